"""What an optimizer remembers, found anywhere inside its optax state: chains, groups, injected hyperparameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from attnlab.dynamics.preconditioners import is_block
from attnlab.types import Params, PyTree


class Sides(NamedTuple):
    """Averages over the past of G G^T and G^T G of one matrix G (m, n) of gradients."""

    left: Float[Array, "m m"]
    right: Float[Array, "n n"]


def parts_of(state: optax.OptState, kind: type) -> list[Any]:
    """The parts of a composed optax state that are of this `kind`: one, or one for each group of parameters."""
    parts = [part for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind)) if isinstance(part, kind)]
    if not parts:
        raise ValueError(
            f"the optimizer state holds no part of type {kind.__name__}; expected one, or one for each group of "
            "parameters. Pass the state that optimizer.update returned."
        )
    return parts


def learning_rate_in(state: optax.OptState) -> Array:
    """The learning rate among the hyperparameters of a composed optax state."""
    kind = optax.InjectStatefulHyperparamsState
    rates = [part.hyperparams for part in parts_of(state, kind) if "learning_rate" in part.hyperparams]
    if len(rates) != 1:
        raise ValueError(
            f"the optimizer state holds {len(rates)} learning rates; expected one. Pass the part that is meant, of a "
            "rule's transformation."
        )
    return rates[0]["learning_rate"]


def steps_of(part: Any) -> Array:
    """The steps that a part counts; 0 where it counts none."""
    return part.count if "count" in part._fields else jnp.array(0)  # every tuple has a method count


def joined(parts: list[Params]) -> Params:
    """One tree from those of several groups, each of which masks the parameters of the others."""

    def join(path: tuple, *entries: PyTree) -> PyTree:
        held = [entry for entry in entries if not is_masked(entry)]
        if len(held) > 1:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"the optimizer state holds {len(held)} parts that move {where}; expected one for each parameter. Pass "
                "the part that is meant."
            )
        return held[0] if held else entries[0]

    return jax.tree.map_with_path(join, *parts, is_leaf=_is_entry)


def is_masked(node: PyTree) -> bool:
    """Whether optax left this parameter to another group."""
    return isinstance(node, optax.MaskedNode)


def _is_entry(node: PyTree) -> bool:
    return is_masked(node) or is_block(node) or isinstance(node, Sides)


def filled(tree: PyTree, default: Params) -> Params:
    """The tree with `default`'s leaf for each parameter that no part holds."""
    return jax.tree.map(lambda held, leaf: leaf if is_masked(held) else held, tree, default, is_leaf=_is_entry)
