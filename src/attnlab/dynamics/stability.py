"""Where each optimizer loses stability on a quadratic: its threshold and its preconditioner, in one table.

Gradient descent on a quadratic with Hessian eigenvalue h iterates w -> (1 - eta h) w, stable for h < 2 / eta. An
optimizer that preconditions by P does so for the eigenvalues of P^-1/2 H P^-1/2, and momentum moves the threshold
(Cohen et al., arXiv 2103.00065, section 2 and appendix B; Cohen et al., arXiv 2207.14484, section 2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike

from attnlab.checks import check_arrays, check_names, is_concrete, unknown_name
from attnlab.curvature.transforms import adam_preconditioner, rmsprop_preconditioner
from attnlab.types import Params, Scalar

LearningRate = float | Callable[[Array], Array]
Preconditioner = Callable[[optax.OptState], Params]


@dataclass(frozen=True)
class StableOptimizer:
    """An optax optimizer that knows the edge of its stability. Build it with `stable_optimizer`.

    Attributes:
        name: a key of `RULES`.
        transformation: what `train` takes; its learning rate is a hyperparameter of its state, so that it may be a
            schedule or differ over an ensemble (`train(..., hyperparameters={"learning_rate": rates})`).
        edge: threshold as a function of the learning rate.
        preconditioner: diagonal of P, from the optimizer state after a step; None for the identity.
    """

    name: str
    transformation: optax.GradientTransformation
    edge: Callable[[ArrayLike], ArrayLike]
    preconditioner: Preconditioner | None = None

    def threshold(self, state: Any) -> Scalar:
        """The largest stable eigenvalue of P^-1/2 H P^-1/2 at the learning rate in `state`."""
        return jnp.asarray(self.edge(state.hyperparams["learning_rate"]))


def _gradient_descent(learning_rate: LearningRate) -> StableOptimizer:
    return StableOptimizer("gd", _injected(optax.sgd)(learning_rate), lambda eta: 2 / eta)


def _heavy_ball(learning_rate: LearningRate, momentum: float = 0.9) -> StableOptimizer:
    # v' = beta v + g, w' = w - eta v': z^2 - (1 + beta - eta h) z + beta has the root -1 at eta h = 2 + 2 beta
    optimizer = _injected(optax.sgd)(learning_rate, momentum=momentum)
    return StableOptimizer("heavy_ball", optimizer, lambda eta: (2 + 2 * momentum) / eta)


def _nesterov(learning_rate: LearningRate, momentum: float = 0.9) -> StableOptimizer:
    # v' = h w + beta v, w' = w - eta (h w + beta v'): z^2 - (1 + beta)(1 - eta h) z + beta (1 - eta h), which has the
    # root -1 where 1 + (1 + 2 beta)(1 - eta h) = 0
    optimizer = _injected(optax.sgd)(learning_rate, momentum=momentum, nesterov=True)
    return StableOptimizer("nesterov", optimizer, lambda eta: (2 + 2 * momentum) / (eta * (1 + 2 * momentum)))


def _rmsprop(learning_rate: LearningRate, b2: float = 0.99, eps: float = 1e-8) -> StableOptimizer:
    optimizer = _injected(optax.rmsprop)(learning_rate, decay=b2, eps=eps, eps_in_sqrt=False)

    preconditioner = partial(rmsprop_preconditioner, eps=eps, eps_in_sqrt=False)
    return StableOptimizer("rmsprop", optimizer, lambda eta: 2 / eta, preconditioner)


def _adam(learning_rate: LearningRate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> StableOptimizer:
    optimizer = _injected(optax.adam)(learning_rate, b1=b1, b2=b2, eps=eps)
    edge = lambda eta: (2 + 2 * b1) / ((1 - b1) * eta)  # noqa: E731
    return StableOptimizer("adam", optimizer, edge, partial(adam_preconditioner, b1=b1, b2=b2, eps=eps))


def _adamw(
    learning_rate: LearningRate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-4
) -> StableOptimizer:
    optimizer = _injected(optax.adamw)(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    # m' = b1 m + (1 - b1) h w, w' = a w - eta m' with a = 1 - eta weight_decay gives
    #   z^2 - (a + b1 - eta (1 - b1) h) z + a b1, which has the root -1 at eta (1 - b1) h = (1 + a)(1 + b1)
    edge = lambda eta: (2 - eta * weight_decay) * (1 + b1) / ((1 - b1) * eta)  # noqa: E731
    return StableOptimizer("adamw", optimizer, edge, partial(adam_preconditioner, b1=b1, b2=b2, eps=eps))


def _injected(constructor: Callable) -> Callable:
    """The optimizer with its learning rate, and nothing else, in its state."""

    def build(learning_rate: LearningRate, **options: Any) -> optax.GradientTransformation:
        with_rate = optax.inject_hyperparams(lambda learning_rate: constructor(learning_rate, **options))
        return with_rate(learning_rate=learning_rate)

    return build


RULES: dict[str, Callable[..., StableOptimizer]] = {
    "gd": _gradient_descent,
    "heavy_ball": _heavy_ball,
    "nesterov": _nesterov,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adamw,
}
"""Optimizers whose threshold is known; a new one is a row here, and the table drives its tests."""


def stable_optimizer(name: str, learning_rate: LearningRate, **options: float) -> StableOptimizer:
    """The optimizer called `name` with its threshold and preconditioner.

    `learning_rate` is a number or an optax schedule. Options, with optax's defaults: `momentum` (0.9) of `heavy_ball`
    and `nesterov`; `b2` (0.99), `eps` of `rmsprop`; `b1`, `b2`, `eps` of `adam`; these and `weight_decay` of `adamw`.
    Thresholds: 2/eta for gd and rmsprop, (2 + 2 beta)/eta, (2 + 2 beta)/((1 + 2 beta) eta), (2 + 2 b1)/((1 - b1) eta)
    for adam, and (2 - eta weight_decay)(1 + b1)/((1 - b1) eta) for adamw. Raises `ValueError` for an optimizer whose
    threshold is not known, an option that it does not have, or a number out of its range (`check_hyperparameters`); a
    schedule is not looked into.
    """
    if name not in RULES:
        raise unknown_name("optimizer with a known stability threshold", name, RULES)
    check_names(f"option of {name}", options, [*signature(RULES[name]).parameters][1:])
    check_hyperparameters(**options)
    if not callable(learning_rate):
        check_hyperparameters(learning_rate=learning_rate)
    return RULES[name](learning_rate, **options)


def check_hyperparameters(**numbers: ArrayLike) -> None:
    """Raise `ValueError` for a number, given by name, that is outside the range in which the thresholds hold:
    `learning_rate` positive, `momentum`, `b1`, `b2` at least 0 and below 1, `eps` and `weight_decay` not negative, all
    finite. Tracers and other names pass."""
    for name, value in numbers.items():
        if name not in _RANGES or not is_concrete(value):
            continue
        holds, expected = _RANGES[name]
        check_arrays(name, value)
        if not np.all(np.isfinite(value) & holds(np.asarray(value))):
            raise ValueError(f"{name} is {value}; expected {expected}.")


_DECAY = (lambda value: (value >= 0) & (value < 1), "a number of at least 0 and below 1")
_NOT_NEGATIVE = (lambda value: value >= 0, "a finite number of at least 0")
_RANGES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "learning_rate": (lambda value: value > 0, "a finite number above 0"),
    **dict.fromkeys(("momentum", "b1", "b2"), _DECAY),
    **dict.fromkeys(("eps", "weight_decay"), _NOT_NEGATIVE),
}


def preconditioner_after_step(
    optimizer: StableOptimizer, gradient: Params, state: optax.OptState, params: Params
) -> tuple[Params | None, Scalar]:
    """P (None for the identity) and the threshold of the step that is taken from here: with the second moment that
    already holds this point's gradient."""
    with jax.numpy_dtype_promotion("standard"):
        _, after = optimizer.transformation.update(gradient, state, params)
        diagonal = None if optimizer.preconditioner is None else optimizer.preconditioner(after)
        return diagonal, optimizer.threshold(after)
