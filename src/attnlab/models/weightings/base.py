"""What a kind of attention is: weights that are the gradient of a potential of the scores, and their derivatives.

A query's weights are A_j = dPhi/dT_j of its scores T_j = z . x_j, so that m = sum_j A_j x_j is the gradient of Phi in
z, and its derivatives in z are symmetric moments of the tokens,

    dm/dz    = sum_j s_j (x_j - c)(x_j - c)^T + r c c^T,
    d^2m/dz^2 = sum_j t_j (x_j - c)^(x3)       - r c^(x3).

For weights that act on each score alone, A_j = phi(T_j), these are s = phi'(T), t = phi''(T), c = 0, r = 0. For
softmax, the exponential family over the tokens, they are cumulants: s = t = A, c = m, r = 0. A sink is one token more,
at the origin, of weight r.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float

Mask = Bool[Array, "..."] | None


class ScoreDerivatives(NamedTuple):
    """What the moments are made of, for every query L and key M; zero where a query may not look.

    Attributes:
        weights: A.
        slopes: s; None is 1 at every key that the query sees.
        bends: t; None is zero.
        rest: r of every query; None is zero.
    """

    weights: Float[Array, "*B L M"]
    slopes: Float[Array, "*B L M"] | None
    bends: Float[Array, "*B L M"] | None
    rest: Float[Array, "*B L"] | None = None


@dataclass(frozen=True)
class Weighting:
    """One kind of attention, a row of `WEIGHTINGS`.

    Attributes:
        weights: `weights(scores, mask) -> A` with scores (..., L, M) and a boolean mask, true where a query may look.
        derivatives: `derivatives(scores, mask)`, the same with all that the closed form needs.
        centred: whether the moments are about the mean, c = m; otherwise c = 0.
        normalised: whether the weights of a query sum to 1. They do not see a shift of all its scores then, and a query
            has to see at least one token.
    """

    weights: Callable[[jax.Array, Mask], jax.Array]
    derivatives: Callable[[jax.Array, Mask], ScoreDerivatives]
    centred: bool = False
    normalised: bool = False
