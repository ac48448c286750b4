"""Adapters from the ways people write models to `predict(params, inputs)`, and read-outs of what they predict."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_range
from attnlab.types import Params, Predict, PyTree


def from_function(function: Callable[..., PyTree], *bound: PyTree) -> Partial:
    """`predict(params, inputs)` of a function `function(*bound, params, inputs)`.

    Whatever is `bound` is held fixed and crosses `jit` as an argument, where a closure would be compiled in.
    """
    return function if isinstance(function, Partial) and not bound else Partial(function, *bound)


@dataclass(frozen=True)
class _LinenPredict:
    """Apply a linen module; hashed by the module, so that equal modules share one compiled function."""

    module: nn.Module
    method: str | None

    def __call__(self, collections: dict[str, PyTree], params: Params, inputs: PyTree) -> PyTree:
        method = None if self.method is None else getattr(self.module, self.method)
        return self.module.apply({"params": params, **collections}, inputs, method=method)


def from_linen(module: nn.Module, *, method: str | None = None, **collections: PyTree) -> Partial:
    """`predict(params, inputs)` of a linen module, where `params` is `module.init(key, inputs)["params"]`.

    `method` names another method than `__call__`; further variable collections (`batch_stats=...`) are held fixed.
    """
    return Partial(_LinenPredict(module, method), collections)


@dataclass(frozen=True)
class _NnxPredict:
    """Apply an nnx model of a fixed graph."""

    graph: Any

    def __call__(self, rest: PyTree, params: Params, inputs: PyTree) -> PyTree:
        return nnx.merge(self.graph, nnx.State(params), rest)(inputs)


def from_nnx(model: nnx.Module) -> tuple[Partial, Params]:
    """`predict(params, inputs)` of an nnx model, and its parameters (all `nnx.Param`) as a pure nested dict.

    All other state (batch statistics, keys) is held fixed as it stands.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return Partial(_NnxPredict(graph), rest), nnx.to_pure_dict(params)


@dataclass(frozen=True)
class _AtPositions:
    """Some tokens' outputs of another `predict`."""

    positions: tuple[int, ...]

    def __call__(self, predict: Predict, params: Params, inputs: PyTree) -> Float[Array, "*B P O"]:
        outputs = predict(params, inputs)
        length = outputs.shape[-2]
        check_range("the last of positions", max(self.positions), 0, length - 1, f"There are {length} tokens.")
        return outputs[..., jnp.asarray(self.positions), :]


def at_positions(predict: Predict, positions: Iterable[int]) -> Partial:
    """`predict` whose outputs (..., L, O) are read at some `positions` (whole numbers below L) only: (..., P, O).

    With a loss that averages over all positions, the risk is that of these tokens alone.
    """
    positions = tuple(positions)
    if not positions or min(positions) < 0:
        raise ValueError(f"positions are {positions}; expected at least one whole number, none negative.")
    return Partial(_AtPositions(positions), from_function(predict))


def _mean_over_tokens(predict: Predict, params: Params, inputs: PyTree) -> Float[Array, "*B O"]:
    return jnp.mean(predict(params, inputs), axis=-2)


def mean_over_tokens(predict: Predict) -> Partial:
    """`predict` whose outputs (..., L, O) are averaged over the tokens: one prediction (..., O) for a sequence."""
    return Partial(_mean_over_tokens, from_function(predict))
