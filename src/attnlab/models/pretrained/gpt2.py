"""GPT-2 (Radford et al., 2019): learned positions, pre-norm, tied unembedding."""

import numpy as np

from attnlab.models.attention import AttentionConfig
from attnlab.models.pretrained.checkpoint import Take
from attnlab.models.pretrained.family import Family, all_layers, layer_norm
from attnlab.models.pretrained.settings import Settings, activation, head_width, needed, only
from attnlab.models.transformer import EmbeddingConfig, LanguageModel, LanguageModelConfig, TransformerConfig


def gpt2_config(settings: Settings) -> LanguageModelConfig:
    """The config of GPT-2's settings."""
    only(settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width, heads = needed(settings, "n_embd"), needed(settings, "n_head")
    scheme = {"init": "normal", "gain": settings.get("initializer_range", 0.02)}
    head = head_width(width, heads)
    attention = AttentionConfig(head, head, heads, causal=True, output_dim=width, bias=True, **scheme)
    blocks = TransformerConfig(
        attention,
        needed(settings, "n_layer"),
        settings.get("n_inner") or 4 * width,
        activation=activation(settings, "activation_function"),
        final_norm=True,
        bias=True,
        epsilon=needed(settings, "layer_norm_epsilon"),
        **scheme,
    )
    size = (needed(settings, "vocab_size"), needed(settings, "n_positions"), width)
    tied = settings.get("tie_word_embeddings", True)
    return LanguageModelConfig(blocks, *size, tied=tied, embedding_std=scheme["gain"], **scheme)


def gpt2_params(config: EmbeddingConfig, take: Take) -> dict:
    """The parameters from GPT-2's tensors, whose matrices act on rows, as ours do."""
    assert isinstance(config, LanguageModelConfig)
    width = config.width
    params: dict = {
        "token_embedding": take("wte.weight", config.vocabulary, width),
        "position_embedding": take("wpe.weight", config.length, width),
        "transformer": all_layers(config, lambda index: _layer(config, take, f"h.{index}")),
    }
    params["transformer"]["final_norm"] = layer_norm(take, "ln_f", width)
    return params if config.tied else params | {"unembedding": take("lm_head.weight", config.vocabulary, width).T}


def _layer(config: EmbeddingConfig, take: Take, layer: str) -> dict:
    width, hidden = config.width, config.transformer.mlp_width
    assert hidden is not None
    matrices = np.split(take(f"{layer}.attn.c_attn.weight", width, 3 * width), 3, axis=1)
    biases = np.split(take(f"{layer}.attn.c_attn.bias", 3 * width), 3)
    names = ("query", "key", "value")
    return {
        "attention": dict(zip(names, matrices, strict=True))
        | {f"{name}_bias": bias for name, bias in zip(names, biases, strict=True)}
        | _rows(take, "output", f"{layer}.attn.c_proj", width, width),
        "mlp": _rows(take, "up", f"{layer}.mlp.c_fc", width, hidden)
        | _rows(take, "down", f"{layer}.mlp.c_proj", hidden, width),
        "attention_norm": layer_norm(take, f"{layer}.ln_1", width),
        "mlp_norm": layer_norm(take, f"{layer}.ln_2", width),
    }


def _rows(take: Take, ours: str, theirs: str, inputs: int, outputs: int) -> dict:
    return {ours: take(f"{theirs}.weight", inputs, outputs), f"{ours}_bias": take(f"{theirs}.bias", outputs)}


GPT2 = Family(
    gpt2_config,
    gpt2_params,
    LanguageModel,
    prefixes=("transformer.",),
    passed_over=(r"h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask, and its value
    copies={"lm_head.weight": "wte.weight"},
)
