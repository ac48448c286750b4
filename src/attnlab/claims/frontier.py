"""Claims about attention at its limits, and about what is made of it: large prompts, infinite width, prompting, laws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Array, Float

from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, between, equal
from attnlab.icl.constructions import (
    gradient_descent_residual,
    gradient_descent_stack,
    gradient_step_layer,
    gradient_step_predict,
)
from attnlab.icl.models import looped_predict
from attnlab.icl.tasks import Prompt
from attnlab.memory.scaling import fit_power_law
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.heads import attend, softmax_weights
from attnlab.statistics import Estimate, estimate, standard_error
from attnlab.types import PRNGKey, Real

LENGTHS = (64, 128, 256, 512, 1024)


@partial(jax.jit, static_argnames=("length", "count", "law"))
def _prompt_errors(
    key: PRNGKey, root: Float[Array, "d d"], query: Float[Array, " d"], length: int, count: int, law: str = "normal"
) -> tuple[Float[Array, "count d"], Float[Array, "count d"]]:
    """Softmax attention over `count` prompts less the limit of Gaussian tokens, and the same less its linear part.

    With m the limit, A = mean(x e^{x.z}), B = mean(e^{x.z}) and b = E[B], the linear part (A - m B) / b has mean zero
    for Gaussian tokens and holds all fluctuations of order n^{-1/2}: what is left shows the bias, of order 1 / n.
    """
    limit, mean = root.T @ root @ query, jnp.exp(jnp.sum((root @ query) ** 2) / 2)
    draw = jax.random.normal if law == "normal" else lambda k, shape: jax.random.rademacher(k, shape, root.dtype)

    def one(key):
        tokens = draw(key, (length, len(query))) @ root
        scores = tokens @ query
        error = attend(softmax_weights(scores[None]), tokens)[0] - limit
        return error, error - jnp.mean((tokens - limit) * jnp.exp(scores)[:, None], axis=0) / mean

    return jax.lax.map(one, jax.random.split(key, count), batch_size=500)


@claim(
    statement=r"f_n = \textstyle\sum_j \mathrm{softmax}(\langle x_j, z \rangle)\, x_j \to \Sigma z \text{ for } x_j \sim N(0, \Sigma): "
    r"n\, \mathrm{Cov} f_n \to e^s (\Sigma + \Sigma z z^\top \Sigma), \ n (E f_n - \Sigma z) \to -e^s \Sigma z, \ s = z^\top \Sigma z",
    source="arXiv 2512.11784 (that softmax attention on large prompts tends to linear attention); both constants: derived "
    "here, the delta method on A / B with moments of N(2 Sigma z, Sigma)",
    tolerance=4.5,
    because="in standard errors over 4,000 prompts, beside a remainder of order 1 / n that is a smaller part",
    slow=True,
)
def softmax_attention_on_large_gaussian_prompts_is_linear(key: PRNGKey) -> list[Expectation]:
    """Prompts of 64 to 1,024 tokens in three dimensions with a random covariance, s = 0.3: exponents by regression over
    the length, constants at the greatest; Rademacher tokens, whose limit is tanh(z) and not z."""
    root_key, query_key, key = jax.random.split(key, 3)
    root = jnp.eye(3) + 0.3 * jax.random.normal(root_key, (3, 3))
    query = jax.random.normal(query_key, (3,))
    query = query * jnp.sqrt(0.3) / jnp.linalg.norm(root @ query)
    keys, count = jax.random.split(key, len(LENGTHS) + 1), 4000
    found = [_prompt_errors(k, root, query, n, count) for k, n in zip(keys, LENGTHS, strict=False)]
    limit, growth, n = root.T @ root @ query, np.exp(0.3), LENGTHS[-1]
    direction = limit / jnp.linalg.norm(limit)
    squares = [estimate(jnp.sum(errors**2, axis=1)) for errors, _ in found]
    biases = [estimate(-rest @ direction) for _, rest in found]
    spread, bias = (fit_power_law(LENGTHS, *np.array(list(map(np.asarray, e))).T) for e in (squares, biases))
    covariance = growth * (root.T @ root + jnp.outer(limit, limit))
    outer = estimate(n * jnp.einsum("ci,cj->cij", found[-1][0], found[-1][0]))
    rest = estimate(n * found[-1][1])
    return [
        equal("exponent of the fluctuations", spread.exponent / 2, -0.5, standard_error=spread.error / 2),
        equal("exponent of the bias", bias.exponent, -1.0, standard_error=bias.error),
        equal("covariance times n", outer.value, covariance, standard_error=outer.error),
        equal("bias times n", rest.value, -growth * limit, standard_error=rest.error),
        *_rademacher_limit(keys[-1], query / jnp.linalg.norm(query), n, count),
    ]


def _rademacher_limit(key: PRNGKey, query: Float[Array, " d"], length: int, count: int) -> list[Expectation]:
    """E[x e^{x z}] / E[e^{x z}] = tanh(z) for signs; the bias, of order 1 / n, is within the bars of single prompts."""
    errors, _ = _prompt_errors(key, jnp.eye(len(query)), query, length, count, "rademacher")
    tokens = estimate(errors + query)
    off = jnp.max(jnp.abs(tokens.value - query) / tokens.error)
    return [
        equal(
            "limit of signs", tokens.value, jnp.tanh(query), 0.01, because="the bias, at most e / n, three times over"
        ),
        at_least("the Gaussian limit for signs, off by standard errors", off, 20.0, 0.0, because="the control"),
    ]


WIDE = 100
"""Query dimension of a layer that stands for the wide limit."""
SQUARED = 2.0
"""Squared length of its two orthogonal tokens."""


@partial(jax.jit, static_argnames="heads")
def _random_layers(score_keys: Array, value_keys: Array, heads: int) -> Float[Array, " n"]:
    """An output of layers with standard Gaussian weights on two orthogonal tokens, a layer a pair of keys.

    Scores are divided by the root of the query dimension: the difference of the two has variance 2 SQUARED^2. Heads add
    with the factor 1 / sqrt(heads).
    """
    config = AttentionConfig(key_dim=WIDE, value_dim=1, heads=heads)

    def output(pair: tuple[Array, Array]) -> Array:
        query, key = jax.random.split(pair[0])
        params = {
            "query": jax.random.normal(query, (2, heads * WIDE)),
            "key": jax.random.normal(key, (2, heads * WIDE)),
            "value": jax.random.normal(pair[1], (2, heads)),
        }
        return jnp.sum(from_linen(SelfAttention(config))(params, SQUARED**0.5 * jnp.eye(2))[0]) / heads**0.5

    return jax.lax.map(output, (score_keys, value_keys), batch_size=500)


@jax.jit
def _kurtosis(outputs: Float[Array, " n"]) -> Estimate:
    """E[f^4] / E[f^2]^2 of outputs with mean zero, with the error of the delta method."""
    square = jnp.mean(outputs**2)
    value = jnp.mean(outputs**4) / square**2
    return Estimate(value, standard_error(outputs**4 / square**2 - 2 * value * outputs**2 / square), len(outputs))


def _mixture_excess() -> float:
    """3 Var(q) / E[q]^2 for q = a^2 + (1 - a)^2, a = sigmoid(u), u ~ N(0, 2 SQUARED^2): by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    share = 1 / (1 + np.exp(-(2**0.5) * SQUARED * nodes))
    variance, weights = share**2 + (1 - share) ** 2, weights / weights.sum()
    mean = weights @ variance
    return float(3 * (weights @ variance**2 / mean**2 - 1))


@claim(
    statement=r"\text{the output of a wide layer of } H \text{ heads is Gaussian given its scores: kurtosis } "
    r"3 + \frac{3}{H} \frac{\mathrm{Var}\, q}{(E q)^2}, \ q = \textstyle\sum_{jk} a_j a_k \langle x_j, x_k \rangle",
    source="arXiv 2506.00846 (the law is a mixture of Gaussians); the kurtosis: derived here",
    tolerance=4.5,
    because="in standard errors over 100,000 layers; a query dimension of 100 moves the excess by less than a hundredth",
    slow=True,
)
def wide_attention_is_gaussian_given_its_scores_alone(key: PRNGKey) -> list[Expectation]:
    """Two orthogonal tokens, 1 and 3 heads with random weights; and value weights alone random, with scores given."""
    excess, (score_key, value_key) = _mixture_excess(), jax.random.split(key)
    scores, values = (jax.random.split(k, 100_000) for k in (score_key, value_key))
    one, three = (_kurtosis(_random_layers(scores, values, heads)) for heads in (1, 3))
    given = _kurtosis(_random_layers(jnp.repeat(scores[:1], len(scores)), values, 1))
    return [
        equal("kurtosis of one head", one.value, 3 + excess, standard_error=one.error),
        equal("kurtosis of three heads", three.value, 3 + excess / 3, standard_error=three.error),
        equal("kurtosis with scores given", given.value, 3.0, standard_error=given.error),
        at_least(
            "excess of one head, in standard errors",
            (one.value - 3) / one.error,
            5.0,
            0.0,
            because="so that a Gaussian fails",
        ),
    ]


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


def _parities(key: PRNGKey, right: float, steps: int, shape: tuple[int, ...], proposals: int = 1) -> np.ndarray:
    """Whether chains that add up random bits modulo 2, a bit a step, end at the parity.

    Each proposal of a next state is right with probability `right`; a verifier keeps the first that is, and where none
    of the `proposals` is, the state goes wrong.
    """
    bit_key, noise_key = jax.random.split(key)
    bits = np.asarray(jax.random.bernoulli(bit_key, 0.5, (*shape, steps)))
    good = jax.random.bernoulli(noise_key, right, (*shape, steps, proposals))
    wrong = np.asarray(~jnp.any(good, axis=-1))
    state: np.ndarray = np.zeros(shape, bool)
    for step in range(steps):
        state = state ^ bits[..., step] ^ wrong[..., step]
    return state == (bits.sum(axis=-1) % 2 == 1)


def _chain_is_right(right: float, steps: int) -> float:
    """(1 + (2 p - 1)^k) / 2: an even number of k steps is wrong."""
    return (1 + (2 * right - 1) ** steps) / 2


@claim(
    statement=r"\text{parity of } k \text{ bits, steps right with } p: \text{ a chain } q = \tfrac12 (1 + (2p - 1)^k), \text{ a vote of } m "
    r"\ P(\mathrm{Bin}(m, q) > \tfrac m2), \text{ a greedy tree of } b \text{ verified proposals a step: a chain with } 1 - (1 - p)^b",
    source="strategies of Wang et al., arXiv 2203.11171 (self-consistency) and Yao et al., arXiv 2305.10601 (trees); "
    "probabilities derived here",
    tolerance=4.5,
    because="in standard errors over 40,000 questions",
)
def votes_amplify_what_chains_do_and_a_verifier_repairs_them(key: PRNGKey) -> list[Expectation]:
    """Five bits, steps right with probability 0.8 and 0.2: nine chains, and greedy trees of two and three proposals a
    step; where a chain is right less than half the time, the vote hurts."""
    steps, voters, count = 5, 9, 40_000
    found, predicted = [], []
    for place, right in enumerate((0.8, 0.2)):
        keys = jax.random.split(jax.random.fold_in(key, place), 2)
        chains = _parities(keys[0], right, steps, (count, voters))
        one = _chain_is_right(right, steps)
        found += [chains[:, 0], chains.sum(axis=1) > voters / 2]
        predicted += [one, scipy.stats.binom.sf(voters // 2, voters, one)]
        for proposals in (2, 3):
            found.append(_parities(keys[1], right, steps, (count,), proposals))
            predicted.append(_chain_is_right(1 - (1 - right) ** proposals, steps))
    rates, wanted = np.array([row.mean() for row in found]), np.array(predicted)
    errors = np.sqrt(wanted * (1 - wanted) / count)
    gain, loss = (rates[place + 1] - rates[place] for place in (0, 4))
    return [
        equal(
            "shares of right answers: chain, vote, trees of 2 and 3, at 0.8 and 0.2",
            rates,
            wanted,
            standard_error=errors,
        ),
        at_least("what a vote gains at 0.8", gain, 0.02, 0.0),
        at_most("what it gains at 0.2", loss, -0.02, 0.0, because="the control: a majority that is wrong more often"),
    ]


def _offset_law(x: np.ndarray, offset: float, factor: float, exponent: float) -> np.ndarray:
    return offset + factor * x**-exponent


def _law_slopes(x: np.ndarray, offset: float, factor: float, exponent: float) -> np.ndarray:
    power = x**-exponent
    return np.stack([np.ones_like(x), power, -factor * power * np.log(x)], axis=1)


@claim(
    statement=r"L(n) = a + b n^{-c} \text{ with noise of known size: } 95\,\% \text{ intervals of least squares hold } a, b, c "
    r"\text{ in about } 95\,\% \text{ of draws; those of a line in logarithms, without } a, \text{ never hold } c",
    source="Hoffmann et al., arXiv 2203.15556 (the form); intervals by the delta method: derived here",
    tolerance=0.0,
    because="600 draws: .90 and .99 are 5.6 and 4.5 standard errors from .95",
)
def intervals_of_scaling_exponents_cover_with_the_offset_and_not_without(key: PRNGKey) -> list[Expectation]:
    """Twelve sizes from 10 to 10,000, random offset, factor and exponent, noise of 1 %; fits start from rough guesses."""
    truth_key, noise_key = jax.random.split(key)
    low, high = np.array([0.5, 2.0, 0.4]), np.array([1.0, 4.0, 0.7])
    truth = low + (high - low) * np.asarray(jax.random.uniform(truth_key, (3,)))
    sizes, noise = np.geomspace(10, 1e4, 12), 0.01
    losses = _offset_law(sizes, *truth) + noise * np.asarray(jax.random.normal(noise_key, (600, 12)))
    held = np.array([_intervals_hold(sizes, row, noise, truth) for row in losses])
    lines = [fit_power_law(sizes, row, np.full(12, noise)).interval() for row in losses]
    covered = np.mean([low <= -truth[2] <= high for low, high in lines])
    return [
        between("coverage of offset, factor, exponent", held.mean(axis=0), 0.90, 0.99),
        at_most("coverage of the exponent by a line in logarithms", covered, 0.01, because="the control"),
    ]


def _intervals_hold(sizes: np.ndarray, losses: np.ndarray, noise: float, truth: np.ndarray) -> np.ndarray:
    start, sigma = (0.9 * losses.min(), losses[0] - losses[-1], 0.3), np.full(len(sizes), noise)
    found, covariance = scipy.optimize.curve_fit(
        _offset_law, sizes, losses, start, sigma, absolute_sigma=True, jac=_law_slopes, maxfev=2000
    )
    half = scipy.stats.norm.ppf(0.975) * np.sqrt(np.diag(covariance))
    return np.abs(found - truth) <= half


def _rotating_states(angles: Array, amplitudes: Array, basis: Float[Array, "d d"], count: int) -> Float[Array, "n d"]:
    """s_0 ... s_count of s <- W s, W rotations by `angles` in planes of a random basis."""
    phases = jnp.arange(count + 1)[:, None] * angles
    planes = amplitudes[:, None] * jnp.stack([jnp.cos(phases), jnp.sin(phases)], axis=-1)
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
