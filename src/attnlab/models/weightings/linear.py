"""Linear attention: the scores themselves, not normalised."""

from jaxtyping import Array, Float

from attnlab.models.heads import linear_weights
from attnlab.models.weightings.base import Mask, ScoreDerivatives, Weighting


def _derivatives(scores_BxLxM: Float[Array, "*B L M"], mask: Mask) -> ScoreDerivatives:
    return ScoreDerivatives(linear_weights(scores_BxLxM, mask), None, None)


LINEAR = Weighting(linear_weights, _derivatives)
