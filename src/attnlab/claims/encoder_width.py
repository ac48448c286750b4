"""Claims about a wide one-layer encoder under two scales of its scores: weights, kernels at the start, gradient descent."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.claims.registry import claim
from attnlab.dynamics.kernel import empirical_ntk
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.memory.scaling import PowerLaw, fit_power_law
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.heads import attention_scores, softmax_weights
from attnlab.objectives import Objective, objective
from attnlab.statistics import Estimate, estimate
from attnlab.trees import ravel
from attnlab.types import Params, PRNGKey, Scalar

ENCODER = "Wu, Liu, Chrysos, Cevher, arXiv 2311.01575"
TOKENS, DIMENSION = 4, 4
WIDTHS = (128, 512, 2048)
SCALES: dict[str, Callable[[int], float]] = {
    "1 / width": lambda width: 1 / width,
    "1 / root": lambda width: width**-0.5,
}


def encoder_weights(key: PRNGKey, width: int) -> Params:
    """Query, key and value of variance 1 / d, readout of variance 1 / width (LeCun, as the paper's)."""
    keys, size = jax.random.split(key, 4), DIMENSION**-0.5
    names = ("query", "key", "value")
    weights = {n: size * jax.random.normal(k, (DIMENSION, width)) for n, k in zip(names, keys, strict=False)}
    return {"attention": weights, "readout": width**-0.5 * jax.random.normal(keys[3], (width,))}


def encoder_features(weights: Params, sequences: Float[Array, "N L d"], scale: float) -> Float[Array, "N m"]:
    """An attention layer with queries, keys and values of the width m, ReLU, and the mean over tokens."""
    width = weights["readout"].shape[0]
    layer = from_linen(SelfAttention(AttentionConfig(key_dim=width, value_dim=width, scale=scale)))
    return jnp.mean(jax.nn.relu(layer(weights["attention"], sequences)), axis=1)


def encoder(scale: float) -> Callable[[Params, Float[Array, "N L d"]], Float[Array, " N"]]:
    """Readouts of the features, a number for each sequence."""
    return lambda weights, sequences: encoder_features(weights, sequences, scale) @ weights["readout"]


def _half_squares(outputs: Float[Array, " N"], targets: Float[Array, " N"]) -> Scalar:
    return jnp.sum((outputs - targets) ** 2) / 2


def _law(estimates: list[Estimate], widths: tuple[int, ...] = WIDTHS) -> PowerLaw:
    values = np.array([np.asarray(found) for found in estimates])
    return fit_power_law(widths, values[:, 0], values[:, 1])


@partial(jax.jit, static_argnames=("width", "scale", "count"))
def _unevenness(key: PRNGKey, x: Float[Array, "L d"], width: int, scale: float, count: int) -> Float[Array, " count"]:
    """||A - 1 1^T / L||^2 of attention weights of random encoders."""

    def one(key: PRNGKey) -> Scalar:
        weights = encoder_weights(key, width)["attention"]
        scores = attention_scores(x @ weights["query"], x @ weights["key"], scale)
        return jnp.sum((softmax_weights(scores) - 1 / x.shape[0]) ** 2)

    return jax.lax.map(one, jax.random.split(key, count), batch_size=50)


@claim(
    statement=r"\tau = 1/m: \ m\, E \|A - \tfrac1L 1 1^\top\|_F^2 \to \frac{\sum_i \|x_i\|^2 \sum_j \|x_j - \bar x\|^2}{L^2 d^2}; \quad "
    r"\tau = m^{-1/2}: \text{ its limit is that of Gaussian scores of covariance } \langle x_i, x_{i'} \rangle \langle x_j, x_{j'} \rangle / d^2",
    source=f"both scales: {ENCODER}; constant and limit derived here, from E[s_ij s_ij'] = m tau^2 |x_i|^2 <x_j, x_j'> / d^2",
    tolerance=4.5,
    because="in standard errors over 1,000 encoders a width; what is left of order 1 / m is a smaller part",
    slow=True,
)
def small_scores_average_tokens(key: PRNGKey) -> list[Expectation]:
    """Four tokens in four dimensions, widths 128 to 2,048: exponents, and constants at the largest width; the limit under
    the larger scale by drawing scores x_i M x_j with a Gaussian matrix M."""
    x_key, limit_key, *keys = jax.random.split(key, 2 + 2 * len(WIDTHS))
    x, count = jax.random.normal(x_key, (TOKENS, DIMENSION)), 1000
    found = {
        name: [estimate(_unevenness(k, x, m, scale(m), count)) for k, m in zip(keys[part::2], WIDTHS, strict=True)]
        for part, (name, scale) in enumerate(SCALES.items())
    }
    constant = jnp.sum(x**2) * jnp.sum((x - jnp.mean(x, axis=0, keepdims=True)) ** 2) / (TOKENS * DIMENSION) ** 2
    gaussian = jax.random.normal(limit_key, (20_000, DIMENSION, DIMENSION)) / DIMENSION
    scores = jnp.einsum("ia,cab,jb->cij", x, gaussian, x)
    limit = estimate(jnp.sum((softmax_weights(scores) - 1 / TOKENS) ** 2, axis=(1, 2)))
    small, large = found["1 / width"], found["1 / root"]
    laws, m = {name: _law(rows) for name, rows in found.items()}, WIDTHS[-1]
    return [
        equal("exponent under 1 / m", laws["1 / width"].exponent, -1.0, standard_error=laws["1 / width"].error),
        equal("exponent under 1 / root m", laws["1 / root"].exponent, 0.0, standard_error=laws["1 / root"].error),
        equal("constant under 1 / m", m * small[-1].value, constant, standard_error=m * small[-1].error),
        equal(
            "limit under 1 / root m",
            large[-1].value,
            limit.value,
            standard_error=jnp.hypot(large[-1].error, limit.error),
        ),
    ]


@partial(jax.jit, static_argnames=("width", "scale", "count"))
def _kernels(
    key: PRNGKey, sequences: Float[Array, "N L d"], width: int, scale: float, count: int
) -> tuple[Float[Array, "count N N"], Float[Array, "count N N"]]:
    """Neural tangent kernels of random encoders over their width, and the readout's part in them, the Gram matrix of the
    last hidden features."""

    def one(key: PRNGKey) -> tuple[Array, Array]:
        weights = encoder_weights(key, width)
        features = encoder_features(weights, sequences, scale)
        risk = objective(encoder(scale), _half_squares, sequences, jnp.zeros(len(sequences)))
        return empirical_ntk(risk, weights) / width, features @ features.T / width

    return jax.lax.map(one, jax.random.split(key, count), batch_size=50)


def _kernel_estimates(
    key: PRNGKey, sequences: Float[Array, "N L d"], scale: Callable[[int], float], count: int
) -> dict[str, list[Estimate]]:
    """By width: the least eigenvalue of the features' Gram matrix, and how much greater that of the kernel is."""
    rows: dict[str, list[Estimate]] = {"features": [], "gap": []}
    for k, width in zip(jax.random.split(key, len(WIDTHS)), WIDTHS, strict=True):
        kernels, grams = _kernels(k, sequences, width, scale(width), count)
        least, own = (jnp.linalg.eigvalsh(matrices)[:, 0] for matrices in (kernels, grams))
        rows["features"].append(estimate(own))
        rows["gap"].append(estimate(least - own))
    return rows


def _sequences_of_one_mean(key: PRNGKey, count: int) -> Float[Array, "N L d"]:
    """Gaussian sequences, shifted to one common mean."""
    mean_key, key = jax.random.split(key)
    tokens = jax.random.normal(key, (count, TOKENS, DIMENSION))
    return tokens - jnp.mean(tokens, axis=1, keepdims=True) + jax.random.normal(mean_key, (1, 1, DIMENSION))


def _in_errors(what: str, law: PowerLaw, exponent: float) -> Expectation:
    return equal(what, law.exponent, exponent, standard_error=law.error)


@claim(
    statement=r"\tau = 1/m, \text{ sequences with one mean token } \bar x: \ \lambda_{\min}(\Phi \Phi^\top / m) \to \frac{\|\bar x\|^2 "
    r"\|P_\perp (C - C')\|_F^2}{4 d^3 m},\ P_\perp \bar x = 0, \text{ with features } \Phi \text{ and token covariances } C, C'; \ "
    r"\tau = m^{-1/2}: \text{ it does not fall}; \ \lambda_{\min}(K / m) - \lambda_{\min}(\Phi \Phi^\top / m) \propto m^{-1}",
    source=f"the kernel at the start, and the least singular value of the last features as its bound: {ENCODER}; constant and exponents derived "
    "here: features relu(V^T o), E[v v^T 1(v.x > 0)] = I / 2d, and o - x = C M^T x / m^(1/2) with M Gaussian",
    tolerance=4.5,
    because="in standard errors over 400 encoders a width; what is left of order 1 / m is a smaller part",
    slow=True,
)
def kernels_of_averaged_tokens_forget_their_order(key: PRNGKey) -> list[Expectation]:
    """Two sequences of four tokens with one mean, widths 128 to 2,048; two with means of their own, which the smaller scale
    tells apart as well."""
    pair_key, other_key, *keys = jax.random.split(key, 5)
    same, count = _sequences_of_one_mean(pair_key, 2), 400
    others = jax.random.normal(other_key, (2, TOKENS, DIMENSION))
    small, large = (_kernel_estimates(k, same, scale, count) for k, scale in zip(keys, SCALES.values(), strict=False))
    apart = _kernel_estimates(keys[2], others, SCALES["1 / width"], count)
    mean = jnp.mean(same[0], axis=0)
    covariances = jnp.einsum("nia,nib->nab", same - mean[None, None], same - mean[None, None]) / TOKENS
    difference = covariances[0] - covariances[1]
    across = difference - jnp.outer(mean, mean @ difference) / (mean @ mean)
    constant, m = (mean @ mean) * jnp.sum(across**2) / (4 * DIMENSION**3), WIDTHS[-1]
    return [
        equal(
            "exponent of the features' least eigenvalue under 1 / m",
            _law(small["features"]).exponent,
            -1.0,
            0.25,
            because="errors are .03, and what is left of order 1 / m at the least width moves it by .15 at most (20 seeds)",
        ),
        equal(
            "its constant",
            m * small["features"][-1].value,
            constant,
            standard_error=m * small["features"][-1].error,
        ),
        _in_errors("exponent under 1 / root m", _law(large["features"]), 0.0),
        equal(
            "exponents for two means: under 1 / m, and of what the whole kernel has beyond",
            [_law(apart["features"]).exponent, _law(apart["gap"]).exponent],
            [0.0, -1.0],
            0.05,
            because="the first is the control; errors are .003, and what is left of order 1 / m moves both by .01 at most",
        ),
        _in_errors("exponent of what it has beyond for one mean, under 1 / root m", _law(large["gap"]), -1.0),
    ]


DESCENT_STEPS, MEMBERS = 8, 128


class _Descent(NamedTuple):
    """Of one run: the loss at the end over what the least eigenvalue promises, and over what twice that eigenvalue would;
    squared length of the way of the weights over the kernel's prediction, and by itself; distance of the outputs from the
    kernel's, over the first residual."""

    promise: Scalar
    twice: Scalar
    way: Scalar
    moved: Scalar
    apart: Scalar


def _descend(risk: Objective, start: Params, rate: Scalar) -> Params:
    def step(weights: Params, _: None) -> tuple[Params, None]:
        return jax.tree.map(lambda w, g: w - rate * g, weights, jax.grad(risk)(weights)), None

    return jax.lax.scan(step, start, length=DESCENT_STEPS)[0]


@partial(jax.jit, static_argnames=("width", "scale"))
def _runs(key: PRNGKey, sequences: Float[Array, "N L d"], targets: Array, width: int, scale: float) -> _Descent:
    """Gradient descent on the half sum of squares at a rate of 1 / lambda_max of the kernel at the start."""

    def one(key: PRNGKey) -> _Descent:
        start = encoder_weights(key, width)
        risk = objective(encoder(scale), _half_squares, sequences, targets)
        kernel = empirical_ntk(risk, start)
        values, vectors = jnp.linalg.eigh(kernel)
        rate, first = 1 / values[-1], risk.outputs(start) - targets
        factors = (1 - rate * values) ** DESCENT_STEPS
        end = _descend(risk, start, rate)
        last = risk.outputs(end) - targets
        moved = jnp.sum((ravel(end) - ravel(start)) ** 2)
        along = vectors.T @ first
        predicted = jnp.sum(((1 - factors) * along) ** 2 / values)
        fall, double = jnp.sum(last**2) / jnp.sum(first**2), (1 - 2 * rate * values[0]) ** (2 * DESCENT_STEPS)
        apart = jnp.linalg.norm(last - vectors @ (factors * along)) / jnp.linalg.norm(first)
        return _Descent(fall / factors[0] ** 2, fall / double, moved / predicted, moved, apart)

    return jax.lax.map(one, jax.random.split(key, MEMBERS), batch_size=16)


@claim(
    statement=r"\text{descent at } \eta = 1 / \lambda_{\max}(K_0): \ \tfrac12 \|f - y\|^2 \le (1 - \eta \lambda_{\min}(K_0))^{2t} \, \tfrac12 \|f_0 - y\|^2"
    r" \text{ up to } O(1/m), \ \|\theta_t - \theta_0\|^2 \to u^\top K_0 u \propto m^{-1}, \ \|f_t - f_t^{K}\| \propto m^{-1} \text{ under } \tau = m^{-1/2},"
    r" \ m^{-2} \text{ under } 1/m",
    source=f"linear convergence at a rate of the kernel's least eigenvalue, and small changes of wide weights: {ENCODER}; exponents and the length of "
    "the way derived here: u = K^-1 (1 - (1 - eta K)^t) (f - y)",
    tolerance=4.5,
    because="in standard errors over 128 runs a width",
    slow=True,
)
def wide_encoders_descend_by_their_first_kernel(key: PRNGKey) -> list[Expectation]:
    """Three sequences of which the means point in different directions, random signs as targets, eight steps, to a thousandth of
    the loss or so."""
    x_key, y_key, *keys = jax.random.split(key, 4)
    directions = jnp.linalg.qr(jax.random.normal(x_key, (DIMENSION, DIMENSION)))[0]
    x = 2 * directions[:3, None] + jax.random.normal(x_key, (3, TOKENS, DIMENSION))
    y = jax.random.rademacher(y_key, (3,), x.dtype)
    runs = {
        name: [_runs(jax.random.fold_in(k, m), x, y, m, scale(m)) for m in WIDTHS]
        for k, (name, scale) in zip(keys, SCALES.items(), strict=True)
    }
    laws = {
        (name, field): _law([estimate(getattr(run, field)) for run in found])
        for name, found in runs.items()
        for field in ("apart", "moved")
    }
    widest = [found[-1] for found in runs.values()]
    return [
        _in_errors("exponent of the outputs' distance from the kernel's, 1 / m", laws["1 / width", "apart"], -2.0),
        _in_errors("the same, 1 / root m", laws["1 / root", "apart"], -1.0),
        _in_errors("exponent of the squared way, 1 / m", laws["1 / width", "moved"], -1.0),
        _in_errors("the same, 1 / root m", laws["1 / root", "moved"], -1.0),
        equal(
            "mean squared way over the kernel's, at the largest width",
            [jnp.mean(run.way) for run in widest],
            1.0,
            0.01,
            because="what is left of order 1 / m, twenty times over",
        ),
        at_most(
            "greatest loss over what the least eigenvalue promises, there",
            jnp.max(jnp.stack([run.promise for run in widest])),
            1.0,
            0.05,
            because="of order 1 / m as well, a hundred times over",
        ),
        at_least(
            "greatest loss over what twice that eigenvalue would promise",
            jnp.max(jnp.stack([run.twice for run in widest])),
            1.0,
            because="the control",
        ),
    ]
