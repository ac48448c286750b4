"""Checks of an objective before its curvature is believed: each failure is named, with its usual culprit."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.curvature.independence import check_batches, check_examples
from attnlab.curvature.operators import hessian
from attnlab.curvature.self_checks import (
    ASYMMETRIC,
    DISAGREE,
    NOT_DERIVATIVE,
    Vector,
    VerificationError,
    asymmetry,
    central_difference,
    direction,
    disagreement,
    flat,
    longest_step,
    precision,
    slope_error,
    unflat,
)
from attnlab.objectives import BatchedObjective, Objective, Risk, check_objective
from attnlab.types import Params, PRNGKey

__all__ = ["VerificationError", "check_curvature"]


def check_curvature(risk: Risk, params: Params, key: PRNGKey, *, examples: bool = True) -> dict[str, float]:
    """Check that the curvature of `risk` at `params` means what it should; returns the relative discrepancies.

    - `determinism`: two evaluations, each traced afresh, agree (dropout or sampling without a fixed key);
    - `examples`: outputs do not depend on the other examples of the batch (batch norm in training mode, dropout with a
      fixed key), and the loss of the whole is the mean over its parts (a loss that sums). Needs a first axis of
      examples: with `examples=False` it is skipped;
    - `gradient` and `hessian`: products agree with central differences (a wrong derivative rule, or kinks: with relu
      the difference sees the jumps of the derivative between its two points, which autodiff does not);
    - `symmetry`: <u, H v> = <v, H u> for random u and v.

    Costs a few evaluations, gradients and products. Of a `BatchedObjective` the first batch is looked at; of all of
    them, whether they read the same twice and are means over their examples. Raises `VerificationError`, which lists
    every check that failed.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> import jax
        >>> sorted(al.check_curvature(risk, jnp.ones(2), jax.random.key(0)))
        ['determinism', 'examples', 'gradient', 'hessian', 'symmetry']
    """
    check_objective(risk, params)
    if isinstance(risk, BatchedObjective):
        check_batches(risk, params)
        risk = risk.batch(0)
    params = jax.tree.map(jnp.asarray, params)
    u = direction(params, np.random.default_rng(np.asarray(jax.random.key_data(key))))
    operator = hessian(risk, params, check=False)

    def product(vector: Vector) -> Vector:
        return flat(operator.mv(unflat(vector, params)))

    image = product(u)
    found = {
        "determinism": (disagreement(risk, params), DISAGREE),
        "gradient": _gradient(risk, params),
        "hessian": (slope_error(jax.jit(jax.grad(risk)), params, u, image), NOT_DERIVATIVE),
        "symmetry": (asymmetry(product, image), ASYMMETRIC),
    }
    if examples:
        found["examples"] = check_examples(risk, params)
    eps = precision(params)
    limits = {"gradient": eps**0.25, "hessian": eps**0.25, "examples": eps**0.5, "symmetry": eps**0.5}
    failed = [
        f"- {name}: {culprit} Relative discrepancy {error:.2g}, expected at most {limits.get(name, 0.0):.2g}."
        for name, (error, culprit) in found.items()
        if not error <= limits.get(name, 0.0)
    ]
    discrepancies = {name: error for name, (error, _) in found.items()}
    if failed:
        raise VerificationError("\n".join(["the objective's curvature cannot be trusted:", *failed]), discrepancies)
    return discrepancies


def _gradient(risk: Objective, params: Params) -> tuple[float, str]:
    value_and_gradient = jax.jit(jax.value_and_grad(risk))
    value, gradient = value_and_gradient(params)
    # Along the gradient itself: a random direction in many dimensions is almost orthogonal to it.
    norm = float(np.linalg.norm(flat(gradient)))
    if norm == 0:
        return 0.0, ""
    step = longest_step(params)
    values = lambda point: value_and_gradient(point)[0]  # noqa: E731
    difference = float(central_difference(values, params, flat(gradient) / norm, step)[0])
    # Rounding of the two values, over the step, is no discrepancy.
    rounding = 10 * precision(params) * abs(float(value)) / step
    error = max(abs(difference - norm) - rounding, 0.0) / norm
    return error, "the gradient is not the derivative of the loss: a custom derivative rule or a stop_gradient."
