"""The optimizer inside the training loop: any of optax, with the hyperparameters that a run sets in its state."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from attnlab.checks import check_arrays
from attnlab.types import Params, Scalar


def check_optimizer(optimizer: Any) -> None:
    """Raise `TypeError` for what is no optax gradient transformation."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        what = "function" if callable(optimizer) else type(optimizer).__name__
        raise TypeError(
            f"optimizer is a {what}; expected an optax gradient transformation, such as optax.adam(1e-3). Of a "
            "rule of attnlab.dynamics that is its attribute transformation."
        )


def member_values(hyperparameters: Mapping[str, ArrayLike], members: int | None) -> dict[str, Array]:
    """The hyperparameters of one run as scalars, or of an ensemble with one entry a member.

    Raises `ValueError` for any other shape than a scalar or (members,).
    """
    if not isinstance(hyperparameters, Mapping):
        raise TypeError(f"hyperparameters is a {type(hyperparameters).__name__}; expected a dict of numbers by name.")
    for name, value in hyperparameters.items():
        check_arrays(f"hyperparameter '{name}'", value)
    values = {name: jnp.asarray(value) for name, value in hyperparameters.items()}
    expected = "a scalar, or keys of shape (m,) to train m members" if members is None else f"() or ({members},)"
    for name, value in values.items():
        if value.shape not in ((), () if members is None else (members,)):
            raise ValueError(f"hyperparameter '{name}' has shape {value.shape}; expected {expected}.")
    return values if members is None else {name: jnp.broadcast_to(v, (members,)) for name, v in values.items()}


def start_optimizer(
    optimizer: optax.GradientTransformation, params: Params, values: Mapping[str, Array]
) -> optax.OptState:
    """The optimizer's state before the first step, with the hyperparameters of these names replaced.

    Raises `ValueError` for one that the state does not hold, that follows a schedule, or that it holds as an integer
    while the value is none.
    """
    return set_values(_standard_promotion(optimizer.init)(params), values)


def set_values(state: optax.OptState, values: Mapping[str, Array]) -> optax.OptState:
    """The state with the hyperparameters of these names replaced; errors as of `start_optimizer`."""
    for name, value in values.items():
        dtype = _held_dtype(state, name)
        if jnp.issubdtype(value.dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"hyperparameter '{name}' is {value.dtype}, and the optimizer holds it as {dtype}, which would cut it "
                f"down to a whole number. Build the optimizer with a float: {name}=1.0, not {name}=1."
            )
        state = optax.tree.set(state, _entry_of("hyperparams"), **{name: value.astype(dtype)})
    return state


def check_state(name: str, state: optax.OptState, expected: optax.OptState) -> None:
    """Raise `ValueError` if the optimizer state of a run that goes on is not like that of its optimizer."""
    found, wanted = (
        [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(tree)]
        for tree in (state, expected)
    )
    if found != wanted:
        differing = [path for path, _ in sorted(set(found) ^ set(wanted))]
        raise ValueError(
            f"{name} holds the state of another optimizer, which differs at {', '.join(differing[:4])}; expected that "
            "of the optimizer that is given. Go on with the same one, or start anew from its params."
        )


def _held_dtype(state: optax.OptState, name: str) -> Any:
    """Of a hyperparameter that a run may set."""
    held = optax.tree.get_all_with_path(state, name, _entry_of("hyperparams"))
    if not held:
        raise ValueError(
            f"the optimizer's state holds no hyperparameter '{name}'; expected an optimizer that takes it, wrapped "
            f"as optax.inject_hyperparams(optax.sgd)({name}=0.1)."
        )
    if optax.tree.get_all_with_path(state, name, _entry_of("hyperparams_states")):
        raise ValueError(
            f"hyperparameter '{name}' follows a schedule, which would undo a value set at the start; expected an "
            f"optimizer that was built with a number. Leave '{name}' out, or build with {name}=0.1."
        )
    return jnp.asarray(held[0][1]).dtype


def _entry_of(field: str) -> Callable[[tuple, Any], bool]:
    """Whether a path ends in an entry of the dict `field` of a state; other fields, as adam's count, may have the name
    of a hyperparameter too."""
    return lambda path, _: len(path) > 1 and getattr(path[-2], "name", None) == field


def update(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    state: optax.OptState,
    params: Params,
    loss: Scalar,
    risk: Callable[[Params], Scalar],
) -> tuple[Params, optax.OptState]:
    """The optimizer's updates and its state after a step. It is told the loss, for a step set by it
    (`optax.polyak_sgd`), the risk, for a line search (`optax.lbfgs`), and the risk's gradient (`optax.contrib.sam`)."""
    step = _standard_promotion(optax.with_extra_args_support(optimizer).update)
    told = {"value": loss, "grad": gradient, "value_fn": risk, "grad_fn": lambda at, *_: jax.grad(risk)(at)}
    while True:
        try:
            return step(gradient, state, params, **told)
        except TypeError as error:  # an optimizer, maybe one within another, that takes some of these alone
            refused = _REFUSED.search(str(error))
            if refused is None or told.pop(refused["name"], None) is None:
                raise


_REFUSED = re.compile(r"(unexpected keyword argument |not consumed by `value_fn`: \[)'(?P<name>\w+)'")
"""How Python refuses an argument, and how optax's line searches do, which hand on what they do not take."""


def _standard_promotion(function: Callable) -> Callable:
    # optax mixes Python scalars, float32 schedules and integer counts: strict promotion would refuse its arithmetic.
    def wrapped(*arguments: Any, **named: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **named)

    return wrapped
