"""A transformer that embeds texts as unit vectors: BERT's architecture with its tokens averaged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from attnlab.models.layers import LayerNorm
from attnlab.models.transformer import EmbeddingConfig, Transformer, embed


class TokenBatch(NamedTuple):
    """Sequences of tokens, padded at their end: the whole numbers, and where a token stands."""

    tokens: Int[Array, "*B L"]
    mask: Bool[Array, "*B L"]


class TextEncoder(nn.Module):
    """Unit vectors (..., D) of padded token sequences (..., L): the direction of the mean over a text's tokens.

    Parameters: `token_embedding` (vocabulary x D), `position_embedding` (length x D), `embedding_norm/...`,
    `transformer/layer_0/...`. The architecture is that of Devlin et al. (arXiv 1810.04805) where the config has `norm`
    "post", biases and GELU; means over tokens as in Reimers & Gurevych (arXiv 1908.10084).
    """

    config: EmbeddingConfig

    @nn.compact
    def __call__(self, batch: TokenBatch) -> Float[Array, "*B D"]:
        """See the class. Raises as `embed` does."""
        tokens, mask = batch
        embedded = LayerNorm(self.config.transformer.epsilon, name="embedding_norm")(embed(self, tokens, self.config))
        # Every query may look at the tokens of its text, whatever its head: (..., heads, queries, keys).
        hidden = Transformer(self.config.transformer, name="transformer")(embedded, mask[..., None, None, :])
        total = jnp.einsum("...l,...ld->...d", mask.astype(hidden.dtype), hidden)
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def pair_logits(encode: jax.tree_util.Partial, scale: float) -> jax.tree_util.Partial:
    """`predict(params, pairs)` of how similar each first text is to each second one: `scale` times their cosines.

    `pairs` is a `TokenBatch` of shape (2, N, L), the predictions are (N, N). With cross-entropy against 0 ... N - 1 the
    risk is the contrastive loss of sentence encoders, each pair told from the N - 1 others in the batch
    (van den Oord, Li, Vinyals, arXiv 1807.03748). `encode` is `from_linen` of a `TextEncoder`.
    """
    return jax.tree_util.Partial(_pair_logits, jnp.asarray(scale), encode)


def _pair_logits(
    scale: Float[Array, ""], encode: jax.tree_util.Partial, params: dict, pairs: TokenBatch
) -> Float[Array, "N N"]:
    first, second = encode(params, pairs)
    return scale.astype(first.dtype) * (first @ second.T)
