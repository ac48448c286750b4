"""Probes of sharpness: highest eigenvalues of the Hessian, of the preconditioned one against the optimizer's
threshold, and of diagonal blocks; all warm-started, with residuals."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from attnlab.checks import check_number, check_range, check_whole
from attnlab.curvature.operator import Operator, flat_dtype
from attnlab.curvature.operators import Block, hessian
from attnlab.dynamics.preconditioners import whitened
from attnlab.dynamics.rules import RULES, UpdateRule, edge_of_step, preconditioner_after_step
from attnlab.krylov.tracking import Course, TopPairs, cold_top_pairs, followed_top_pairs, upper_bound
from attnlab.objectives import Objective
from attnlab.statistics import estimate
from attnlab.training.probe import Probe, TrainingState
from attnlab.trees import leaf_names
from attnlab.types import PRNGKey

Values = dict[str, Array]
Follow = Callable[[Objective, TrainingState], tuple[Callable[[], Operator], Values]]


@dataclass(frozen=True)
class Tracking:
    """How a probe follows the highest eigenpairs.

    Attributes:
        count: how many pairs k, at a Hessian product each.
        certified: how many of them, from the highest, are followed to the `accuracy`; the others are guards, which give
            the gap, and notice when another eigenvalue overtakes, after some measurements where it comes from outside
            of the pairs. Their own values are good to a few percent.
        accuracy: largest error of a certified value, as a share of the highest, by the estimate ||residual||^2 / gap:
            where it is exceeded, further products follow. The estimate is cautious: at 0.01 some 95 % of the errors are
            below 0.005.
        rounds: at most so many times k further products a measurement.
        batched: take the k products of a block at once, see `fastest_batching`.
        search: products that are spent on each measurement to bound what lies outside of the pairs: `upper` of the
            record is then exceeded by the highest eigenvalue with a probability of at most 0.001 (`upper_bound`; some
            10 to 20 products make it useful). With 0, the default, nothing is known of it and `upper` is infinite: an
            eigenvalue that overtakes from outside may be missed for some measurements.
    """

    count: int = 2
    certified: int = 1
    accuracy: float = 0.01
    rounds: int = 10
    batched: bool = False
    search: int = 0

    def __post_init__(self) -> None:
        check_range("search", self.search, 0, math.inf, "It is a number of products; 0 is none.")
        check_whole(count=self.count, rounds=self.rounds, certified=self.certified)
        check_number("accuracy", self.accuracy, 0, 1, "It is a relative error.")
        check_range("certified", self.certified, 1, self.count, f"Only count = {self.count} pairs are followed.")


@dataclass(frozen=True)
class _Start:
    follow: Follow
    tracking: Tracking

    def __call__(self, risk: Objective, state: TrainingState, key: PRNGKey) -> Course:
        operator = self.follow(risk, state)[0]()
        count = min(self.tracking.count, operator.dimension)
        pairs = cold_top_pairs(operator.flat_mv, operator.dimension, count, key, operator.flat_dtype)
        return Course(pairs.vectors, pairs.vectors)


@dataclass(frozen=True)
class _Measure:
    follow: Follow
    tracking: Tracking

    def __call__(self, risk: Objective, state: TrainingState, memory: Course, key: PRNGKey) -> tuple[Values, Course]:
        linearise, extra = self.follow(risk, state)
        now = self.tracking
        pairs, course = followed_top_pairs(
            lambda: linearise().flat_mv,
            memory,
            key,
            accuracy=now.accuracy,
            certified=now.certified,
            rounds=now.rounds,
            batched=now.batched,
        )
        values = {"values": pairs.values, "residuals": pairs.residuals, "upper": self._upper(linearise, pairs, key)}
        values |= extra
        if "threshold" in extra:
            values["ratio"] = pairs.values[-1] / extra["threshold"]
        return values, course

    def _upper(self, linearise: Callable[[], Operator], pairs: TopPairs, key: PRNGKey) -> Array:
        """Of the certified pairs, whose residuals are small, and of all that is left."""
        outside = pairs.vectors.shape[1] - self.tracking.certified
        steps = min(self.tracking.search, outside)
        if steps == 0:
            return jnp.full_like(pairs.values[-1], jnp.inf)
        certified = TopPairs(*(part[-self.tracking.certified :] for part in pairs))
        return upper_bound(linearise().flat_mv, certified, jax.random.fold_in(key, 1), steps)


def _tracked(follow: Follow, tracking: Tracking) -> Probe:
    return Probe(_Measure(follow, tracking), _Start(follow, tracking))


@dataclass(frozen=True)
class _Hessian:
    block: Block | None = None

    def __call__(self, risk: Objective, state: TrainingState) -> tuple[Callable[[], Operator], Values]:
        return lambda: hessian(risk, state.params, block=self.block), {}


@dataclass(frozen=True)
class _Preconditioned:
    rule: UpdateRule
    optimizer: optax.GradientTransformation | None

    def __call__(self, risk: Objective, state: TrainingState) -> tuple[Callable[[], Operator], Values]:
        self._check_trained_with(state)
        gradient, dtype = jax.grad(risk)(state.params), flat_dtype(state.params)
        if self.optimizer is None:
            found = preconditioner_after_step(self.rule, gradient, state.optimizer_state, state.params)
            preconditioner, threshold = found
            extra = {}
        else:
            edge = edge_of_step(self.rule, self.optimizer, gradient, state.optimizer_state, state.params)
            preconditioner, threshold = edge.metric, edge.threshold
            extra = {"rate": edge.rate.astype(dtype), "mismatch": jnp.max(edge.mismatch).astype(dtype)}

        def linearise() -> Operator:
            return whitened(hessian(risk, state.params), preconditioner)

        return linearise, {"threshold": threshold.astype(dtype), **extra}

    def _check_trained_with(self, state: TrainingState) -> None:
        optimizer = self.rule.transformation if self.optimizer is None else self.optimizer
        with jax.numpy_dtype_promotion("standard"):
            own = jax.eval_shape(optimizer.init, state.params)
        if str(jax.tree.structure(own)) != str(jax.tree.structure(state.optimizer_state)):
            raise ValueError(
                f"the probe stability is for '{self.rule.name}', and the run trains with an optimizer of another "
                "state; expected the same. Train with the transformation of the probe's rule."
            )


def top_eigenvalues(tracking: Tracking = Tracking()) -> Probe:
    """Probe: the highest eigenvalues of the Hessian, `values` (k,) ascending with their `residuals` (k,), and an
    `upper` bound on the highest (see `Tracking.search`)."""
    return _tracked(_Hessian(), tracking)


def stability(
    rule: UpdateRule, tracking: Tracking = Tracking(), optimizer: optax.GradientTransformation | None = None
) -> Probe:
    """Probe: the highest eigenvalues of P^-1/2 H P^-1/2 (`values`, `residuals`), the rule's `threshold`, and
    `ratio`, the highest over the threshold: 1 at the edge of stability.

    The run must train with `rule.transformation`, or with an `optimizer` of optax that is a chain around the rule:
    clipped by norm, scheduled, decayed (masked too), in groups, over several steps. Then the effective `rate` and P are
    read off its step (`rules.edge_of_step`; the rule's own rate and decay are not looked at), and where that is not the
    rule's, by its `mismatch`, the threshold is NaN. P and the threshold are those of the step from this point with
    the gradient over all examples, also where the run trains on batches, at the cost of that gradient. Raises
    `TypeError` for an optimizer that is no `UpdateRule`, whose threshold is not known, or one whose step is the
    steepest in a norm (`generalized_stability`), and before training starts `ValueError` where the run's optimizer has
    a state of another structure. Another one with a state of the same structure cannot be told: not `heavy_ball` from
    `nesterov`, nor one b1 or b2 from another; only the learning rate is read from the run.
    """
    if not isinstance(rule, UpdateRule):
        raise TypeError(
            f"rule is a {type(rule).__name__}, whose stability threshold is not known; expected one of "
            f"{', '.join(RULES)} as update_rule(name, learning_rate) builds it."
        )
    if rule.norm is not None:
        raise TypeError(
            f"rule is {rule.name}, whose step is the steepest in a norm and has no preconditioner; expected a rule "
            "that has one. The probe generalized_stability measures its edge."
        )
    return _tracked(_Preconditioned(rule, optimizer), tracking)


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
    check_whole(samples=samples)
    check_range("samples", samples, 2, math.inf, "One sample has no standard error.")

    def measure(risk: Objective, state: TrainingState, memory: Any, key: PRNGKey) -> tuple[Values, Any]:
        operator = hessian(risk, state.params)
        leaves, structure = jax.tree.flatten(state.params)

        def column(key: PRNGKey, position: int) -> Float[Array, " m"]:
            signs = [jnp.zeros_like(leaf) for leaf in leaves]
            signs[position] = jax.random.rademacher(key, leaves[position].shape, leaves[position].dtype)
            image = operator.linear(jax.tree.unflatten(structure, signs))
            wide = [leaf.astype(operator.flat_dtype) for leaf in jax.tree.leaves(image)]
            return jnp.stack([jnp.sum(leaf**2) for leaf in wide])

        keys = jax.random.split(key, (samples, len(leaves)))
        columns = [jax.lax.map(lambda k, p=p: column(k, p), keys[:, p]) for p in range(len(leaves))]
        draws = jnp.stack(columns, axis=-1)
        found = estimate(draws)
        return {"squared": found.value, "error": found.standard_error}, memory

    return Probe(measure)


def fastest_batching(operator: Operator, count: int = 2, repeats: int = 5) -> bool:
    """Whether `count` products are faster at once than one after another, by a timing of both (medians).

    Small models gain from batches; large ones on a CPU, bound by memory, do not. Both give the same up to rounding. A
    timing does not repeat: a run that must resume, or be made again bit by bit, writes its choice down instead.
    """
    vectors = jnp.ones((count, operator.dimension), operator.flat_dtype)
    one_by_one = jax.jit(lambda operator, vectors: jnp.stack([operator.flat_mv(vector) for vector in vectors]))
    at_once = jax.jit(lambda operator, vectors: jax.vmap(operator.flat_mv)(vectors))
    return _seconds(at_once, operator, vectors, repeats) < _seconds(one_by_one, operator, vectors, repeats)


def _seconds(function: Callable, operator: Operator, vectors: Array, repeats: int) -> float:
    jax.block_until_ready(function(operator, vectors))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(operator, vectors))
        times.append(time.perf_counter() - started)
    return statistics.median(times)
