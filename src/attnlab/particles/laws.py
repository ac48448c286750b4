"""What is known in closed form of tokens that attention moves: equal angles, the first instability, long contexts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jaxtyping import Array, Float

from attnlab.checks import check_number, check_whole
from attnlab.types import Real

POINTS = 4096
"""Of the circle, in Fourier coefficients that fall as fast as those of exp(beta cos)."""


def equiangular_rate(cosine: Float[Array, "*s"], count: Real, beta: Real, *, normalised: bool = True) -> Array:
    """The time derivative of the cosine g of `count` tokens that are pairwise at g, with V = I:

        g' = 2 e^{beta g} (1 - g) (1 + (n - 1) g) / (e^beta + (n - 1) e^{beta g}),

    without normalisation the same with n for the denominator. Geshkovski et al., arXiv 2312.10794, theorem 6.8 and
    after it; the rate 2 (1 - g) at the end, and the slow start of large beta.
    """
    pull = 2 * (1 - cosine) * (1 + (count - 1) * cosine)
    if normalised:  # in e^{beta (1 - g)}, which may be large, but not its inverse
        return pull / (jnp.exp(beta * (1 - cosine)) + (count - 1))
    return pull * jnp.exp(beta * cosine) / count


def equiangular_cosine(
    start: Real, times: Float[Array, " t"], count: int, beta: Real, *, normalised: bool = True, tolerance: float = 1e-10
) -> Float[Array, " t"]:
    """The solution of `equiangular_rate` from `start` at the first of the times."""
    check_number("beta", beta, np.nextafter(0, 1), np.inf, "It is an inverse temperature.")
    first = jnp.asarray(start, jnp.result_type(float))
    numbers = (jnp.asarray(number, first.dtype) for number in (times, count, beta))
    return _solve(first, *numbers, normalised, float(tolerance))


@partial(jax.jit, static_argnames=("normalised", "tolerance"))
def _solve(start: Array, times: Array, count: Array, beta: Array, normalised: bool, tolerance: float) -> Array:
    def slope(cosine: Array, time: Array, count: Array, beta: Array) -> Array:
        return equiangular_rate(cosine, count, beta, normalised=normalised)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return odeint(slope, start, times, count, beta, rtol=tolerance, atol=tolerance)


def mode_rates(beta: float, modes: int) -> np.ndarray:
    """Growth rates of the modes k = 1, ..., `modes` of tokens spread evenly on the circle: k^2 I_k(beta) / (beta
    I_0(beta)).

    A displacement cos(k angle) of density (1 + ...) moves with the slope of exp(beta cos) * density over beta I_0,
    whose Fourier coefficient is I_k, the modified Bessel function.

    Example:
        >>> from attnlab.particles.laws import mode_rates
        >>> int(mode_rates(50.0, 30).argmax()) + 1  # about sqrt(2 beta)
        10
    """
    check_number("beta", beta, np.nextafter(0, 1), np.inf, "It is an inverse temperature.")
    check_whole(modes=modes)
    angles = 2 * np.pi * np.arange(POINTS) / POINTS
    bessel = np.fft.rfft(np.exp(beta * (np.cos(angles) - 1))).real
    numbers = np.arange(1, modes + 1)
    return numbers**2 * bessel[1 : modes + 1] / (beta * bessel[0])


def fastest_mode(beta: float) -> int:
    """The mode that grows fastest, which is how many clusters form first; sqrt(2 beta) for large beta."""
    return int(np.argmax(mode_rates(beta, int(4 * np.sqrt(beta) + 4)))) + 1


def self_attention_share(count: Real, strength: Real, cosine: Real) -> Real:
    """What a token gives itself, of `count` at equal cosine with beta = strength x log n: 1 / (1 + (n - 1) n^{-c (1 -
    g)}).

    It tends to 1 for c (1 - g) > 1, where attention is the identity and nothing moves, and to 0 below, where it
    averages: the transition of long contexts (Rigollet, arXiv 2512.01868).
    """
    return 1 / (1 + (count - 1) * count ** (-strength * (1 - cosine)))
