"""Claims about softmax attention itself: its cumulants, scale, depth, rank and cost."""

from collections.abc import Callable
from functools import partial
from typing import Literal

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
from attnlab.claims.instances import ROUNDING, layer_objective
from attnlab.claims.registry import claim
from attnlab.curvature import hessian
from attnlab.dynamics.tokens import rank_residual
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.losses import square_loss
from attnlab.models import heads
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention, attention_maps
from attnlab.models.transformer import Transformer, TransformerBlock, TransformerConfig
from attnlab.objectives import objective
from attnlab.types import PRNGKey

VASWANI = "Vaswani et al., arXiv 1706.03762"
COLLAPSE = "Dong, Cordonnier, Loukas, arXiv 2103.03404"


@claim(
    statement=r"\partial f / \partial q = \beta\,\mathrm{Cov}_a(v, k), \quad "
    r"\partial^2 f / \partial q^2 = \beta^2 \kappa_a(v, k, k)",
    source="derived here: softmax is an exponential family, its derivatives are cumulants",
    tolerance=1e-12,
    because=ROUNDING,
)
def softmax_attention_is_a_cumulant_generator(key: PRNGKey, size: int = 1) -> Expectation:
    """Autodiff of one query's output against the cumulants of its values and keys."""
    shapes = ((4 * size,), (9 * size, 4 * size), (9 * size, 3))
    query, keys, values = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), shapes, strict=True))
    beta = 0.7
    moments = cumulants(query, keys, values, beta)
    first, second = jax.jit(
        lambda q: (jax.jacfwd(attend_query)(q, keys, values, beta), _second(q, keys, values, beta))
    )(query)
    predicted = [beta * moments.covariance.ravel(), beta**2 * moments.third.ravel()]
    return equal(
        "first and second derivatives in the query",
        jnp.concatenate([first.ravel(), second.ravel()]),
        jnp.concatenate(predicted),
        unit="relative",
    )


def _second(query: Array, keys: Array, values: Array, scale: float) -> Array:
    return jax.jacfwd(jax.jacrev(attend_query))(query, keys, values, scale)


@claim(
    statement=r"\mathbb{E}\big[1 - \textstyle\sum_j a_j^2\big] \to c_N / \sqrt{d},\ c_N = N(N-1)\int \varphi^2 \Phi^{N-2}, "
    r"\text{ without the scale } 1/\sqrt{d}",
    source=f"derived here (the remedy, 1/sqrt(d): {VASWANI}, section 3.2.1)",
    tolerance=0.05,
    because="the next order is 3/(4 d) and (pi/sigma)^2/6 of the gap's curvature: below 2 %; 1 % Monte Carlo error",
    slow=True,
)
def unscaled_attention_saturates_on_average_like_a_power(key: PRNGKey, size: int = 1) -> Expectation:
    """Mean trace of the softmax Jacobian of 8 tokens in d = 256 and 1024, over c_8 / sqrt(d)."""
    draws = saturation_constant(8) / np.sqrt([256, 1024])
    means = [jnp.mean(saturation(key, dim, 8, 200_000 * size)) for dim in (256, 1024)]
    return equal("mean saturation over c_8 / sqrt(d)", np.array(means) / draws, 1.0, unit="relative")


@claim(
    statement=r"\mathrm{median}\big(1 - \textstyle\sum_j a_j^2\big) \approx 2 e^{-\sqrt{2 d}\, \Phi^{-1}(3/4)} "
    r"\text{ for two unscaled tokens}",
    source="derived here: the typical gradient vanishes exponentially where its mean is a power of d",
    tolerance=4.0,
    because="in standard errors of the median of the gap, plus its fluctuating scale |q|",
    slow=True,
)
def unscaled_attention_saturates_typically_like_an_exponential(key: PRNGKey, size: int = 1) -> Expectation:
    """-log(median / 2) / sqrt(d) for two tokens at d = 1024, against the median gap of two normal variables."""
    dim, draws = 1024, 50_000 * size
    found = -jnp.log(jnp.median(saturation(key, dim, 2, draws)) / 2) / dim**0.5
    gap = 2**0.5 * scipy.stats.norm.ppf(0.75)
    density = 2 * scipy.stats.norm.pdf(gap, scale=2**0.5)
    return equal("-log(median / 2) / sqrt(d)", found, gap, standard_error=0.5 / (density * draws**0.5))


@claim(
    statement=r"\tau^2 H(\tau; \tau W) = H(1; W)",
    source="derived here: attention sees W / temperature",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def temperature_rescales_the_hessian(key: PRNGKey) -> Expectation:
    """Autodiff Hessian of a merged query-key matrix at temperature 2.5 against temperature 1."""
    found = []
    tokens, targets = jax.random.normal(key, (2, 6, 4)), jax.random.normal(key, (2, 6, 3))
    for temperature in (1.0, 2.5):
        module = SelfAttention(AttentionConfig(key_dim=4, value_dim=3, merged=True, scale=1 / temperature))
        params = module.init(key, tokens)["params"]
        params = {**params, "query_key": temperature * params["query_key"]}
        risk = objective(from_linen(module), square_loss, tokens, targets)
        found.append(temperature**2 * hessian(risk, params, block="query_key", check=False).dense())
    return equal("tau^2 H at temperature 2.5", found[1], found[0], unit="relative")


@claim(
    statement=r"\text{half of the attention on one of } n \text{ tokens takes a logit of } \log n + \tfrac12",
    source="derived here for normal scores of the other tokens",
    tolerance=0.02,
    because="standard error of a mean weight 0.001 at n = 256 over 400 draws, bias (e - 1) / (8 n)",
    slow=True,
)
def a_needle_needs_a_logarithmic_logit(key: PRNGKey) -> list[Expectation]:
    """Mean softmax weight of a needle placed among n scores N(0, 1), n = 256 ... 16384; with half that logit, below 0.1."""
    found = []
    for length in (256, 1024, 4096, 16_384):
        others = jax.random.normal(jax.random.fold_in(key, length), (400, length))
        logit = float(needle_logit(length))
        found.append([jnp.mean(_needle_weights(others, share * logit)) for share in (1.0, 0.5)])
    whole, half = np.array(found).T
    return [
        equal("mean weight of the needle, by n", whole, 0.5),
        at_most("the same with half that logit", half, 0.1, because="the negative control"),
    ]


@jax.jit
def _needle_weights(others: Array, logit: Array) -> Array:
    scores = jnp.concatenate([jnp.full((len(others), 1), logit), others], axis=1)
    return heads.softmax_weights(scores)[:, 0]


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
def pure_attention_contracts_the_token_spread_cubically(key: PRNGKey) -> Expectation:
    """Slope of the spread of the outputs against that of the inputs, without and with a residual."""
    attention = AttentionConfig(key_dim=4, value_dim=4, scale=1.0)
    slopes = []
    for residual in (False, True):
        module = Transformer(TransformerConfig(attention, norm=None, residual=residual))
        params = module.init(key, near_rank_one(key, 1.0))["params"]
        outputs = jax.jit(from_linen(module))
        slopes.append(slope(SPREADS, [rank_residual(outputs(params, near_rank_one(key, size))) for size in SPREADS]))
    return equal("exponents without and with a skip", slopes, [3.0, 1.0])


@claim(
    statement=r"\|\nabla_{QK}\| \sim \epsilon^2,\ \|H_o[QK,QK]\| \sim \epsilon^4,\ \|H_f[QK,QK]\| \sim \epsilon^3,\ "
    r"\|H_o[V,V]\| \sim \epsilon^0",
    source="derived here from the cumulants: the mean token's share of each order cancels",
    tolerance=0.05,
    because=NEXT_ORDER,
    slow=True,
)
def curvature_of_queries_and_keys_vanishes_with_the_token_spread(key: PRNGKey) -> Expectation:
    """Slopes of gradient and Hessian blocks of a merged layer against the spread of its tokens."""
    config = AttentionConfig(key_dim=4, value_dim=3, merged=True)
    params = SelfAttention(config).init(key, near_rank_one(key, 1.0))["params"]
    targets = jax.random.normal(key, (6, 3))
    rows = []
    for size in SPREADS:
        tokens = near_rank_one(key, size)
        risk = objective(from_linen(SelfAttention(config)), square_loss, tokens, targets)
        norms = attention_hessian(layer_objective(config, tokens, targets), params).norms()
        pair = ("query_key", "query_key")
        gradient = jnp.linalg.norm(jax.jit(jax.grad(risk))(params)["query_key"])
        rows.append([gradient, norms["ggn"][pair], norms["functional"][pair], norms["ggn"]["value", "value"]])
    return equal("exponents of the gradient, H_o, H_f, and H_o of values", slope(SPREADS, rows), [2.0, 4.0, 3.0, 0.0])


@claim(
    statement=r"\|\nabla W_{\mathrm{last\ MLP}}\| \sim L^{-1/2} \text{ in a pre-LN transformer of } L \text{ blocks, } L^0 \text{ in a post-LN one}",
    source="Xiong et al., arXiv 2002.04745",
    tolerance=0.08,
    because="the residual stream's variance is 1 + c L: at L = 8 ... 64 the constant still bends the slope a little",
    slow=True,
)
def last_gradient_of_a_pre_norm_transformer_falls_with_depth(key: PRNGKey, size: int = 1) -> Expectation:
    """Root mean square over 64 initialisations of the last MLP's gradient, with a LayerNorm before the read-out."""
    depths = size * np.array([8, 16, 32, 64])
    slopes = []
    for norm in ("pre", "post"):
        streams, targets = jax.random.normal(key, (2, 64, 4, 16))
        found = []
        for depth in range(1, depths[-1] + 1):
            keys = jax.random.split(jax.random.fold_in(key, depth), 64)
            if depth in depths:
                found.append(jnp.sqrt(jnp.mean(_last_gradients(norm, keys, streams, targets) ** 2)))
            streams = _next_block(norm, keys, streams)
        slopes.append(slope(depths, found))
    return equal("exponents in the depth: pre-LN, post-LN", slopes, [-0.5, 0.0])


def _block(norm: Literal["pre", "post"]) -> TransformerBlock:
    return TransformerBlock(
        TransformerConfig(AttentionConfig(16, 16), mlp_width=32, activation="relu", norm=norm, gain=2**0.5)
    )


@partial(jax.jit, static_argnums=0)
def _next_block(norm: Literal["pre", "post"], keys: PRNGKey, streams: Array) -> Array:
    block = _block(norm)
    return jax.vmap(lambda key, tokens: jnp.asarray(block.apply(block.init(key, tokens), tokens)))(keys, streams)


@partial(jax.jit, static_argnums=0)
def _last_gradients(norm: Literal["pre", "post"], keys: PRNGKey, streams: Array, targets: Array) -> Array:
    """Norms of the gradients of the down-projection of a last block on the streams."""
    return jax.vmap(partial(_last_gradient, _block(norm)))(keys, streams, targets)


def _last_gradient(block: TransformerBlock, key: PRNGKey, tokens: Array, target: Array) -> Array:
    params = block.init(key, tokens)["params"]

    def loss(down: Array) -> Array:
        outputs = jnp.asarray(block.apply({"params": {**params, "mlp": {**params["mlp"], "down": down}}}, tokens))
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
def softmax_has_full_rank_over_low_rank_scores(key: PRNGKey) -> Expectation:
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
    return equal("ranks of A, of centred log A, of A (x) W_V^T, at two key dimensions", found, predicted)


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
def outputs_lie_in_the_convex_hull_of_the_values(key: PRNGKey) -> list[Expectation]:
    """Distance of each output of a random layer from the hull of its values; a point outside is told apart."""
    module = SelfAttention(AttentionConfig(key_dim=3, value_dim=2))
    tokens = jax.random.normal(key, (10, 5))
    params = module.init(key, tokens)["params"]
    values = np.asarray(tokens @ params["value"])
    outputs = np.asarray(module.apply({"params": params}, tokens))
    distances = [distance_to_hull(values, output) for output in outputs]
    outside = 3 * values[np.argmax(np.linalg.norm(values, axis=1))]
    return [
        equal("distances of the outputs from the hull", distances, 0.0),
        at_least("that of a point outside", distance_to_hull(values, outside), 0.1, because="the negative control"),
    ]


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
def attention_costs_more_than_the_mlp_only_in_long_contexts(key: PRNGKey) -> Expectation:
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
    return equal("ratio of operations over the predicted one", np.array(found) / predicted, 1.0, unit="relative")


def _attend(x: Array, query: Array, key: Array, value: Array, output: Array) -> Array:
    weights = heads.softmax_weights(heads.attention_scores(x @ query, x @ key, 1.0))
    return heads.attend(weights, x @ value) @ output


def _mlp(x: Array, up: Array, down: Array) -> Array:
    return jax.nn.relu(x @ up) @ down


def _operations(function: Callable[..., Array], *arguments: Array) -> float:
    counts = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert counts is not None
    return counts["flops"]
