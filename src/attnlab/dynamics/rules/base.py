"""What an optimizer is to the theory of its dynamics."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from attnlab.checks import check_arrays, is_concrete
from attnlab.dynamics.norms import Norm
from attnlab.dynamics.preconditioners import Preconditioner, divided
from attnlab.dynamics.states import joined, learning_rate_in, parts_of, steps_of
from attnlab.types import Params, PyTree, Scalar

Rate = float | Array
LearningRate = Rate | Callable[[Array], Array]


class Moments(NamedTuple):
    """What a rule remembers, each like the parameters: zeros where it keeps no first moment, ones where no second, of
    which the entries may be several arrays; and the number of steps that its bias corrections count, 0 where it has
    none."""

    first: Params
    second: PyTree
    steps: Array


@dataclass(frozen=True)
class UpdateRule(ABC):
    """An optimizer that knows the edge of its stability; two are equal where their numbers are. A new one is a class
    here and a row of `RULES`.

    Attributes:
        learning_rate: a number, or an optax schedule.
        name: its key in `RULES`.
        averaged: whether the central flow of its time average is known, which is so without momentum and decay.
        first_moment, second_moment: where optax keeps them, as (type of state, field); None where there is none.

    Raises `ValueError` for a number out of its range: `learning_rate` positive, `momentum`, `b1`, `b2` at least 0 and
    below 1, `eps`, `eps_root`, `decay_rate` and `weight_decay` not negative, `frequency` and `min_dim_size_to_factor`
    at least 1, all finite; tracers and schedules are not looked into.
    """

    learning_rate: LearningRate

    name: ClassVar[str]
    averaged: ClassVar[bool] = False
    first_moment: ClassVar[tuple[type, str] | None] = None
    second_moment: ClassVar[tuple[type, str] | None] = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            _check_number(field.name, value)
            if isinstance(value, Array) and is_concrete(value) and value.ndim == 0:
                object.__setattr__(self, field.name, float(value))  # an array has no hash

    @property
    def second_decay(self) -> float | None:
        """Of the moving average of squared gradients, entry by entry; None where the second moment is another."""
        return None

    @abstractmethod
    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        """The optimizer of optax."""

    @abstractmethod
    def edge(self, learning_rate: Rate) -> Rate:
        """The largest stable eigenvalue of P^-1/2 H P^-1/2."""

    def second_of(self, part: Any, params: Params) -> PyTree:
        """The second moment in a part of the optimizer's state; `params` give the shapes."""
        assert self.second_moment is not None
        return getattr(part, self.second_moment[1])

    def denominator(self, second: PyTree, steps: Array) -> Preconditioner:
        """P from the second moment after so many steps."""
        return second  # ones

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        """What a step adds to parameters and first moment, with its P held; arrays of one shape."""
        return -learning_rate * gradient / denominator, jnp.zeros_like(first)

    @property
    def norm(self) -> Norm | None:
        """In which the step is the steepest; None for the Euclidean one in the metric P."""
        return None

    def undecayed(self) -> "UpdateRule":
        """The same without decay of the weights."""
        return replace(self, **dict.fromkeys({"weight_decay"} & {field.name for field in fields(self)}, 0.0))

    @property
    def slack(self) -> float:
        """How far the step may be from the steepest in the norm, as a share of it, before it is taken for another."""
        return 0.0

    def edge_at(self, rate: Rate, steps: Array) -> Rate:
        """The edge after so many steps, where bias corrections move it."""
        return self.edge(rate)

    def kept(self, first: Params, gradient: Params) -> Params:
        """What a step adds to the first moment."""
        unit = lambda m, g: self.drift(1.0, jnp.zeros_like(m), m, g, jnp.ones_like(m))[1]  # noqa: E731
        return jax.tree.map(unit, first, gradient)

    def read(self, before: Moments, gradient: Params, denominator: Preconditioner) -> Params:
        """What the rule steps along at learning rate 1, without decay of the weights."""
        drift = lambda m, g: -self.drift(1.0, jnp.zeros_like(m), m, g, jnp.ones_like(m))[0]  # noqa: E731
        return divided(jax.tree.map(drift, before.first, gradient), denominator)

    @cached_property
    def transformation(self) -> optax.GradientTransformation:
        """What `train` takes; one object a rule, so that training compiles once. Its learning rate, and nothing else,
        is a hyperparameter of its state, so that it may be a schedule or differ over an ensemble
        (`train(..., hyperparameters={"learning_rate": rates})`)."""
        with_rate = optax.inject_hyperparams(lambda learning_rate: self.optimizer(learning_rate))
        return with_rate(learning_rate=self.learning_rate)

    def threshold(self, state: optax.OptState) -> Scalar:
        """The edge at the learning rate in `state`, anywhere in a chain; `ValueError` where that holds none, or two,
        and for a rule whose step is the steepest in a norm: its effective rate depends on the gradient."""
        if self.norm is not None:
            raise ValueError(
                f"rule is {self.name}, whose effective rate is the length of its step; expected a gradient too. Take "
                "edge_of_step(rule, rule.transformation, gradient, state, params)."
            )
        return jnp.asarray(self.edge(learning_rate_in(state)))

    def preconditioner(self, state: optax.OptState, params: Params) -> Preconditioner | None:
        """P from an optimizer state after a step, also inside of a chain; None for the identity. Its diagonal, like the
        parameters; of rules in a rotated basis `KroneckerBlock`s in the place of arrays (`preconditioners.whitened`).

        Of an optimizer of several groups (`optax.partition`) each group's own state counts; a group with
        hyperparameters of its own has its P from its `inner_states[label]`. Parameters that the rule does not move have
        no entry: take the operator of the block that is moved. Raises `ValueError` where `state` holds none of the
        rule's, one before the first step, or two of one parameter.
        """
        if self.second_moment is None:
            return None
        parts = parts_of(state, self.second_moment[0])
        return joined([self.denominator(self.second_of(part, params), steps_of(part)) for part in parts])

    def moments(self, state: optax.OptState, params: Params) -> Moments:
        """What `state` remembers, wherever in a chain; errors as of `preconditioner`."""
        first, second = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params)
        steps = jnp.array(0)
        if self.first_moment is not None:
            kind, name = self.first_moment
            first = joined([getattr(part, name) for part in parts_of(state, kind)])
        if self.second_moment is not None:
            second = joined([self.second_of(part, params) for part in parts_of(state, self.second_moment[0])])
        memory = self.second_moment or self.first_moment
        if memory is not None:
            steps = steps_of(parts_of(state, memory[0])[0])
        return Moments(first, second, steps)


def preconditioner_after_step(
    rule: UpdateRule, gradient: Params, state: optax.OptState, params: Params
) -> tuple[Preconditioner | None, Scalar]:
    """P (None for the identity) and the threshold of the step that is taken from here: with the second moment that
    already holds this point's gradient."""
    with jax.numpy_dtype_promotion("standard"):
        _, after = rule.transformation.update(gradient, state, params)
        return rule.preconditioner(after, params), rule.threshold(after)


def constant_rate(rule: UpdateRule) -> float:
    """The learning rate, a number; `ValueError` for a schedule, which a flow in the time of steps does not follow."""
    if callable(rule.learning_rate):
        raise ValueError(
            f"the learning_rate of the rule {rule.name} is a schedule; a flow expects a number. Build the rule with a "
            "number."
        )
    return float(rule.learning_rate)


def check_stepped(name: str, steps: Array) -> None:
    """Raise `ValueError` for a state before the first step, where P is zero (skipped while tracing)."""
    if is_concrete(steps) and int(steps) == 0:
        raise ValueError(f"the {name} state has taken no step; expected at least one: before it, P is zero.")


def _check_number(name: str, value: Any) -> None:
    if name not in _RANGES or callable(value) or not is_concrete(value):
        return
    holds, expected = _RANGES[name]
    check_arrays(name, value)
    if not np.all(np.isfinite(value) & holds(np.asarray(value))):
        raise ValueError(f"{name} is {value}; expected {expected}.")


_DECAY = (lambda value: (value >= 0) & (value < 1), "a number of at least 0 and below 1")
_COUNT = (lambda value: (value >= 1) & (value == np.floor(value)), "a whole number of at least 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "a finite number of at least 0")
_RANGES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "learning_rate": (lambda value: value > 0, "a finite number above 0"),
    **dict.fromkeys(("momentum", "b1", "b2"), _DECAY),
    **dict.fromkeys(("eps", "eps_root", "weight_decay", "decay_rate"), _NOT_NEGATIVE),
    **dict.fromkeys(("frequency", "min_dim_size_to_factor"), _COUNT),
}
