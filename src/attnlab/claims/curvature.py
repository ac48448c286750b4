"""Claims about the Hessian of attention: growth with the embedding scale, structure of the blocks, special points.

Source, unless said otherwise: Ormaniec, Dangel, Singh, "What does it mean to be a Transformer? Insights from a
theoretical Hessian analysis" (arXiv 2410.10986). Norms are of the closed form, which the tests hold against autodiff to
rounding; where a claim is about the closed form itself, it is measured by autodiff here.
"""

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.attention import attention_hessian
from attnlab.attention.blocks import Part
from attnlab.claims.registry import Comparison, claim
from attnlab.curvature import ggn, hessian
from attnlab.losses import cross_entropy, loss_by_name, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.networks import MLP, MLPConfig
from attnlab.models.transformer import Transformer, TransformerConfig
from attnlab.objective import objective
from attnlab.types import Params, PRNGKey

PAPER = "Ormaniec, Dangel, Singh, arXiv 2410.10986"
SOFTMAX = AttentionConfig(key_dim=3, value_dim=4)
LINEAR = AttentionConfig(key_dim=3, value_dim=4, weights="linear")
TOKENS, WIDTH = 6, 5

VV, QQ, KK = ("value", "value"), ("query", "query"), ("key", "key")
QK, VQ, VK = ("query", "key"), ("value", "query"), ("value", "key")
Pair = tuple[str, str]


def instance(key: PRNGKey, config: AttentionConfig) -> tuple[Params, Array, Array]:
    """Gaussian weights, tokens and targets for one sequence."""
    token_key, target_key, init_key = jax.random.split(key, 3)
    inputs = jax.random.normal(token_key, (TOKENS, WIDTH))
    features = config.heads * config.value_dim if config.output_dim is None else config.output_dim
    targets = jax.random.normal(target_key, (TOKENS, features))
    return SelfAttention(config).init(init_key, inputs)["params"], inputs, targets


def slopes(key: PRNGKey, config: AttentionConfig, part: Part, pairs: list[Pair], scales: np.ndarray) -> np.ndarray:
    """Least-squares slopes of log block norm against log embedding scale."""
    params, inputs, targets = instance(key, config)
    norms = [attention_hessian(config, params, scale * inputs, targets).norms()[part] for scale in scales]
    return np.polyfit(np.log(scales), np.log([[blocks[pair] for pair in pairs] for blocks in norms]), 1)[0]


SMALL_SCALES = np.geomspace(1e-3, 1e-2, 4)
ASYMPTOTIC = "the next order in sigma is two powers up, so the fit over sigma in [0.001, 0.01] is off by about sigma^2"


@claim(
    statement=r"H = H_o + H_f \text{ in moment form equals autodiff}",
    source=f"{PAPER}, theorems 3.1 and 3.2, rewritten in attention moments and extended to heads and an output projection",
    tolerance=1e-12,
    because="an identity in float64, to rounding",
)
def closed_form_equals_autodiff(key: PRNGKey) -> Comparison:
    """The whole Hessian of softmax, linear, and causal multi-head layers under both losses."""
    errors = []
    for options in VARIANTS:
        config = AttentionConfig(key_dim=3, value_dim=4, **options)
        params, inputs, targets = instance(key, config)
        labels = jnp.argmax(targets, axis=-1)
        for loss, wanted in (("square", targets), ("cross_entropy", labels)):
            risk = objective(from_linen(SelfAttention(config)), loss_by_name(loss), inputs, wanted)
            expected = hessian(risk, params).dense()
            difference = attention_hessian(config, params, inputs, wanted, loss).dense() - expected
            errors.append(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))
    return Comparison(np.zeros(len(errors)), jnp.stack(errors), scale=1)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"weights": "linear"},
    {"heads": 2, "output_dim": 4, "scale": 3.0, "causal": True},
]


@claim(
    statement=r"\|H_o\| \sim \sigma^2, \sigma^4, \sigma^6, \sigma^6 \text{ for } VV, VQ \text{ and } VK, QQ \text{ and } KK, QK",
    source=f"{PAPER}, section 4.1",
    tolerance=1e-3,
    because=ASYMPTOTIC,
)
def softmax_outer_exponents(key: PRNGKey) -> Comparison:
    """Growth of the outer-product blocks of softmax attention with the embedding scale."""
    predicted = {VV: 2, VQ: 4, VK: 4, QQ: 6, KK: 6, QK: 6}
    return Comparison(list(predicted.values()), slopes(key, SOFTMAX, "outer", list(predicted), SMALL_SCALES))


@claim(
    statement=r"\|H_f\| \sim \sigma^3, \sigma^5, \sigma^3 \text{ for } VQ \text{ and } VK, QQ \text{ and } KK, QK",
    source=f"{PAPER}, section 4.1",
    tolerance=1e-3,
    because=ASYMPTOTIC + "; the residual tends to minus the targets, so it is held fixed to that order",
)
def softmax_functional_exponents(key: PRNGKey) -> Comparison:
    """Growth of the functional blocks of softmax attention with the embedding scale."""
    predicted = {VQ: 3, VK: 3, QQ: 5, KK: 5, QK: 3}
    return Comparison(list(predicted.values()), slopes(key, SOFTMAX, "functional", list(predicted), SMALL_SCALES))


@claim(
    statement=r"\|H_o\| \sim \sigma^6 \text{ in every block of linear attention}",
    source=f"{PAPER}, section 4.2",
    tolerance=1e-9,
    because="the blocks are homogeneous in the tokens: rounding is all that is left",
)
def linear_outer_exponents(key: PRNGKey) -> Comparison:
    """Growth of the outer-product blocks of linear attention."""
    pairs = [VV, VQ, VK, QQ, KK, QK]
    return Comparison([6] * 6, slopes(key, LINEAR, "outer", pairs, np.geomspace(0.1, 1, 4)))


@claim(
    statement=r"\|H_f\| \sim \sigma^3 \text{ in the mixed blocks of linear attention}",
    source=f"{PAPER}, section 4.2",
    tolerance=1e-4,
    because="the residual F - Y has a part of order sigma^3 beside the targets: at sigma <= 0.01 it shifts a slope by 1e-5",
)
def linear_functional_exponents(key: PRNGKey) -> Comparison:
    """Growth of the functional blocks of linear attention."""
    return Comparison([3] * 3, slopes(key, LINEAR, "functional", [VQ, VK, QK], SMALL_SCALES))


@claim(
    statement=r"H_f[V,V] = 0; \text{ for linear attention also } H_f[Q,Q] = H_f[K,K] = 0",
    source=f"{PAPER}, theorem 3.2",
    tolerance=1e-12,
    because="zero to rounding, relative to the block of the Gauss-Newton matrix; measured as H - GGN by autodiff",
)
def functional_diagonal_blocks_vanish(key: PRNGKey) -> Comparison:
    """Zero functional blocks, by autodiff."""
    ratios = []
    for config, blocks in ((SOFTMAX, ["value"]), (LINEAR, ["value", "query", "key"])):
        params, inputs, targets = instance(key, config)
        risk = objective(from_linen(SelfAttention(config)), square_loss, inputs, targets)
        for block in blocks:
            whole, outer = (build(risk, params, block=block).dense() for build in (hessian, ggn))
            ratios.append(jnp.linalg.norm(whole - outer) / jnp.linalg.norm(outer))
    return Comparison(np.zeros(4), np.array(ratios), scale=1)


@claim(
    statement=r"\|H_o\| \sim \sigma^{2 \cdot 3^D} \text{ in the last of } D \text{ linear-attention layers } (D = 1, 2, 3)",
    source=f"{PAPER}, section 4.2",
    tolerance=1e-8,
    because="the network is homogeneous of degree 3^D in the tokens",
)
def depth_of_linear_attention_cubes_the_exponent(key: PRNGKey) -> Comparison:
    """Growth of the Gauss-Newton blocks of a stack of linear-attention layers without residual."""
    measured = []
    for depth in (1, 2, 3):
        attention = AttentionConfig(key_dim=3, value_dim=WIDTH, weights="linear")
        stack = Transformer(
            TransformerConfig(attention, depth, mlp_width=None, norm=None, final_norm=False, residual=False)
        )
        inputs, targets = jax.random.normal(key, (2, TOKENS, WIDTH))
        params = stack.init(key, inputs)["params"]
        scales = np.geomspace(0.5, 1.0, 3)
        logs = []
        for scale in scales:
            risk = objective(from_linen(stack), square_loss, scale * inputs, targets)
            matrices = (
                ggn(risk, params, block=f"layer_{depth - 1}/attention/{name}").dense() for name in ("query", "value")
            )
            logs.append([np.log(jnp.linalg.norm(matrix)) for matrix in matrices])
        measured.append(np.polyfit(np.log(scales), np.array(logs), 1)[0])
    predicted = [[2 * 3**depth] * 2 for depth in (1, 2, 3)]
    return Comparison(predicted, measured)


@claim(
    statement=r"\lambda_{\min}(H[Q,Q]) < 0 \text{ and } \lambda_{\min}(H[K,K]) < 0 \text{ for softmax}; \ge 0 \text{ for linear attention}",
    source=f"{PAPER}, section 4",
    tolerance=0.0,
    because="signs: 1 for a negative eigenvalue below -1e-6 of the largest, 0 for none below -1e-12 of it",
)
def softmax_makes_query_and_key_blocks_indefinite(key: PRNGKey) -> Comparison:
    """Negative curvature of the query and key blocks, at small token scale, where H_f outweighs H_o."""
    signs = []
    for config, threshold in ((SOFTMAX, 1e-6), (LINEAR, 1e-12)):
        params, inputs, targets = instance(key, config)
        exact = attention_hessian(config, params, 0.3 * inputs, targets)
        for pair in (QQ, KK):
            eigenvalues = jnp.linalg.eigvalsh(exact.block(*pair).dense())
            signs.append(float(eigenvalues[0] < -threshold * jnp.max(jnp.abs(eigenvalues))))
    return Comparison([1, 1, 0, 0], signs, scale=1)


@claim(
    statement=r"A_{ij} \in \{0, 1\} \implies H[P, \cdot] = 0 \text{ for } P \in \{Q, K\}",
    source=f"{PAPER}, section 4.3: the second and third central moments vanish",
    tolerance=1e-12,
    because="attention of logits a thousand times apart is one-hot to rounding",
)
def one_hot_attention_has_no_query_key_curvature(key: PRNGKey) -> Comparison:
    """All blocks of the query and key vanish under one-hot attention."""
    params, inputs, targets = instance(key, SOFTMAX)
    sharp = AttentionConfig(key_dim=3, value_dim=4, scale=1e6)
    norms = attention_hessian(sharp, params, inputs, targets).norms()["full"]
    # The blocks carry powers of the scale: divide them out, and compare with the value block.
    powers = {QQ: 2, KK: 2, QK: 2, VQ: 1, VK: 1}
    measured = [norms[pair] / 1e6**power / norms[VV] for pair, power in powers.items()]
    return Comparison(np.zeros(5), np.array(measured), scale=1)


@claim(
    statement=r"A = \tfrac1L 1 1^\top,\ \sum_i x_i = 0 \implies H[V,V] = 0",
    source=f"{PAPER}, section 4.3: the first moment vanishes",
    tolerance=1e-14,
    because="zero to rounding, relative to tr(X^T X)",
)
def uniform_attention_over_centred_tokens_has_no_value_curvature(key: PRNGKey) -> Comparison:
    """The value block vanishes where every first moment does."""
    params, inputs, targets = instance(key, SOFTMAX)
    flat = {**params, "query": jnp.zeros_like(params["query"])}
    centred = inputs - jnp.mean(inputs, axis=0, keepdims=True)
    measured = attention_hessian(SOFTMAX, flat, centred, targets).norms()["full"][VV]
    return Comparison(0.0, measured, scale=jnp.sum(centred**2))


@claim(
    statement=r"\tau \to c\tau,\ W_K \to W_K / c:\ H[V,V], H[V,Q], H[Q,Q] \text{ stay};\ H[V,K], H[Q,K] \to c;\ H[K,K] \to c^2",
    source=f"{PAPER}, equation 4, where every query or key index of a block brings one factor of the scale; derived here",
    tolerance=1e-10,
    because="an identity: the attention matrix is the same",
)
def temperature_scales_the_blocks(key: PRNGKey) -> Comparison:
    """Blocks at scale 1, and at scale c with the key weights divided by c."""
    factor = 3.0
    params, inputs, targets = instance(key, SOFTMAX)
    sharper = AttentionConfig(key_dim=3, value_dim=4, scale=factor * SOFTMAX.score_scale)
    before = attention_hessian(SOFTMAX, params, inputs, targets).norms()["full"]
    same_attention = {**params, "key": params["key"] / factor}
    after = attention_hessian(sharper, same_attention, inputs, targets).norms()["full"]
    powers = {VV: 0, VQ: 0, QQ: 0, VK: 1, QK: 1, KK: 2}
    predicted = jnp.stack([factor**power * before[pair] for pair, power in powers.items()])
    return Comparison(predicted, jnp.stack([after[pair] for pair in powers]))


def query_key_remainder(key: PRNGKey) -> tuple[Array, Array, Array]:
    """By autodiff: the Hessian in (W_Q, W_K) minus J^T U J, with U the Hessian in the product M = W_Q W_K^T and J the
    Jacobian of that product; J^T U J itself; and the gradient in M."""
    merged = AttentionConfig(key_dim=3, value_dim=4, merged=True)
    params, inputs, targets = instance(key, SOFTMAX)
    factors = {name: params[name] for name in ("key", "query")}
    predict = from_linen(SelfAttention(merged))

    def of_product(product: Array) -> Array:
        outputs = predict({"query_key": product, "value": params["value"]}, inputs)
        return square_loss(outputs, targets)

    flat, unravel = jax.flatten_util.ravel_pytree(factors)

    def product(vector: Array) -> Array:
        pair = unravel(vector)
        return pair["query"] @ pair["key"].T

    point = product(flat)
    size = point.size
    jacobian = jax.jacobian(product)(flat).reshape(size, flat.size)
    inner = jax.hessian(of_product)(point).reshape(size, size)
    whole = jax.hessian(lambda vector: of_product(product(vector)))(flat)
    chained = jacobian.T @ inner @ jacobian
    return whole - chained, chained, jax.grad(of_product)(point)


@claim(
    statement=r"H = J^\top U J + \begin{pmatrix}0 & B\\ B^\top & 0\end{pmatrix} \otimes I_k \text{ in } (W_Q, W_K):"
    r" \text{ the second term has eigenvalues } \pm s_i(B), \text{ each } k \text{ times},\ B = \partial\ell/\partial(W_Q W_K^\top)",
    source=f"{PAPER}, section 3, and the chain rule; derived here",
    tolerance=1e-10,
    because="an identity in float64; U by autodiff in the merged matrix",
)
def separate_query_and_key_add_paired_eigenvalues(key: PRNGKey) -> Comparison:
    """What separate query and key matrices add to the curvature of their product."""
    remainder, _, gradient = jax.jit(query_key_remainder)(key)
    singular = jnp.linalg.svd(gradient, compute_uv=False)
    predicted = jnp.sort(jnp.repeat(jnp.concatenate([singular, -singular]), SOFTMAX.key_dim))
    return Comparison(predicted, jnp.linalg.eigvalsh(remainder))


@claim(
    statement=r"\mathrm{rank}(J^\top U J) \le 2kd - k^2 \text{ for } k < d",
    source="dimension of the matrices of rank k; derived here",
    tolerance=0.0,
    because="a count of eigenvalues above 1e-9 of the largest",
    relation="at most",
)
def curvature_through_the_product_is_rank_deficient(key: PRNGKey) -> Comparison:
    """Rank of the curvature that passes through the product W_Q W_K^T."""
    _, chained, _ = jax.jit(query_key_remainder)(key)
    eigenvalues = np.abs(np.linalg.eigvalsh(chained))
    width = SOFTMAX.key_dim
    return Comparison(2 * width * WIDTH - width**2, np.sum(eigenvalues > 1e-9 * eigenvalues.max()), scale=1)


@claim(
    statement=r"\partial m / \partial z = \Sigma,\quad \partial^2 m / \partial z^2 = \kappa \quad (m = X^\top \mathrm{softmax}(Xz))",
    source=f"{PAPER}, lemma on the derivatives of softmax attention; the cumulants of the attention distribution",
    tolerance=1e-10,
    because="an identity in float64, by autodiff",
)
def derivatives_of_attention_are_its_moments(key: PRNGKey) -> Comparison:
    """First and second derivative of a token's attention average in its logit direction."""
    params, inputs, targets = instance(key, SOFTMAX)
    moments = attention_hessian(SOFTMAX, params, inputs, targets).moments
    directions = SOFTMAX.score_scale * inputs @ params["query"] @ params["key"].T

    def mean(direction: Array) -> Array:
        return inputs.T @ jax.nn.softmax(inputs @ direction)

    second, third = jax.jit(jax.vmap(lambda z: (jax.jacobian(mean)(z), jax.hessian(mean)(z))))(directions)
    predicted = jnp.concatenate([moments.second[0, 0].ravel(), moments.third()[0, 0].ravel()])
    return Comparison(predicted, jnp.concatenate([second.ravel(), third.ravel()]))


@claim(
    statement=r"H_f[P_h, P'_{h'}] = 0 \text{ for heads } h \ne h' \text{ and } P, P' \in \{Q, K, V\}",
    source="derived here: each token's output is a sum of one term per head",
    tolerance=1e-12,
    because="zero to rounding, relative to the blocks within a head; H - GGN by autodiff",
)
def heads_are_coupled_by_the_outer_part_only(key: PRNGKey) -> Comparison:
    """Functional curvature between two heads behind one output projection."""
    config = AttentionConfig(key_dim=2, value_dim=2, heads=2, output_dim=4)
    params, inputs, targets = instance(key, config)
    risk = objective(from_linen(SelfAttention(config)), square_loss, inputs, targets)
    within, across = jnp.zeros(()), jnp.zeros(())
    for block in ("query", "key", "value"):
        matrix = hessian(risk, params, block=block).dense() - ggn(risk, params, block=block).dense()
        entries = matrix.reshape(WIDTH, 2, 2, WIDTH, 2, 2)
        within += jnp.sum(entries[:, 0, :, :, 0] ** 2) + jnp.sum(entries[:, 1, :, :, 1] ** 2)
        across += 2 * jnp.sum(entries[:, 0, :, :, 1] ** 2)
    return Comparison(0.0, jnp.sqrt(across), scale=jnp.sqrt(within))


@claim(
    statement=r"\|H[P,P]\| \sim \sigma^0 \text{ for } P \in \{Q, K, V\} \text{ behind a LayerNorm}",
    source=f"{PAPER}, section 4.4",
    tolerance=1e-3,
    because="LayerNorm's epsilon of 1e-12 relative to token variances of order 0.01 and more; rounding in the fit",
)
def pre_norm_removes_the_growth(key: PRNGKey) -> Comparison:
    """Growth of the diagonal blocks of a pre-norm attention layer without residual."""
    attention = AttentionConfig(key_dim=3, value_dim=WIDTH)
    block = Transformer(
        TransformerConfig(attention, 1, mlp_width=None, norm="pre", final_norm=False, residual=False, epsilon=1e-12)
    )
    inputs, targets = jax.random.normal(key, (2, TOKENS, WIDTH))
    params = block.init(key, inputs)["params"]
    return Comparison([0, 0, 0], block_slopes(block, params, inputs, targets, np.geomspace(0.1, 10, 3)), scale=1)


def block_slopes(module: Transformer, params: Params, inputs: Array, targets: Array, scales: np.ndarray) -> np.ndarray:
    """Slopes of the diagonal blocks' norms against the scale of the inputs, by autodiff, for attention weights."""
    logs = []
    for scale in scales:
        risk = objective(from_linen(module), square_loss, scale * inputs, targets)
        blocks = (hessian(risk, params, block=name).dense() for name in ("query", "key", "value"))
        logs.append([np.log(jnp.linalg.norm(block)) for block in blocks])
    return np.polyfit(np.log(scales), np.array(logs), 1)[0]


@claim(
    statement=r"\|H[W_l, W_l]\| \sim \sigma^2 \text{ for every layer } l \text{ of a bias-free linear MLP, at any depth}",
    source=f"{PAPER}, section 4.2",
    tolerance=1e-10,
    because="homogeneous of degree two in the inputs",
)
def linear_mlp_blocks_grow_quadratically(key: PRNGKey) -> Comparison:
    """Growth of the diagonal blocks of linear networks of depth 1 to 4."""
    measured = []
    for depth in (1, 2, 3, 4):
        network = MLP(MLPConfig((4,) * depth, "identity"))
        inputs, targets = jax.random.normal(key, (6, 4)), jax.random.normal(key, (6, 4))
        params = network.init(key, inputs)["params"]
        norms = []
        for scale in (1.0, 10.0):
            risk = objective(from_linen(network), square_loss, scale * inputs, targets)
            norms.append([jnp.linalg.norm(hessian(risk, params, block=name).dense()) for name in params])
        measured.extend(np.log10(np.array(norms[1]) / np.array(norms[0])))
    return Comparison(np.full(10, 2.0), measured)


@claim(
    statement=r"\Lambda_{CE}(F = 0) = \tfrac12 \Lambda_{MSE} (I - \tfrac1v 1 1^\top)",
    source="derived here",
    tolerance=1e-12,
    because="an identity in float64; both by autodiff of the losses",
)
def cross_entropy_curvature_at_zero_is_half_the_square_loss(key: PRNGKey) -> Comparison:
    """Curvature of the two losses in the outputs of one layer, at outputs zero."""
    tokens, classes = TOKENS, 4
    labels = jax.random.randint(key, (tokens,), 0, classes)
    outputs = jnp.zeros((tokens, classes))
    square = jax.hessian(square_loss)(outputs, jax.nn.one_hot(labels, classes))
    entropy = jax.hessian(cross_entropy)(outputs, labels)
    centring = jnp.eye(classes) - 1 / classes
    return Comparison(jnp.einsum("iajb,bc->iajc", square, centring) / 2, entropy)


@claim(
    statement=r"\text{float32 error of the closed form} \le \text{float32 error of autodiff, for tokens } X + 30",
    source="derived here: moments are centred before they are squared",
    tolerance=0.0,
    because="an inequality between two errors against float64",
    relation="at most",
)
def centred_moments_beat_autodiff_in_float32(key: PRNGKey) -> Comparison:
    """Errors in the query block, whose entries lose all digits to an offset of the tokens when moments are not centred."""
    params, inputs, targets = instance(key, SOFTMAX)
    offset = inputs + 30.0
    exact = attention_hessian(SOFTMAX, params, offset, targets).block("query", "query").dense()
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, offset, targets))
    risk = objective(from_linen(SelfAttention(SOFTMAX)), square_loss, *single[1:])
    ours = attention_hessian(SOFTMAX, *single).block("query", "query").dense()
    autodiff = hessian(risk, single[0], block="query").dense()
    errors = [np.linalg.norm(np.asarray(found, float) - exact) for found in (autodiff, ours)]
    return Comparison(errors[0], errors[1], scale=np.linalg.norm(exact))
