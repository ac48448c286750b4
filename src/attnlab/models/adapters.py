"""Adapters from the ways people write models to `predict(params, inputs)`."""

from dataclasses import dataclass
from typing import Any

from flax import linen as nn
from flax import nnx
from jax.tree_util import Partial

from attnlab.types import Params, PyTree


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
