"""Linear systems with an operator, by MINRES."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import check_number, check_same_structure, check_whole, is_concrete
from attnlab.curvature.averages import nonzero
from attnlab.curvature.guards import check_operator, check_symmetric, non_finite
from attnlab.curvature.operator import Operator, wide_unravel
from attnlab.krylov.lanczos import Recurrence, advance, begin, relative_asymmetry
from attnlab.trees import length, power_of_two
from attnlab.types import Params


class Solution(NamedTuple):
    """Of (A + damping I) x = b: `vector` x like the operator's point, `residual` |b - (A + damping I) x| / |b| taken
    afresh from x, and how many `products` with the operator it took.

    For a positive definite A + damping I, |x - exact x| <= residual |b| / (lambda_min + damping)."""

    vector: Params
    residual: Float[Array, ""]
    products: Array


def solve(
    operator: Operator, vector: Params, *, damping: float = 0.0, tolerance: float = 1e-5, steps: int = 1000
) -> Solution:
    """The inverse-vector product (A + damping I)^-1 vector, by MINRES (Paige & Saunders 1975).

    Of all vectors in the Krylov space it takes that of the smallest residual; it needs no definiteness, as conjugate
    gradients would, so that it serves Hessians at any point. Stops at a relative residual of `tolerance`, after `steps`
    products, or where no vector has a smaller residual, as the equation has no solution (a singular A + damping I, such
    as a `ggn` of few examples without damping; what is below the root of the machine epsilon times its norm counts as
    zero): look at the `residual`. Memory: seven vectors. Raises `ValueError` for a vector of another structure, a
    negative tolerance or an operator that is not symmetric, `NonFiniteProductError`. The vector of the solution has the
    dtype of flat vectors, float32 at least.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> found = al.solve(al.hessian(risk, jnp.ones(2)), jnp.array([1.0, 2.0]))
        >>> found.vector.round(4).tolist()
        [1.0, 0.5]
    """
    check_operator(operator)
    check_same_structure("vector", vector, operator.point)
    check_whole(steps=steps)
    check_number("damping", damping, -math.inf, math.inf, "It is added to every eigenvalue.")
    check_number("tolerance", tolerance, 0, math.inf, "It is relative to the length of the vector.")
    flat = operator.ravel(vector)
    size = power_of_two(length(flat))
    solution, residual, products, asymmetry = _minres(operator, flat / size, damping, tolerance, steps)
    if is_concrete(residual):
        if not np.isfinite(residual):
            raise non_finite(operator, f"within {products} products")
        check_symmetric(asymmetry, operator.epsilon)
    return Solution(wide_unravel(operator)(solution * size), residual, products)


class _Minres(NamedTuple):
    """The state of MINRES: where Lanczos stands, two search directions, the two last Givens rotations."""

    solution: Array
    lanczos: Recurrence
    direction_before: Array
    direction: Array
    cosines: tuple[Array, Array]
    sines: tuple[Array, Array]
    remainder: Array  # signed norm of the residual
    least: Array  # whether no vector has a smaller residual: it is one that A + damping I does not see
    steps: Array


@jax.jit
def _minres(
    operator: Operator, target: Float[Array, " n"], damping: float, tolerance: float, steps: int
) -> tuple[Array, Array, Array, Array]:
    shift = jnp.asarray(damping, target.dtype)

    def step(state: _Minres) -> _Minres:
        # Lanczos and T = Q R by Givens rotations: (third, second, first) is a column of R from the diagonal up.
        before, vector = state.lanczos.norm, state.lanczos.vector
        lanczos, ((diagonal,), (beta,)) = advance(operator.flat_mv, state.lanczos, 1)
        alpha = diagonal + shift
        (cosine_before, cosine), (sine_before, sine) = state.cosines, state.sines
        first = sine_before * before
        second = sine * alpha + cosine_before * cosine * before
        rotated = cosine * alpha - cosine_before * sine * before
        # The residual r so far has (A + damping I) r = +-|r| (rotated v + cosine beta v_next). In an equation without a
        # solution that fades, and to go on would be to divide by it. Below the root of the machine epsilon, where the
        # recurrence has no digits left, it counts as faded.
        seen, norm = jnp.hypot(rotated, cosine * beta), lanczos.scale + jnp.abs(shift)
        least = seen <= jnp.finfo(norm.dtype).eps ** 0.5 * norm
        third = nonzero(jnp.hypot(rotated, beta))
        direction = (vector - first * state.direction_before - second * state.direction) / third
        new_cosine, new_sine = rotated / third, beta / third
        return _Minres(
            solution=state.solution + jnp.where(least, 0, new_cosine * state.remainder) * direction,
            lanczos=lanczos,
            direction_before=state.direction,
            direction=direction,
            cosines=(cosine, new_cosine),
            sines=(sine, new_sine),
            remainder=-new_sine * state.remainder,
            least=least,
            steps=state.steps + 1,
        )

    size = length(target)
    zeros, zero, one = jnp.zeros_like(target), jnp.zeros_like(size), jnp.ones_like(size)
    start = begin(jnp.where(size > 0, target, 1))
    state = _Minres(zeros, start, zeros, zeros, (one, one), (zero, zero), size, jnp.array(False), jnp.array(0))
    state = jax.lax.while_loop(
        lambda state: (jnp.abs(state.remainder) > tolerance * size) & (state.steps < steps) & ~state.least,
        step,
        state,
    )
    image = operator.flat_mv(state.solution) + shift * state.solution
    asymmetry = relative_asymmetry(state.lanczos.asymmetry, state.lanczos.scale)
    return state.solution, length(target - image) / nonzero(size), state.steps + 1, asymmetry
