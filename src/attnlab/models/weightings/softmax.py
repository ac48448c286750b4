"""Softmax attention."""

from jaxtyping import Array, Float

from attnlab.models.heads import softmax_weights
from attnlab.models.weightings.base import Mask, ScoreDerivatives, Weighting


def _derivatives(scores_BxLxM: Float[Array, "*B L M"], mask: Mask) -> ScoreDerivatives:
    weights = softmax_weights(scores_BxLxM, mask)
    return ScoreDerivatives(weights, weights, weights)


SOFTMAX = Weighting(softmax_weights, _derivatives, centred=True, normalised=True)
