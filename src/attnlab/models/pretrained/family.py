"""What a family of pretrained models is, and the tensors that all of them are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flax import linen as nn

from attnlab.models.pretrained.checkpoint import Take
from attnlab.models.pretrained.settings import Settings
from attnlab.models.transformer import EmbeddingConfig


@dataclass(frozen=True)
class Family:
    """How the checkpoints of a family become ours.

    Attributes:
        config: of the settings; raises `ValueError` for one that is not implemented.
        params: `params(config, take)`, the parameters without stacked layers, in NumPy.
        module: the model of a config.
        prefixes: before the published names of tensors, where a model with a head holds them.
        passed_over: patterns of tensors that are no parameters of the module.
        copies: tensors that must equal others where the unembedding is tied to the embedding.
        renamed: names that some files have, and the one that all others have.
    """

    config: Callable[[Settings], EmbeddingConfig]
    params: Callable[[EmbeddingConfig, Take], dict]
    module: type[nn.Module]
    prefixes: tuple[str, ...]
    passed_over: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def linear_map(take: Take, ours: str, theirs: str, inputs: int, outputs: int, bias: bool = False) -> dict:
    """The matrix `ours` (inputs x outputs), and its bias, from torch's, which act on columns."""
    found = {ours: take(f"{theirs}.weight", outputs, inputs).T}
    return found | {f"{ours}_bias": take(f"{theirs}.bias", outputs)} if bias else found


def layer_norm(take: Take, theirs: str, width: int) -> dict[str, np.ndarray]:
    """The parameters of a LayerNorm."""
    return {"scale": take(f"{theirs}.weight", width), "bias": take(f"{theirs}.bias", width)}


def all_layers(config: EmbeddingConfig, layer: Callable[[int], dict]) -> dict[str, dict]:
    """`layer_0`, `layer_1`, ... of a transformer."""
    return {f"layer_{index}": layer(index) for index in range(config.transformer.layers)}
