"""GGUF files: settings and names as `config.json` and safetensors would have them, quantised tensors as float32."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.checks import unknown_name
from attnlab.models.pretrained.checkpoint import Checkpoint, Stored
from attnlab.models.pretrained.tokenizers import tokenizer_of_gguf

Change = Callable[[np.ndarray, dict[str, Any]], np.ndarray]


@dataclass(frozen=True)
class Architecture:
    """How a GGUF file writes a family.

    Attributes:
        settings: the name in `config.json` of each value under the name of the architecture.
        names: the published name of each tensor, without `.weight` and `.bias`; of the tensors of layers, from its
            name after `blk.0.`, `{}` being the number.
        changes: what makes a tensor, by its own name, what is published (the same shape up to a transposition).
        constants: settings that a GGUF file leaves to its architecture.
    """

    settings: dict[str, str]
    names: dict[str, str]
    changes: dict[str, Change]
    constants: dict[str, Any]


def _neighbours_to_halves(heads: str) -> Change:
    """Rows of queries or keys whose pairs turn as neighbours, in the order in which they turn as halves."""

    def change(rows: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
        count = settings[heads]
        return rows.reshape(count, len(rows) // count // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)

    return change


def _transposed(matrix: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    return matrix.T if matrix.ndim == 2 else matrix


LLAMA = Architecture(
    settings={
        "vocab_size": "vocab_size",
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
        "rope.dimension_count": "rotary_dim",
        "attention.key_length": "head_dim",
        "attention.value_length": "value_dim",
        "rope.scaling.type": "rope_type",
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_experts",
    },
    names={
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "output": "lm_head",
        "attn_norm": "layers.{}.input_layernorm",
        "ffn_norm": "layers.{}.post_attention_layernorm",
        "attn_q": "layers.{}.self_attn.q_proj",
        "attn_k": "layers.{}.self_attn.k_proj",
        "attn_v": "layers.{}.self_attn.v_proj",
        "attn_output": "layers.{}.self_attn.o_proj",
        "ffn_gate": "layers.{}.mlp.gate_proj",
        "ffn_up": "layers.{}.mlp.up_proj",
        "ffn_down": "layers.{}.mlp.down_proj",
    },
    changes={
        "attn_q": _neighbours_to_halves("num_attention_heads"),
        "attn_k": _neighbours_to_halves("num_key_value_heads"),
    },
    constants={"model_type": "llama", "hidden_act": "silu"},
)
GPT2 = Architecture(
    settings={
        "vocab_size": "vocab_size",
        "block_count": "n_layer",
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    names={
        "token_embd": "wte",
        "position_embd": "wpe",
        "output_norm": "ln_f",
        "output": "lm_head",
        "attn_norm": "h.{}.ln_1",
        "attn_qkv": "h.{}.attn.c_attn",
        "attn_output": "h.{}.attn.c_proj",
        "ffn_norm": "h.{}.ln_2",
        "ffn_up": "h.{}.mlp.c_fc",
        "ffn_down": "h.{}.mlp.c_proj",
    },
    changes=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _transposed),
    constants={"model_type": "gpt2", "activation_function": "gelu_new"},
)
ARCHITECTURES = {"llama": LLAMA, "gpt2": GPT2}


def gguf_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a GGUF file. Raises `ValueError` for another architecture, or a file that is cut short."""
    reader = _reader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    kind = metadata.get("general.architecture", "")
    if kind not in ARCHITECTURES:
        raise unknown_name("architecture of GGUF files that is read", kind, ARCHITECTURES)
    architecture, prefix = ARCHITECTURES[kind], f"{kind}."
    held = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    unknown = sorted(set(held) - set(architecture.settings))
    if unknown:
        raise ValueError(f"{path} has the settings {', '.join(unknown)}, which are not implemented for {kind}.")
    settings = architecture.constants | {architecture.settings[name]: value for name, value in held.items()}
    sources = {tensor.name: tensor for tensor in reader.tensors}
    if "vocab_size" not in settings and "token_embd.weight" in sources:
        settings["vocab_size"] = int(sources["token_embd.weight"].shape[1])
    settings["tie_word_embeddings"] = "output.weight" not in sources
    tensors = dict(_published(name, tensor, architecture, settings) for name, tensor in sources.items())
    has_tokenizer = "tokenizer.ggml.tokens" in reader.fields
    return Checkpoint(path, settings, tensors, partial(tokenizer_of_gguf, reader.fields) if has_tokenizer else None)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{path} is read by the package gguf; run pip install "attnlab[pretrained]".'
        ) from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no whole GGUF file ({error}); is it cut short?") from error


def _published(name: str, tensor: Any, architecture: Architecture, settings: dict[str, Any]) -> tuple[str, Stored]:
    """A tensor by its published name; one that the architecture has not keeps its own, and is left over."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    number, stem, ending = match.groups() if match else (None, "", "")
    shape = tuple(int(size) for size in reversed(tensor.shape))
    known = architecture.names.get(stem)
    if known is None or ("{}" in known) != (number is not None):
        return name, Stored(shape, tensor.tensor_type.name, lambda: _values(tensor))
    change = architecture.changes.get(stem)
    if change is _transposed:
        shape = shape[::-1]
    read = (lambda: change(_values(tensor), settings)) if change else (lambda: _values(tensor))
    return f"{known.format(number)}.{ending}", Stored(shape, tensor.tensor_type.name, read)


def _values(tensor: Any) -> np.ndarray:
    from gguf.quants import dequantize

    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
