"""Addition of two numbers through one attention layer."""

from typing import Any, Literal

import jax

from attnlab.checks import unknown_name
from attnlab.data.addition import VOCABULARY, addition, answer_positions
from attnlab.losses import cross_entropy
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import Objective, objective
from attnlab.types import Params, PRNGKey

WIDTH = 16
ADDITION_KINDS = ("softmax", "linear", "pre-LN")
"""Kinds of attention layer for `addition_attention`; the last is softmax attention behind a LayerNorm."""


def addition_attention(key: PRNGKey, kind: str, count: int = 64, digits: int = 5) -> tuple[Objective, Params]:
    """Addition of two numbers through one causal attention layer with a residual, at initialisation.

    `kind` is one of `ADDITION_KINDS`. Width 16, weights N(0, 0.64 / width), embeddings N(0, 1): scale the two
    embeddings to see how the blocks of the Hessian grow with them. Cross-entropy of the answer.
    """
    if kind not in ADDITION_KINDS:
        raise unknown_name("kind of attention layer", kind, ADDITION_KINDS)
    scheme: dict[str, Any] = {"init": "normal", "gain": 0.8 * WIDTH**-0.5}
    weights: Literal["softmax", "linear"] = "linear" if kind == "linear" else "softmax"
    attention = AttentionConfig(WIDTH, WIDTH, causal=True, output_dim=WIDTH, weights=weights, **scheme)
    blocks = TransformerConfig(attention, norm="pre" if kind == "pre-LN" else None)
    model = LanguageModel(LanguageModelConfig(blocks, len(VOCABULARY), 3 * digits + 3, WIDTH, **scheme))
    data_key, init_key = jax.random.split(key)
    data = addition(data_key, count, digits)
    params = model.init(init_key, data.inputs)["params"]
    return objective(at_positions(from_linen(model), answer_positions(digits)), cross_entropy, *data), params
