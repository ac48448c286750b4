"""Claims about attention as memory: rank and capacity, outer products, Hopfield networks, sparse recovery."""

from collections import Counter
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array

from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.curvature import hessian
from attnlab.data.markov import entropy_rate, markov_sequences, random_transitions
from attnlab.data.sparse import Code
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.memory.associative import first_curvature, first_step, recall_errors, recall_objective, storage_error, zipf
from attnlab.memory.capacity import (
    attention_features,
    jacobian_rank,
    memorization_error,
    rank_with_random_contexts,
    rank_with_shared_context,
    readout_rank,
    scalar_head_params,
    scalar_heads,
)
from attnlab.memory.hopfield import denoising_slope, hopfield_energy, hopfield_update
from attnlab.memory.recovery import attention_threshold, decode, detection_threshold, state_evolution
from attnlab.memory.scaling import fit_power_law
from attnlab.models.heads import softmax_weights
from attnlab.types import PRNGKey

WHOLE = "whole numbers; singular values below 1e-11 of the largest count as zero"


@claim(
    statement=r"\mathrm{rank}\,J = H (2 d d_h - d_h^2 + d) \text{ with random contexts}",
    source="derived here by counting gauges; published lower bound: Mahdavi, Liao, Thrampoulidis, arXiv 2306.02010",
    tolerance=0.0,
    because=WHOLE,
    slow=True,
)
def memorization_rank_with_random_contexts(key: PRNGKey, size: int = 1) -> Expectation:
    """Rank of the Jacobian of scalar heads on 80 random queries, each with its own context of 5 tokens."""
    predicted, found = [], []
    for heads, width, head_dim in ((1, 4, 2), (2 * size, 4, 2), (2, 3, 1)):
        params = scalar_head_params(key, heads, width, head_dim)
        inputs = jax.random.normal(key, (80 * size, width)), jax.random.normal(key, (80 * size, 5, width))
        found.append(jacobian_rank(scalar_heads, params, inputs))
        predicted.append(rank_with_random_contexts(heads, width, head_dim))
    return equal("ranks of the Jacobian", found, predicted)


@claim(
    statement=r"\mathrm{rank}\,J = H[\rho(d + r - \rho) + r] + [n \le d], \ r = \min(n-1, d), \ \rho = \min(d_h, r), "
    r"\text{ in one shared context}",
    source="derived here by counting gauges; published lower bound: Mahdavi, Liao, Thrampoulidis, arXiv 2306.02010",
    tolerance=0.0,
    because=WHOLE,
    slow=True,
)
def memorization_rank_in_a_shared_context(key: PRNGKey, size: int = 1) -> Expectation:
    """The same for queries that see one context, of fewer and more tokens than the head dimension and than the width."""
    predicted, found = [], []
    for heads, width, head_dim, tokens in ((1, 5, 3, 3), (2 * size, 4, 2, 4), (1, 3, 2, 6), (2, 3, 3, 4)):
        params = scalar_head_params(key, heads, width, head_dim)
        context = jnp.broadcast_to(jax.random.normal(key, (tokens, width)), (80 * size, tokens, width))
        inputs = jax.random.normal(key, (80 * size, width)), context
        found.append(jacobian_rank(scalar_heads, params, inputs))
        predicted.append(rank_with_shared_context(heads, width, head_dim, tokens))
    return equal("ranks of the Jacobian", found, predicted)


@claim(
    statement=r"N \le 0.8\,\mathrm{rank}\,J: \text{ random labels are fitted; } N \ge 1.25\,\mathrm{rank}\,J: \text{ they are not}",
    source="derived here: the outputs fill a manifold of that dimension, which a random point misses with probability one",
    because="error over variance of the best of three starts: 1e-6 and 1e-3 stand for fitted and not fitted",
    slow=True,
)
def attention_fits_as_many_labels_as_its_jacobian_has_rank(key: PRNGKey) -> list[Expectation]:
    """Levenberg-Marquardt on the labels of two heads with d = 3 and d_h = 1, whose rank is 16."""
    shape = (2, 3, 1)
    rank = rank_with_random_contexts(*shape)
    best = [
        min(memorization_error(jax.random.fold_in(key, start), shape, count, evaluations=100) for start in range(3))
        for count in (int(0.8 * rank), int(1.25 * rank))
    ]
    return [
        at_most("error over variance at 0.8 of the rank", best[0], 1e-6),
        at_least("error over variance at 1.25 of the rank", best[1], 1e-3),
    ]


@claim(
    statement=r"\mathrm{rank}[a_1 \ldots a_H] = H(n - 1) + 1 \ge H(\min(n, d_h) - 1) + 1",
    source="Mahdavi, Liao, Thrampoulidis, arXiv 2306.02010 (the order, of min(n, d_h)); constants derived here",
    tolerance=0.0,
    because=WHOLE,
)
def fixed_heads_memorize_as_many_as_their_weights_are_independent(key: PRNGKey, size: int = 1) -> Expectation:
    """The attention weights of 80 queries over one context, with fewer and more tokens than the head dimension."""
    predicted, found = [], []
    for heads, width, head_dim, tokens in ((2, 5, 2, 4), (3, 5, 3, 3), (2 * size, 4, 1, 4)):
        params = scalar_head_params(key, heads, width, head_dim)
        inputs = jax.random.normal(key, (80 * size, width)), jax.random.normal(key, (tokens, width))
        found.append(np.linalg.matrix_rank(np.asarray(attention_features(params, inputs)), rtol=1e-11))
        predicted.append(readout_rank(heads, tokens))
    return equal("ranks of the features", found, predicted)


@claim(
    statement=r"-\nabla_{W=0} = \tfrac1n \textstyle\sum_i (u_{y_i} - \bar u)\, e_i^\top, \quad "
    r"H_{W=0} = \mathrm{Cov}(u) \otimes \tfrac1n \textstyle\sum_i e_i e_i^\top",
    source="derived here: at zero softmax is uniform; compare Cabannes, Dohmatob, Bietti, arXiv 2310.02984",
    tolerance=1e-12,
    because=ROUNDING,
)
def the_first_step_stores_outer_products(key: PRNGKey) -> Expectation:
    """Autodiff gradient and Hessian of the cross-entropy of an associative memory at zero."""
    keys, outputs = jax.random.normal(key, (9, 4)), jax.random.normal(jax.random.fold_in(key, 1), (5, 3))
    labels = jax.random.randint(key, (9,), 0, 5)
    risk, zero = recall_objective(keys, outputs, labels), {"W": jnp.zeros((3, 4))}
    predicted = [first_step(keys, outputs, labels).ravel(), first_curvature(keys, outputs).ravel()]
    found = [-jax.jit(jax.grad(risk))(zero)["W"].ravel(), hessian(risk, zero).dense().ravel()]
    return equal("gradient and Hessian at zero", jnp.concatenate(found), jnp.concatenate(predicted), unit="relative")


@claim(
    statement=r"\text{recall error of } N \text{ pairs in } d \text{ dimensions: } (N-1)/d \text{ (outer products)}, "
    r"\max(0, 1 - d/N) \text{ (least squares)}, \approx 0 \text{ (softmax)}",
    source="derived here: crosstalk of random keys, residual of a projection, exponential separation",
    tolerance=4.0,
    because="in standard errors over 20 draws",
)
def recall_errors_form_a_ladder(key: PRNGKey) -> list[Expectation]:
    """96 random unit keys in 64 dimensions with values N(0, I)."""
    count, dim = 96, 64

    @jax.jit
    @jax.vmap
    def errors(key: PRNGKey) -> dict[str, Array]:
        keys = jax.random.normal(key, (count, dim))
        keys = keys / jnp.linalg.norm(keys, axis=1, keepdims=True)
        return recall_errors(keys, jax.random.normal(jax.random.fold_in(key, 1), (count, dim)), 50.0)

    found = {name: np.asarray(row) for name, row in errors(jax.random.split(key, 20)).items()}
    predicted = {"linear": (count - 1) / dim, "least_squares": 1 - dim / count}
    rows = [found[name] for name in predicted]
    return [
        equal(
            "recall errors of outer products and of least squares",
            [row.mean() for row in rows],
            list(predicted.values()),
            standard_error=[row.std(ddof=1) / 20**0.5 for row in rows],
        ),
        at_most("recall error of softmax at beta = 50", found["softmax"].mean(), 4e-3, because="next to nothing"),
    ]


@claim(
    statement=r"\text{error} = \textstyle\sum_{i > m} p_i \left(1 - \tfrac1m [\mathrm{class} \in \mathrm{stored}]\right) \sim (m + \tfrac12)^{1 - \alpha},"
    r" \ m = d / 8, \text{ of a memory of } m \text{ items under Zipf}(\alpha)",
    source="Cabannes, Dohmatob, Bietti, arXiv 2310.02984 (thresholded storage; the constant d / 8 is chosen here); "
    "the sum, and the chance of a right guess: derived here",
    tolerance=5.0,
    because="in standard errors over ten draws, a thousandth of the error and less but for the draws, at d = 64, where crosstalk "
    "confuses an item that is stored",
    slow=True,
)
def associative_memory_scales_with_dimension(key: PRNGKey, size: int = 1) -> Expectation:
    """Error at d = 64 ... 512, alpha = 2, 200 classes, 4,000 items, against Hurwitz zeta functions.

    The answer for an item that is not stored is one of the stored classes, each as likely: right with probability 1 / m
    where its own is among them.
    """
    items, dims = 4000, [64, 128, 256, 512]
    one = jax.jit(storage_error, static_argnums=(2, 3, 4))
    keys = jax.random.split(key, 10 * size)
    draws = np.array([[one(k, zipf(items, 2.0), 200, dim, dim // 8) for k in keys] for dim in dims])
    bars = draws.std(axis=1, ddof=1) / draws.shape[1] ** 0.5
    return equal(
        "errors at d = 64 ... 512",
        draws.mean(axis=1),
        [_not_stored(items, dim // 8) for dim in dims],
        standard_error=bars,
    )


def _not_stored(items: int, stored: int) -> float:
    """Share of items beyond the stored ones under Zipf(2), less that of the right guesses, 1 / m of those items i with
    i mod 200 < m."""
    total, lost = (scipy.special.zeta(2, first + 1) - scipy.special.zeta(2, items + 1) for first in (0, stored))
    others = np.arange(stored, items)
    guessed = np.sum((others + 1.0)[others % 200 < stored] ** -2) / stored
    return float((lost - guessed) / total)


@claim(
    statement=r"\beta^* = 1 / \sigma^2: \text{ softmax attention over patterns of one norm is the MMSE denoiser}",
    source="derived here; the update is of Ramsauer et al., arXiv 2008.02217",
    tolerance=4.0,
    because="in standard errors of the error's slope in beta",
    slow=True,
)
def hopfield_attention_is_the_best_denoiser(key: PRNGKey) -> list[Expectation]:
    """Slope at beta* on 100,000 noisy patterns, and in standard errors at half and double beta*."""
    patterns = jax.random.normal(key, (6, 4))
    patterns = patterns / jnp.linalg.norm(patterns, axis=1, keepdims=True)
    noise = 0.6
    slopes = [denoising_slope(key, patterns, noise, factor / noise**2, 100_000) for factor in (0.5, 1.0, 2.0)]
    (low, low_error), (best, error), (high, high_error) = slopes
    return [
        equal("slope at beta*", best, 0.0, standard_error=error),
        at_most("slope at half of it, in standard errors", low / low_error, -4.0, because="the negative control"),
        at_least("slope at twice of it, in standard errors", high / high_error, 4.0, because="the negative control"),
    ]


@claim(
    statement=r"E(\mathrm{update}(x)) \le E(x), \quad \mathrm{update}(x) = x - \nabla E(x)",
    source="Ramsauer et al., arXiv 2008.02217; the gradient: derived here",
    tolerance=1e-12,
    because=ROUNDING,
)
def hopfield_updates_descend_their_energy(key: PRNGKey) -> list[Expectation]:
    """Ten random states among six patterns: the update against the energy's gradient, and rises of the energy."""
    patterns, states = jax.random.normal(key, (6, 4)), jax.random.normal(jax.random.fold_in(key, 1), (10, 4))
    updated = hopfield_update(patterns, states, 1.3)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(hopfield_energy(patterns, x, 1.3))))(states)
    rises = hopfield_energy(patterns, updated, 1.3) - hopfield_energy(patterns, states, 1.3)
    return [
        equal("x - grad E(x)", states - gradient, updated, unit="relative"),
        at_most("rise of the energy, by state", rises, 0.0, 1e-12),
    ]


@claim(
    statement=r"\|\nabla^2 \Phi\| = \max_h \|\nabla^2 \varphi_h\| / \sqrt{H} \text{ for } \Phi = \tfrac{1}{\sqrt H} \textstyle\sum_h \varphi_h",
    source="Deora, Ghaderi, Taheri, Thrampoulidis, arXiv 2310.12680 (heads smooth the landscape); the identity: derived here",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def heads_smooth_the_landscape(key: PRNGKey) -> Expectation:
    """Hessian of one output of 1, 2 and 4 heads in all weights against those of its heads alone."""
    query, context = jax.random.normal(key, (1, 3)), jax.random.normal(key, (1, 5, 3))
    params = scalar_head_params(key, 4, 3, 2)
    predicted, found = [], []
    for heads in (1, 2, 4):
        parts = [jax.tree.map(lambda leaf, h=h: leaf[h : h + 1], params) for h in range(heads)]
        alone = [np.linalg.norm(_output_hessian(part, (query, context)), 2) for part in parts]
        some = jax.tree.map(lambda leaf, heads=heads: leaf[:heads], params)
        predicted.append(max(alone) / heads**0.5)
        found.append(np.linalg.norm(_output_hessian(some, (query, context)), 2) / heads**0.5)
    return equal("norms of the Hessian of 1, 2 and 4 heads", found, predicted, unit="relative")


@jax.jit
def _output_hessian(params: dict[str, Array], inputs: tuple[Array, Array]) -> Array:
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.hessian(lambda vector: scalar_heads(unravel(vector), inputs)[0])(flat)


@claim(
    statement=r"\text{softmax attention separates all contexts that mean pooling confuses}",
    source="after Kajitsuka, Sato, arXiv 2307.14023; the enumeration: derived here",
    tolerance=0.0,
    because="whole numbers: pairs of contexts with outputs closer than 1e-9",
)
def softmax_separates_contexts_that_pooling_confuses(key: PRNGKey) -> Expectation:
    """All multisets of four tokens among -1, 0, 1 in one dimension, seen by one query with a random score weight."""
    contexts = np.array([c for c in product([-1.0, 0.0, 1.0], repeat=4) if list(c) == sorted(c)])
    weight = 1 + jax.random.uniform(key)
    softmax = np.asarray(jnp.sum(softmax_weights(weight * jnp.asarray(contexts)) * contexts, axis=1))
    pairs = Counter(contexts.sum(axis=1)).values()
    by_count = sum(n * (n - 1) // 2 for n in pairs)
    return equal(
        "confused pairs of contexts: pooling, softmax",
        [_confused(contexts.mean(axis=1)), _confused(softmax)],
        [by_count, 0],
    )


def _confused(outputs: np.ndarray) -> int:
    close = np.abs(outputs[:, None] - outputs[None]) < 1e-9
    return int(np.triu(close, 1).sum())


@claim(
    statement=r"\|x_t - x\|^2 / n = P(1 - s_t): \text{ state evolution of message passing with a softmax denoiser}",
    source="Rush, Greig, Venkataramanan, arXiv 1501.05892; Onsager's term as a softmax Jacobian's trace: derived here",
    tolerance=0.12,
    because="the share of 256 sections fluctuates by 0.03, which the steep part amplifies twice",
    slow=True,
)
def state_evolution_predicts_softmax_message_passing(key: PRNGKey) -> list[Expectation]:
    """Six iterations on one code word: L = 256 sections, M = 32 entries, capacity 1.5 bits, rate 0.8 and 1.4 bits."""
    predicted, found = [], []
    run, evolve = jax.jit(decode, static_argnums=(1, 2, 3)), jax.jit(state_evolution, static_argnums=(1, 2))
    for rate in (0.8, 1.4):
        code = Code(256, 32, rows=round(256 * 5 / rate), power=7.0)  # log2(1 + 7) / 2 = 1.5 bits
        predicted.append(evolve(key, code, 6))
        found.append(run(key, code, 6, True))
    plain = run(key, Code(256, 32, rows=1600, power=7.0), 6, False)  # at the rate 0.8
    off = jnp.max(jnp.abs(plain - predicted[0])) / 7
    return [
        equal(
            "squared errors over the power, by iteration", jnp.concatenate(found) / 7, jnp.concatenate(predicted) / 7
        ),
        at_least("how far the run at 0.8 bits is off without Onsager's term", off, 0.12, because="the control"),
    ]


@claim(
    statement=r"\mu^*_{\mathrm{pooling}} = 2 z \sqrt{L} \sim L^{1/2}, \quad \mu^*_{\mathrm{attention}} = "
    r"\Phi^{-1}\big((1 - \varepsilon)^{1/L}\big) - \Phi^{-1}\big(\varepsilon (1 - \varepsilon)^{1/L - 1}\big) \sim \sqrt{2 \ln L}",
    source="derived here: one token of strength mu among L, errors of a share epsilon = 0.1 of both kinds",
    tolerance=0.03,
    because="4 standard errors of the slope; of the attention, what goes beyond 4 of its own",
    slow=True,
)
def attention_detects_a_token_that_pooling_drowns(key: PRNGKey) -> list[Expectation]:
    """Strengths found by bisection for L = 4 ... 256: softmax with logits of scale 0 (the mean token) and 100."""
    lengths, count = 4 ** np.arange(1, 5), 8000
    pooled, attended = (
        np.array([detection_threshold(key, int(length), 0.1, scale, count) for length in lengths])
        for scale in (0.0, 100.0)
    )
    wanted = attention_threshold(lengths, 0.1)
    off = np.maximum(np.abs(attended[:, 0] - wanted) - 4 * attended[:, 1], 0) / wanted
    growth = fit_power_law(lengths, *pooled.T).exponent
    return [
        equal("exponent of the strength that pooling needs", growth, 0.5),
        at_most("relative deviation of the attention's, beyond 4 standard errors, by L", off, 0.03),
    ]


@claim(
    statement=r"W = \log P \text{ with one-hot embeddings has the least cross-entropy on a Markov chain, its entropy rate}",
    source="derived here: the log-likelihood of a chain; its excess is a Kullback-Leibler divergence",
    tolerance=4.5,
    because="in standard errors over 40,000 pairs; the gradient has mean zero where each share is right",
    slow=True,
)
def a_memory_of_bigrams_reaches_the_entropy_rate(key: PRNGKey) -> Expectation:
    """Risk and gradient of the associative memory with W = log P on sequences of a random chain of five states."""
    transitions = random_transitions(key, 5)
    data = markov_sequences(jax.random.fold_in(key, 1), transitions, 4000, 10)
    keys, labels = jnp.eye(5)[data.inputs.ravel()], data.targets.ravel()
    risk, point = recall_objective(keys, jnp.eye(5), labels), {"W": jnp.log(transitions).T}
    losses = -jnp.log(transitions)[data.inputs, data.targets].mean(axis=1)
    found = jnp.append(risk(point), jnp.max(jnp.abs(jax.grad(risk)(point)["W"])))
    # an entry of the gradient is the mean of at most a Bernoulli variable less its probability
    scale = jnp.array([jnp.std(losses) / losses.size**0.5, 0.5 / labels.size**0.5])
    return equal(
        "risk, and the largest entry of the gradient",
        found,
        jnp.append(entropy_rate(transitions), 0.0),
        standard_error=scale,
    )
