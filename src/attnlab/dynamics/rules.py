"""Optimizers as the theory of their dynamics sees them: one row each, which edges, probes and flows read alike.

Gradient descent on a quadratic with Hessian eigenvalue h iterates w -> (1 - eta h) w, stable for h < 2 / eta. An
optimizer that preconditions by P does so for the eigenvalues of P^-1/2 H P^-1/2, and momentum moves the threshold
(Cohen et al., arXiv 2103.00065, section 2 and appendix B; Cohen et al., arXiv 2207.14484, section 2).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from attnlab.checks import check_arrays, check_names, is_concrete, unknown_name
from attnlab.dynamics.states import joined, learning_rate_in, parts_of, steps_of
from attnlab.types import Params, Scalar

Rate = float | Array
LearningRate = Rate | Callable[[Array], Array]


class Moments(NamedTuple):
    """What a rule remembers, each like the parameters: zeros where it keeps no first moment, ones where no second; and
    the number of steps that its bias corrections count, 0 where it has none."""

    first: Params
    second: Params
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
    below 1, `eps`, `eps_root` and `weight_decay` not negative, all finite; tracers and schedules are not looked into.
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
        """Of the moving average of squared gradients; None where there is none."""
        return None

    @abstractmethod
    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        """The optimizer of optax."""

    @abstractmethod
    def edge(self, learning_rate: Rate) -> Rate:
        """The largest stable eigenvalue of P^-1/2 H P^-1/2."""

    def denominator(self, second: Params, steps: Array) -> Params:
        """P from the second moment after so many steps."""
        return second  # ones

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        """What a step adds to parameters and first moment, with its P held; arrays of one shape."""
        return -learning_rate * gradient / denominator, jnp.zeros_like(first)

    @cached_property
    def transformation(self) -> optax.GradientTransformation:
        """What `train` takes; one object a rule, so that training compiles once. Its learning rate, and nothing else,
        is a hyperparameter of its state, so that it may be a schedule or differ over an ensemble
        (`train(..., hyperparameters={"learning_rate": rates})`)."""
        with_rate = optax.inject_hyperparams(lambda learning_rate: self.optimizer(learning_rate))
        return with_rate(learning_rate=self.learning_rate)

    def threshold(self, state: optax.OptState) -> Scalar:
        """The edge at the learning rate in `state`, anywhere in a chain; `ValueError` where that holds none, or two."""
        return jnp.asarray(self.edge(learning_rate_in(state)))

    def preconditioner(self, state: optax.OptState) -> Params | None:
        """The diagonal of P from an optimizer state after a step, also inside of a chain; None for the identity.

        Of an optimizer of several groups (`optax.partition`) each group's own state counts; a group with
        hyperparameters of its own has its P from its `inner_states[label]`. Parameters that the rule does not move have
        no entry: take the operator of the block that is moved. Raises `ValueError` where `state` holds none of the
        rule's, one before the first step, or two of one parameter.
        """
        if self.second_moment is None:
            return None
        kind, name = self.second_moment
        return joined([self.denominator(getattr(part, name), steps_of(part)) for part in parts_of(state, kind)])

    def moments(self, state: optax.OptState, params: Params) -> Moments:
        """What `state` remembers, wherever in a chain; errors as of `preconditioner`."""
        first, second = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params)
        steps = jnp.array(0)
        if self.first_moment is not None:
            kind, name = self.first_moment
            first = joined([getattr(part, name) for part in parts_of(state, kind)])
        if self.second_moment is not None:
            kind, name = self.second_moment
            parts = parts_of(state, kind)
            second, steps = joined([getattr(part, name) for part in parts]), steps_of(parts[0])
        return Moments(first, second, steps)


@dataclass(frozen=True)
class GradientDescent(UpdateRule):
    """w' = w - eta g."""

    name = "gd"
    averaged = True

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.sgd(learning_rate)

    def edge(self, learning_rate: Rate) -> Rate:
        return 2 / learning_rate


@dataclass(frozen=True)
class HeavyBall(UpdateRule):
    """v' = beta v + g, w' = w - eta v': z^2 - (1 + beta - eta h) z + beta has the root -1 at eta h = 2 + 2 beta."""

    momentum: float = 0.9

    name = "heavy_ball"
    first_moment = (optax.TraceState, "trace")

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.sgd(learning_rate, momentum=self.momentum)

    def edge(self, learning_rate: Rate) -> Rate:
        return (2 + 2 * self.momentum) / learning_rate

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        after = self.momentum * first + gradient
        return -learning_rate * after / denominator, after - first


@dataclass(frozen=True)
class Nesterov(UpdateRule):
    """v' = g + beta v, w' = w - eta (g + beta v'): z^2 - (1 + beta)(1 - eta h) z + beta (1 - eta h) has the root -1
    where 1 + (1 + 2 beta)(1 - eta h) = 0."""

    momentum: float = 0.9

    name = "nesterov"
    first_moment = (optax.TraceState, "trace")

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.sgd(learning_rate, momentum=self.momentum, nesterov=True)

    def edge(self, learning_rate: Rate) -> Rate:
        return (2 + 2 * self.momentum) / (learning_rate * (1 + 2 * self.momentum))

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        after = self.momentum * first + gradient
        return -learning_rate * (gradient + self.momentum * after) / denominator, after - first


@dataclass(frozen=True)
class RMSProp(UpdateRule):
    """w' = w - eta g / P with P = sqrt(nu) + eps, or sqrt(nu + eps) where `eps_in_sqrt`; without bias correction."""

    b2: float = 0.99
    eps: float = 1e-8
    eps_in_sqrt: bool = False

    name = "rmsprop"
    averaged = True
    second_moment = (optax.ScaleByRmsState, "nu")

    @property
    def second_decay(self) -> float:
        return self.b2

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.rmsprop(learning_rate, decay=self.b2, eps=self.eps, eps_in_sqrt=self.eps_in_sqrt)

    def edge(self, learning_rate: Rate) -> Rate:
        return 2 / learning_rate

    def denominator(self, second: Params, steps: Array) -> Params:
        root = (lambda nu: jnp.sqrt(nu + self.eps)) if self.eps_in_sqrt else (lambda nu: jnp.sqrt(nu) + self.eps)
        return jax.tree.map(root, second)


@dataclass(frozen=True)
class _AdaptiveMoments(UpdateRule):
    """m' = b1 m + (1 - b1) g, and a step along m' / P with P = (1 - b1^t) (sqrt(nu / (1 - b2^t) + eps_root) + eps): the
    factor 1 - b1^t is m's own bias correction. Numbers as in `optax.adam`."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0

    first_moment = (optax.ScaleByAdamState, "mu")
    second_moment = (optax.ScaleByAdamState, "nu")

    @property
    def second_decay(self) -> float:
        return self.b2

    def denominator(self, second: Params, steps: Array) -> Params:
        if is_concrete(steps) and int(steps) == 0:
            raise ValueError("the Adam state has taken no step; expected at least one: before it, P is zero.")

        def entry(nu: Array) -> Array:
            count = steps.astype(nu.dtype)
            corrected = nu / (1 - jnp.asarray(self.b2, nu.dtype) ** count)
            return (1 - jnp.asarray(self.b1, nu.dtype) ** count) * (jnp.sqrt(corrected + self.eps_root) + self.eps)

        return jax.tree.map(entry, second)


@dataclass(frozen=True)
class Adam(_AdaptiveMoments):
    """w' = w - eta m' / P."""

    name = "adam"

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.adam(learning_rate, b1=self.b1, b2=self.b2, eps=self.eps, eps_root=self.eps_root)

    def edge(self, learning_rate: Rate) -> Rate:
        return (2 + 2 * self.b1) / ((1 - self.b1) * learning_rate)

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        after = self.b1 * first + (1 - self.b1) * gradient
        return -learning_rate * after / denominator, after - first


@dataclass(frozen=True)
class AdamW(_AdaptiveMoments):
    """w' = a w - eta m' / P with a = 1 - eta weight_decay: z^2 - (a + b1 - eta (1 - b1) h) z + a b1 has the root -1 at
    eta (1 - b1) h = (1 + a)(1 + b1)."""

    weight_decay: float = 1e-4

    name = "adamw"

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        numbers = {"b1": self.b1, "b2": self.b2, "eps": self.eps, "eps_root": self.eps_root}
        return optax.adamw(learning_rate, weight_decay=self.weight_decay, **numbers)

    def edge(self, learning_rate: Rate) -> Rate:
        return (2 - learning_rate * self.weight_decay) * (1 + self.b1) / ((1 - self.b1) * learning_rate)

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        after = self.b1 * first + (1 - self.b1) * gradient
        return -learning_rate * (after / denominator + self.weight_decay * point), after - first


RULES: dict[str, type[UpdateRule]] = {
    row.name: row for row in (GradientDescent, HeavyBall, Nesterov, RMSProp, Adam, AdamW)
}
"""Optimizers whose threshold is known; a new one is a row here, and the table drives its tests."""


def update_rule(name: str, learning_rate: LearningRate, **options: float) -> UpdateRule:
    """The optimizer called `name`: `update_rule("adam", 1e-3, b1=0.8)` is `Adam(1e-3, b1=0.8)`.

    `learning_rate` is a number or an optax schedule. Options, with optax's defaults: `momentum` (0.9) of `heavy_ball`
    and `nesterov`; `b2` (0.99), `eps`, `eps_in_sqrt` (False) of `rmsprop`; `b1`, `b2`, `eps`, `eps_root` of `adam`;
    these and `weight_decay` of `adamw`. Thresholds: 2/eta for gd and rmsprop, (2 + 2 beta)/eta,
    (2 + 2 beta)/((1 + 2 beta) eta), (2 + 2 b1)/((1 - b1) eta) for adam, and
    (2 - eta weight_decay)(1 + b1)/((1 - b1) eta) for adamw. Raises `ValueError` for an optimizer whose threshold is not
    known, an option that it does not have, or a number out of its range (`UpdateRule`).
    """
    if name not in RULES:
        raise unknown_name("optimizer with a known stability threshold", name, RULES)
    check_names(f"option of {name}", options, [field.name for field in fields(RULES[name])][1:])
    return RULES[name](learning_rate, **options)


def preconditioner_after_step(
    rule: UpdateRule, gradient: Params, state: optax.OptState, params: Params
) -> tuple[Params | None, Scalar]:
    """P (None for the identity) and the threshold of the step that is taken from here: with the second moment that
    already holds this point's gradient."""
    with jax.numpy_dtype_promotion("standard"):
        _, after = rule.transformation.update(gradient, state, params)
        return rule.preconditioner(after), rule.threshold(after)


def constant_rate(rule: UpdateRule) -> float:
    """The learning rate, a number; `ValueError` for a schedule, which a flow in the time of steps does not follow."""
    if callable(rule.learning_rate):
        raise ValueError(
            f"the learning_rate of the rule {rule.name} is a schedule; a flow expects a number. Build the rule with a "
            "number."
        )
    return float(rule.learning_rate)


def _check_number(name: str, value: Any) -> None:
    if name not in _RANGES or callable(value) or not is_concrete(value):
        return
    holds, expected = _RANGES[name]
    check_arrays(name, value)
    if not np.all(np.isfinite(value) & holds(np.asarray(value))):
        raise ValueError(f"{name} is {value}; expected {expected}.")


_DECAY = (lambda value: (value >= 0) & (value < 1), "a number of at least 0 and below 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "a finite number of at least 0")
_RANGES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "learning_rate": (lambda value: value > 0, "a finite number above 0"),
    **dict.fromkeys(("momentum", "b1", "b2"), _DECAY),
    **dict.fromkeys(("eps", "eps_root", "weight_decay"), _NOT_NEGATIVE),
}
