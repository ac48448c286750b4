"""Probes of sharpness: highest eigenvalues of the Hessian, of the preconditioned one against the optimizer's
threshold, and of diagonal blocks; all warm-started, with residuals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_positive
from attnlab.curvature.lanczos import FlatProduct
from attnlab.curvature.operators import Block, hessian
from attnlab.curvature.transforms import precondition
from attnlab.dynamics.krylov import cold_top_pairs, refined_top_pairs
from attnlab.dynamics.stability import StableOptimizer, preconditioner_after_step
from attnlab.objective import Objective
from attnlab.training.probe import Probe, TrainingState
from attnlab.trees import leaf_names, ravel
from attnlab.types import PRNGKey

Values = dict[str, Array]
BuildProduct = Callable[[Objective, TrainingState], tuple[FlatProduct, int, Values]]


@dataclass(frozen=True)
class Tracking:
    """How a probe follows the highest eigenpairs.

    Attributes:
        count: how many pairs k; one more than wanted guards against crossings.
        depth: Krylov steps a round, which costs k (depth + 1) Hessian products.
        tolerance: further rounds follow while the highest pair's residual is above this share of its value. The value's
            own error is of the order of the square: 0.05 keeps it below about half a percent.
        rounds: at most so many a measurement.
        batched: take the k products of a block at once, see `krylov.fastest_batching`.
    """

    count: int = 2
    depth: int = 1
    tolerance: float = 0.05
    rounds: int = 10
    batched: bool = False

    def __post_init__(self) -> None:
        check_positive(count=self.count, depth=self.depth, rounds=self.rounds)


@dataclass(frozen=True)
class _Start:
    build: BuildProduct
    tracking: Tracking

    def __call__(self, risk: Objective, state: TrainingState, key: PRNGKey) -> Float[Array, "k n"]:
        product, dimension, _ = self.build(risk, state)
        count = min(self.tracking.count, dimension)
        return cold_top_pairs(product, dimension, count, key, ravel(state.params).dtype).vectors


@dataclass(frozen=True)
class _Measure:
    build: BuildProduct
    tracking: Tracking

    def __call__(
        self, risk: Objective, state: TrainingState, memory: Float[Array, "k n"], key: PRNGKey
    ) -> tuple[Values, Float[Array, "k n"]]:
        product, _, extra = self.build(risk, state)
        now = self.tracking
        pairs = refined_top_pairs(
            product, memory, now.depth, tolerance=now.tolerance, rounds=now.rounds, batched=now.batched
        )
        values = {"values": pairs.values, "residuals": pairs.residuals, **extra}
        if "threshold" in extra:
            values["ratio"] = pairs.values[-1] / extra["threshold"]
        return values, pairs.vectors


def _tracked(build: BuildProduct, tracking: Tracking) -> Probe:
    return Probe(_Measure(build, tracking), _Start(build, tracking))


@dataclass(frozen=True)
class _Hessian:
    block: Block | None = None

    def __call__(self, risk: Objective, state: TrainingState) -> tuple[FlatProduct, int, Values]:
        operator = hessian(risk, state.params, block=self.block)
        return operator.flat_mv, operator.dimension, {}


@dataclass(frozen=True)
class _Preconditioned:
    optimizer: StableOptimizer

    def __call__(self, risk: Objective, state: TrainingState) -> tuple[FlatProduct, int, Values]:
        gradient = jax.grad(risk)(state.params)
        diagonal, threshold = preconditioner_after_step(self.optimizer, gradient, state.optimizer_state, state.params)
        operator = hessian(risk, state.params)
        if diagonal is not None:
            operator = precondition(operator, diagonal)
        dtype = ravel(state.params).dtype
        return operator.flat_mv, operator.dimension, {"threshold": threshold.astype(dtype)}


def top_eigenvalues(tracking: Tracking = Tracking()) -> Probe:
    """Probe: the highest eigenvalues of the Hessian, `values` (k,) ascending with their `residuals` (k,)."""
    return _tracked(_Hessian(), tracking)


def stability(optimizer: StableOptimizer, tracking: Tracking = Tracking()) -> Probe:
    """Probe: the highest eigenvalues of P^-1/2 H P^-1/2 (`values`, `residuals`), the optimizer's `threshold`, and
    `ratio`, the highest over the threshold: 1 at the edge of stability.

    The run must train with `optimizer.transformation`. P and the threshold are those of the step from this point, at
    the cost of one more gradient.
    """
    return _tracked(_Preconditioned(optimizer), tracking)


def block_sharpness(blocks: tuple[Block, ...] | None = None, tracking: Tracking = Tracking()) -> Probe:
    """Probe: by block, the highest eigenvalues of the diagonal block of the Hessian (`values`, `residuals`).

    `blocks` names them as `curvature.operators.hessian` does; None is every leaf. Each is linearised in its own
    parameters alone.
    """

    def parts(state: TrainingState) -> dict[str, Probe]:
        chosen = leaf_names(state.params) if blocks is None else blocks
        return {_name(block): _tracked(_Hessian(block), tracking) for block in chosen}

    def start(risk: Objective, state: TrainingState, key: PRNGKey) -> dict[str, Array]:
        return {name: probe.start(risk, state, key) for name, probe in parts(state).items()}

    def measure(risk: Objective, state: TrainingState, memory: dict[str, Array], key: PRNGKey) -> tuple[Any, Any]:
        measured = {name: probe.measure(risk, state, memory[name], key) for name, probe in parts(state).items()}
        return {name: pair[0] for name, pair in measured.items()}, {name: pair[1] for name, pair in measured.items()}

    return Probe(measure, start)


def _name(block: Block) -> str:
    return block if isinstance(block, str) else block.pattern


def block_norms(samples: int = 10) -> Probe:
    """Probe: Frobenius norms of all Hessian blocks, leaf by leaf (m, m), in the order of `trees.leaf_names`.

    `squared` is unbiased for the squared norms: E ||H_ab z||^2 = ||H_ab||^2 over random signs z on leaf b alone, which
    gives the whole block column at once, for m `samples` products in all; `error` is its standard error. For an
    attention layer by itself `closed_form.attention_blocks` is exact.
    """
    check_positive(samples=samples - 1)  # one sample has no error estimate

    def measure(risk: Objective, state: TrainingState, memory: Any, key: PRNGKey) -> tuple[Values, Any]:
        operator = hessian(risk, state.params)
        leaves, structure = jax.tree.flatten(state.params)

        def column(key: PRNGKey, position: int) -> Float[Array, " m"]:
            signs = [jnp.zeros_like(leaf) for leaf in leaves]
            signs[position] = jax.random.rademacher(key, leaves[position].shape, leaves[position].dtype)
            image = operator.linear(jax.tree.unflatten(structure, signs))
            return jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(image)])

        keys = jax.random.split(key, (samples, len(leaves)))
        columns = [jax.lax.map(lambda k, p=p: column(k, p), keys[:, p]) for p in range(len(leaves))]
        draws = jnp.stack(columns, axis=-1)
        error = jnp.std(draws, axis=0, ddof=1) / samples**0.5
        return {"squared": jnp.mean(draws, axis=0), "error": error}, memory

    return Probe(measure)
