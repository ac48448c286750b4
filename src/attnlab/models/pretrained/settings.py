"""The settings of a checkpoint: which are needed, and which values of the others are implemented."""

from collections.abc import Mapping
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
