"""Probes of curvature along the step that the optimizer is about to take: by forward passes alone, or by products.

Let u be that update, learning rate and all, and phi(t) = L(w + t u). The critical step t_c is the least t > 0 with
phi(t) > phi(0), and 2 / t_c the critical sharpness in units of the step (arXiv 2601.16979): above 2 the very next step
raises the loss. On a quadratic 2 / t_c = <u, H u> / -<g, u>, for gradient descent eta times the Rayleigh quotient of
the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from attnlab.checks import check_number, check_whole
from attnlab.curvature.operators import Block, hessian
from attnlab.objectives import Objective
from attnlab.training.optimizer import check_optimizer, update
from attnlab.training.probe import Probe, TrainingState
from attnlab.trees import leaf_names, select
from attnlab.types import Params, PRNGKey, Scalar

Values = dict[str, Array]
Measured = Callable[[Objective], Objective]


def _next_update(
    optimizer: optax.GradientTransformation, risk: Objective, state: TrainingState
) -> tuple[Scalar, Params, Params]:
    """The loss, its gradient, and the update that follows from them."""
    loss, gradient = jax.value_and_grad(risk)(state.params)
    return loss, gradient, update(optimizer, gradient, state.optimizer_state, state.params, loss, risk)[0]


@dataclass(frozen=True)
class _CriticalSharpness:
    optimizer: optax.GradientTransformation
    accuracy: float
    doublings: int
    measured: Measured | None

    def start(self, risk: Objective, state: TrainingState, key: PRNGKey) -> Array:
        return jnp.ones((), jax.eval_shape(risk, state.params).dtype)

    def __call__(self, risk: Objective, state: TrainingState, memory: Array, key: PRNGKey) -> tuple[Values, Array]:
        step = _next_update(self.optimizer, risk, state)[2]
        seen = risk if self.measured is None else self.measured(risk)
        here = seen(state.params)

        def rises(length: Array) -> Array:
            moved = jax.tree.map(lambda w, u: w + length.astype(w.dtype) * u, state.params, step)
            return ~(seen(moved) <= here)  # what is not a number has risen

        low, high, passes = self._bracket(rises, memory)
        low, high, passes = self._bisect(rises, low, high, passes)
        middle = (low + high) / 2
        values = {"step": middle, "sharpness": 2 / middle, "passes": passes + 1}
        usable = jnp.isfinite(middle) & (middle > 0)
        return values, jnp.where(usable, middle, 1)

    def _bracket(self, rises: Callable[[Array], Array], start: Array) -> tuple[Array, Array, Array]:
        """By doubling where the loss has not risen, by halving where it has: neither, within so many."""
        above = rises(start)

        def go_on(carry: tuple) -> Array:
            number, _, same = carry
            return same & (number <= self.doublings)

        def once(carry: tuple) -> tuple:
            number, length, _ = carry
            length = jnp.where(above, length / 2, length * 2)
            return number + 1, length, rises(length) == above

        number, last, same = jax.lax.while_loop(go_on, once, (jnp.array(1), start, jnp.array(True)))
        low, high = jnp.where(above, last, last / 2), jnp.where(above, last * 2, last)
        low, high = jnp.where(same & ~above, jnp.inf, low), jnp.where(same & ~above, jnp.inf, high)
        never = same & above
        return jnp.where(never, 0, low), jnp.where(never, 0, high), number

    def _bisect(
        self, rises: Callable[[Array], Array], low: Array, high: Array, passes: Array
    ) -> tuple[Array, Array, Array]:
        def wide(carry: tuple) -> Array:
            low, high, _ = carry
            return high - low > 2 * self.accuracy * low

        def once(carry: tuple) -> tuple:
            low, high, passes = carry
            middle = (low + high) / 2
            above = rises(middle)
            return jnp.where(above, low, middle), jnp.where(above, middle, high), passes + 1

        return jax.lax.while_loop(wide, once, (low, high, passes))


def critical_sharpness(
    optimizer: optax.GradientTransformation,
    *,
    accuracy: float = 0.02,
    doublings: int = 40,
    measured: Measured | None = None,
) -> Probe:
    """Probe: the critical `step` along the next update, as a multiple of it, `sharpness` 2 / step, and the forward
    `passes` that it took (beside one gradient).

    Args:
        optimizer: the one that the run trains with.
        accuracy: of the step, relative: bisection ends there. The search starts at the last step that was found.
        doublings: at most so many; where the loss has not risen by then the step is infinite, and where it rises from
            the start, as along an update uphill, 0.
        measured: the relative critical sharpness: `measured(risk)` is the objective whose loss is looked at along the
            updates of the one that is trained.

    Of several places where the loss crosses its value here, doubling may miss the first. Raises `TypeError` for an
    optimizer that is none, `ValueError` for an accuracy outside of (1e-12, 0.5).
    """
    check_optimizer(optimizer)
    check_whole(doublings=doublings)
    check_number("accuracy", accuracy, 1e-12, 0.5, "It is a relative error.")
    found = _CriticalSharpness(optimizer, accuracy, doublings, measured)
    return Probe(found, found.start)


@dataclass(frozen=True)
class _Directional:
    optimizer: optax.GradientTransformation
    blocks: tuple[Block, ...] | None

    def __call__(self, risk: Objective, state: TrainingState, memory: Any, key: PRNGKey) -> tuple[Values, Any]:
        _, gradient, step = _next_update(self.optimizer, risk, state)
        operator = hessian(risk, state.params)
        parts = jnp.stack([operator.ravel(part) for part in self._parts(step)])
        whole, slope = operator.ravel(step), operator.ravel(gradient)
        products = jax.lax.map(operator.flat_mv, jnp.concatenate([parts, slope[None]]))
        size = whole @ whole
        pairs = parts @ products[:-1].T / size
        within = jnp.trace(pairs)
        values = {
            "update": jnp.sum(pairs),
            "within": within,
            "across": jnp.sum(pairs) - within,
            "pairs": pairs,
            "gradient": slope @ products[-1] / (slope @ slope),
            "critical": jnp.sum(pairs) * size / -(slope @ whole),
        }
        return values, memory

    def _parts(self, step: Params) -> list[Params]:
        zeros = jax.tree.map(jnp.zeros_like, step)
        chosen = leaf_names(step) if self.blocks is None else self.blocks
        parts = []
        for block in chosen:
            selection = select(step, block)
            parts.append(selection.put(zeros, selection.take(step)))
        _check_partition(step, chosen, [select(step, block).positions for block in chosen])
        return parts


def _check_partition(step: Params, blocks: tuple[Block, ...], positions: list[tuple[int, ...]]) -> None:
    counts = [sum(place in held for held in positions) for place in range(len(jax.tree.leaves(step)))]
    odd = [f"{name} in {count}" for name, count in zip(leaf_names(step), counts, strict=True) if count != 1]
    if odd:
        raise ValueError(
            f"blocks is {blocks}, which has {', '.join(odd)} of them; expected every parameter in one. Name each layer "
            "once, or leave blocks out for a split by leaves."
        )


def directional_sharpness(optimizer: optax.GradientTransformation, blocks: tuple[Block, ...] | None = None) -> Probe:
    """Probe: Rayleigh quotients of the Hessian along the next `update` u and the `gradient`, the split of the first
    into `within` and `across` blocks (`pairs` (m, m): <u_a, H u_b> / ||u||^2), and `critical`, <u, H u> / -<g, u>,
    which is the critical sharpness of the quadratic model. At m + 1 products.

    `blocks` names m layers as `curvature.operators.hessian` does, each parameter in one; None is every leaf. Raises
    `TypeError` for an optimizer that is none, `ValueError` for blocks that leave parameters out or share them.
    """
    check_optimizer(optimizer)
    return Probe(_Directional(optimizer, blocks))
