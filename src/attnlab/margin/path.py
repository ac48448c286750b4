"""The regularization path: the least loss among parameters of one norm, as the norm grows."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from attnlab.checks import check_finite
from attnlab.display import line, whatever_it_holds
from attnlab.margin.checking import check_selection, real_array
from attnlab.margin.problems import AnyArray
from attnlab.margin.training import rescaled
from attnlab.objectives import Objective
from attnlab.types import Params, Scalar

Unravel = Callable[[Array], Params]


class RegularizationPath(NamedTuple):
    """Minimisers by radius.

    Attributes:
        radii: Euclidean norms of all parameters together, (r,).
        params: with a leading axis r on every leaf.
        log_excess: log(L - L_s), L_s the loss of attention to the selected tokens alone, (r,).
        slope: derivative of `log_excess` along the radius; negative where the minimiser over the sphere is one over the
            ball too, (r,).
    """

    radii: Float[np.ndarray, " r"]
    params: Params
    log_excess: Float[np.ndarray, " r"]
    slope: Float[np.ndarray, " r"]

    @whatever_it_holds
    def __repr__(self) -> str:
        """The radii, and where it ends."""
        ends = [float(self.radii[0]), float(self.radii[-1])]
        return line("RegularizationPath", radii=len(self.radii), within=ends, log_excess=float(self.log_excess[-1]))


def regularization_path(
    risk: Objective, selection: Int[Array, " n"], start: Params, radii: Float[AnyArray, " r"]
) -> RegularizationPath:
    """Minimise an `attention_risk` over parameters of each norm, from the minimiser of the norm before.

    In direction it converges to the solution of least Frobenius norm for W, of least Euclidean norm for p, and of least
    nuclear norm for (K, Q), as the least (||K||^2 + ||Q||^2) / 2 of given K Q^T is ||K Q^T||_* (arXiv 2308.16898). What
    is minimised is log(L - L_s), in which exponentially small differences of the loss keep their digits; the selection
    must be the best one (each token the largest Y_i v^T x_it), so that the difference is positive. L-BFGS on the sphere
    by v -> radius * v / ||v||; local minimisers, followed from `start`, whose norm does not matter but is not 0. Raises
    `ValueError` for radii that are not positive and rising, a start at zero, and a selection that is not the best.

    >>> import jax.numpy as jnp, numpy as np
    >>> from attnlab.margin import attention_risk, max_margin, regularization_path, vector_problem
    >>> tokens = np.array([[[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    >>> risk = attention_risk(jnp.asarray(tokens), jnp.ones(1), readout=jnp.array([1.0, 0.0]))
    >>> path = regularization_path(risk, np.array([0]), {"prompt": jnp.ones(2)}, radii=np.array([10.0, 1000.0]))
    >>> solution = max_margin(vector_problem(tokens, np.array([0])))
    >>> np.round(np.asarray(path.params["prompt"]) @ solution.direction / path.radii, 3).tolist()
    [0.993, 1.0]
    """
    radii = real_array("radii", radii, 1, "(radii,)")
    check_finite("start", start)
    flat, unravel = ravel_pytree(start)
    if not (np.diff(radii, prepend=0.0) > 0).all():
        raise ValueError(f"radii are {radii}; expected positive numbers, one larger than the other.")
    if not jnp.any(flat):
        raise ValueError("start is 0, which has no direction; expected parameters of any other norm.")
    _check_best(risk, selection)
    flat = jnp.asarray(np.asarray(flat, float) / np.abs(flat).max())  # squares of what is left do not underflow
    excess = rescaled(risk, selection)
    ends, values, slopes = [], [], []
    for radius in radii:
        found = scipy.optimize.minimize(
            lambda v, radius=radius: tuple(map(np.asarray, _on_sphere(unravel, excess, v, radius))),
            flat / np.linalg.norm(flat),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 30},
        )
        flat = radius * found.x / np.linalg.norm(found.x)
        ends.append(unravel(jnp.asarray(flat)))
        values.append(found.fun)
        slopes.append(float(_outwards(unravel, excess, flat)))
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ends)
    return RegularizationPath(np.asarray(radii), params, np.array(values), np.array(slopes))


def _check_best(risk: Objective, selection: Int[Array, " n"]) -> None:
    if not (isinstance(risk.inputs, Mapping) and "readout" in risk.inputs):
        raise ValueError(
            "risk has no fixed readout, so that no token is the best; expected attention_risk(..., readout=v). Give v, "
            "for instance the one that was trained."
        )
    check_selection("selection", selection, *risk.inputs["tokens"].shape[:2])
    values = np.asarray(risk.targets)[:, None] * np.asarray(risk.inputs["tokens"] @ risk.inputs["readout"])
    short = values.max(axis=1) - values[np.arange(len(values)), selection]
    if short.any():
        i = int(short.argmax())
        raise ValueError(
            f"selection[{i}] is {int(selection[i])}, but token {int(values[i].argmax())} of sequence {i} has a larger "
            "Y_i v^T x_it; expected the best token of every sequence. Follow another selection by descent instead."
        )


@partial(jax.jit, static_argnums=0)
def _on_sphere(unravel: Unravel, excess: Objective, flat: Array, radius: Array) -> tuple[Scalar, Array]:
    """`log_excess` at radius * v / ||v|| and its gradient in v."""
    value = lambda v: log_excess(excess, unravel(radius * v / jnp.linalg.norm(v)))  # noqa: E731
    return jax.value_and_grad(value)(flat)


@partial(jax.jit, static_argnums=0)
def _outwards(unravel: Unravel, excess: Objective, flat: Array) -> Scalar:
    """<gradient, w> / ||w||."""
    return jax.grad(lambda v: log_excess(excess, unravel(v)))(flat) @ flat / jnp.linalg.norm(flat)


def log_excess(excess: Objective, params: Params) -> Scalar:
    """log(L - L_s) of a `rescaled` risk with a selection: the factor exp(-c) that it carries is put back as +c.

    c is a constant to the gradient, and rightly so: the sum does not depend on it.
    """
    outputs = excess.predict(params, excess.inputs)
    return outputs[2] + jnp.log(excess.loss(outputs, excess.targets))
