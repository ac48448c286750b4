"""Which algorithm is this model? Fit the residual of each family on some prompts, score it on others.

An algorithm that treats the eigendirections (lambda_i, v_i) of G = (1/N) X^T X alike predicts

    f = sum_i <x_q, v_i> <v_i, g> (1 - r(lambda_i)) / lambda_i,   g = (1/N) X^T y,

with its residual r: what it leaves of the error along an eigendirection. Families differ in r, and the fit of r to the
model's own predictions (not to the targets) says which family it belongs to. For one layer of a stack, pass the model
cut after that layer. Inputs must be isotropic, or whitened first: a model that preconditions is not a function of G.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_names, check_positive, check_range, is_concrete
from attnlab.display import Words, line, whatever_it_holds
from attnlab.icl.baselines import empirical_moments
from attnlab.icl.constructions import gd_plus_plus_residual
from attnlab.icl.diagnostics import Model, predictions
from attnlab.icl.tasks import Prompt, shuffle_labels
from attnlab.statistics import Estimate, estimate
from attnlab.types import PRNGKey


class Family(NamedTuple):
    """A residual r(lambda, parameters) and how many parameters it has for a given number of layers."""

    parameters: Callable[[int], int]
    residual: Callable[[Array, Array, int], Array]


def _gradient_descent(eigenvalues: Array, parameters: Array, layers: int) -> Array:
    return jnp.prod(1 - jnp.multiply.outer(eigenvalues, parameters), axis=-1)


def _plus_plus(eigenvalues: Array, parameters: Array, layers: int) -> Array:
    return gd_plus_plus_residual(eigenvalues, parameters[:layers], parameters[layers:])


def _newton(eigenvalues: Array, parameters: Array, layers: int) -> Array:
    return (1 - parameters[0] * eigenvalues**2) ** (2**layers)


def _ridge(eigenvalues: Array, parameters: Array, layers: int) -> Array:
    penalty = parameters[0] ** 2  # a square, so that no step of the fit makes it negative
    return penalty / (eigenvalues + penalty)


FAMILIES: dict[str, Family] = {
    "gradient_descent": Family(lambda layers: layers, _gradient_descent),
    "gradient_descent_plus_plus": Family(lambda layers: 2 * layers, _plus_plus),
    "newton": Family(lambda layers: 1, _newton),
    "ridge": Family(lambda layers: 1, _ridge),
}


class Fit(NamedTuple):
    """One family fitted to a model.

    `parameters` are step sizes in units of 1/lambda of G (for `gradient_descent_plus_plus` then as many contractions;
    for `newton` the scale; for `ridge` the square root of the penalty over N). `held_out_error` is the mean squared
    difference from the model's predictions on prompts that the fit has not seen, over their mean square: 1 is no
    better than 0.
    """

    parameters: Float[Array, " p"]
    held_out_error: Estimate

    @whatever_it_holds
    def __repr__(self) -> str:
        """The fitted numbers and the error on prompts that the fit has not seen."""
        return line("Fit", parameters=self.parameters, held_out_error=Words(self.held_out_error.in_words()))


class _Spectral(NamedTuple):
    eigenvalues: Float[Array, "batch d"]
    weights: Float[Array, "batch d"]
    outputs: Float[Array, " batch"]


def _spectral(prompts: Prompt, outputs: Float[Array, " batch"]) -> _Spectral:
    def one(prompt: Prompt) -> tuple[Array, Array]:
        covariance, moment = empirical_moments(prompt)
        values, vectors = jnp.linalg.eigh(covariance)
        # Directions that the context does not see have lambda = 0 and <v, g> = 0: drop them.
        seen = values > 1e-10 * values[-1]
        values = jnp.where(seen, values, 1)
        return values, jnp.where(seen, (prompt.query @ vectors) * (moment @ vectors) / values, 0)

    return _Spectral(*jax.vmap(one)(prompts), outputs)


def _misfit(parameters: Array, data: _Spectral, family: str, layers: int) -> Float[Array, " batch"]:
    left = FAMILIES[family].residual(data.eigenvalues, parameters, layers)
    return jnp.sum(data.weights * (1 - left), axis=1) - data.outputs


@partial(jax.jit, static_argnames=("family", "layers"))
def _fit(starts: Float[Array, "starts p"], data: _Spectral, family: str, layers: int) -> Float[Array, " p"]:
    """Levenberg and Marquardt's least squares from each start; the best end."""
    misfit = partial(_misfit, data=data, family=family, layers=layers)

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        parameters, damping = state
        error, jacobian = misfit(parameters), jax.jacfwd(misfit)(parameters)
        normal = jacobian.T @ jacobian
        normal = normal + damping * jnp.diag(jnp.diag(normal) + 1e-12)
        trial = parameters - jnp.linalg.lstsq(normal, jacobian.T @ error)[0]
        better = jnp.sum(misfit(trial) ** 2) < jnp.sum(error**2)
        return (jnp.where(better, trial, parameters), jnp.where(better, damping / 3, damping * 4)), None

    def run(start: Array) -> tuple[Array, Array]:
        (parameters, _), _ = jax.lax.scan(step, (start, jnp.asarray(1e-2, start.dtype)), length=100)
        return parameters, jnp.sum(misfit(parameters) ** 2)

    ends, errors = jax.vmap(run)(starts)
    return ends[jnp.nanargmin(errors)]


def fit_family(model: Model, prompts: Prompt, family: str, layers: int, key: PRNGKey, starts: int = 16) -> Fit:
    """Fit one family of `FAMILIES` with `layers` steps to half of the prompts, and score it on the rest.

    Raises `ValueError` for an unknown family, numbers that are not positive, less than two prompts, or a model whose
    predictions are all zero, or not finite: there is nothing to compare with.
    """
    check_names("family", [family], FAMILIES)
    check_positive(layers=layers, starts=starts)
    check_range("the number of prompts", len(prompts.target), 2, math.inf, "One half is fitted, the other scored.")
    return _fit_outputs(predictions(model, prompts), prompts, family, layers, key, starts)


def _fit_outputs(outputs: Array, prompts: Prompt, family: str, layers: int, key: PRNGKey, starts: int = 16) -> Fit:
    check_finite("the model's predictions", outputs)
    if is_concrete(outputs) and not np.any(outputs[len(outputs) // 2 :]):
        raise ValueError(
            "the model predicts 0 on all prompts that the fit is scored on; expected a prediction that depends on the "
            "prompt, since errors are relative to it. Train the model first."
        )
    data = _spectral(prompts, outputs)
    half = len(outputs) // 2
    train, held_out = (jax.tree.map(lambda x, part=part: x[part], data) for part in (slice(half), slice(half, None)))
    # Starts in (0, 1) over the typical largest eigenvalue: steps of that size converge.
    top = jnp.mean(jnp.max(train.eigenvalues, axis=1))
    shape = (starts, FAMILIES[family].parameters(layers))
    power = {"newton": 2, "ridge": -0.5}.get(family, 1)
    parameters = _fit(jax.random.uniform(key, shape, top.dtype) / top**power, train, family, layers)
    errors = _misfit(parameters, held_out, family, layers) ** 2
    return Fit(parameters, estimate(errors / jnp.mean(held_out.outputs**2)))


def identify(model: Model, prompts: Prompt, layers: int, key: PRNGKey) -> dict[str, Fit]:
    """Fit every family with `layers` steps to the model. `best_family` reads the answer.

    Raises `ValueError` for fewer than 8 prompts a parameter.
    """
    if layers < 1:
        raise ValueError(f"layers is {layers}; expected the number of steps that the model can take, at least 1.")
    _check_batch(prompts, layers)
    outputs = predictions(model, prompts)
    return {family: _fit_outputs(outputs, prompts, family, layers, key) for family in FAMILIES}


def identify_shuffled(model: Model, prompts: Prompt, layers: int, key: PRNGKey) -> dict[str, Fit]:
    """The null of `identify`: the model sees shuffled labels, the families are fitted with the true ones.

    Held-out errors near 1 say that the fits follow what the labels say, and not the law of the inputs.
    """
    _check_batch(prompts, layers)
    key_labels, key_fit = jax.random.split(key)
    outputs = predictions(model, shuffle_labels(key_labels, prompts))
    return {family: _fit_outputs(outputs, prompts, family, layers, key_fit) for family in FAMILIES}


def best_family(fits: dict[str, Fit], resolution: float = 1e-8) -> str:
    """The family of fewest parameters whose held-out error is within two standard errors of the least.

    Gradient descent is GD++ without contraction, so the least error alone would always name the larger family;
    differences below `resolution` (relative squared error) count as none. Look at the error too: the best may be bad.
    """
    least = min(fits.values(), key=lambda fit: float(fit.held_out_error.value)).held_out_error
    allowed = float(least.value) + 2 * float(least.standard_error) + resolution
    near = [name for name, fit in fits.items() if float(fit.held_out_error.value) <= allowed]
    return min(near, key=lambda name: (len(fits[name].parameters), float(fits[name].held_out_error.value)))


def fitted_residual(fit: Fit, family: str, eigenvalues: Float[Array, "*n"], layers: int) -> Float[Array, "*n"]:
    """r(lambda) of a fit, to draw."""
    return FAMILIES[family].residual(eigenvalues, fit.parameters, layers)


def _check_batch(prompts: Prompt, layers: int) -> None:
    count, needed = prompts.target.shape[0], 8 * max(f.parameters(layers) for f in FAMILIES.values())
    if count < needed:
        raise ValueError(f"there are {count} prompts; expected at least {needed}, 8 for each parameter of a family.")
