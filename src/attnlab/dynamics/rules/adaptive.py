"""Rules that divide by a root of the mean square of past gradients."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from attnlab.checks import is_concrete
from attnlab.dynamics.rules.base import Rate, UpdateRule
from attnlab.types import Params


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
