"""Many small Frobenius problems at once, or one inside a traced function: fixed shapes, `jit` and `vmap`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnlab.margin.certificates import INFEASIBLE_BELOW, MaxMargin, Status, bounds
from attnlab.margin.problems import MarginProblem

DESCENT_STEPS = 24
PATIENCE = 10
"""So many exchanges in a row may fail to set a new record of violated rows before the least-index rule takes over."""

RIDGE = 1e-9
"""Added to the unit diagonal of the Gram matrix, so that dependent rows pivot too; refinement takes it away."""

CHUNK = 32
"""Problems that are solved side by side: their tableaus fit the cache."""


def frobenius_traced(problem: MarginProblem, tolerance: float = 1e-9) -> MaxMargin:
    """`max_margin` of one Frobenius problem as a traced function, on the Gram matrix of its rows: for up to ~200 rows.

    Principal pivoting from the active rows that a few gradient steps guess. It solves

        minimise (1/2) ||sum_k lambda_k a_k||^2 + (1/2) (1 - bound^T lambda)^2  over  lambda >= 0,

    which always has a solution: with rho = 1 - bound^T lambda, the max-margin multipliers are lambda / rho if rho > 0;
    otherwise lambda is Gordan's certificate. No LAPACK call: elementwise operations only, so `vmap` costs what it
    computes. Raises `RuntimeError` outside 64-bit mode.
    """
    _check_double(problem)
    differences, queries = problem.differences, problem.queries[problem.owner]
    scale = jnp.sqrt(jnp.sum(differences**2, axis=1) * jnp.sum(queries**2, axis=1))
    scale = jnp.where(scale > 0, scale, 1.0)
    gram = (differences @ differences.T) * (queries @ queries.T) / (scale[:, None] * scale[None, :])
    bound, free = problem.bound / scale, problem.equality
    hull = gram + bound[:, None] * bound[None, :]
    guess = free | (_descend(hull, bound, free) > 0)
    active, tableau = _pivot(hull, bound, free, guess)
    multipliers = _refine(gram, bound, active, tableau)
    multipliers = jnp.where(free, multipliers, jnp.maximum(multipliers, 0.0))
    matrix = ((multipliers / scale)[:, None] * differences).T @ queries
    size = jnp.sqrt(jnp.vdot(matrix, matrix))
    scores = jnp.sum((differences @ matrix) * queries, axis=1) / scale
    proof = bounds("frobenius", matrix, scores, multipliers, matrix, bound, free, jnp)
    infeasible = proof.residual <= INFEASIBLE_BELOW
    solved = (proof.gap <= tolerance) & (proof.violation <= tolerance)
    status = jnp.where(infeasible, Status.INFEASIBLE, jnp.where(solved, Status.SOLVED, Status.INACCURATE))
    direction = jnp.where(infeasible, 0.0, matrix / size).reshape(problem.shape)
    return MaxMargin(direction, multipliers / scale, free | (multipliers > 0), status, proof)


@jax.jit
def frobenius_batch(problems: MarginProblem) -> MaxMargin:
    """`frobenius_traced` of every problem along the leading axis of a stacked one (see `stack`)."""
    return lax.map(frobenius_traced, problems, batch_size=CHUNK)


def _check_double(problem: MarginProblem) -> None:
    if jnp.result_type(problem.differences) != jnp.float64:
        raise RuntimeError(
            f"the rows have dtype {jnp.result_type(problem.differences)}: max-margin certificates need 64 bits. Call "
            'jax.config.update("jax_enable_x64", True) first, or use max_margin, which computes outside JAX.'
        )


def _descend(gram: Float[Array, "m m"], bound: Float[Array, " m"], free: Bool[Array, " m"]) -> Float[Array, " m"]:
    """Accelerated projected gradient steps from zero: a guess of the active rows."""
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
    return jnp.where(free, 1.0, multipliers)


def _pivot(
    gram: Float[Array, "m m"], bound: Float[Array, " m"], free: Bool[Array, " m"], guess: Bool[Array, " m"]
) -> tuple[Bool[Array, " m"], Float[Array, "m1 m1"]]:
    """The active rows S of the solution, and the tableau [[G, bound], [bound^T, 0]] swept on them.

    Swept on S it holds -G_SS^-1 in the block of S, lambda_S in the last column there, and -gradient elsewhere. First the
    guess is swept in, then the worst row of wrong sign is exchanged until none is; by the least-index rule (Murty 1974,
    finite for positive definite G) when that stops making progress.
    """
    m = len(bound)
    gram = gram + RIDGE * jnp.eye(m, dtype=gram.dtype)
    tableau = jnp.block([[gram, bound[:, None]], [bound[None, :], jnp.zeros((1, 1), bound.dtype)]])
    index = jnp.arange(m)

    def wrong(state: tuple[Array, ...]) -> Array:
        tableau, active, pending, *_ = state
        column = tableau[:m, m]
        violation = jnp.where(active, jnp.where(free, 0.0, -column), column)
        violation = jnp.where(violation > 1e-12, violation, 0.0)
        return jnp.where(jnp.any(pending), pending.astype(violation.dtype), violation)

    def unfinished(state: tuple[Array, ...]) -> Array:
        return jnp.any(wrong(state) > 0) & (state[-1] < 20 * m)

    def exchange(state: tuple[Array, ...]) -> tuple[Array, ...]:
        tableau, active, pending, fewest, patience, step = state
        violation = wrong(state)
        count = jnp.sum(violation > 0)
        least = jnp.argmax(violation > 0)
        k = jnp.where(patience > 0, jnp.argmax(violation), least)
        patience = jnp.where(count < fewest, PATIENCE, jnp.maximum(patience - 1, 0))
        flipped = active ^ (index == k)
        tableau = _sweep(tableau, k)
        # Rows of the guess that depend on those already in (a tiny pivot left) are dropped from it.
        pending = pending & ~flipped & (jnp.diagonal(tableau)[:m] > 1e-6)
        return tableau, flipped, pending, jnp.minimum(fewest, count), patience, step + 1

    zero = jnp.zeros((), int)
    start = (tableau, jnp.zeros(m, bool), guess, zero + m + 1, zero + PATIENCE, zero)
    tableau, active, *_ = lax.while_loop(unfinished, exchange, start)
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
    gram: Float[Array, "m m"], bound: Float[Array, " m"], active: Bool[Array, " m"], tableau: Float[Array, "m1 m1"]
) -> Float[Array, " m"]:
    """Multipliers with G_SS lambda_S = bound_S; or Gordan's, with bound^T lambda = 1 and G_SS lambda_S = 0.

    The tableau holds P = (G_SS + bound bound^T)^-1; G_SS^-1 r = P r + P bound (bound^T P r) / rho with
    rho = 1 - bound^T P bound (Sherman and Morrison).
    """
    m = len(bound)
    bound = jnp.where(active, bound, 0.0)
    inverse = jnp.where(active[:, None] & active[None, :], -tableau[:m, :m], 0.0)

    def residual(multipliers: Array, right: Array) -> Array:
        return jnp.where(active, right - gram @ multipliers, 0.0)

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
