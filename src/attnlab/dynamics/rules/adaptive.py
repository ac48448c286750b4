"""Rules that divide by a root of the mean square of past gradients."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from attnlab.dynamics.preconditioners import Preconditioner, on_eigenvalues
from attnlab.dynamics.rules.base import Rate, UpdateRule, check_stepped
from attnlab.dynamics.states import is_masked
from attnlab.types import Params, PyTree


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
class Adafactor(UpdateRule):
    """w' = w - eta g / P with P = sqrt(nu), nu_ij = r_i c_j / mean(r): r and c the averages of g^2 + eps over the two
    longest axes, with the weight 1 - t^-decay_rate on the past; entry by entry where one of them is below
    `min_dim_size_to_factor` (Shazeer, Stern, arXiv 1804.04235). Numbers as in `optax.adafactor`.

    Of what `optax.adafactor` adds, `edge_of_step` reads clipping of blocks, schedules and decay off the step; steps in
    proportion to the parameters (`multiply_by_parameter_scale`) and momentum, which averages g / P, it refuses.
    """

    decay_rate: float = 0.8
    min_dim_size_to_factor: int = 128
    eps: float = 1e-30

    name = "adafactor"
    second_moment = (optax.FactoredState, "v")

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        factored = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor, epsilon=self.eps
        )
        return optax.chain(factored, optax.scale_by_learning_rate(learning_rate))

    def edge(self, learning_rate: Rate) -> Rate:
        return 2 / learning_rate

    def second_of(self, part: optax.FactoredState, params: Params) -> Params:
        def one(rows: Array, columns: Array, whole: Array, leaf: Array) -> Array:
            if is_masked(rows) or whole.shape == leaf.shape:
                return whole
            shorter, longer = (int(axis) for axis in np.argsort(leaf.shape)[-2:])  # as optax chooses the two axes
            rows, columns = jnp.expand_dims(rows, longer), jnp.expand_dims(columns, shorter)
            return rows * columns / jnp.mean(rows, axis=shorter, keepdims=True)

        return jax.tree.map(one, part.v_row, part.v_col, part.v, params, is_leaf=is_masked)

    def denominator(self, second: Params, steps: Array) -> Params:
        check_stepped(self.name, steps)
        return jax.tree.map(jnp.sqrt, second)


@dataclass(frozen=True)
class AveragedOverP(UpdateRule):
    """m' = b1 m + (1 - b1) g, and a step along m' / P, where P holds m's own bias correction 1 - b1^t:
    z^2 - (1 + b1 - eta (1 - b1) h) z + b1 has the root -1 at eta (1 - b1) h = 2 + 2 b1."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def edge(self, learning_rate: Rate) -> Rate:
        return (2 + 2 * self.b1) / ((1 - self.b1) * learning_rate)

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        after = self.b1 * first + (1 - self.b1) * gradient
        return -learning_rate * after / denominator, after - first


@dataclass(frozen=True)
class AdaptiveMoments(AveragedOverP):
    """P = (1 - b1^t) (sqrt(nu / (1 - b2^t) + eps_root) + eps), nu the average of g^2: numbers as in `optax.adam`."""

    eps_root: float = 0.0

    def denominator(self, second: PyTree, steps: Array) -> Preconditioner:
        check_stepped(self.name, steps)

        def entry(nu: Array) -> Array:
            count = steps.astype(nu.dtype)
            corrected = nu / (1 - jnp.asarray(self.b2, nu.dtype) ** count)
            return (1 - jnp.asarray(self.b1, nu.dtype) ** count) * (jnp.sqrt(corrected + self.eps_root) + self.eps)

        return on_eigenvalues(entry, second)


@dataclass(frozen=True)
class _EntryByEntry(AdaptiveMoments):
    """With optax's own state of Adam."""

    first_moment = (optax.ScaleByAdamState, "mu")
    second_moment = (optax.ScaleByAdamState, "nu")

    @property
    def second_decay(self) -> float:
        return self.b2


@dataclass(frozen=True)
class Adam(_EntryByEntry):
    """w' = w - eta m' / P."""

    name = "adam"

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.adam(learning_rate, b1=self.b1, b2=self.b2, eps=self.eps, eps_root=self.eps_root)


@dataclass(frozen=True)
class AdamW(_EntryByEntry):
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
