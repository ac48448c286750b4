"""Adapters from the ways people write models to `predict(params, inputs)`, and read-outs of what they predict."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.errors import (
    ApplyScopeInvalidVariablesStructureError,
    ApplyScopeInvalidVariablesTypeError,
    ModifyScopeVariableError,
    ScopeCollectionNotFound,
    ScopeParamNotFoundError,
    ScopeParamShapeError,
)
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_range
from attnlab.types import Params, Predict, PRNGKey, PyTree


def from_function(function: Callable[..., PyTree], *bound: PyTree) -> Partial:
    """`predict(params, inputs)` of a function `function(*bound, params, inputs)`.

    Whatever is `bound` is held fixed and crosses `jit` as an argument, where a closure would be compiled in.
    """
    return function if isinstance(function, Partial) and not bound else Partial(function, *bound)


MISFITS = (
    ApplyScopeInvalidVariablesStructureError,
    ApplyScopeInvalidVariablesTypeError,
    ScopeCollectionNotFound,
    ScopeParamNotFoundError,
    ScopeParamShapeError,
)
"""What flax raises for parameters of another module, or of inputs of another shape."""


@dataclass(frozen=True)
class _LinenPredict:
    """Apply a linen module; hashed by the module and its static keywords, so that equal ones share one program."""

    module: nn.Module
    method: str | None
    static: tuple[tuple[str, Any], ...]

    def __call__(self, bound: dict[str, PyTree], params: Params, inputs: PyTree) -> PyTree:
        method = None if self.method is None else getattr(self.module, self.method)
        variables, keywords = {**bound["variables"], "params": params}, {**dict(self.static), **bound["keywords"]}
        try:
            return self.module.apply(variables, inputs, method=method, rngs=bound["rngs"], **keywords)
        except MISFITS as error:
            what = str(error).partition(" (http")[0]
            raise ValueError(
                f"params do not fit the module: {what} Expected what module.init(key, inputs)['params'] returns for "
                "inputs of this shape."
            ) from error
        except ModifyScopeVariableError as error:
            raise ValueError(
                f"the module changes other variables than its parameters: {error} Curvature is that of a function of "
                f"the parameters alone. {EVALUATION}"
            ) from error


EVALUATION = (
    "Put it in evaluation mode: train=False, deterministic=True or use_running_average=True in linen, model.eval() in "
    "nnx, equinox.nn.inference_mode(model)."
)


def from_linen(
    module: nn.Module,
    variables: Mapping[str, PyTree] | None = None,
    *,
    method: str | None = None,
    rngs: Mapping[str, PRNGKey] | None = None,
    **keywords: Any,
) -> Partial:
    """`predict(params, inputs)` of a linen module, where `params` is `module.init(key, inputs)["params"]`.

    Args:
        module: the module; it is called on the inputs alone.
        variables: what `module.init` returned, or its other collections such as `batch_stats`: held fixed. A collection
            of parameters in it is passed over.
        method: another method than `__call__`, by its name.
        rngs: keys by name, as `apply` takes them. They are held fixed, so that every call draws the same numbers.
        keywords: of the call, such as `train=False`; arrays among them (a mask) are held fixed, everything else is
            static.

    A module in training mode is no function of the parameters alone: batch norm couples the examples of a batch, which
    the self-checks of operators report, and changes its statistics, which is a `ValueError` here; dropout under fixed
    `rngs` is one network, drawn once. Take the module in evaluation mode (`train=False`) unless that is what is meant.
    Raises `TypeError` for a module that is none, or a static keyword that cannot be hashed.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, inputs = nn.Dense(1), jnp.ones((5, 2), jnp.float32)
        >>> params = model.init(jax.random.key(0), inputs)["params"]
        >>> al.from_linen(model)(params, inputs).shape
        (5, 1)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is a {type(module).__name__}; expected a flax.linen.Module. Take from_nnx, from_equinox or "
            "from_function for another model."
        )
    bound = {name: value for name, value in keywords.items() if _is_array_tree(value)}
    static = tuple(sorted((name, value) for name, value in keywords.items() if name not in bound))
    _check_hashable(dict(static))
    others = {name: tree for name, tree in (variables or {}).items() if name != "params"}
    rngs = None if rngs is None else dict(rngs)
    return Partial(_LinenPredict(module, method, static), {"variables": others, "keywords": bound, "rngs": rngs})


def _is_array_tree(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)


def _check_hashable(keywords: Mapping[str, Any]) -> None:
    for name, value in keywords.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{name} is {value!r}, which cannot be hashed; expected arrays, or a static value. Make a list a tuple."
            ) from None


@dataclass(frozen=True)
class _NnxPredict:
    """Apply an nnx model of a fixed graph, whose parameters have the paths `paths`."""

    graph: Any
    paths: tuple[tuple[Any, ...], ...]

    def __call__(self, params_and_rest: tuple[PyTree, PyTree], params: Params, inputs: PyTree) -> PyTree:
        # New variables for every call: those of the model are changed by a module in training mode.
        template, rest = jax.tree.map(lambda leaf: leaf, params_and_rest)
        by_path = _by_path(params, self.paths)
        state = nnx.map_state(lambda path, variable: variable.replace(by_path[path]), template)
        return nnx.merge(self.graph, state, rest)(inputs)


def from_nnx(model: nnx.Module) -> tuple[Partial, Params]:
    """`predict(params, inputs)` of an nnx model, and its parameters (all `nnx.Param`) as a pure nested dict.

    All other state (batch statistics, keys and counters of dropout) is held fixed as it stands: every call starts from
    it anew, and the model itself is never changed. A model in training mode (`model.train()`) is then one network with
    the dropout of its current keys, and one whose batch norm couples the examples of a batch: the self-checks of
    operators report it. Take `model.eval()` first unless that is what is meant.

    Parameters are matched by their paths: a dict in another order, or with the numbers of layers as strings (as a
    checkpoint restores them), is the same point. `predict` raises `ValueError` for parameters that are missing, not of
    the model, or of another shape; this raises `TypeError` for a model that is none.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> predict, params = al.from_nnx(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
        >>> sorted(params), predict(params, jnp.ones((5, 2), params["bias"].dtype)).shape
        (['bias', 'kernel'], (5, 1))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a flax.nnx.Module. Take from_linen, from_equinox or "
            "from_function for another model."
        )
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    # Copies of the variables, whose arrays do not change.
    params, rest = jax.tree.map(lambda leaf: leaf, (params, rest))
    paths = tuple(path for path, _ in nnx.to_flat_state(params))
    return Partial(_NnxPredict(graph, paths), (params, rest)), nnx.to_pure_dict(params)


def _by_path(params: Params, paths: Iterable[tuple[Any, ...]]) -> dict[tuple[Any, ...], jax.Array]:
    """The leaves of a nested dict at these paths, whatever the order of its keys, numbers as numbers or strings."""
    found = {_as_text(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    wanted = {"/".join(map(str, path)): path for path in paths}
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unexpected or len(found) != len(jax.tree.leaves(params)):
        raise ValueError(
            f"params lack {missing or 'nothing'} of the model's parameters and hold {unexpected or 'nothing'} that the "
            "model has not; expected those that from_nnx returned. Restore them into that structure."
        )
    return {path: found[name] for name, path in wanted.items()}


def _as_text(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclass(frozen=True)
class _EquinoxPredict:
    """Apply an equinox module: `static` are the leaves that are no arrays, by their place."""

    structure: jax.tree_util.PyTreeDef
    static: tuple[tuple[int, Any], ...]
    vmap: bool

    def __call__(self, bound: dict[str, PyTree], params: Params, inputs: PyTree) -> PyTree:
        import equinox

        leaves = dict(self.static) | bound["arrays"]
        rest = jax.tree.unflatten(self.structure, [leaves[i] for i in range(len(leaves))])
        model = equinox.combine(params, rest)
        call = lambda example: model(example, **bound["keywords"])  # noqa: E731
        return jax.vmap(call)(inputs) if self.vmap else call(inputs)


def from_equinox(model: Any, *, vmap: bool = True, **keywords: PyTree) -> tuple[Partial, Params]:
    """`predict(params, inputs)` of an Equinox module, and its parameters: all its floating-point arrays, as a module.

    Everything else in the module is held fixed: other arrays cross `jit` as arguments, functions and options are
    static. A module is written for one example, and is mapped over the first axis of the inputs; `vmap=False` calls it
    on the whole batch. `keywords` of the call, such as `key=`, are held fixed, and the same for all examples.

    Take `equinox.nn.inference_mode(model)` unless dropout under a fixed key is what is meant. Modules with a state
    (`equinox.nn.BatchNorm`) return two things and take their state beside the inputs: wrap them in `from_function`.
    Raises `ImportError` without the package `equinox`, `TypeError` for a model that is not a module of it.

    Example:
        >>> import attnlab as al
        >>> import equinox
        >>> import jax
        >>> import jax.numpy as jnp
        >>> predict, params = al.from_equinox(equinox.nn.Linear(2, 1, key=jax.random.key(0)))
        >>> predict(params, jnp.ones((5, 2))).shape  # one example at a time, over the first axis
        (5, 1)
    """
    try:
        import equinox
    except ImportError as error:
        raise ImportError("from_equinox needs the package equinox: pip install equinox.") from error
    if not isinstance(model, equinox.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; expected an equinox.Module. Take from_linen, from_nnx or "
            "from_function for another model."
        )
    params, rest = equinox.partition(model, equinox.is_inexact_array)
    leaves, structure = jax.tree.flatten(rest)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
    static = tuple((i, leaf) for i, leaf in enumerate(leaves) if i not in arrays)
    bound = {"arrays": arrays, "keywords": keywords}
    return Partial(_EquinoxPredict(structure, static, vmap), bound), params


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

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> last = al.at_positions(lambda params, tokens: params * tokens, [2])
        >>> last(2.0, jnp.arange(3.0)[None, :, None]).tolist()
        [[[4.0]]]
    """
    positions = tuple(positions)
    if not positions or min(positions) < 0:
        raise ValueError(f"positions are {positions}; expected at least one whole number, none negative.")
    return Partial(_AtPositions(positions), from_function(predict))


def positions_read(predict: Partial) -> tuple[int, ...] | None:
    """The positions of a `predict` that `at_positions` made; None for another."""
    return predict.func.positions if isinstance(predict.func, _AtPositions) else None


def _mean_over_tokens(predict: Predict, params: Params, inputs: PyTree) -> Float[Array, "*B O"]:
    return jnp.mean(predict(params, inputs), axis=-2)


def mean_over_tokens(predict: Predict) -> Partial:
    """`predict` whose outputs (..., L, O) are averaged over the tokens: one prediction (..., O) for a sequence."""
    return Partial(_mean_over_tokens, from_function(predict))
