"""Claims about softmax attention itself: its cumulants, scale, depth, rank, masks, positions and tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from jaxtyping import Array
from numpy.typing import ArrayLike

from attnlab.attention import attend_query, attention_hessian, cumulants
from attnlab.attention.cumulants import needle_logit, saturation, saturation_constant
from attnlab.claims.registry import Comparison, claim
from attnlab.curvature import hessian
from attnlab.data.digits import patches
from attnlab.data.signals import frames, spectrogram
from attnlab.dynamics.tokens import rank_residual
from attnlab.losses import square_loss
from attnlab.models import heads
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention, attention_maps
from attnlab.models.positions import rotate, rotate_2d, sinusoidal, sinusoidal_shift
from attnlab.models.transformer import Transformer, TransformerBlock, TransformerConfig
from attnlab.objective import objective
from attnlab.types import PRNGKey

ROUNDING = "an identity in float64, to rounding"
VASWANI = "Vaswani et al., arXiv 1706.03762"
COLLAPSE = "Dong, Cordonnier, Loukas, arXiv 2103.03404"


@claim(
    statement=r"\partial f / \partial q = \beta\,\mathrm{Cov}_a(v, k), \quad "
    r"\partial^2 f / \partial q^2 = \beta^2 \kappa_a(v, k, k)",
    source="derived here: softmax is an exponential family, its derivatives are cumulants",
    tolerance=1e-12,
    because=ROUNDING,
)
def softmax_attention_is_a_cumulant_generator(key: PRNGKey, size: int = 1) -> Comparison:
    """Autodiff of one query's output against the cumulants of its values and keys."""
    shapes = ((4 * size,), (9 * size, 4 * size), (9 * size, 3))
    query, keys, values = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
    beta = 0.7
    moments = cumulants(query, keys, values, beta)
    first, second = jax.jit(
        lambda q: (jax.jacfwd(attend_query)(q, keys, values, beta), _second(q, keys, values, beta))
    )(query)
    predicted = [beta * moments.covariance.ravel(), beta**2 * moments.third.ravel()]
    return Comparison(jnp.concatenate(predicted), jnp.concatenate([first.ravel(), second.ravel()]))


def _second(query: Array, keys: Array, values: Array, scale: float) -> Array:
    return jax.jacfwd(jax.jacrev(attend_query))(query, keys, values, scale)


@claim(
    statement=r"\mathbb{E}\big[1 - \textstyle\sum_j a_j^2\big] \to c_N / \sqrt{d},\ c_N = N(N-1)\int \varphi^2 \Phi^{N-2}, "
    r"\text{ without the scale } 1/\sqrt{d}",
    source=f"derived here (the remedy, 1/sqrt(d): {VASWANI}, section 3.2.1)",
    tolerance=0.05,
    because="the next order is 3/(4 d) and (pi/sigma)^2/6 of the gap's curvature: below 2 %; 1 % Monte Carlo error",
)
def unscaled_attention_saturates_on_average_like_a_power(key: PRNGKey, size: int = 1) -> Comparison:
    """Mean trace of the softmax Jacobian of 8 tokens in d = 256 and 1024, over c_8 / sqrt(d)."""
    draws = saturation_constant(8) / np.sqrt([256, 1024])
    means = [jnp.mean(saturation(key, dim, 8, 200_000 * size)) for dim in (256, 1024)]
    return Comparison(np.ones(2), np.array(means) / draws)


@claim(
    statement=r"\mathrm{median}\big(1 - \textstyle\sum_j a_j^2\big) \approx 2 e^{-\sqrt{2 d}\, \Phi^{-1}(3/4)} "
    r"\text{ for two unscaled tokens}",
    source="derived here: the typical gradient vanishes exponentially where its mean is a power of d",
    tolerance=4.0,
    because="in standard errors of the median of the gap, plus its fluctuating scale |q|",
)
def unscaled_attention_saturates_typically_like_an_exponential(key: PRNGKey, size: int = 1) -> Comparison:
    """-log(median / 2) / sqrt(d) for two tokens at d = 1024, against the median gap of two normal variables."""
    dim, draws = 1024, 50_000 * size
    found = -jnp.log(jnp.median(saturation(key, dim, 2, draws)) / 2) / dim**0.5
    gap = 2**0.5 * scipy.stats.norm.ppf(0.75)
    density = 2 * scipy.stats.norm.pdf(gap, scale=2**0.5)
    return Comparison(gap, found, scale=0.5 / (density * draws**0.5))


@claim(
    statement=r"\tau^2 H(\tau; \tau W) = H(1; W)",
    source="derived here: attention sees W / temperature",
    tolerance=1e-12,
    because=ROUNDING,
)
def temperature_rescales_the_hessian(key: PRNGKey) -> Comparison:
    """Autodiff Hessian of a merged query-key matrix at temperature 2.5 against temperature 1."""
    found = []
    tokens, targets = jax.random.normal(key, (2, 6, 4)), jax.random.normal(key, (2, 6, 3))
    for temperature in (1.0, 2.5):
        module = SelfAttention(AttentionConfig(key_dim=4, value_dim=3, merged=True, scale=1 / temperature))
        params = module.init(key, tokens)["params"]
        params = {**params, "query_key": temperature * params["query_key"]}
        risk = objective(from_linen(module), square_loss, tokens, targets)
        found.append(temperature**2 * hessian(risk, params, block="query_key").dense())
    return Comparison(*found)


@claim(
    statement=r"\text{half of the attention on one of } n \text{ tokens takes a logit of } \log n + \tfrac12",
    source="derived here for normal scores of the other tokens",
    tolerance=0.02,
    because="standard error 0.004 at n = 256 over 400 draws, bias -(e - 1) / (2 n)",
)
def a_needle_needs_a_logarithmic_logit(key: PRNGKey) -> Comparison:
    """Mean log-sum-exp of n scores N(0, 1) for n = 256 ... 16384."""
    lengths = 4 ** np.arange(4, 8)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    found = [scipy.special.logsumexp(random.standard_normal((400, n)), axis=1).mean() for n in lengths]
    return Comparison(needle_logit(lengths), found, scale=1)


def slope(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Least-squares slope of log y against log x."""
    return np.polyfit(np.log(x), np.log(np.asarray(y, float)), 1)[0]


SPREADS = np.geomspace(1e-3, 1e-2, 4)
NEXT_ORDER = "the next order is one power of the spread further, 1e-3 ... 1e-2"


def near_rank_one(key: PRNGKey, spread: float, length: int = 6, width: int = 4) -> Array:
    """A common token plus a small spread around it."""
    common, noise = jax.random.normal(key, (width,)), jax.random.normal(jax.random.fold_in(key, 1), (length, width))
    return common[None] + spread * (noise - jnp.mean(noise, axis=0, keepdims=True))


@claim(
    statement=r"\|X' - \bar X'\| \sim \epsilon^3 \text{ after a layer of pure attention, } \epsilon^1 \text{ with a skip}",
    source=f"{COLLAPSE} (the cubic rate); the exponent with a skip: derived here",
    tolerance=0.05,
    because=NEXT_ORDER,
)
def pure_attention_contracts_the_token_spread_cubically(key: PRNGKey) -> Comparison:
    """Slope of the spread of the outputs against that of the inputs, without and with a residual."""
    attention = AttentionConfig(key_dim=4, value_dim=4, scale=1.0)
    slopes = []
    for residual in (False, True):
        module = Transformer(TransformerConfig(attention, norm=None, residual=residual))
        params = module.init(key, near_rank_one(key, 1.0))["params"]
        outputs = jax.jit(from_linen(module))
        slopes.append(slope(SPREADS, [rank_residual(outputs(params, near_rank_one(key, size))) for size in SPREADS]))
    return Comparison([3.0, 1.0], slopes, scale=1)


@claim(
    statement=r"\|\nabla_{QK}\| \sim \epsilon^2,\ \|H_o[QK,QK]\| \sim \epsilon^4,\ \|H_f[QK,QK]\| \sim \epsilon^3,\ "
    r"\|H_o[V,V]\| \sim \epsilon^0",
    source="derived here from the cumulants: the mean token's share of each order cancels",
    tolerance=0.05,
    because=NEXT_ORDER,
)
def curvature_of_queries_and_keys_vanishes_with_the_token_spread(key: PRNGKey) -> Comparison:
    """Slopes of gradient and Hessian blocks of a merged layer against the spread of its tokens."""
    config = AttentionConfig(key_dim=4, value_dim=3, merged=True)
    params = SelfAttention(config).init(key, near_rank_one(key, 1.0))["params"]
    targets = jax.random.normal(key, (6, 3))
    rows = []
    for size in SPREADS:
        tokens = near_rank_one(key, size)
        risk = objective(from_linen(SelfAttention(config)), square_loss, tokens, targets)
        norms = attention_hessian(config, params, tokens, targets).norms()
        pair = ("query_key", "query_key")
        gradient = jnp.linalg.norm(jax.jit(jax.grad(risk))(params)["query_key"])
        rows.append([gradient, norms["outer"][pair], norms["functional"][pair], norms["outer"]["value", "value"]])
    return Comparison([2.0, 4.0, 3.0, 0.0], slope(SPREADS, rows), scale=1)


@claim(
    statement=r"\|\nabla W_{\mathrm{last\ MLP}}\| \sim L^{-1/2} \text{ in a pre-LN transformer of } L \text{ blocks}",
    source="Xiong et al., arXiv 2002.04745",
    tolerance=0.08,
    because="the residual stream's variance is 1 + c L: at L = 8 ... 64 the constant still bends the slope a little",
)
def last_gradient_of_a_pre_norm_transformer_falls_with_depth(key: PRNGKey, size: int = 1) -> Comparison:
    """Root mean square over 64 initialisations of the last MLP's gradient, with a LayerNorm before the read-out."""
    depths = size * np.array([8, 16, 32, 64])
    streams, targets = jax.random.normal(key, (2, 64, 4, 16))
    found = []
    for depth in range(1, depths[-1] + 1):
        keys = jax.random.split(jax.random.fold_in(key, depth), 64)
        if depth in depths:
            norms = _last_gradients(keys, streams, targets)
            found.append(jnp.sqrt(jnp.mean(norms**2)))
        streams = _next_block(keys, streams)
    return Comparison(-0.5, slope(depths, found), scale=1)


BLOCK = TransformerBlock(
    TransformerConfig(AttentionConfig(16, 16), mlp_width=32, activation="relu", norm="pre", gain=2**0.5)
)


@jax.jit
@jax.vmap
def _next_block(key: PRNGKey, tokens: Array) -> Array:
    return jnp.asarray(BLOCK.apply(BLOCK.init(key, tokens), tokens))


@jax.jit
@jax.vmap
def _last_gradients(key: PRNGKey, tokens: Array, target: Array) -> Array:
    """Norm of the gradient of the down-projection of a last block on the stream `tokens`."""
    params = BLOCK.init(key, tokens)["params"]

    def loss(down: Array) -> Array:
        outputs = jnp.asarray(BLOCK.apply({"params": {**params, "mlp": {**params["mlp"], "down": down}}}, tokens))
        centred = outputs - jnp.mean(outputs, -1, keepdims=True)
        return jnp.mean((centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True)) - target) ** 2)

    return jnp.linalg.norm(jax.grad(loss)(params["mlp"]["down"]))


@claim(
    statement=r"\mathrm{rank}\,A = n,\ \mathrm{rank}(\log A - \mathrm{row\ means}) = \min(d_k, n - 1),\ "
    r"\mathrm{rank}(A \otimes W_V^\top) = \mathrm{rank}\,A \cdot \mathrm{rank}\,W_V",
    source="derived here: softmax restores the rank that the low-rank scores lack",
    tolerance=0.0,
    because="whole numbers; singular values below 1e-10 of the largest count as zero",
)
def softmax_has_full_rank_over_low_rank_scores(key: PRNGKey) -> Comparison:
    """Attention of 8 tokens with key dimension 2, and with 10 (above n - 1); the value map has rank 3."""
    predicted, found = [], []
    for key_dim in (2, 10):
        module = SelfAttention(AttentionConfig(key_dim, value_dim=3))
        tokens = 2 * jax.random.normal(key, (8, 12))
        params = module.init(key, tokens)["params"]
        (weights,) = attention_maps(module, params, tokens).values()
        (matrix,) = np.asarray(weights)
        logs = np.log(matrix)
        centred = logs - logs.mean(axis=1, keepdims=True)
        joint = np.kron(matrix, np.asarray(params["value"]).T)
        found += [numerical_rank(each) for each in (matrix, centred, joint)]
        predicted += [8, min(key_dim, 7), 8 * 3]
    return Comparison(predicted, found, scale=1)


def numerical_rank(matrix: np.ndarray) -> int:
    """Singular values above 1e-10 of the largest."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(values > 1e-10 * values[0]))


@claim(
    statement=r"f_i \in \mathrm{conv}\{v_1, \dots, v_n\}",
    source="derived here: attention weights are a distribution",
    tolerance=1e-10,
    because="residual of the nearest point of the hull by non-negative least squares",
)
def outputs_lie_in_the_convex_hull_of_the_values(key: PRNGKey) -> Comparison:
    """Distance of each output of a random layer from the hull of its values; a point outside is told apart."""
    module = SelfAttention(AttentionConfig(key_dim=3, value_dim=2))
    tokens = jax.random.normal(key, (10, 5))
    params = module.init(key, tokens)["params"]
    values = np.asarray(tokens @ params["value"])
    outputs = np.asarray(module.apply({"params": params}, tokens))
    distances = [distance_to_hull(values, output) for output in outputs]
    outside = 3 * values[np.argmax(np.linalg.norm(values, axis=1))]
    return Comparison(np.zeros(11), [*distances, float(distance_to_hull(values, outside) < 0.1)], scale=1)


def distance_to_hull(points: np.ndarray, target: np.ndarray) -> float:
    """Residual of target = sum w_i p_i with w >= 0 and sum w = 1."""
    system = np.vstack([points.T, np.ones(len(points))])
    return scipy.optimize.nnls(system, np.append(target, 1.0))[1]


@claim(
    statement=r"\mathrm{FLOPs}_{\mathrm{attention}} / \mathrm{FLOPs}_{\mathrm{MLP}} = (2 D + N) / (4 D): "
    r"\text{ attention costs more only for } N > 2 D",
    source="derived here: 8 N D^2 + 4 N^2 D operations against 16 N D^2 (MLP of width 4 D); counted by the compiler",
    tolerance=0.03,
    because="softmax, activation and sums are of lower order, 1 % at these sizes",
)
def attention_costs_more_than_the_mlp_only_in_long_contexts(key: PRNGKey) -> Comparison:
    """Operation counts of compiled attention and MLP at D = 128, N = 128, 256 (equal cost) and 512."""
    width, predicted, found = 128, [], []
    for length in (128, 256, 512):
        tokens, square = jnp.zeros((length, width)), jnp.zeros((width, width))
        wide = jnp.zeros((width, 4 * width))
        attention, mlp = (
            _operations(f, *x) for f, x in ((_attend, (tokens, *[square] * 4)), (_mlp, (tokens, wide, wide.T)))
        )
        predicted.append((2 * width + length) / (4 * width))
        found.append(attention / mlp)
    return Comparison(np.ones(3), np.array(found) / predicted)


def _attend(x: Array, query: Array, key: Array, value: Array, output: Array) -> Array:
    weights = heads.softmax_weights(heads.attention_scores(x @ query, x @ key, 1.0))
    return heads.attend(weights, x @ value) @ output


def _mlp(x: Array, up: Array, down: Array) -> Array:
    return jax.nn.relu(x @ up) @ down


def _operations(function: Callable[..., Array], *arguments: Array) -> float:
    counts = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert counts is not None
    return counts["flops"]


@claim(
    statement=r"f(P X) = P f(X); \text{ not so with positions}",
    source="derived here: a layer sees its tokens as a set",
    tolerance=1e-12,
    because=ROUNDING,
)
def attention_is_equivariant_under_permutations(key: PRNGKey) -> Comparison:
    """Outputs on permuted tokens, against permuted outputs; with sinusoidal positions the two differ by more than 1 %."""
    module = SelfAttention(AttentionConfig(key_dim=3, value_dim=3))
    tokens, order = jax.random.normal(key, (7, 6)), np.roll(np.arange(7), 1)
    params = module.init(key, tokens)["params"]

    def error(code: Array) -> float:
        plain, permuted = (jnp.asarray(module.apply({"params": params}, x + code)) for x in (tokens, tokens[order]))
        return float(jnp.linalg.norm(permuted - plain[order]) / jnp.linalg.norm(plain))

    positions = sinusoidal(jnp.arange(7.0), 6)
    return Comparison([0.0, 1.0], [error(jnp.zeros_like(positions)), float(error(positions) > 0.01)], scale=1)


@claim(
    statement=r"PE(t + k) = R_k PE(t); \quad \langle PE(s), PE(t) \rangle \text{ is Toeplitz and symmetric}",
    source=f"{VASWANI}, section 3.5 (the linear map); the rotation and the Gram matrix: derived here",
    tolerance=1e-12,
    because=ROUNDING,
)
def sinusoidal_codes_are_shifted_by_rotations(key: PRNGKey) -> Comparison:
    """Codes of 9 positions from a random start, shifted by 3.5, and their Gram matrix against its first row."""
    positions = jnp.arange(9.0) + 100 * jax.random.uniform(key)
    codes = sinusoidal(positions, 16)
    shifted = codes @ sinusoidal_shift(3.5, 16).T
    gram = codes @ codes.T
    toeplitz = gram[0][np.abs(np.arange(9)[:, None] - np.arange(9)[None])]
    predicted = [sinusoidal(positions + 3.5, 16).ravel(), toeplitz.ravel()]
    return Comparison(jnp.concatenate(predicted), jnp.concatenate([shifted.ravel(), gram.ravel()]))


@claim(
    statement=r"\cos(PE(t), PE(t+1)) = \frac{\mathrm{Ci}(1) - \mathrm{Ci}(10^{-4})}{\ln 10^4} + \frac{\cos 1 - 1}{D} + O(D^{-2}) \approx 0.97",
    source="derived here: the mean of cos(w_i) over geometric frequencies. Neighbouring codes are far from orthogonal",
    tolerance=1e-4,
    because="the Euler-Maclaurin remainder is of order 1e-5 at D = 512",
)
def neighbouring_sinusoidal_codes_are_nearly_parallel(key: PRNGKey) -> Comparison:
    """Cosine of the codes of two neighbouring positions at width 512 from a random start."""
    first, second = sinusoidal(100 * jax.random.uniform(key) + jnp.arange(2.0), 512)
    integral = (scipy.special.sici(1.0)[1] - scipy.special.sici(1e-4)[1]) / np.log(1e4)
    return Comparison(
        integral + (np.cos(1) - 1) / 512, first @ second / (jnp.linalg.norm(first) * jnp.linalg.norm(second))
    )


@claim(
    statement=r"\langle R_s q, R_t k \rangle \text{ depends on } t - s \text{ alone and is not even in it; }"
    r"\text{ in 2-D on both offsets alone}",
    source="Su et al., arXiv 2104.09864; asymmetry and two dimensions: derived here",
    tolerance=1e-12,
    because=ROUNDING + "; the last two numbers say that reversed offsets and additive positions do differ",
)
def rotary_scores_depend_on_offsets_alone(key: PRNGKey) -> Comparison:
    """One query and one key rotated at pairs of places with equal offsets, in one and two dimensions."""
    query, other = jax.random.normal(key, (2, 8))

    def score(s: float, t: float) -> Array:
        return rotate(query[None], jnp.array([s]))[0] @ rotate(other[None], jnp.array([t]))[0]

    def score_2d(s: tuple[float, float], t: tuple[float, float]) -> Array:
        turned = (rotate_2d(v[None], *jnp.array(p)[:, None])[0] for v, p in ((query, s), (other, t)))
        return jnp.vdot(*turned)

    def additive(s: float, t: float) -> Array:
        return (query + sinusoidal(jnp.array(s), 8)) @ (other + sinusoidal(jnp.array(t), 8))

    first = [score(0.0, 3.0), score_2d((0.0, 0.0), (3.0, -2.0)), 1.0, 1.0]
    differ = [jnp.abs(score(0.0, 3.0) - score(3.0, 0.0)), jnp.abs(additive(0.0, 3.0) - additive(5.0, 8.0))]
    second = [score(5.0, 8.0), score_2d((4.0, 9.0), (7.0, 7.0)), *(float(x > 1e-3) for x in differ)]
    return Comparison(np.array(first, float), np.array(second, float))


@claim(
    statement=r"D\,\mathbb{E}\cos^2 = 1, \quad \max_{i<j}|\cos| \text{ of } n \text{ random vectors has distribution } "
    r"I_{t^2}(\tfrac12, \tfrac{D-1}{2})^{n(n-1)/2}",
    source="derived here: cos^2 of independent directions is Beta(1/2, (D - 1)/2); pairs are nearly independent",
    tolerance=4.0,
    because="in standard errors over 20 draws",
)
def random_directions_are_nearly_orthogonal(key: PRNGKey) -> Comparison:
    """Mean squared cosine and maximal |cosine| of 300 random vectors in 64 dimensions, 20 draws."""
    count, dim, draws = 300, 64, 20
    vectors = np.array(jax.random.normal(key, (draws, count, dim)))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    cosines = np.abs(np.einsum("rid,rjd->rij", vectors, vectors)[:, *np.triu_indices(count, 1)])
    grid = np.linspace(0, 1, 20_001)
    law = scipy.stats.beta.cdf(grid**2, 0.5, (dim - 1) / 2) ** (count * (count - 1) // 2)
    mean = np.trapezoid(1 - law, grid)
    deviation = np.sqrt(np.trapezoid(2 * grid * (1 - law), grid) - mean**2)
    squares = dim * (cosines**2).mean(axis=1)
    scale = np.array([squares.std(ddof=1), deviation]) / draws**0.5
    return Comparison([1.0, mean], [squares.mean(), cosines.max(axis=1).mean()], scale=scale)


@claim(
    statement=r"\mathrm{softmax}_j\big(w^\top (q_i + k_j)\big) \text{ does not depend on } q_i; \text{ with } \tanh \text{ it does}",
    source="derived here for the additive score of Bahdanau, Cho, Bengio, arXiv 1409.0473",
    tolerance=1e-12,
    because=ROUNDING,
)
def additive_attention_without_tanh_ignores_its_query(key: PRNGKey) -> Comparison:
    """Spread over queries of the weights, without and with the activation."""
    queries, keys = jax.random.normal(key, (2, 7, 5))
    weight = jax.random.normal(jax.random.fold_in(key, 1), (5,))

    def spread(activation: Callable[[Array], Array]) -> Array:
        weights = heads.softmax_weights(heads.additive_scores(queries, keys, weight, activation))
        return jnp.max(jnp.abs(weights - weights[:1]))

    return Comparison([0.0, 1.0], [float(spread(lambda x: x)), float(spread(jnp.tanh) > 1e-2)], scale=1)


@claim(
    statement=r"\mathrm{Var}(q \cdot k) = d, \text{ while additive scores with } w \sim N(0, I/d) \text{ keep a variance below } 1",
    source=f"{VASWANI}, section 3.2.1 (the variance d); the additive score: derived here",
    tolerance=4.0,
    because="in standard errors of the variance over 20,000 draws; |tanh| < 1 bounds the second",
)
def dot_products_grow_with_dimension_additive_scores_do_not(key: PRNGKey) -> Comparison:
    """Variance over d of dot products, and whether that of additive scores is below 1, at d = 16 and 256."""
    found, scale = [], []
    for dim in (16, 256):
        left, right, weight = jax.random.normal(jax.random.fold_in(key, dim), (3, 20_000, dim))
        products = np.asarray(jnp.sum(left * right, axis=-1)) / dim**0.5
        additive = jnp.sum(weight * jnp.tanh(left + right), axis=-1) / dim**0.5
        found += [products.var(), float(jnp.var(additive) < 1)]
        scale += [np.std(products**2) / len(products) ** 0.5, 1.0]
    return Comparison(np.ones(4), found, scale=np.array(scale))


@claim(
    statement=r"\text{a patch embedding is a convolution whose stride is its kernel's side}",
    source="derived here",
    tolerance=1e-12,
    because=ROUNDING,
)
def patch_embedding_is_a_strided_convolution(key: PRNGKey) -> Comparison:
    """Patches of random images times a matrix, against XLA's convolution."""
    images, weight = jax.random.normal(key, (2, 8, 12)), jax.random.normal(key, (16, 5))
    embedded = patches(images, (4, 4)) @ weight
    kernel = weight.reshape(4, 4, 1, 5)
    layout = ("NHWC", "HWIO", "NHWC")
    found = jax.lax.conv_general_dilated(images[..., None], kernel, (4, 4), "VALID", dimension_numbers=layout)
    return Comparison(embedded, found.reshape(embedded.shape))


@claim(
    statement=r"\text{spectrogram tokens hardly change with the phase of a tone; frames change by their own norm}",
    source="derived here: a phase turns the transform; a Hann window leaks as the cube of the frequency distance",
    tolerance=0.0,
    because="one-sided bounds: 1 % against more than 50 %",
    relation="at most",
)
def spectrograms_ignore_phase(key: PRNGKey) -> Comparison:
    """A tone at a random frequency away from 0 and Nyquist, before and after a quarter turn of its phase."""
    frequency = 0.1 + 0.3 * jax.random.uniform(key)
    time = jnp.arange(1024.0)
    tones = jnp.sin(2 * jnp.pi * frequency * time), jnp.cos(2 * jnp.pi * frequency * time)

    def change(tokens: Callable[..., Array]) -> float:
        first, second = (tokens(tone, 128, 64) for tone in tones)
        return float(jnp.linalg.norm(first - second) / jnp.linalg.norm(first))

    return Comparison([0.01, -0.5], [change(spectrogram), -change(frames)], scale=1)
