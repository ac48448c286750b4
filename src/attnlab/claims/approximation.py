"""Claims about attention computed otherwise: tiles, graphs, recurrences, and approximations with their errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.approximation.approximate import (
    Attention,
    exact,
    low_rank,
    nystrom,
    positive_features,
    random_features,
    sliding_window,
    top_k,
    top_k_bound,
)
from attnlab.approximation.errors import approximation_errors, head_params
from attnlab.approximation.structure import (
    decay_mask,
    graph_attention,
    masked_linear_attention,
    recurrent_linear_attention,
)
from attnlab.approximation.tiled import Partition, merge, output, partition, tiled_attention
from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.models.heads import softmax_weights
from attnlab.types import PRNGKey


def head_inputs(key: PRNGKey, length: int = 12, dim: int = 4, value_dim: int = 3) -> tuple[Array, Array, Array]:
    """Gaussian queries, keys and values."""
    widths = (dim, dim, value_dim)
    queries, keys, values = (
        jax.random.normal(k, (length, w)) for k, w in zip(jax.random.split(key, 3), widths, strict=True)
    )
    return queries, keys, values


def second_order(attention: Attention, queries: Array, keys: Array, values: Array) -> Array:
    """A Hessian-vector product of the sum of squares of the outputs in all three inputs."""

    def risk(inputs: tuple[Array, Array, Array]) -> Array:
        return jnp.sum(attention(*inputs) ** 2)

    inputs = (queries, keys, values)
    product = jax.jvp(jax.grad(risk), (inputs,), (jax.tree.map(jnp.sin, inputs),))[1]
    return jnp.concatenate([leaf.ravel() for leaf in product])


@claim(
    statement=r"\text{tiled attention has the output and the Hessian-vector product of the naive one}",
    source="derived here; the tiles are of Rabe, Staats, arXiv 2112.05682",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def tiled_attention_is_exact_to_second_order(key: PRNGKey, size: int = 1) -> Expectation:
    """24 tokens in tiles of 4 with scores of spread 10, against one softmax."""
    inputs = head_inputs(key, 24 * size)
    naive, tiled = exact(5.0), partial(tiled_attention, scale=5.0, tile=4)
    expected, found = (jnp.append(second_order(each, *inputs), each(*inputs)) for each in (naive, tiled))
    return equal("output and Hessian-vector product in tiles", found, expected, unit="relative")


@claim(
    statement=r"\text{temporary memory of a Hessian-vector product: } N^{1} \text{ in tiles, } N^{2} \text{ naively}",
    source="derived here: reverse mode keeps the inputs alone and makes each tile again",
    because="log-log slopes between N = 512 and 2048, where lower orders still count",
    slow=True,
)
def tiled_attention_takes_memory_linear_in_tokens(key: PRNGKey) -> list[Expectation]:
    """Temporary bytes that the compiler reports for the two products."""
    slopes = []
    for attention in (partial(tiled_attention, tile=128), exact()):
        sizes = []
        for length in (512, 2048):
            shapes = [jax.ShapeDtypeStruct((length, width), float) for width in (16, 16, 16)]
            analysis = jax.jit(partial(second_order, attention)).lower(*shapes).compile().memory_analysis()
            assert analysis is not None
            sizes.append(analysis.temp_size_in_bytes)
        slopes.append(np.log(sizes[1] / sizes[0]) / np.log(4))
    return [
        at_most("exponent of the memory in tiles", slopes[0], 1.2),
        at_least("exponent of the memory of naive attention", slopes[1], 1.8),
    ]


@claim(
    statement=r"\text{merging partitions } (m, l, o) \text{ is associative and commutative}",
    source="derived here: attention over a union of key sets",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def merging_partial_attention_is_associative(key: PRNGKey) -> Expectation:
    """Three sets of keys merged in three orders, against one softmax."""
    queries, keys, values = head_inputs(key)
    first, second, third = (partition(queries, keys[s], values[s], 1.0) for s in np.split(np.arange(12), [3, 7]))
    orders: list[Partition] = [
        merge(merge(first, second), third),
        merge(first, merge(second, third)),
        merge(third, merge(first, second)),
    ]
    whole = exact()(queries, keys, values)
    return equal(
        "outputs of the three orders",
        jnp.stack([output(order) for order in orders]),
        jnp.stack([whole] * 3),
        unit="relative",
    )


@claim(
    statement=r"m\,\mathrm{MSE}\big(\phi(x)^\top\phi(y)\big) = e^{\|x+y\|^2} \mathrm{SM}^2 \big(1 - e^{-\|x+y\|^2}\big), "
    r"\ \mathrm{SM} = e^{x \cdot y}",
    source="Choromanski et al., arXiv 2009.14794; rederived here from the moments of e^(w . (x + y))",
    tolerance=5.0,
    because="in standard errors of the mean square over 400,000 draws",
    slow=True,
)
def positive_random_features_have_this_variance(key: PRNGKey) -> Expectation:
    """Single features (m = 1) at a random pair with |x + y| near 1, in units of SM^2."""
    pair = jax.random.normal(key, (2, 4)) / 3
    features = positive_features(pair, jax.random.normal(jax.random.fold_in(key, 1), (400_000, 4)))
    kernel = jnp.exp(pair[0] @ pair[1])
    squares = (400_000 * features[0] * features[1] - kernel) ** 2 / kernel**2
    distance = jnp.sum((pair[0] + pair[1]) ** 2)
    predicted = jnp.exp(distance) * (1 - jnp.exp(-distance))
    return equal(
        "mean squared error over SM^2", jnp.mean(squares), predicted, standard_error=jnp.std(squares) / 400_000**0.5
    )


@claim(
    statement=r"\frac{\|\hat H[QK,QK] - H[QK,QK]\|}{\|H[QK,QK]\|} > \frac{\|\hat f - f\|}{\|f\|} "
    r"\text{ for random features and Nystrom}",
    source="derived here: the curvature differentiates the approximation's error twice; it is no law for top-k and windows",
    because="a bound; found between 1.4 and 1e6",
    slow=True,
)
def surrogate_kernels_lose_more_curvature_than_output(key: PRNGKey) -> Expectation:
    """Ratio of relative errors of a random head (D = 6, d = 4, 16 tokens): 1,024 features and 8 landmarks."""
    tokens, targets = jax.random.normal(key, (4, 16, 6)), jax.random.normal(key, (4, 16, 3))
    params = head_params(key, 6, 4, 3)
    found = []
    for attention in (random_features(key, 4, 1024, 0.5), nystrom(8, 0.5)):
        errors = approximation_errors(attention, exact(0.5), params, tokens, targets)
        found.append(errors.score_curvature / errors.output)
    return at_least("relative error of the curvature over that of the output: features, Nystrom", found, 1.0)


@claim(
    statement=r"\tfrac12 < \frac{\|\hat H[QK,QK] - H[QK,QK]\| / \|H[QK,QK]\|}{\|\hat f - f\| / \|f\|} < 2 "
    r"\text{ for low-rank, top-}k \text{ and sliding-window attention}",
    source="derived here: a small change of the weights moves all their moments at first order; that the factor is near one is measured",
    tolerance=0.3,
    because="log base 10 of the ratio, mean over 4 random heads: within a factor of 2 of one; random features and Nystrom go beyond",
    slow=True,
)
def averages_of_fewer_tokens_lose_curvature_as_they_lose_output(key: PRNGKey) -> Expectation:
    """Mean log ratio of relative errors of random heads (D = 6, d = 4, 16 tokens) that keep half of the tokens."""
    found = []
    for number in range(4):
        keys = jax.random.split(jax.random.fold_in(key, number), 4)
        tokens, targets = jax.random.normal(keys[0], (4, 16, 6)), jax.random.normal(keys[1], (4, 16, 3))
        params = head_params(keys[2], 6, 4, 3)
        kept = (low_rank(keys[3], 16, 8, 0.5), top_k(8, 0.5), sliding_window(4, 0.5))
        errors = [approximation_errors(attention, exact(0.5), params, tokens, targets) for attention in kept]
        found.append([float(jnp.log10(each.score_curvature / each.output)) for each in errors])
    return equal("mean log10 of the ratio: low rank, top-k, window", np.mean(found, axis=0), 0.0)


@claim(
    statement=r"\text{the attention of jax.nn takes its softmax in 32 bits of 64-bit inputs: errors of } 10^{-7}",
    source="measured here against 80-bit arithmetic; the cast to float32 is in JAX's own implementation of it",
    tolerance=0.15,
    because="log base 10 of the relative error, mean over 8 heads: -7.09 within 0.07 on seeds 0 to 9, as rounding of 32 bits is 6e-8",
)
def the_library_attention_is_exact_to_single_precision(key: PRNGKey) -> list[Expectation]:
    """Outputs of the library's and of our attention on 12 tokens in 64 bits."""
    errors = np.array([_library_and_own_error(each) for each in jax.random.split(key, 8)])
    return [
        equal("log10 of the relative error of the library, mean", np.log10(errors[:, 0]).mean(), -7.09),
        at_most(
            "largest relative error of ours, the control", errors[:, 1].max(), 1e-15, because="rounding of 64 bits"
        ),
    ]


def _library_and_own_error(key: PRNGKey) -> list[float]:
    queries, keys, values = head_inputs(key, value_dim=4)
    q, k, v = (np.asarray(x, np.longdouble) for x in (queries, keys, values))
    masses = np.exp(q @ k.T)
    wanted = masses @ v / masses.sum(axis=1, keepdims=True)
    with jax.numpy_dtype_promotion("standard"):  # it mixes 64 and 32 bits, which strict promotion refuses
        library = jax.nn.dot_product_attention(*(x[None, :, None] for x in (queries, keys, values)), scale=1.0)
    return [
        float(np.linalg.norm(np.asarray(outputs, np.longdouble) - wanted) / np.linalg.norm(wanted))
        for outputs in (library[0, :, 0], exact()(queries, keys, values))
    ]


@claim(
    statement=r"\|f_{\mathrm{top}\,k} - f\| \le 2 (1 - \mathrm{mass}_k) \max_j \|v_j\|",
    source="derived here: the two distributions differ by 2 (1 - mass) in the 1-norm",
    because="an inequality: only rounding may go beyond it",
)
def the_error_of_top_k_is_bounded_by_the_lost_mass(key: PRNGKey) -> Expectation:
    """Every query of a random head, for k = 1 ... 11 of 12 tokens."""
    queries, keys, values = head_inputs(key)
    weights, whole = softmax_weights(queries @ keys.T), exact()(queries, keys, values)
    kept = range(1, 12)
    bounds = [top_k_bound(weights, values, count) for count in kept]
    found = [jnp.linalg.norm(top_k(count)(queries, keys, values) - whole, axis=-1) for count in kept]
    return at_most("errors of the outputs, by k and query", jnp.stack(found), jnp.stack(bounds), 1e-12)


@claim(
    statement=r"(M \circ Q K^\top) V = \text{ the recurrence } S_i = a_i S_{i-1} + k_i v_i^\top,\ y_i = q_i^\top S_i; "
    r"\ \mathrm{rank}(M \circ Q K^\top)_{\mathrm{below}} = d",
    source="Dao, Gu, arXiv 2405.21060 (state-space duality)",
    tolerance=1e-12,
    because=ROUNDING,
)
def masked_linear_attention_is_a_recurrence(key: PRNGKey, size: int = 1) -> list[Expectation]:
    """Both forms on 12 tokens with random decays, and the rank of the lower left block for state size 4."""
    queries, keys, values = head_inputs(key, 12 * size)
    decays = jax.nn.sigmoid(jax.random.normal(key, (12 * size,)))
    forms = [f(queries, keys, values, decays).ravel() for f in (masked_linear_attention, recurrent_linear_attention)]
    block = np.asarray(decay_mask(decays) * (queries @ keys.T))[6 * size :, : 6 * size]
    singular = np.linalg.svd(block, compute_uv=False)
    rank = float(np.sum(singular > 1e-12 * singular[0]))
    return [
        equal("outputs of the recurrence", forms[1], forms[0], unit="relative"),
        equal("rank of the lower left block", rank, 4, 0.0, because="a whole number"),
    ]


@claim(
    statement=r"\text{attention under a mask is message passing along the edges of that graph}",
    source="derived here; compare graph attention networks, Velickovic et al., arXiv 1710.10903",
    tolerance=1e-12,
    because=ROUNDING,
)
def masked_attention_is_message_passing(key: PRNGKey, size: int = 1) -> Expectation:
    """A random graph with self-loops on 12 nodes, against masked softmax."""
    queries, keys, values = head_inputs(key, 12 * size)
    mask = np.asarray(jax.random.bernoulli(key, 0.3, (12 * size, 12 * size))) | np.eye(12 * size, dtype=bool)
    receivers, senders = (jnp.asarray(index) for index in np.nonzero(mask))
    masked = softmax_weights(queries @ keys.T, jnp.asarray(mask)) @ values
    return equal(
        "outputs along the edges", graph_attention(queries, keys, values, senders, receivers), masked, unit="relative"
    )
