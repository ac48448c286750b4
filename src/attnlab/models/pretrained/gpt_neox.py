"""GPT-NeoX (Black et al., arXiv 2204.06745), the architecture of Pythia: rotary positions on a share of each head,
attention and MLP in parallel, a separate unembedding."""

from attnlab.models.attention import AttentionConfig
from attnlab.models.positions import Rotary
from attnlab.models.pretrained.checkpoint import Take
from attnlab.models.pretrained.family import Family, all_layers, layer_norm, linear_map
from attnlab.models.pretrained.settings import Settings, activation, head_width, needed, only, rotary
from attnlab.models.transformer import EmbeddingConfig, LanguageModel, LanguageModelConfig, TransformerConfig

ROTARY_SHARE = 0.25
"""Of a head, where the settings leave it out."""


def gpt_neox_config(settings: Settings) -> LanguageModelConfig:
    """The config of GPT-NeoX's settings."""
    only(settings, attention_bias=True)
    width, heads = needed(settings, "hidden_size"), needed(settings, "num_attention_heads")
    scheme = {"init": "normal", "gain": settings.get("initializer_range", 0.02)}
    base, share = rotary(settings)
    head = head_width(width, heads)
    turns = Rotary(base, "halves", ROTARY_SHARE if share is None else share)
    attention = AttentionConfig(head, head, heads, causal=True, output_dim=width, bias=True, rotary=turns, **scheme)
    blocks = TransformerConfig(
        attention,
        needed(settings, "num_hidden_layers"),
        needed(settings, "intermediate_size"),
        activation=activation(settings, "hidden_act"),
        final_norm=True,
        parallel=settings.get("use_parallel_residual", True),
        bias=True,
        epsilon=needed(settings, "layer_norm_eps"),
        **scheme,
    )
    size = (needed(settings, "vocab_size"), needed(settings, "max_position_embeddings"), width)
    tied = settings.get("tie_word_embeddings", False)
    return LanguageModelConfig(blocks, *size, positions="none", tied=tied, embedding_std=scheme["gain"], **scheme)


def gpt_neox_params(config: EmbeddingConfig, take: Take) -> dict:
    """The parameters from GPT-NeoX's tensors."""
    assert isinstance(config, LanguageModelConfig)
    width = config.width
    params: dict = {
        "token_embedding": take("embed_in.weight", config.vocabulary, width),
        "transformer": all_layers(config, lambda index: _layer(config, take, f"layers.{index}")),
    }
    params["transformer"]["final_norm"] = layer_norm(take, "final_layer_norm", width)
    return params if config.tied else params | {"unembedding": take("embed_out.weight", config.vocabulary, width).T}


def _layer(config: EmbeddingConfig, take: Take, layer: str) -> dict:
    width, hidden, heads = config.width, config.transformer.mlp_width, config.transformer.attention.heads
    assert hidden is not None
    # Head after head, each with its rows of queries, keys and values.
    stacked = f"{layer}.attention.query_key_value"
    matrices = take(f"{stacked}.weight", 3 * width, width).reshape(heads, 3, -1, width)
    biases = take(f"{stacked}.bias", 3 * width).reshape(heads, 3, -1)
    attention: dict = {}
    for number, name in enumerate(("query", "key", "value")):
        attention[name] = matrices[:, number].reshape(width, width).T
        attention[f"{name}_bias"] = biases[:, number].reshape(width)
    return {
        "attention": attention | linear_map(take, "output", f"{layer}.attention.dense", width, width, bias=True),
        "mlp": linear_map(take, "up", f"{layer}.mlp.dense_h_to_4h", width, hidden, bias=True)
        | linear_map(take, "down", f"{layer}.mlp.dense_4h_to_h", hidden, width, bias=True),
        "attention_norm": layer_norm(take, f"{layer}.input_layernorm", width),
        "mlp_norm": layer_norm(take, f"{layer}.post_attention_layernorm", width),
    }


GPT_NEOX = Family(
    gpt_neox_config,
    gpt_neox_params,
    LanguageModel,
    prefixes=("gpt_neox.",),
    # The causal mask, its value, and the frequencies of the rotary embedding.
    passed_over=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r"rotary_emb\.inv_freq"),
    copies={"embed_out.weight": "embed_in.weight"},
    renamed={"lm_head.weight": "embed_out.weight"},
)
