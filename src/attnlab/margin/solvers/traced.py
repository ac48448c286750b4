"""Many small Frobenius problems at once, or one inside a traced function: fixed shapes, `jit` and `vmap`."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnlab.margin.certificates import INFEASIBLE_BELOW, MaxMargin, Status, bounds
from attnlab.margin.checking import check_tolerance
from attnlab.margin.problems import MarginProblem

DESCENT_STEPS = 24
PIVOT_BELOW = 1e-12
"""A pivot of the unit-diagonal Gram matrix below this is a row that depends on the active ones."""

CHUNK = 32
"""Problems that are solved side by side: their tableaus fit the cache."""


def frobenius_traced(problem: MarginProblem, tolerance: float = 1e-9) -> MaxMargin:
    """`max_margin` of one Frobenius problem as a traced function, on the Gram matrix of its rows: for up to ~200 rows.

    The active-set method of Lawson and Hanson on a swept tableau, from where a few gradient steps lead. It solves

        minimise (1/2) ||sum_k lambda_k a_k||^2 + (1/2) (1 - bound^T lambda)^2  over  lambda >= 0,

    which always has a solution: with rho = 1 - bound^T lambda, the max-margin multipliers are lambda / rho if rho > 0;
    otherwise lambda is Gordan's certificate. No LAPACK call: elementwise operations only, so `vmap` costs what it
    computes. Margins below about 1e-3 of the rows' norms may be `INACCURATE` here: see `max_margin` for those. Raises
    `RuntimeError` outside 64-bit mode, `ValueError` for another norm, a tolerance outside (0, 1), and a stack.
    """
    _check(problem, tolerance)
    differences, owner, bound, free = (
        jnp.asarray(part) for part in (problem.differences, problem.owner, problem.bound, problem.equality)
    )
    queries = jnp.asarray(problem.queries)[owner]
    # Unit rows with bounds of at most 1: tokens and queries of any size are the same problem.
    differences, length = _unit(differences)
    queries, height = _unit(queries)
    scale = length * height
    bound = bound / scale
    top = jnp.max(bound)
    bound = bound / top

    def normal(multipliers: Array) -> Array:
        return jnp.sum((differences @ ((multipliers[:, None] * differences).T @ queries)) * queries, axis=1)

    gram = (differences @ differences.T) * (queries @ queries.T)
    hull = gram + bound[:, None] * bound[None, :]
    active, tableau = _pivot(hull, bound, free, _descend(hull, bound, free))
    multipliers = _refine(normal, bound, active, tableau)
    multipliers = jnp.where(free, multipliers, jnp.maximum(multipliers, 0.0))
    matrix = (multipliers[:, None] * differences).T @ queries
    size = jnp.sqrt(jnp.vdot(matrix, matrix))
    scores = jnp.sum((differences @ matrix) * queries, axis=1)
    certificate = bounds("frobenius", matrix, scores, multipliers, matrix, bound, free, jnp)
    infeasible = certificate.residual <= INFEASIBLE_BELOW
    solved = (certificate.gap <= tolerance) & (certificate.violation <= tolerance)
    status = jnp.where(infeasible, Status.INFEASIBLE, jnp.where(solved, Status.SOLVED, Status.INACCURATE))
    direction = jnp.where(infeasible, 0.0, matrix / size).reshape(problem.shape)
    certificate = replace(certificate, margin=certificate.margin / top, bound=certificate.bound / top)
    multipliers = jnp.where(infeasible, multipliers / top, multipliers * top) / scale
    return MaxMargin(direction, multipliers, free | (multipliers > 0), status, certificate)


def frobenius_batch(problems: MarginProblem) -> MaxMargin:
    """`frobenius_traced` of every problem along the leading axis of a stacked one (see `stack`).

    >>> import jax, numpy as np
    >>> from attnlab.margin import attention_problem, frobenius_batch, stack
    >>> jax.config.update("jax_enable_x64", True)
    >>> random = np.random.default_rng(0)
    >>> tokens, queries = random.normal(size=(8, 4, 5, 6)), random.normal(size=(8, 4, 6))
    >>> found = frobenius_batch(stack([attention_problem(x, z, np.zeros(4, int)) for x, z in zip(tokens, queries)]))
    >>> found.direction.shape, bool((found.gap < 1e-9).all())
    ((8, 6, 6), True)
    """
    if isinstance(problems, MarginProblem) and jnp.ndim(problems.differences) != 3:
        raise ValueError(
            f"problems have differences of shape {jnp.shape(problems.differences)}; expected (problems, rows, token "
            "dimension). Make one of a list by stack, and solve a single problem with max_margin."
        )
    return _batch(problems)


@jax.jit
def _batch(problems: MarginProblem) -> MaxMargin:
    return lax.map(frobenius_traced, problems, batch_size=CHUNK)


def _unit(vectors: Float[Array, "m d"]) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
    """Rows divided by their norms, and these; a row of 0 stays, with 1."""
    largest = jnp.max(jnp.abs(vectors), axis=1, keepdims=True)
    scaled = vectors / jnp.where(largest > 0, largest, 1.0)
    norms = jnp.sqrt(jnp.sum(scaled**2, axis=1, keepdims=True))
    return scaled / jnp.where(norms > 0, norms, 1.0), jnp.where(largest > 0, largest * norms, 1.0)[:, 0]


def _check(problem: MarginProblem, tolerance: float) -> None:
    if not isinstance(problem, MarginProblem):
        raise TypeError(
            f"problem is a {type(problem).__name__}; expected a MarginProblem. Build it with attention_problem, or "
            "several with stack."
        )
    check_tolerance(tolerance)
    if problem.norm != "frobenius":
        raise ValueError(
            f"problem has the norm {problem.norm!r}; expected 'frobenius', the only one that is traced. Use max_margin."
        )
    if jnp.ndim(problem.differences) != 2:
        raise ValueError(
            f"problem has differences of shape {jnp.shape(problem.differences)}; expected (rows, token dimension). Use "
            "frobenius_batch for a stack, made by stack."
        )
    if jnp.result_type(problem.differences) != jnp.float64:
        raise RuntimeError(
            f"the rows have dtype {jnp.result_type(problem.differences)}: max-margin certificates need 64 bits. Call "
            'jax.config.update("jax_enable_x64", True) first, or use max_margin, which computes outside JAX.'
        )


def _descend(gram: Float[Array, "m m"], bound: Float[Array, " m"], free: Bool[Array, " m"]) -> Float[Array, " m"]:
    """Accelerated projected gradient steps from zero: a feasible point near the solution."""
    step_size = 1 / jnp.max(jnp.sum(jnp.abs(gram), axis=1))

    def step(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        multipliers, ahead, pace = state
        slope = gram @ ahead - bound
        new = ahead - step_size * slope
        new = jnp.where(free, new, jnp.maximum(new, 0.0))
        pace = jnp.where(slope @ (new - multipliers) > 0, 1.0, pace)
        next_pace = (1 + jnp.sqrt(1 + 4 * pace * pace)) / 2
        return (new, new + (pace - 1) / next_pace * (new - multipliers), next_pace), None

    zeros = jnp.zeros_like(bound)
    (multipliers, _, _), _ = lax.scan(step, (zeros, zeros, jnp.ones((), bound.dtype)), length=DESCENT_STEPS)
    return multipliers


def _pivot(
    gram: Float[Array, "m m"], bound: Float[Array, " m"], free: Bool[Array, " m"], start: Float[Array, " m"]
) -> tuple[Bool[Array, " m"], Float[Array, "m1 m1"]]:
    """The active rows S of the solution, and the tableau [[G, bound], [bound^T, 0]] swept on them.

    Swept on S it holds -G_SS^-1 in the block of S, z_S = G_SS^-1 bound_S in the last column there, and -gradient
    elsewhere. First the rows of the start are swept in, but for those that depend on others. Then each step moves
    lambda towards z: to z, where the row of worst gradient enters; or as far as lambda stays non-negative, where the
    row that blocks leaves. The objective falls, so no set of rows returns.
    """
    m = len(bound)
    tableau = jnp.block([[gram, bound[:, None]], [bound[None, :], jnp.zeros((1, 1), bound.dtype)]])
    index = jnp.arange(m)

    def inspect(tableau: Array, active: Array, pending: Array) -> tuple[Array, Array]:
        """Rows that block the way to z, and rows that should enter, by how much."""
        column, pivots = tableau[:m, m], jnp.diagonal(tableau)[:m]
        loading = jnp.any(pending)
        blocking = active & ~free & (column < 0) & ~loading
        # The gradient is rho times the violation of a row by W; a row without a pivot depends on the active ones.
        noise = jnp.maximum(1e-10 * (1 + tableau[m, m]), 1e-14)
        entering = jnp.where(~active & (pivots > PIVOT_BELOW) & (column > noise), column, 0.0)
        return blocking, jnp.where(loading, pending.astype(column.dtype), entering)

    def unfinished(state: tuple[Array, ...]) -> Array:
        tableau, active, pending, _, step = state
        blocking, entering = inspect(tableau, active, pending)
        return (jnp.any(blocking) | jnp.any(entering > 0)) & (step < 10 * m)

    def exchange(state: tuple[Array, ...]) -> tuple[Array, ...]:
        tableau, active, pending, multipliers, step = state
        blocking, entering = inspect(tableau, active, pending)
        target = jnp.where(active, tableau[:m, m], 0.0)
        ratios = jnp.where(blocking, multipliers / jnp.where(blocking, multipliers - target, 1.0), 2.0)
        leave = jnp.any(blocking)
        k = jnp.where(leave, jnp.argmin(ratios), jnp.argmax(entering))
        moved = multipliers + jnp.minimum(jnp.min(ratios), 1.0) * (target - multipliers)
        moved = jnp.where(leave & (index == k), 0.0, moved)
        multipliers = jnp.where(jnp.any(pending), multipliers, moved)
        tableau = _sweep(tableau, k)
        active = active ^ (index == k)
        pending = pending & ~active & (jnp.diagonal(tableau)[:m] > 1e-6)
        # A row of the start that was dropped leaves with its multiplier.
        multipliers = jnp.where(active | pending, multipliers, 0.0)
        return tableau, active, pending, multipliers, step + 1

    state: tuple[Array, ...] = (tableau, jnp.zeros(m, bool), free | (start > 0), start, jnp.zeros((), int))
    tableau, active, *_ = lax.while_loop(unfinished, exchange, state)
    return active, tableau


def _sweep(tableau: Float[Array, "m1 m1"], k: Int[Array, ""]) -> Float[Array, "m1 m1"]:
    """Exchange row k: into the active ones if its pivot is positive, out of them if negative."""
    column = tableau[:, k]
    pivot = column[k]
    here = jnp.arange(len(column)) == k
    swept = tableau - column[:, None] * (column / pivot)[None, :]
    edge = jnp.where(here, -1 / pivot, column / jnp.abs(pivot))
    return jnp.where(here[:, None], edge[None, :], jnp.where(here[None, :], edge[:, None], swept))


def _refine(
    normal: Callable[[Array], Array],
    bound: Float[Array, " m"],
    active: Bool[Array, " m"],
    tableau: Float[Array, "m1 m1"],
) -> Float[Array, " m"]:
    """Multipliers with G_SS lambda_S = bound_S; or Gordan's, with bound^T lambda = 1 and G_SS lambda_S = 0.

    The tableau holds P = (G_SS + bound bound^T)^-1; G_SS^-1 r = P r + P bound (bound^T P r) / rho with
    rho = 1 - bound^T P bound (Sherman and Morrison). Residuals are `normal` = lambda -> G lambda by way of W, whose
    rounding is that of W: through the Gram matrix Gordan's W would end at its square root.
    """
    m = len(bound)
    bound = jnp.where(active, bound, 0.0)
    inverse = jnp.where(active[:, None] & active[None, :], -tableau[:m, :m], 0.0)

    def residual(multipliers: Array, right: Array) -> Array:
        return jnp.where(active, right - normal(multipliers), 0.0)

    hull = inverse @ bound
    for _ in range(2):
        hull = hull + inverse @ (residual(hull, bound) - bound * (bound @ hull))
    rho = 1 - bound @ hull
    feasible = rho > 1e-11
    rho = jnp.where(feasible, rho, 1.0)
    multipliers = hull / rho
    for _ in range(2):
        part = inverse @ residual(multipliers, bound)
        multipliers = multipliers + part + hull * (bound @ part) / rho
    return jnp.where(feasible, multipliers, hull)
