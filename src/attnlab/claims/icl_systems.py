"""Claims that linear attention solves a linear system, or learns one from its own past: kernel ridge regression by
Richardson's iteration, and the rotation that made a sequence of states."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_most, equal
from attnlab.icl.constructions import (
    gradient_descent_residual,
    gradient_descent_stack,
    gradient_step_layer,
    gradient_step_predict,
)
from attnlab.icl.models import looped_predict
from attnlab.icl.tasks import Prompt
from attnlab.types import PRNGKey, Real


def _ridge_prompt(inputs: Float[Array, "N 2"], labels: Float[Array, " N"], query: Array, penalty: Real) -> Prompt:
    """Features of the kernel (1 + <x, x'>)^2 and, for the context alone, sqrt(penalty) times the token's own direction:
    inner products in the context are those of K + penalty I, the query's are of K."""

    def features(x):
        return jnp.array([1.0, *(2**0.5 * x), *(x**2), 2**0.5 * x[0] * x[1]])

    count = len(labels)
    own = jnp.concatenate([penalty**0.5 * jnp.eye(count), jnp.zeros((1, count))])
    tokens = jnp.concatenate([jax.vmap(features)(jnp.vstack([inputs, query])), own], axis=1)
    return Prompt(tokens[:-1], labels, tokens[-1], jnp.zeros(()))


@claim(
    statement=r"L \text{ layers of linear attention on kernel features} = L \text{ steps } \alpha \leftarrow \alpha + \eta (y - (K + \lambda I) \alpha); "
    r"\text{ error} = \textstyle\sum_i c_i (1 - \eta \lambda_i)^L, \text{ kernel ridge regression as } L \to \infty \text{ iff } \eta < 2 / \lambda_{\max}",
    source="Richardson's iteration; the tokens, with the penalty as a feature of their own: derived here, after von Oswald et "
    "al., arXiv 2212.07677",
    tolerance=1e-9,
    because="identities in float64, over 200 layers",
    slow=True,
)
def linear_attention_runs_richardson_to_kernel_ridge_regression(key: PRNGKey) -> list[Expectation]:
    """Eight Gaussian examples in two dimensions, the kernel (1 + <x, x'>)^2 written out, penalty 0.2 of its largest
    eigenvalue: predictions against numpy's iteration, the limit against its solver, and steps of 2.2 / lambda_max."""
    input_key, label_key, query_key = jax.random.split(key, 3)
    inputs, labels = jax.random.normal(input_key, (8, 2)), jax.random.normal(label_key, (8,))
    query = jax.random.normal(query_key, (2,))
    gram, across = ((1 + np.asarray(x) @ np.asarray(inputs).T) ** 2 for x in (inputs, query))
    penalty = float(0.2 * np.linalg.norm(gram, 2))
    system = gram + penalty * np.eye(8)
    prompt, (values, vectors) = _ridge_prompt(inputs, labels, query, penalty), np.linalg.eigh(system)
    best = across @ np.linalg.solve(system, labels)
    parts = (across @ vectors) * (vectors.T @ labels) / values

    def predict(step, layers):
        layer = gradient_descent_stack(8 * step * jnp.eye(prompt.query.size)[None])[0]
        return float(looped_predict(layer, prompt, layers))

    good, bad = 2 / (values[0] + values[-1]), 2.2 / values[-1]
    depths = np.array([1, 2, 3, 5, 8, 13])
    found = np.array([predict(good, int(depth)) for depth in depths])
    errors = [float(parts @ gradient_descent_residual(jnp.asarray(values), int(depth), good)) for depth in depths]
    growth = (predict(bad, 201) - best) / (predict(bad, 200) - best)
    return [
        equal(
            "predictions by depth",
            found,
            [_richardson(system, labels, across, good, d) for d in depths],
            unit="relative",
        ),
        equal("errors by depth", best - found, errors, unit="relative"),
        equal("prediction of 200 layers", predict(good, 200), best, unit="relative"),
        equal(
            "factor of the error of a layer with too large a step", growth, 1 - bad * values[-1], because="the control"
        ),
    ]


def _richardson(system: np.ndarray, labels: Array, across: np.ndarray, step: float, steps: int) -> float:
    coefficients = np.zeros(len(system))
    for _ in range(steps):
        coefficients = coefficients + step * (np.asarray(labels) - system @ coefficients)
    return float(across @ coefficients)


def _rotating_states(angles: Array, amplitudes: Array, basis: Float[Array, "d d"], count: int) -> Float[Array, "n d"]:
    """s_0 ... s_count of s <- W s, W rotations by `angles` in planes of a random basis."""
    phases = jnp.outer(jnp.arange(count + 1.0), angles)
    planes = amplitudes[None, :, None] * jnp.stack([jnp.cos(phases), jnp.sin(phases)], axis=-1)
    return planes.reshape(count + 1, -1) @ basis.T


def _one_step_error(angles: Array, amplitudes: Array, basis: Float[Array, "d d"], count: int) -> Float[Array, " d"]:
    """What one layer misses of s_{count + 1}: the step 2 from W = 0 on the pairs (s_t, s_{t + 1})."""
    states = _rotating_states(angles, amplitudes, basis, count + 1)
    layer, initial = gradient_step_layer(2.0, jnp.zeros_like(basis))
    return gradient_step_predict(layer, initial, states[:count], states[1:-1], states[count]) - states[-1]


@claim(
    statement=r"s_{t+1} = W s_t, \ W \text{ orthogonal: one linear attention layer, a step } \eta = 2 \text{ from } 0, \text{ misses } "
    r"W (2 C_n - I) s_n, \ C_n = \tfrac1n \textstyle\sum_t s_t s_t^\top, \text{ of order } 1 / n \text{ for planes of unit amplitude}",
    source="after Sander, Giryes, Suzuki, Blondel, Peyre, arXiv 2402.05787 (autoregression in context as a step of "
    "descent); rate and bound derived here: sums of cos(t u) are at most 1 / |sin(u / 2)|",
    tolerance=1e-10,
    because=ROUNDING,
    slow=True,
)
def one_layer_learns_a_rotation_at_the_rate_one_over_n(key: PRNGKey) -> list[Expectation]:
    """Two planes in a random basis, prompts of 50 to 3,200 states; with amplitudes 1 and 1/2, which no one step fits,
    what is missed tends to 3/8."""
    angle_key, basis_key = jax.random.split(key)
    angles = jnp.array([0.5, 1.7]) + 0.5 * jax.random.uniform(angle_key, (2,))
    basis = jnp.linalg.qr(jax.random.normal(basis_key, (4, 4)))[0]
    ones, halves, lengths = jnp.ones(2), jnp.array([1.0, 0.5]), (50, 200, 800, 3200)
    missed = [_one_step_error(angles, ones, basis, n) for n in lengths]
    errors = jnp.array([n * jnp.linalg.norm(error) for n, error in zip(lengths, missed, strict=True)])
    uneven = jnp.linalg.norm(_one_step_error(angles, halves, basis, lengths[-1]))
    return [
        equal(
            "what is missed, by autodiff of the prompt's loss", jnp.stack(missed), _by_autodiff(angles, basis, lengths)
        ),
        at_most("n times its norm", errors, _rotation_bound(angles)),
        equal(
            "the limit for amplitudes 1 and 1/2",
            uneven,
            3 / 8,
            _rotation_bound(angles) / lengths[-1],
            because="the control: the bound",
        ),
    ]


def _by_autodiff(angles: Array, basis: Float[Array, "d d"], lengths: tuple[int, ...]) -> Float[Array, "m d"]:
    """Minus twice the gradient, at zero, of the mean of |W s_t - s_{t+1}|^2 / 2, applied to the last state."""

    def one(count):
        states = _rotating_states(angles, jnp.ones(2), basis, count + 1)
        loss = lambda w: jnp.sum((states[:count] @ w.T - states[1:-1]) ** 2) / (2 * count)  # noqa: E731
        return -2 * jax.grad(loss)(jnp.zeros_like(basis)) @ states[count] - states[-1]

    return jnp.stack([one(count) for count in lengths])


def _rotation_bound(angles: Float[Array, "2"]) -> float:
    """n |2 C_n - I| |s_n| at most: within a plane sums of (cos, sin)(2 t u), between two of (cos, sin)(t (u ± v))."""
    u, v = (float(angle) for angle in angles)
    within, between_planes = max(1 / np.sin(u), 1 / abs(np.sin(v))), 1 / np.sin((u + v) / 2) + 1 / np.sin((v - u) / 2)
    return float(2**0.5 * (within + between_planes))
