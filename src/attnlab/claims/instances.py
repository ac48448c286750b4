"""Random instances that the claims about one attention layer share."""

import jax
import jax.flatten_util
from jaxtyping import Array

from attnlab.losses import LOSSES
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import Objective, objective
from attnlab.types import Params, PRNGKey

PAPER = "Ormaniec, Dangel, Singh, arXiv 2410.10986"
SOFTMAX = AttentionConfig(key_dim=3, value_dim=4)
LINEAR = AttentionConfig(key_dim=3, value_dim=4, weights="linear")
TOKENS, WIDTH = 6, 5

VV, QQ, KK = ("value", "value"), ("query", "query"), ("key", "key")
QK, VQ, VK = ("query", "key"), ("value", "query"), ("value", "key")
Pair = tuple[str, str]

ROUNDING = "an identity in float64, to rounding"
"""Why a tolerance of 1e-10 or less."""


def instance(key: PRNGKey, config: AttentionConfig, size: int = 1) -> tuple[Params, Array, Array]:
    """Gaussian weights, tokens and targets for one sequence, `size` times as long."""
    token_key, target_key, init_key = jax.random.split(key, 3)
    inputs = jax.random.normal(token_key, (size * TOKENS, WIDTH))
    features = config.heads * config.value_dim if config.output_dim is None else config.output_dim
    targets = jax.random.normal(target_key, (size * TOKENS, features))
    return SelfAttention(config).init(init_key, inputs)["params"], inputs, targets


def layer_objective(config: AttentionConfig, inputs: Array, targets: Array, loss: str = "square") -> Objective:
    """The objective of one layer by itself."""
    return objective(from_linen(SelfAttention(config)), LOSSES[loss], inputs, targets)
