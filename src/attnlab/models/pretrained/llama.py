"""Llama (Touvron et al., arXiv 2302.13971), the architecture of SmolLM2: RMSNorm, rotary positions, a gated MLP, keys
and values shared by several queries."""

from attnlab.models.attention import AttentionConfig
from attnlab.models.positions import Rotary
from attnlab.models.pretrained.checkpoint import Take
from attnlab.models.pretrained.family import Family, all_layers, linear_map
from attnlab.models.pretrained.settings import Settings, activation, head_width, needed, only, rotary
from attnlab.models.transformer import EmbeddingConfig, LanguageModel, LanguageModelConfig, TransformerConfig


def llama_config(settings: Settings) -> LanguageModelConfig:
    """The config of Llama's settings."""
    only(settings, attention_bias=False, mlp_bias=False, sliding_window=None, num_experts=None, rope_interleaved=False)
    width, heads = needed(settings, "hidden_size"), needed(settings, "num_attention_heads")
    scheme = {"init": "normal", "gain": settings.get("initializer_range", 0.02)}
    base, share = rotary(settings)
    head = settings.get("head_dim") or head_width(width, heads)
    only(settings, value_dim=head, rotary_dim=head)
    attention = AttentionConfig(
        head,
        head,
        heads,
        causal=True,
        output_dim=width,
        key_value_heads=settings.get("num_key_value_heads") or heads,
        rotary=Rotary(base, "halves", 1.0 if share is None else share),
        **scheme,
    )
    blocks = TransformerConfig(
        attention,
        needed(settings, "num_hidden_layers"),
        needed(settings, "intermediate_size"),
        mlp="gated",
        activation=activation(settings, "hidden_act"),
        normalization="rms_norm",
        final_norm=True,
        epsilon=needed(settings, "rms_norm_eps"),
        **scheme,
    )
    size = (needed(settings, "vocab_size"), needed(settings, "max_position_embeddings"), width)
    tied = settings.get("tie_word_embeddings", False)
    return LanguageModelConfig(blocks, *size, positions="none", tied=tied, embedding_std=scheme["gain"], **scheme)


def llama_params(config: EmbeddingConfig, take: Take) -> dict:
    """The parameters from Llama's tensors."""
    assert isinstance(config, LanguageModelConfig)
    params: dict = {
        "token_embedding": take("embed_tokens.weight", config.vocabulary, config.width),
        "transformer": all_layers(config, lambda index: _layer(config, take, f"layers.{index}")),
    }
    params["transformer"]["final_norm"] = {"scale": take("norm.weight", config.width)}
    return (
        params if config.tied else params | {"unembedding": take("lm_head.weight", config.vocabulary, config.width).T}
    )


def _layer(config: EmbeddingConfig, take: Take, layer: str) -> dict:
    width, hidden, attention = config.width, config.transformer.mlp_width, config.transformer.attention
    assert hidden is not None
    queries, shared = (count * attention.key_dim for count in (attention.heads, attention.groups))
    return {
        "attention": linear_map(take, "query", f"{layer}.self_attn.q_proj", width, queries)
        | linear_map(take, "key", f"{layer}.self_attn.k_proj", width, shared)
        | linear_map(take, "value", f"{layer}.self_attn.v_proj", width, shared)
        | linear_map(take, "output", f"{layer}.self_attn.o_proj", queries, width),
        "mlp": linear_map(take, "gate", f"{layer}.mlp.gate_proj", width, hidden)
        | linear_map(take, "up", f"{layer}.mlp.up_proj", width, hidden)
        | linear_map(take, "down", f"{layer}.mlp.down_proj", hidden, width),
        "attention_norm": {"scale": take(f"{layer}.input_layernorm.weight", width)},
        "mlp_norm": {"scale": take(f"{layer}.post_attention_layernorm.weight", width)},
    }


LLAMA = Family(
    llama_config,
    llama_params,
    LanguageModel,
    prefixes=("model.",),
    passed_over=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),  # the frequencies of the rotary embedding
    copies={"lm_head.weight": "embed_tokens.weight"},
)
