"""Claims about attention at its limits, and about what is made of it: large prompts, infinite width, prompting, laws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Array, Float

from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, between, equal
from attnlab.memory.scaling import fit_power_law
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.heads import attend, softmax_weights
from attnlab.statistics import Estimate, estimate, standard_error
from attnlab.types import PRNGKey

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
        return error, error - jnp.mean((tokens - limit[None]) * jnp.exp(scores)[:, None], axis=0) / mean

    return jax.lax.map(one, jax.random.split(key, count), batch_size=500)


@claim(
    statement=r"f_n = \textstyle\sum_j \mathrm{softmax}(\langle x_j, z \rangle)\, x_j \to \Sigma z \text{ for } x_j \sim N(0, \Sigma): "
    r"n\, \mathrm{Cov} f_n \to e^s (\Sigma + \Sigma z z^\top \Sigma), \ n (E f_n - \Sigma z) \to -e^s \Sigma z, \ s = z^\top \Sigma z",
    source="Boyer, Boursier, arXiv 2512.11784 (that softmax attention on large prompts tends to linear attention); both constants: derived "
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
    tokens = estimate(errors + query[None])
    off = jnp.max(jnp.abs(tokens.value - query) / tokens.error)
    return [
        equal(
            "limit of signs", tokens.value, jnp.tanh(query), 0.01, because="the bias, at most e / n, three times over"
        ),
        at_least("the Gaussian limit for signs, off by standard errors", off, 20.0, 0.0, because="the control"),
    ]


WIDE = 40
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
    source="Sakai, Karakida, Imaizumi, arXiv 2506.00846 (the law is a mixture of Gaussians); the kurtosis: derived here",
    tolerance=4.5,
    because="in standard errors over 100,000 layers; a query dimension of 40 moves the excess by a hundredth",
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
