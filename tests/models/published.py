"""Tiny models of every family by their published settings, and tensors that a formula fills, for the tests and for the
script that makes their reference."""

import zlib

import numpy as np

SHARED = {"vocab_size": 19, "initializer_range": 0.02}
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 100.0,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    **SHARED,
}
SETTINGS = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 12,
        "n_inner": 20,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **SHARED,
    },
    "gpt_neox": NEOX,
    "gpt_neox_sequential": {**NEOX, "use_parallel_residual": False, "num_hidden_layers": 1},
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "tie_word_embeddings": True,
        **SHARED,
    },
    "bert": {
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 12,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        **SHARED,
    },
}


def filled(name, shape):
    """A tensor by its published name: scales of norms around one, everything else around zero, in float32."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    is_scale = name.endswith("weight") and len(shape) == 1
    return (0.4 * random.standard_normal(shape) + is_scale).astype(np.float32)


def tokens_of(name):
    """Tokens (2, 7), and where they are not padding, whose place only the encoder of texts is told."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return random.integers(0, SHARED["vocab_size"], (2, 7)), np.arange(7) < np.array([[7], [4]])
