"""Rules whose step is the steepest in a norm, of the gradient or of a moving average of it.

Steepest descent in a norm, w' = w - eta ||g||_* d(g) with d(g) = argmax over ||d|| <= 1 of <g, d>, on a quadratic with
the Hessian H >= 0 and S = max over ||d|| <= 1 of <d, H d>:

    L(w') <= L(w) - eta ||g||_*^2 (1 - eta S / 2),

so that every start converges where S < 2 / eta; and with d the maximiser, whose slope H d has the dual norm S and the
steepest direction d itself, w = x d gives w' = (1 - eta S) x d: where S > 2 / eta that ray grows (arXiv 2603.05002, for
networks). A step of fixed length, w' = w - eta d(g), is the same at the effective rate eta / ||g||_*.

With averages, c = p m + q g, m' = b2 m + (1 - b2) g and a step along ||c||_* d(c), the ray w = x d, m = u H d stays
one: on it the rule is linear, with (x, u) the state at curvature S. With a = 1 - eta lambda for a decay of the weights
it has the root -1 at

    eta S = (1 + a) (1 + b2) / (q (1 + b2) - p (1 - b2)),

and a pair of complex roots on the unit circle at eta S = (1 - a b2) / (p (1 - b2) - q b2), where that is positive; the
edge is the lower one. p = b, q = 1 - b, b2 = b is the plain average, (2 + 2 b) / ((1 - b) eta); p = b^2, q = 1 - b^2
with b2 = b that of Nesterov; p = b1, q = 1 - b1 is Lion. Off the ray the map is not linear, and below the edge nothing
is proved with momentum.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array

from attnlab.dynamics.norms import LargestBlock, LargestEntry, LargestMatrix, Norm
from attnlab.dynamics.rules.base import Moments, Rate, UpdateRule
from attnlab.types import Params


@dataclass(frozen=True)
class _InNorm(UpdateRule):
    """Of the readout p m + q g and the average of decay b2, what all rules of a norm share."""

    first_moment: ClassVar[tuple[type, str] | None] = (optax.EmaState, "ema")

    @property
    @abstractmethod
    def norm(self) -> Norm: ...

    @property
    def averaging(self) -> float:
        """b2."""
        return 0.0

    def readout(self, steps: Array | None) -> tuple[Rate, Rate]:
        """p and q of the step that comes after so many; None for the limit of many."""
        return self.averaging, 1 - self.averaging

    def edge(self, learning_rate: Rate) -> Rate:
        return self._edge(learning_rate, *self.readout(None))

    def edge_at(self, rate: Rate, steps: Array) -> Rate:
        return self._edge(rate, *self.readout(steps - 1))

    def _edge(self, rate: Rate, p: Rate, q: Rate) -> Rate:
        b2, stay = self.averaging, 1 - rate * getattr(self, "weight_decay", 0.0)
        flips, turns = q * (1 + b2) - p * (1 - b2), p * (1 - b2) - q * b2
        flip = jnp.where(flips > 0, (1 + stay) * (1 + b2) / jnp.where(flips > 0, flips, 1), jnp.inf)
        turn = jnp.where(turns > 0, (1 - stay * b2) / jnp.where(turns > 0, turns, 1), jnp.inf)
        return jnp.minimum(flip, turn) / rate

    def drift(
        self, learning_rate: Rate, point: Array, first: Array, gradient: Array, denominator: Array
    ) -> tuple[Array, Array]:
        raise ValueError(
            f"the rule {self.name} has no drift: its step is the steepest in a norm, not one divided by P. Take a rule "
            "without a norm, such as gd or adam."
        )

    def kept(self, first: Params, gradient: Params) -> Params:
        return jax.tree.map(lambda m, g: (1 - self.averaging) * (g - m), first, gradient)

    def read(self, before: Moments, gradient: Params, denominator: Params) -> Params:
        p, q = (jnp.asarray(number) for number in self.readout(before.steps))
        return jax.tree.map(lambda m, g: p.astype(g.dtype) * m + q.astype(g.dtype) * g, before.first, gradient)


@dataclass(frozen=True)
class SignDescent(_InNorm):
    """w' = w - eta sign(m'), m' = b m + (1 - b) g: the norm is the largest entry, the dual the sum of moduli."""

    momentum: float = 0.0

    name = "sign"

    @property
    def norm(self) -> Norm:
        return LargestEntry()

    @property
    def averaging(self) -> float:
        return self.momentum

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        average = optax.ema(self.momentum, debias=False)
        return optax.chain(average, optax.scale_by_sign(), optax.scale_by_learning_rate(learning_rate))


@dataclass(frozen=True)
class Lion(_InNorm):
    """w' = (1 - eta weight_decay) w - eta sign(b1 m + (1 - b1) g), m' = b2 m + (1 - b2) g. Numbers as in
    `optax.lion` (Chen et al., arXiv 2302.06675)."""

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 1e-3

    name = "lion"
    first_moment = (optax.ScaleByLionState, "mu")

    @property
    def norm(self) -> Norm:
        return LargestEntry()

    @property
    def averaging(self) -> float:
        return self.b2

    def readout(self, steps: Array | None) -> tuple[Rate, Rate]:
        return self.b1, 1 - self.b1

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.lion(learning_rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class SpectralDescent(_InNorm):
    """w' = w - eta ||m'||_* U V^T, the steepest step in the largest spectral norm of a leaf, its length that of the sum
    of all nuclear norms; m' = b m + (1 - b) g."""

    momentum: float = 0.0

    name = "spectral"

    @property
    def norm(self) -> Norm:
        return LargestMatrix()

    @property
    def averaging(self) -> float:
        return self.momentum

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        average, steepest = optax.ema(self.momentum, debias=False), _stateless(self.norm)
        return optax.chain(average, steepest, optax.scale_by_learning_rate(learning_rate))


@dataclass(frozen=True)
class BlockCoordinate(_InNorm):
    """w' = w - eta g on the leaf with the longest gradient, the others stand: the norm is the sum of the leaves'."""

    name = "block_coordinate"
    first_moment = None

    @property
    def norm(self) -> Norm:
        return LargestBlock()

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.chain(_stateless(self.norm), optax.scale_by_learning_rate(learning_rate))


LIFT, POLISH = (3.4445, -4.7750, 2.0315), (15 / 8, -10 / 8, 3 / 8)
"""Coefficients of a Newton-Schulz step: Muon's own, which lift small singular values, and those that converge."""


@dataclass(frozen=True)
class Muon(_InNorm):
    """w' = w - eta s (Newton-Schulz of c): the orthogonal factor of the average gradient, matrix by matrix, scaled by
    s = sqrt(max(1, columns / rows)); `optax.contrib.scale_by_muon`. The average is corrected for its start.

    The five steps of Newton and Schulz in Muon's own coefficients leave singular values from 0.7 to 1.2; the edge is
    that of the exact factor, which `exact` takes: ten of them and six that converge, exact for singular values above
    1e-5 of the largest. Leaves of three axes are stacks of matrices; a leaf of fewer than two has no orthogonal factor.
    """

    momentum: float = 0.95
    nesterov: bool = True
    exact: bool = False

    name = "muon"
    first_moment = (optax.contrib.MuonState, "mu")

    _norm: ClassVar[LargestMatrix] = LargestMatrix(scaled=True)

    @property
    def norm(self) -> Norm:
        return self._norm

    @property
    def averaging(self) -> float:
        return self.momentum

    def readout(self, steps: Array | None) -> tuple[Rate, Rate]:
        b = self.momentum
        if steps is None:
            return (b**2, 1 - b**2) if self.nesterov else (b, 1 - b)
        steps = steps.astype(float)
        seen = 1 - b ** (steps + 1)
        if not self.nesterov:
            return b / seen, (1 - b) / seen
        ahead = b / (1 - b ** (steps + 2))
        return ahead * b, (1 - b) * (ahead + 1 / seen)

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.chain(self._orthogonal(), optax.scale_by_learning_rate(learning_rate))

    @property
    def slack(self) -> float:
        return 0.0 if self.exact else 0.35

    def _orthogonal(self) -> optax.GradientTransformation:
        coefficients = (LIFT,) * 10 + (POLISH,) * 6 if self.exact else LIFT
        factor = optax.contrib.scale_by_muon(
            coefficients,
            len(coefficients) if self.exact else 5,
            self.momentum,
            nesterov=self.nesterov,
            weight_dimension_numbers=_dimension_numbers,
        )
        scaled = lambda updates, params: jax.tree.map(lambda leaf: self._norm.scale(leaf) * leaf, updates)  # noqa: E731
        return optax.chain(factor, optax.stateless(scaled))


def _dimension_numbers(params: Params) -> Params:
    """The last two axes of every leaf."""

    def one(path: tuple, leaf: Array) -> optax.contrib.MuonDimensionNumbers:
        if leaf.ndim < 2:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{where or 'the parameter'} has shape {leaf.shape}; expected matrices, of two axes or stacked along "
                "more: Muon has no step for others. Leave it out of the parameters, or build the model without biases."
            )
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree.map_with_path(one, params)


def _stateless(norm: Norm) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: norm.descent(updates))
