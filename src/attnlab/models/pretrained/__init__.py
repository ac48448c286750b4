"""Pretrained models from local files: GPT-2, GPT-NeoX (Pythia), Llama (SmolLM2) and BERT (MiniLM)."""

from attnlab.models.pretrained.bert import bert_config
from attnlab.models.pretrained.loading import FAMILIES, Pretrained, load, load_config, minilm, smollm2
from attnlab.models.pretrained.tokenizers import Tokenizer, next_tokens, wordpiece

__all__ = [
    "FAMILIES",
    "Pretrained",
    "Tokenizer",
    "bert_config",
    "load",
    "load_config",
    "minilm",
    "next_tokens",
    "smollm2",
    "wordpiece",
]
