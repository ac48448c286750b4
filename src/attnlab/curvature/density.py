"""The spectral density of an operator by stochastic Lanczos quadrature, with its error."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from html import escape
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from attnlab.checks import check_number, check_range, check_whole, is_concrete
from attnlab.curvature.guards import (
    check_operator_and_key,
    check_samples_fit,
    check_symmetric,
    identity_of,
    non_finite,
)
from attnlab.curvature.operator import Operator
from attnlab.display import Words, line, whatever_it_holds
from attnlab.krylov.lanczos import Recurrence, Tridiagonal, advance, begin, finish, gauss_quadrature
from attnlab.local_devices import everywhere, local_sharding, side_by_side, together_again
from attnlab.plotting.curves import density_on_logarithm
from attnlab.plotting.inline import picture
from attnlab.runs.progress import Clock
from attnlab.runs.session import AT_ONCE, Session, fold
from attnlab.statistics import Estimate, estimate, standard_error
from attnlab.trees import power_of_two
from attnlab.types import PRNGKey

STEPS = 64
"""Lanczos steps of a sample, unless the operator has fewer rows."""

CHUNK = 16
"""Lanczos steps in one jitted call of a long run: between two of them it reports and saves."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpectralDensity:
    """A spectral density by stochastic Lanczos quadrature: one Gauss rule a sample.

    Each sample's rule integrates polynomials up to degree 2 m - 1 against its own spectral measure exactly; the mean
    over samples estimates (1/n) sum_i f(lambda_i), and the spread over samples is its error.

    Attributes:
        nodes: (samples, m) Ritz values, ascending in each row.
        weights: (samples, m), each row sums to 1.
    """

    nodes: Float[Array, "samples m"]
    weights: Float[Array, "samples m"]

    @whatever_it_holds
    def __repr__(self) -> str:
        """How it was made, the range of its nodes and the mean eigenvalue."""
        if not is_concrete(self.nodes) or self.nodes.ndim != 2:
            return line("SpectralDensity", nodes=self.nodes, weights=self.weights)
        samples, steps = self.nodes.shape
        ends = [float(jnp.min(self.nodes)), float(jnp.max(self.nodes))]
        mean = Words(self.moment(1).in_words())
        return line("SpectralDensity", samples=samples, steps=steps, nodes_within=ends, mean=mean)

    def _repr_html_(self) -> str:
        """The density, in a notebook: smoothed by a hundredth of its range, with a band of two standard errors."""
        words = escape(repr(self))
        if not is_concrete(self.nodes):
            return words
        grid, (mean, error) = self.smooth()
        arrays = [np.asarray(part, float) for part in (grid, mean, error)]
        return f"<p>{words}</p>{picture(lambda axes: density_on_logarithm(axes, *arrays), 'spectral density')}"

    def integral(self, function: Callable[[Array], Array]) -> Estimate:
        """Mean of `function` over the eigenvalues, (1/n) sum_i f(lambda_i), and its standard error over the samples.

        `function` maps the nodes (m,) to (..., m). The `interval` of the result is the band.
        """
        return estimate(jax.vmap(lambda nodes, weights: function(nodes) @ weights)(self.nodes, self.weights))

    def moment(self, power: int) -> Estimate:
        """tr(A^power) / n, and its standard error."""
        return self.integral(lambda nodes: nodes**power)

    def density(self, grid: Float[Array, " g"], width: float) -> Estimate:
        """The density convolved with a Gaussian of standard deviation `width` (in units of the eigenvalues), and its
        standard error, at each point of the grid."""
        norm = width * (2 * jnp.pi) ** 0.5
        return self.integral(lambda nodes: jnp.exp(-0.5 * ((grid[:, None] - nodes[None, :]) / width) ** 2) / norm)

    def smooth(self, width: float | None = None, points: int = 512) -> tuple[Float[Array, " g"], Estimate]:
        """A grid over all nodes and the density on it: what a picture needs. The width is by default a hundredth of the
        range of the nodes. Raises `ValueError` for a width that is not positive."""
        low, high = float(jnp.min(self.nodes)), float(jnp.max(self.nodes))
        width = (high - low or abs(high) or 1.0) / 100 if width is None else width
        check_number("width", width, 0, np.inf, "It is a standard deviation, in units of the eigenvalues.")
        grid = jnp.linspace(low - 4 * width, high + 4 * width, points)
        return grid, self.density(grid, width)

    def cumulative(self, grid: Float[Array, " g"]) -> Estimate:
        """Fraction of eigenvalues at or below each point of the grid, and its standard error; it needs no bandwidth."""
        return self.integral(lambda nodes: (nodes[None, :] <= grid[:, None]).astype(nodes.dtype))

    def negative_share(self) -> Estimate:
        """Share of the negative eigenvalues in sum_i |lambda_i|, between 0 and 1 (0 of a zero operator, which has
        none), and its standard error (of a ratio of means, to first order in the spread of both)."""
        nodes = self.nodes / power_of_two(jnp.max(jnp.abs(self.nodes)))
        negative, total = (jnp.sum(f(nodes) * self.weights, axis=1) for f in (lambda x: jnp.maximum(-x, 0), jnp.abs))
        mean = jnp.where(jnp.any(total > 0), jnp.mean(total), 1)
        share = jnp.mean(negative) / mean
        return Estimate(share, standard_error((negative - share * total) / mean), len(total))


def spectral_density(
    operator: Operator,
    key: PRNGKey,
    *,
    samples: int = 10,
    steps: int | None = None,
    session: Session = AT_ONCE,
) -> SpectralDensity:
    """The spectral density by stochastic Lanczos quadrature with Rademacher samples: samples x steps products.

    Ubaru, Chen, Saad (2017); Ghorbani, Krishnan, Xiao (arXiv 1901.10159). No reorthogonalisation: memory stays a few
    vectors a sample, however many steps. Rounding then brings copies of nodes that have converged, at the ends of the
    spectrum first. They share the weight of the one that they copy, so that integrals and densities are unaffected;
    but the number of nodes at a place says nothing of multiplicity, and each copy is one node less for the rest.

    Args:
        operator: the operator; its symmetry is tested at every step, at no product's cost.
        key: of the samples.
        samples: how many random start vectors.
        steps: Lanczos steps of each: nodes of its Gauss rule; by default 64, or as many as the operator has rows.
        session: where to save, every second at most, after a multiple of 16 steps, what to call every 16 steps with a
            `Progress` (`print_progress` is one), how many samples run `together`, a divisor of `samples`, and their
            `sharding` over devices: by default, of an operator on one device, over all of this machine (see
            `attnlab.local_devices`). With several processes, a directory for each. At the end it holds `result.npz`
            (nodes, weights) and `manifest.json`. Without directory and report it is one compiled program.

    Raises `ValueError` for numbers that do not fit, an operator that is not symmetric or a directory of another
    computation; `NonFiniteProductError`, which says at which step and has the density of the finished samples as its
    `partial`; `MemoryError` before the start, if the samples do not fit.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> import jax
        >>> density = al.spectral_density(al.hessian(risk, jnp.ones(2)), jax.random.key(0), samples=3, steps=2)
        >>> mean = density.moment(1)
        >>> float(mean.value.round(4)), float(abs(mean.standard_error) < 1e-4)
        (2.5, 1.0)
    """
    return quadrature(project(operator, key, samples=samples, steps=steps, session=session))


def project(
    operator: Operator, key: PRNGKey, *, samples: int, steps: int | None = None, session: Session = AT_ONCE
) -> Tridiagonal:
    """The projections, stacked over samples, that `spectral_density` is made of; arguments, files and errors are its
    own."""
    check_operator_and_key(operator, key)
    steps = min(STEPS, operator.dimension) if steps is None else steps
    check_whole(samples=samples, together=session.together, steps=steps)
    check_range("steps", steps, 1, operator.dimension, "A Krylov space has no more dimensions than the operator.")
    _check_session(session, samples)
    check_samples_fit(operator, session.together)
    local = None if session.sharding is not None else local_sharding(operator, samples // session.together)
    if local is None:
        return _project(operator, key, samples, steps, session)
    session = replace(session, together=session.together * local.num_devices, sharding=local)
    return together_again(_project(everywhere(operator, local), key, samples, steps, session), operator)


def _project(operator: Operator, key: PRNGKey, samples: int, steps: int, session: Session) -> Tridiagonal:
    keys = jax.random.split(key, (samples // session.together, session.together))
    if session.in_chunks:
        return _in_chunks(operator, keys, steps, session)
    return _checked(operator, _in_one_program(operator, keys, steps, session.sharding))


def _check_session(session: Session, samples: int) -> None:
    if samples % session.together:
        raise ValueError(
            f"together is {session.together}; expected a divisor of samples, which is {samples}. Change one of them."
        )
    if session.directory is not None and session.sharding is not None and not session.sharding.is_fully_addressable:
        raise ValueError(
            f"sharding spreads the samples over several processes: {session.sharding}; expected one process, whose "
            "directory holds the state of all its samples. Spread the data over the processes, or give no directory."
        )


@jax.jit
def quadrature(projections: Tridiagonal) -> SpectralDensity:
    """The Gauss rules of stacked projections."""
    return SpectralDensity(*jax.vmap(gauss_quadrature)(projections))


def _checked(operator: Operator, projections: Tridiagonal) -> Tridiagonal:
    """The projections, unless they can be looked at and are not those of a finite and symmetric operator."""
    if not is_concrete(projections):
        return projections
    finite = np.isfinite(np.asarray(projections.diagonal))
    if not finite.all():
        sample, step = np.argwhere(~finite)[0]
        done = quadrature(jax.tree.map(lambda leaf: leaf[:sample], projections)) if sample else None
        raise non_finite(operator, f"at step {step} of sample {sample}", done)
    check_symmetric(projections.asymmetry, operator.epsilon)
    return projections


def _begin(operator: Operator, keys: Array, sharding: Sharding | None) -> Recurrence:
    starts = jax.vmap(partial(operator.sample, jax.random.rademacher))(keys)
    return jax.vmap(begin)(starts if sharding is None else jax.lax.with_sharding_constraint(starts, sharding))


def _of_samples_alone(operator: Operator, sharding: Sharding | None) -> NamedSharding | None:
    """The sharding, where nothing but samples lies along the devices: each has vectors of its own, and all of the
    operator."""
    if operator.layout is None and isinstance(sharding, NamedSharding):
        return sharding if tuple(sharding.spec) == sharding.mesh.axis_names else None
    return None


class _Entries(NamedTuple):
    """What steps of the recurrence give: two arrays (..., steps) of entries of the projections."""

    diagonal: Any
    norms: Any


def _advance(
    operator: Operator, state: Recurrence, steps: int, sharding: Sharding | None
) -> tuple[Recurrence, _Entries]:
    def one_probe(operator: Operator, state: Recurrence) -> tuple[Recurrence, tuple[Array, Array]]:
        return advance(operator.flat_mv, state, steps)

    def own(operator: Operator, state: Recurrence) -> tuple[Recurrence, tuple[Array, Array]]:
        one = partial(one_probe, operator)
        # One sample is not vectorised: products of a single batched vector are slower on a CPU.
        return jax.lax.map(one, state) if len(state.norm) == 1 else jax.vmap(one)(state)

    alone = _of_samples_alone(operator, sharding)
    state, entries = (own if alone is None else side_by_side(own, alone))(operator, state)
    if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
        # The vectors stay spread; of the numbers every process needs all.
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        numbers = state[2:]
        numbers, entries = jax.lax.with_sharding_constraint((numbers, entries), everywhere)
        state = Recurrence(state.previous, state.vector, *numbers)
    return state, _Entries(*entries)


@jax.jit(static_argnames=("steps", "sharding"))
def _in_one_program(operator: Operator, keys: Array, steps: int, sharding: Sharding | None) -> Tridiagonal:
    def group(keys: Array) -> Tridiagonal:
        state, entries = _advance(operator, _begin(operator, keys, sharding), steps, sharding)
        return jax.vmap(finish)(*entries, state.asymmetry, state.scale)

    return jax.tree.map(_merge, jax.lax.map(group, keys))


def _merge(leaf: Array) -> Array:
    return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])


_begin_jitted = jax.jit(_begin, static_argnames=("sharding",))
_advance_jitted = jax.jit(_advance, static_argnames=("steps", "sharding"), donate_argnames=("state",))


class _Run(NamedTuple):
    """A density under way: how many chunks are done, all entries so far, how the groups ended, the current state."""

    chunks: Array
    entries: _Entries  # (groups, together, steps)
    asymmetry: Array  # (groups, together)
    scale: Array
    state: Recurrence


def _in_chunks(operator: Operator, keys: Array, steps: int, session: Session) -> Tridiagonal:
    """The same recurrences, a call for every chunk of steps; where a group of samples ends the next one begins."""
    groups, together = keys.shape
    firsts = range(0, steps, CHUNK)

    def start() -> _Run:
        state = _begin_jitted(operator, keys[0], session.sharding)
        empty, none = np.zeros((*keys.shape, steps), state.norm.dtype), np.zeros(keys.shape, state.norm.dtype)
        return _Run(np.array(0), _Entries(empty, empty), none, none, state)  # type: ignore[arg-type]

    def chunks(run: _Run) -> tuple[int, int] | None:
        group, chunk = divmod(int(run.chunks), len(firsts))
        return None if group == groups else (group, firsts[chunk])

    def step(run: _Run, chunk: tuple[int, int]) -> tuple[_Run, None]:
        (group, first), size = chunk, min(CHUNK, steps - chunk[1])
        state, entries = _advance_jitted(operator, run.state, size, session.sharding)
        run = _with_chunk(run, state, entries, group, first)
        if not np.isfinite(np.asarray(state.norm)).all():
            place = first + int(np.argwhere(~np.isfinite(np.asarray(entries.norms)))[:, 1].min())
            done = quadrature(_projections_of(run, group)) if group else None
            raise non_finite(operator, f"at step {place} of sample {group * together}", done)
        if first + size == steps and group + 1 < groups:
            run = run._replace(state=_begin_jitted(operator, keys[group + 1], session.sharding))
        return run, None

    def products(run: _Run) -> int:
        group, chunk = divmod(int(run.chunks), len(firsts))
        return together * (group * steps + min(chunk * CHUNK, steps))

    def watch(run: _Run) -> Callable[[_Run], None]:
        assert session.report is not None
        clock = Clock(session.report, products(run), keys.size * steps)
        return lambda run: clock.tell(products(run))

    with session.open(lambda: identity_of(operator, keys, steps)) as stretch:
        run = fold(step, start, chunks, stretch, watch=watch)
        projections = _checked(operator, _projections_of(run, groups))
        choices = {"computation": "spectral density", "dimension": operator.dimension}
        choices |= {"samples": keys.size, "steps": steps}
        if session.directory is not None:
            stretch.write_result(choices, **asdict(quadrature(projections)))
    return projections


def _with_chunk(run: _Run, state: Recurrence, entries: _Entries, group: int, first: int) -> _Run:
    def put(whole: Any, place: Any, new: Array) -> Any:
        changed = np.array(whole)
        changed[place] = new
        return changed

    steps = (group, slice(None), slice(first, first + entries.norms.shape[1]))
    return _Run(
        chunks=run.chunks + 1,
        entries=_Entries(
            put(run.entries.diagonal, steps, entries.diagonal), put(run.entries.norms, steps, entries.norms)
        ),
        asymmetry=put(run.asymmetry, group, state.asymmetry),
        scale=put(run.scale, group, state.scale),
        state=state,
    )


def _projections_of(run: _Run, groups: int) -> Tridiagonal:
    """The projections of the first groups of samples."""
    ends = run.asymmetry[:groups], run.scale[:groups]
    return jax.tree.map(_merge, _finish_all(*(leaf[:groups] for leaf in run.entries), *ends))


@jax.jit
def _finish_all(diagonal: Array, norms: Array, asymmetry: Array, scale: Array) -> Tridiagonal:
    return jax.vmap(jax.vmap(finish))(diagonal, norms, asymmetry, scale)
