"""Sigmoid attention: every score by itself, shifted by the logarithm of the number of tokens.

A_j = sigma(T_j - log M), M the length of the sequence, so that scores of zero average the tokens as softmax does.
Ramapuram et al., arXiv 2409.04431, with their bias b = -log n.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.models.heads import check_mask
from attnlab.models.weightings.base import Mask, ScoreDerivatives, Weighting


def sigmoid_weights(scores_BxLxM: Float[Array, "*B L M"], mask: Mask = None) -> Float[Array, "*B L M"]:
    """The weights, zero where `mask` is false."""
    return _derivatives(scores_BxLxM, mask).weights


def _derivatives(scores_BxLxM: Float[Array, "*B L M"], mask: Mask) -> ScoreDerivatives:
    shifted = scores_BxLxM - math.log(scores_BxLxM.shape[-1])
    weights, others = jax.nn.sigmoid(shifted), jax.nn.sigmoid(-shifted)
    # sigma' = sigma(T) sigma(-T), sigma'' = sigma' (sigma(-T) - sigma(T)): no digits lost where sigma is near 1.
    slopes = weights * others
    found = ScoreDerivatives(weights, slopes, slopes * (others - weights))
    if mask is None:
        return found
    check_mask(mask, scores_BxLxM.shape)
    return jax.tree.map(lambda x: jnp.where(mask, x, 0), found)


SIGMOID = Weighting(sigmoid_weights, _derivatives)
