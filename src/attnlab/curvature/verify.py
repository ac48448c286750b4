"""Checks of an objective before its curvature is believed: each failure is named, with its usual culprit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from attnlab.curvature.batches import BatchedObjective
from attnlab.curvature.independence import check_batches, check_examples
from attnlab.curvature.operators import Risk, hessian
from attnlab.objective import Objective, check_objective
from attnlab.types import Params, PRNGKey

__all__ = ["VerificationError", "verify"]


class VerificationError(ValueError):
    """At least one check failed; `discrepancies` has what was measured, by check."""

    def __init__(self, message: str, discrepancies: dict[str, float]):
        super().__init__(message)
        self.discrepancies = discrepancies


def verify(risk: Risk, params: Params, key: PRNGKey, *, examples: bool = True) -> dict[str, float]:
    """Check that the curvature of `risk` at `params` means what it should; returns the relative discrepancies.

    - `determinism`: two evaluations, each traced afresh, agree (dropout or sampling without a fixed key);
    - `examples`: outputs do not depend on the other examples of the batch (batch norm in training mode, dropout with a
      fixed key), and the loss of the whole is the mean over its parts (a loss that sums). Needs a first axis of
      examples: with `examples=False` it is skipped;
    - `gradient` and `hessian`: products agree with central differences (a wrong derivative rule, or kinks: with relu
      the difference sees the jumps of the derivative between its two points, which autodiff does not);
    - `symmetry`: <u, H v> = <v, H u> for random u and v.

    Costs a few evaluations, gradients and products. Of a `BatchedObjective` the first batch is looked at, and whether
    it reads the same twice. Raises `VerificationError`, which lists every check that failed.
    """
    check_objective(risk, params)
    if isinstance(risk, BatchedObjective):
        check_batches(risk, params)
        risk = risk.batch(0)
    checks: dict[str, Callable[[], tuple[float, str]]] = {
        "determinism": lambda: _determinism(risk, params),
        "gradient": lambda: _gradient(risk, params, key),
        "hessian": lambda: _hessian(risk, params, key),
        "symmetry": lambda: _symmetry(risk, params, key),
    }
    found = {name: check() for name, check in checks.items()}
    if examples:
        found["examples"] = check_examples(risk, params)
    eps = float(jnp.finfo(ravel_pytree(params)[0].dtype).eps)
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


def _determinism(risk: Objective, params: Params) -> tuple[float, str]:
    # A function of its own is traced afresh, so that numbers drawn while tracing differ as well.
    values = [float(jax.jit(lambda risk, params: risk(params))(risk, params)) for _ in range(2)]
    culprit = "two evaluations disagree: dropout or sampling draws new numbers. Fix its key, or switch it off."
    return abs(values[0] - values[1]) / max(abs(values[0]), 1e-300), culprit


def _directions(params: Params, key: PRNGKey) -> tuple[Params, Params, float]:
    """Two random directions of unit length, and the step of a central difference along them."""
    flat, unravel = ravel_pytree(params)
    u, v = jax.random.normal(key, (2, flat.size), flat.dtype)
    step = float(jnp.finfo(flat.dtype).eps) ** (1 / 3) * max(float(jnp.linalg.norm(flat)), 1.0)
    return unravel(u / jnp.linalg.norm(u)), unravel(v / jnp.linalg.norm(v)), step


def _central_difference(function: Callable, params: Params, direction: Params, step: float) -> np.ndarray:
    ends = [
        function(jax.tree.map(lambda x, d, sign=sign: x + jnp.asarray(sign * step, x.dtype) * d, params, direction))
        for sign in (1.0, -1.0)
    ]
    plus, minus = (np.asarray(ravel_pytree(end)[0]) for end in ends)
    return (plus - minus) / (2 * step)


def _gradient(risk: Objective, params: Params, key: PRNGKey) -> tuple[float, str]:
    value_and_gradient = jax.jit(jax.value_and_grad(risk))
    gradient = ravel_pytree(value_and_gradient(params)[1])[0]
    # Along the gradient itself: a random direction in many dimensions is almost orthogonal to it.
    norm = float(jnp.linalg.norm(gradient))
    if norm == 0:
        return 0.0, ""
    _, _, step = _directions(params, key)
    direction = ravel_pytree(params)[1](gradient / jnp.linalg.norm(gradient))
    difference = float(_central_difference(lambda p: value_and_gradient(p)[0], params, direction, step)[0])
    # Rounding of the two values, over the step, is no discrepancy.
    rounding = 10 * float(jnp.finfo(gradient.dtype).eps) * abs(float(value_and_gradient(params)[0])) / step
    error = max(abs(difference - norm) - rounding, 0.0) / norm
    return error, "the gradient is not the derivative of the loss: a custom derivative rule or a stop_gradient."


def _hessian(risk: Objective, params: Params, key: PRNGKey) -> tuple[float, str]:
    gradient = jax.jit(jax.grad(risk))
    u, _, step = _directions(params, key)
    product = np.asarray(ravel_pytree(hessian(risk, params).mv(u))[0])
    difference = _central_difference(gradient, params, u, step)
    size = float(np.linalg.norm(ravel_pytree(gradient(params))[0]))
    rounding = 10 * float(np.finfo(product.dtype).eps) * size / step
    error = max(float(np.linalg.norm(product - difference)) - rounding, 0.0)
    culprit = (
        "a product with the Hessian is not the derivative of the gradient: kinks (relu), whose curvature automatic "
        "differentiation does not see, or a wrong derivative rule."
    )
    return error / max(float(np.linalg.norm(product)), float(np.linalg.norm(difference)), 1e-300), culprit


def _symmetry(risk: Objective, params: Params, key: PRNGKey) -> tuple[float, str]:
    u, v, _ = _directions(params, key)
    operator = hessian(risk, params)
    flat_u, flat_v, image_u, image_v = (
        np.asarray(ravel_pytree(tree)[0]) for tree in (u, v, operator.mv(u), operator.mv(v))
    )
    size = float(np.linalg.norm(image_u) + np.linalg.norm(image_v))
    error = abs(float(flat_v @ image_u - flat_u @ image_v)) / max(size, 1e-300)
    return error, "<u, Hv> and <v, Hu> differ: a derivative rule of second order is wrong."
