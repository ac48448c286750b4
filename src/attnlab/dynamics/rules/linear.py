"""Rules whose step is linear in the gradients: descent, with and without momentum."""

from dataclasses import dataclass

import optax
from jaxtyping import Array

from attnlab.dynamics.rules.base import Rate, UpdateRule


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
class Averaged(UpdateRule):
    """m' = beta m + (1 - beta) g, w' = w - eta m': heavy ball at the learning rate (1 - beta) eta."""

    momentum: float = 0.9

    name = "ema"
    first_moment = (optax.EmaState, "ema")

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        average = optax.ema(self.momentum, debias=False)
        return optax.chain(average, optax.scale_by_learning_rate(learning_rate))

    def edge(self, learning_rate: Rate) -> Rate:
        return (2 + 2 * self.momentum) / ((1 - self.momentum) * learning_rate)

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        after = self.momentum * first + (1 - self.momentum) * gradient
        return -learning_rate * after / denominator, after - first
