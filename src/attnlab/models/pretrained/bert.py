"""BERT (Devlin et al., arXiv 1810.04805), the architecture of MiniLM, as an encoder of texts."""

from attnlab.models.attention import AttentionConfig
from attnlab.models.pretrained.checkpoint import Take
from attnlab.models.pretrained.family import Family, all_layers, layer_norm, linear_map
from attnlab.models.pretrained.settings import Settings, activation, head_width, needed, only
from attnlab.models.text_encoder import TextEncoder
from attnlab.models.transformer import EmbeddingConfig, TransformerConfig


def bert_config(
    *,
    layers: int = 6,
    width: int = 384,
    heads: int = 12,
    mlp_width: int | None = None,
    vocabulary: int = 30522,
    length: int = 512,
    activation: str = "gelu",
    epsilon: float = 1e-12,
    std: float = 0.02,
) -> EmbeddingConfig:
    """BERT's architecture and initialisation, every matrix N(0, std^2).

    By default of the size of MiniLM (Wang et al., arXiv 2002.10957), with heads of width / heads and an MLP of four
    times the width.
    """
    scheme = {"init": "normal", "gain": std}
    size = head_width(width, heads)
    head = AttentionConfig(size, size, heads, output_dim=width, bias=True, **scheme)  # type: ignore[arg-type]
    hidden = mlp_width or 4 * width
    blocks = TransformerConfig(
        head,
        layers,
        hidden,
        activation=activation,
        norm="post",
        bias=True,
        epsilon=epsilon,
        **scheme,  # type: ignore[arg-type]
    )
    return EmbeddingConfig(blocks, vocabulary, length, width, embedding_std=std)


SEGMENTS = 2
"""That BERT tells apart: of a pair of texts."""


def bert_config_of(settings: Settings) -> EmbeddingConfig:
    """The config of BERT's settings."""
    only(
        settings,
        position_embedding_type="absolute",
        type_vocab_size=SEGMENTS,
        is_decoder=False,
        add_cross_attention=False,
    )
    return bert_config(
        layers=needed(settings, "num_hidden_layers"),
        width=needed(settings, "hidden_size"),
        heads=needed(settings, "num_attention_heads"),
        mlp_width=needed(settings, "intermediate_size"),
        vocabulary=needed(settings, "vocab_size"),
        length=needed(settings, "max_position_embeddings"),
        activation=activation(settings, "hidden_act"),
        epsilon=needed(settings, "layer_norm_eps"),
        std=settings.get("initializer_range", 0.02),
    )


def bert_params(config: EmbeddingConfig, take: Take) -> dict:
    """The parameters of a `TextEncoder` from BERT's tensors.

    A text has one segment, the first of two, so that its segment embedding is the same at every token: it goes into the
    positions'.
    """
    width = config.width
    position = take("embeddings.position_embeddings.weight", config.length, width)
    segment = take("embeddings.token_type_embeddings.weight", SEGMENTS, width)
    return {
        "token_embedding": take("embeddings.word_embeddings.weight", config.vocabulary, width),
        "position_embedding": position + segment[:1],
        "embedding_norm": layer_norm(take, "embeddings.LayerNorm", width),
        "transformer": all_layers(config, lambda index: _layer(config, take, f"encoder.layer.{index}")),
    }


def _layer(config: EmbeddingConfig, take: Take, layer: str) -> dict:
    width, hidden = config.width, config.transformer.mlp_width
    assert hidden is not None
    attention: dict = {}
    for name in ("query", "key", "value"):
        attention |= linear_map(take, name, f"{layer}.attention.self.{name}", width, width, bias=True)
    return {
        "attention": attention | linear_map(take, "output", f"{layer}.attention.output.dense", width, width, bias=True),
        "mlp": linear_map(take, "up", f"{layer}.intermediate.dense", width, hidden, bias=True)
        | linear_map(take, "down", f"{layer}.output.dense", hidden, width, bias=True),
        "attention_norm": layer_norm(take, f"{layer}.attention.output.LayerNorm", width),
        "mlp_norm": layer_norm(take, f"{layer}.output.LayerNorm", width),
    }


BERT = Family(
    bert_config_of,
    bert_params,
    TextEncoder,
    prefixes=("bert.",),
    # Numbers of positions, and heads for other tasks than the embedding of a text.
    passed_over=(r"embeddings\.(position_ids|token_type_ids)", r"pooler\.dense\.(weight|bias)", r"cls\..*"),
)
