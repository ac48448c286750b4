"""What a training example does to another loss: its change when the example is left out, to first order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import is_concrete
from attnlab.curvature.kronecker import KroneckerApproximation, preconditioned_solve
from attnlab.curvature.linear_systems import solve
from attnlab.curvature.operator import Operator
from attnlab.objectives import Objective, check_loss, check_objective, example_losses, predict_from_block
from attnlab.trees import Selection, leaf_names
from attnlab.types import Params


class Influence(NamedTuple):
    """Of N examples: the `changes` (N,) of the test loss when each is left out, the `residual` of the one linear system
    behind them, relative, and the `products` that it took."""

    changes: Float[Array, " N"]
    residual: Float[Array, ""]
    products: Array


def influence(
    risk: Objective,
    params: Params,
    test: Objective,
    operator: Operator,
    *,
    damping: float,
    preconditioner: KroneckerApproximation | None = None,
    tolerance: float = 1e-6,
    steps: int = 1000,
) -> Influence:
    """How much the loss `test` changes when an example of `risk` is left out and the others are fitted again.

    Without example i, of the share s_i, the risk is R + s_i / (1 - s_i) (R - l_i), so that a Newton step from a minimum
    moves the parameters by s_i / (1 - s_i) (A + damping I)^-1 (dl_i - dR), and the test loss by <dT, .> of that (Koh,
    Liang, arXiv 1703.04730, with the mean over the examples that are left). One linear system with dT serves them all.

    Args:
        risk: the mean over training examples, the first axis of inputs and targets; the model treats them
            independently.
        params: a minimum of the risk, or of the risk plus `damping` |params|^2 / 2: then the damping is not an
            approximation.
        test: any other objective of the same parameters.
        operator: A, `hessian(risk, params)` or `ggn(risk, params)`, or that of a block, which alone then moves.
        damping: not negative.
        preconditioner: a Kronecker approximation of the operator, such as `kronecker_approximation("ekfac", ...)`.
        tolerance: of the linear system, relative.
        steps: the most products.

    Raises `ValueError` for an operator or a preconditioner of other parameters, where the residual stays above the root
    of the tolerance (a singular A without damping), and for examples that cannot be told apart.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> from attnlab.curvature.influence import influence
        >>> risk = al.objective(lambda mean, x: mean * x, al.square_loss, jnp.ones(3), jnp.array([0.0, 1.0, 5.0]))
        >>> test = al.objective(lambda mean, x: mean * x, al.square_loss, jnp.ones(1), jnp.zeros(1))
        >>> mean = jnp.array(2.0)  # without the last example it is .5; to first order 2 - (5 - 2) / 2
        >>> influence(risk, mean, test, al.hessian(risk, mean), damping=0.0).changes.round(3).tolist()
        [4.0, 2.0, -6.0]
    """
    params = jax.tree.map(jnp.asarray, params)
    check_objective(test, params)
    selection = _selection(operator, params)
    slope = selection.take(_gradient(test, params))
    slope = jax.tree.unflatten(jax.tree.structure(operator.point), jax.tree.leaves(slope))
    options = {"damping": damping, "tolerance": tolerance, "steps": steps}
    if preconditioner is None:
        found = solve(operator, slope, **options)  # type: ignore[arg-type]
    else:
        found = preconditioned_solve(operator, slope, preconditioner, **options)  # type: ignore[arg-type]
    if is_concrete(found.residual) and not np.asarray(found.residual) <= tolerance**0.5:
        raise ValueError(
            f"the system (A + damping I) x = dT is solved to a residual of {float(found.residual):.2g} at damping "
            f"{damping}, after {int(found.products)} products; expected {tolerance}. Raise the damping (A may be "
            "singular), the steps, or the tolerance."
        )
    along = selection.take(params)
    step = jax.tree.unflatten(jax.tree.structure(along), jax.tree.leaves(found.vector))
    changes, loss = _along(risk, params, selection, step)
    check_loss(loss)
    if is_concrete(changes) and not np.isfinite(np.asarray(changes)).all():
        raise ValueError(
            "an example has all of the weight, so that nothing is left without it; expected two that count, along the "
            "first axis of inputs and targets."
        )
    return Influence(changes, found.residual, found.products)


def _selection(operator: Operator, params: Params) -> Selection:
    """The leaves on which the operator acts."""
    names, own = leaf_names(params), leaf_names(operator.point)
    known = {name: place for place, name in enumerate(names)}
    shapes = {name: jnp.shape(leaf) for name, leaf in zip(names, jax.tree.leaves(params), strict=True)}
    for name, leaf in zip(own, jax.tree.leaves(operator.point), strict=True):
        if shapes.get(name) != jnp.shape(leaf):
            raise ValueError(
                f"the operator acts on '{name}' of shape {jnp.shape(leaf)}, and params have {shapes.get(name)} there; "
                "expected an operator at params, or at a block of whole leaves."
            )
    return Selection(jax.tree.structure(params), tuple(known[name] for name in own), own)


@jax.jit
def _gradient(test: Objective, params: Params) -> Params:
    return jax.grad(test)(params)


@jax.jit(static_argnums=2)
def _along(risk: Objective, params: Params, selection: Selection, step: Params) -> tuple[Array, Array]:
    predict = predict_from_block(risk.predict, params, selection)

    def losses(leaves: Params) -> Array:
        return example_losses(risk, predict(leaves, risk.inputs))[0]

    leaves = selection.take(params)
    values, slopes = jax.jvp(losses, (leaves,), (jax.tree.map(lambda a, b: b.astype(a.dtype), leaves, step),))
    _, shares = example_losses(risk, predict(leaves, risk.inputs))
    mean = jnp.vdot(shares, slopes)
    return shares / (1 - shares) * (slopes - mean), jnp.vdot(shares, values)
