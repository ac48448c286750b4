"""Softmax attention with a sink: beside the scores stands a logit of zero, whose share of the weight goes nowhere.

    A_j = exp(T_j) / (1 + sum_k exp(T_k)),

the softmax over one token more that lies at the origin: its score z . 0 is zero, and it adds nothing to the mean. A
query may attend to nothing at all. Xiao et al., arXiv 2309.17453 (the sink as one token of zeros, section 3.3).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.models.heads import check_mask
from attnlab.models.weightings.base import Mask, ScoreDerivatives, Weighting


def _with_sink(scores_BxLxM: Float[Array, "*B L M"], mask: Mask) -> Float[Array, "*B L M+1"]:
    """The weights of all keys, and that of the sink behind them."""
    if mask is not None:
        check_mask(mask, scores_BxLxM.shape)
        scores_BxLxM = jnp.where(mask, scores_BxLxM, -jnp.inf)
    zero = jnp.zeros((*scores_BxLxM.shape[:-1], 1), scores_BxLxM.dtype)
    return jax.nn.softmax(jnp.concatenate((scores_BxLxM, zero), axis=-1), axis=-1)


def softmax_sink_weights(scores_BxLxM: Float[Array, "*B L M"], mask: Mask = None) -> Float[Array, "*B L M"]:
    """The weights of the keys, which sum to less than 1; `mask` is true where a query may look."""
    return _with_sink(scores_BxLxM, mask)[..., :-1]


def _derivatives(scores_BxLxM: Float[Array, "*B L M"], mask: Mask) -> ScoreDerivatives:
    whole = _with_sink(scores_BxLxM, mask)
    weights = whole[..., :-1]
    return ScoreDerivatives(weights, weights, weights, whole[..., -1])


SOFTMAX_SINK = Weighting(softmax_sink_weights, _derivatives, centred=True)
