"""The settings of a checkpoint: which are needed, and which values of the others are implemented."""

import re
import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from attnlab.checks import unknown_name
from attnlab.models.positions import BASE

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Ours by the names that `config.json` has."""

Settings = Mapping[str, Any]

WITHOUT_EFFECT = re.compile(
    r"_.*|.*dropout.*|.*_pdrop|.*_token_id|summary_.*|.*torch_dtype|dtype|transformers.*|architectures|model_type|"
    r"initializer_range|n_ctx|use_cache|gradient_checkpointing|pretraining_tp|reorder_and_upcast_attn|is_llama_config|"
    r"auto_map|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|return_dict|output_.*|"
    r"tokenizer_class|prefix|chunk_size_feed_forward|pruned_heads|torchscript|use_bfloat16|quantization_config"
)
"""Settings that change no output in evaluation: of training, of the text around, of the library that wrote them."""


class Read(Mapping[str, Any]):
    """Settings that know which of them were read."""

    def __init__(self, settings: Settings):
        self._settings, self._read = settings, set[str]()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def warn_of_the_rest(self, source: object) -> None:
        """Warn of settings that nobody read, unless they are known to have no effect."""
        rest = sorted(name for name in self if name not in self._read and not WITHOUT_EFFECT.fullmatch(name))
        if rest:
            named = ", ".join(f"{name} = {self._settings[name]!r}" for name in rest)
            warnings.warn(
                f"{source}: the settings {named} are not known here, and not heeded; see that the model does not need "
                "them, by its outputs on some text.",
                stacklevel=4,
            )


def needed(settings: Settings, name: str) -> Any:
    """The setting `name`; raises `ValueError`, with the nearest name there is, where it is missing."""
    if settings.get(name) is None:
        near = get_close_matches(name, list(settings), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"the settings lack {name}; expected it among {', '.join(settings) or '(none)'}.{hint}")
    return settings[name]


def head_width(width: int, heads: int) -> int:
    """The width of each head; raises `ValueError` where heads do not divide the width."""
    if width % heads:
        raise ValueError(f"the settings have a width of {width} and {heads} heads; expected a multiple of the heads.")
    return width // heads


def activation(settings: Settings, name: str) -> str:
    """Our name of the activation that the setting `name` has."""
    value = needed(settings, name)
    if value not in ACTIVATIONS:
        raise unknown_name(f"implementation of {name}", value, ACTIVATIONS)
    return ACTIVATIONS[value]


def only(settings: Settings, **implemented: Any) -> None:
    """Raise `ValueError` for a setting with another value than the one implemented; one that is missing has it."""
    for name, value in {"quantization_config": None, **implemented}.items():
        if name in settings and settings[name] != value:
            raise ValueError(f"the settings have {name} = {settings[name]!r}; only {value!r} is implemented.")


def rotary(settings: Settings) -> tuple[float, float | None]:
    """The base of rotary embeddings, and the share of each head that turns where the settings have it.

    Raises `ValueError` for frequencies that are scaled.
    """
    both: dict[str, Any] = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    kind = both.get("rope_type", both.get("type", settings.get("rope_type", "default")))
    if kind not in ("default", "none"):
        raise ValueError(f"the settings scale rotary frequencies by the rule {kind!r}; only 'default' is implemented.")
    base: Any = both.get("rope_theta", settings.get("rope_theta", settings.get("rotary_emb_base", BASE)))
    return float(base), both.get("partial_rotary_factor", settings.get("rotary_pct"))
