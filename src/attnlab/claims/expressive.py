"""Claims about what heads, width and depth buy on long but sparse memories: q of N positions averaged, pointers followed."""

from itertools import combinations
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.stats
from jaxtyping import Array, Bool, Float, Int

from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.models.adapters import from_function
from attnlab.models.heads import attend, attention_scores, softmax_weights
from attnlab.objectives import objective
from attnlab.training import train
from attnlab.types import Params, PRNGKey, Scalar

SANFORD = "Sanford, Hsu, Telgarsky, arXiv 2306.02896 (sparse averaging)"


def circular_keys(length: int, frequencies: int) -> Float[Array, "N 2q"]:
    """Sinusoidal positions: cosines and sines of the angles 2 pi i / N at the frequencies 1 ... q."""
    angles = 2 * jnp.pi * jnp.outer(jnp.arange(float(length)) / length, jnp.arange(1.0, frequencies + 1))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def sharp_queries(subsets: Int[Array, "n q"], length: int) -> Float[Array, "n 2q"]:
    """Queries whose scores on `circular_keys` are, but for a constant, -prod_{i in S} (1 - cos(t - t_i)).

    That is a trigonometric polynomial of degree q: zero on the subset S and negative elsewhere, so that one head of 2 q
    dimensions sees S alone, evenly, as the scores grow. Its coefficients are those of a discrete Fourier transform on
    2 q + 1 points.
    """
    degree = subsets.shape[1]
    nodes = 2 * jnp.pi * jnp.arange(2.0 * degree + 1) / (2 * degree + 1)
    angles = 2 * jnp.pi * subsets.astype(nodes.dtype) / length
    values = -jnp.prod(1 - jnp.cos(nodes[None, :, None] - angles[:, None, :]), axis=2)
    waves = circular_keys(2 * degree + 1, degree)
    return 2 * values @ waves / (2 * degree + 1)


def all_subsets(length: int, size: int) -> Int[Array, "n q"]:
    """The subsets of N positions, as rows."""
    return jnp.array(list(combinations(range(length), size)))


def _distances(weights: Float[Array, "n N"], subsets: Int[Array, "n q"]) -> Float[Array, " n"]:
    wanted = jnp.mean(jax.nn.one_hot(subsets, weights.shape[1], dtype=weights.dtype), axis=1)
    return jnp.sum(jnp.abs(weights - wanted), axis=1)


def worst_distance(weights: Float[Array, "n N"], subsets: Int[Array, "n q"]) -> Scalar:
    """max over subsets S of the l1 distance of the weights for S from 1 / q on S."""
    return jnp.max(_distances(weights, subsets))


def _weights(params: Params, subsets: Int[Array, "n q"]) -> Float[Array, "n N"]:
    """Softmax weights of queries and keys that are free: a query for each subset."""
    return softmax_weights(attention_scores(params["queries"], params["keys"], 1.0))


def _mean_log(weights: Float[Array, "n N"], subsets: Int[Array, "n q"]) -> Scalar:
    """-mean of log(q a_i) over i in S, over all S: zero where every weight is even on S."""
    chosen = jnp.take_along_axis(weights, subsets, axis=1)
    return -jnp.mean(jnp.log(subsets.shape[1] * chosen + 1e-30))


ADAM = optax.adam(optax.cosine_decay_schedule(0.1, 3000))


def _trained_distance(key: PRNGKey, length: int, size: int, dimension: int) -> float:
    """The least of the worst distances at the ends of four descents on the cross-entropy of all keys and queries."""
    subsets = all_subsets(length, size)
    key_key, query_key = jax.random.split(key)
    starts = {
        "keys": jax.random.normal(key_key, (4, length, dimension)),
        "queries": jax.random.normal(query_key, (4, len(subsets), dimension)),
    }
    risk = objective(from_function(_weights), _mean_log, subsets, subsets)
    ends = train(risk, starts, ADAM, jax.random.split(key, 4), steps=3000, every=3000).params
    return float(jnp.min(jax.vmap(lambda params: worst_distance(_weights(params, subsets), subsets))(ends)))


def separable(keys: np.ndarray, chosen: np.ndarray) -> bool:
    """Whether some query scores all `chosen` positions above all others: by linear programming, a margin of 1."""
    inside, outside = keys[chosen], keys[~chosen]
    differences = (inside[:, None] - outside[None]).reshape(-1, keys.shape[1])
    found = scipy.optimize.linprog(
        np.zeros(keys.shape[1]), A_ub=-differences, b_ub=-np.ones(len(differences)), bounds=(None, None)
    )
    return bool(found.status == 0)


def separable_share(keys: np.ndarray, size: int) -> float:
    """The share of all subsets of that size which are."""
    length = len(keys)
    masks: list[Bool[np.ndarray, " N"]] = [np.isin(np.arange(length), s) for s in combinations(range(length), size)]
    return float(np.mean([separable(keys, mask) for mask in masks]))


@claim(
    statement=r"\text{one head averages every } q \text{ of } N \ge 3q \text{ positions iff } d_k \ge 2q;\ "
    r"d_k \le 2q - 1 \Rightarrow \max_S \|a(S) - \tfrac1q 1_S\|_1 \ge \tfrac1q",
    source="derived here: cyclic polytopes are q-neighborly in 2q dimensions, and by Radon's theorem 2q + 1 points in 2q - 1 "
    "dimensions hold q or less whose hull meets that of at most 2q others, which a set of q avoids; for orders see "
    + SANFORD,
    because="the bound holds for all keys and queries: a weight off S is no less than one on it",
    slow=True,
)
def one_head_averages_q_positions_in_2q_dimensions_and_not_in_less(key: PRNGKey) -> list[Expectation]:
    """Pairs among eight positions and triples among nine: the construction; descent on all keys and queries, one
    dimension less and at the threshold; random keys by linear programming."""
    built, trained, shares = [], [], []
    for number, (length, size) in enumerate(((8, 2), (9, 3))):
        subsets, keys = all_subsets(length, size), circular_keys(length, size)
        scores = attention_scores(sharp_queries(subsets, length), keys, 1e5)
        built.append(worst_distance(softmax_weights(scores), subsets))
        draw = jax.random.normal(jax.random.fold_in(key, number), (length, 2 * size - 1))
        shares.append([separable_share(np.asarray(each), size) for each in (keys, draw)])
        trained.append(_trained_distance(jax.random.fold_in(key, number), length, size, 2 * size - 1))
    enough = _trained_distance(key, 8, 2, 4)
    (pairs, few_pairs), (triples, few_triples) = shares
    one_short = [1 - 1 / comb(8, 2), 1 - 1 / comb(9, 3)]
    return [
        equal("worst distance of the construction", built, 0.0, 1e-9, because="rounding of scores of 1e5"),
        at_least("of descent, one dimension less", trained, [1 / 2, 1 / 3], 1e-12),
        at_most("of descent on pairs in four dimensions", enough, 0.25, because="half of the bound: the control"),
        equal(
            "share of sets that a query separates: the construction", [pairs, triples], 1.0, 0.0, because="all of them"
        ),
        at_most("share for random keys, one dimension less", [few_pairs, few_triples], one_short, 1e-12),
    ]


def chance_of_separation(size: int, length: int, dimension: int) -> float:
    """Phi(1 / (2 s))^(N - q), s^2 = q / chi^2 with d - q + 1 degrees, in the mean over chi^2."""
    levels = (np.arange(4000) + 0.5) / 4000
    chi = scipy.stats.chi2.ppf(levels, dimension - size + 1)
    return float(np.mean(scipy.stats.norm.cdf(np.sqrt(chi / size) / 2) ** (length - size)))


DRAWS = 300


def _separated(key: PRNGKey, size: int, length: int, dimension: int, count: int) -> Float[Array, " count"]:
    """Whether the least query that scores 1 on the first q of random keys N(0, 1 / d) stays below 1/2 on the others."""

    def one(key: Array) -> Array:
        keys = jax.random.normal(key, (length, dimension)) / dimension**0.5
        chosen = keys[:size]
        query = jnp.linalg.solve(chosen @ chosen.T, jnp.ones(size)) @ chosen
        return jnp.max(keys[size:] @ query) < 0.5

    return jax.lax.map(one, jax.random.split(key, count)).astype(float)


@claim(
    statement=r"\text{random keys, a gap of } \tfrac12: \ P = \mathrm{E}\, \Phi\big(\tfrac12 \sqrt{\chi^2_{d - q + 1} / q}\big)^{N - q},"
    r" \text{ near one from } d \approx 8 q \ln N",
    source="derived here: scores of other keys are Gaussian given the query, whose length is an inverse Wishart entry; "
    "that width q log N suffices: " + SANFORD,
    tolerance=4.5,
    because="in standard errors of a share of 300 draws by the predicted one",
    slow=True,
)
def random_keys_average_q_positions_at_width_q_log_n(key: PRNGKey) -> list[Expectation]:
    """Shares of sets that a head separates by a gap of a half, q = 2 and 6, N = 32 and 512: at the width where the law
    says one half, at 8 q log N, and at half of the former, where there are few."""
    found, predicted = np.zeros((3, 4)), np.zeros((3, 4))
    run = jax.jit(_separated, static_argnums=(1, 2, 3, 4))
    for number, (size, length) in enumerate(((2, 32), (6, 32), (2, 512), (6, 512))):
        even = next(d for d in range(size, 1000) if chance_of_separation(size, length, d) >= 0.5)
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        for row, width in enumerate((even, round(8 * size * np.log(length)), even // 2)):
            found[row, number] = jnp.mean(run(keys[row], size, length, width, DRAWS))
            predicted[row, number] = chance_of_separation(size, length, width)
    bars = np.sqrt(predicted * (1 - predicted) / DRAWS)
    return [
        equal("shares at the two widths", found[:2], predicted[:2], standard_error=bars[:2]),
        at_least(
            "shares at 8 q log N", found[1], 0.75, 0.0, because="four errors below the least that the law says, .84"
        ),
        at_most(
            "shares at half the width of one half", found[2], 0.2, 0.0, because="the control: .11 and less by the law"
        ),
    ]


def _lookup(memory: Float[Array, "N v"], places: Int[Array, " n"], sharpness: float) -> Float[Array, "n v"]:
    """A head of two dimensions: keys on the circle, a query at the angle of each place."""
    keys = circular_keys(len(memory), 1)
    return attend(softmax_weights(attention_scores(keys[places], keys, sharpness)), memory)


@claim(
    statement=r"\text{the mean of } q \text{ positions: one head of } 2q \text{ dimensions, } q \text{ heads of } 2,"
    r" \text{ or } q \text{ layers of one head of } 2, \text{ to rounding}",
    source="derived here; sparse averaging: " + SANFORD,
    tolerance=1e-8,
    because="rounding of scores of 1e6, whose gaps are above 40",
    slow=True,
)
def heads_layers_and_width_buy_the_same_sparse_average(key: PRNGKey) -> list[Expectation]:
    """Random memories of 32 tokens in three dimensions, all positions asking for two others at random. With q - 1 heads,
    or one head of 2 q dimensions at scores that are small, it fails."""
    length, size = 32, 2
    memory_key, place_key = jax.random.split(key)
    memory = jax.random.normal(memory_key, (length, 3))
    orders = jax.vmap(lambda k: jax.random.permutation(k, length))(jax.random.split(place_key, length))
    places = orders[:, :size]
    wanted = jnp.mean(memory[places], axis=1)
    queries, keys = sharp_queries(places, length), circular_keys(length, size)
    one, soft = (attend(softmax_weights(attention_scores(queries, keys, s)), memory) for s in (1e6, 1.0))
    heads = [_lookup(memory, places[:, number], 1e5) for number in range(size)]
    layered = jnp.zeros_like(wanted)
    for number in range(size):  # a layer adds what its head sees to the residual stream, the memory beside it
        layered = layered + _lookup(memory, places[:, number], 1e5) / size
    short = jnp.sqrt(jnp.mean((heads[0] - wanted) ** 2))
    return [
        equal("one head of four dimensions", one, wanted, unit="relative"),
        equal("two heads of two", sum(heads) / size, wanted, unit="relative"),
        equal("two layers of one head of two", layered, wanted, unit="relative"),
        at_least(
            "one head of two dimensions, off by",
            short,
            0.3,
            0.0,
            because="the control: half the variance of a difference",
        ),
        at_least("scores of order one, off by", jnp.max(jnp.abs(soft - wanted)), 0.3, 0.0, because="the control"),
    ]


def followed(pointers: Int[Array, " N"], layers: int, sharpness: float) -> Float[Array, "N 2"]:
    """The positions on the circle that pointer doubling reaches: each layer replaces p by p after p.

    A token holds its place and its pointer as points of the circle; it asks with the pointer and copies the pointer of
    the token there.
    """
    places = circular_keys(len(pointers), 1)
    held = places[pointers]
    for _ in range(layers):
        held = attend(softmax_weights(attention_scores(held, places, sharpness)), held)
    return held


@claim(
    statement=r"D \text{ layers of one head of 2 dimensions follow a pointer } 2^D \text{ times, to rounding}",
    source="pointer doubling: Sanford, Hsu, Telgarsky, arXiv 2402.09268 (k hops in log k layers); this head: derived here",
    tolerance=1e-9,
    because="rounding of scores of 1e4, whose gaps are above 40",
    slow=True,
)
def pointers_are_followed_exponentially_far_in_depth(key: PRNGKey) -> list[Expectation]:
    """A random cycle through 64 positions: 1 to 5 layers against steps of the permutation; one layer less ends half as
    far, which is right nowhere, and the last hop is one in 64 that a guess would find."""
    length = 64
    order = jax.random.permutation(key, length)
    pointers = jnp.zeros(length, int).at[order].set(jnp.roll(order, -1))
    ends, predicted, short = [], [], []
    places = circular_keys(length, 1)
    for layers in range(1, 6):
        reached = jnp.arange(length)
        for _ in range(2**layers):
            reached = pointers[reached]
        ends.append(followed(pointers, layers, 1e4))
        predicted.append(places[reached])
        nearest = jnp.argmax(followed(pointers, layers - 1, 1e4) @ places.T, axis=1)
        short.append(jnp.mean(nearest == reached))
    return [
        equal("positions reached", jnp.stack(ends), jnp.stack(predicted)),
        at_most(
            "share that is right with one layer less",
            jnp.stack(short),
            0.0,
            0.0,
            because="the control: half of a cycle's steps",
        ),
    ]
