"""Claims about the growth of the blocks of the Hessian with the scale of the embeddings.

Source, unless said otherwise: Ormaniec, Dangel, Singh, "What does it mean to be a Transformer? Insights from a
theoretical Hessian analysis" (arXiv 2410.10986). Norms of attention are of the closed form, which the tests hold
against autodiff to rounding.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array

from attnlab.attention import attention_hessian
from attnlab.attention.blocks import Part
from attnlab.claims.curvature import written_out
from attnlab.claims.instances import (
    KK,
    LINEAR,
    PAPER,
    QK,
    QQ,
    SOFTMAX,
    TOKENS,
    VK,
    VQ,
    VV,
    WIDTH,
    Pair,
    instance,
    layer_objective,
)
from attnlab.claims.registry import claim
from attnlab.curvature import Operator, ggn, hessian
from attnlab.expectation import Expectation, at_most, equal
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.networks import MLP, MLPConfig
from attnlab.models.transformer import Transformer, TransformerConfig
from attnlab.objectives import objective
from attnlab.risks.growth import crossings
from attnlab.trees import block_slices
from attnlab.types import Params, PRNGKey


def slopes(key: PRNGKey, config: AttentionConfig, part: Part, pairs: list[Pair], scales: np.ndarray) -> np.ndarray:
    """Least-squares slopes of log block norm against log embedding scale."""
    params, inputs, targets = instance(key, config)
    risks = [layer_objective(config, scale * inputs, targets) for scale in scales]
    norms = [attention_hessian(risk, params).norms()[part] for risk in risks]
    return np.polyfit(np.log(scales), np.log([[blocks[pair] for pair in pairs] for blocks in norms]), 1)[0]


SMALL_SCALES = np.geomspace(1e-3, 1e-2, 4)
ASYMPTOTIC = "the next order in sigma is two powers up, so the fit over sigma in [0.001, 0.01] is off by about sigma^2"


@claim(
    statement=r"\|H_o\| \sim \sigma^2, \sigma^4, \sigma^6, \sigma^6 \text{ for } VV, VQ \text{ and } VK, QQ \text{ and } KK, QK",
    source=f"{PAPER}, section 4.1",
    tolerance=1e-3,
    because=ASYMPTOTIC,
)
def softmax_outer_exponents(key: PRNGKey) -> Expectation:
    """Growth of the outer-product blocks of softmax attention with the embedding scale."""
    predicted = {VV: 2, VQ: 4, VK: 4, QQ: 6, KK: 6, QK: 6}
    return equal(
        "exponents of VV, VQ, VK, QQ, KK, QK",
        slopes(key, SOFTMAX, "ggn", list(predicted), SMALL_SCALES),
        list(predicted.values()),
        unit="relative",
    )


@claim(
    statement=r"\|H_f\| \sim \sigma^3, \sigma^5, \sigma^3 \text{ for } VQ \text{ and } VK, QQ \text{ and } KK, QK",
    source=f"{PAPER}, section 4.1",
    tolerance=2e-4,
    because="the next order in sigma is one power up, so the fit over sigma in [1e-5, 1e-4] is off by about sigma times the "
    "ratio of two random coefficients; the residual tends to minus the targets",
)
def softmax_functional_exponents(key: PRNGKey) -> Expectation:
    """Growth of the functional blocks of softmax attention with the embedding scale."""
    predicted = {VQ: 3, VK: 3, QQ: 5, KK: 5, QK: 3}
    return equal(
        "exponents of VQ, VK, QQ, KK, QK",
        slopes(key, SOFTMAX, "functional", list(predicted), SMALL_SCALES / 100),
        list(predicted.values()),
        unit="relative",
    )


@claim(
    statement=r"\|H_o\| \sim \sigma^6 \text{ in every block of linear attention}",
    source=f"{PAPER}, section 4.2",
    tolerance=1e-9,
    because="the blocks are homogeneous in the tokens: rounding is all that is left",
    slow=True,
)
def linear_outer_exponents(key: PRNGKey) -> Expectation:
    """Growth of the outer-product blocks of linear attention."""
    pairs = [VV, VQ, VK, QQ, KK, QK]
    return equal(
        "exponents of VV, VQ, VK, QQ, KK, QK",
        slopes(key, LINEAR, "ggn", pairs, np.geomspace(0.1, 1, 4)),
        [6] * 6,
        unit="relative",
    )


@claim(
    statement=r"\|H_f\| \sim \sigma^3 \text{ in the mixed blocks of linear attention}",
    source=f"{PAPER}, section 4.2",
    tolerance=1e-4,
    because="the residual F - Y has a part of order sigma^3 beside the targets: at sigma <= 0.01 it shifts a slope by 1e-5",
    slow=True,
)
def linear_functional_exponents(key: PRNGKey) -> Expectation:
    """Growth of the functional blocks of linear attention."""
    return equal(
        "exponents of VQ, VK, QK",
        slopes(key, LINEAR, "functional", [VQ, VK, QK], SMALL_SCALES),
        [3] * 3,
        unit="relative",
    )


@claim(
    statement=r"\|H_o\| \sim \sigma^{2 \cdot 3^D} \text{ in the last of } D \text{ linear-attention layers } (D = 1, 2, 3)",
    source=f"{PAPER}, section 4.2",
    tolerance=1e-8,
    because="the network is homogeneous of degree 3^D in the tokens",
    slow=True,
)
def depth_of_linear_attention_cubes_the_exponent(key: PRNGKey) -> Expectation:
    """Growth of the Gauss-Newton blocks of query, key and value in a stack of linear-attention layers."""
    scales = np.geomspace(0.5, 1.0, 3)
    measured = [linear_stack_slopes(key, depth, depth - 1, ggn, scales) for depth in (1, 2, 3)]
    return equal(
        "exponents of QQ, KK, VV at depths 1, 2, 3",
        measured,
        [[2 * 3**depth] * 3 for depth in (1, 2, 3)],
        unit="relative",
    )


@claim(
    statement=r"\|H[P,P]\| \sim \sigma^{3^D} \text{ in the first of } D = 2 \text{ linear-attention layers,}"
    r" \text{ not } \sigma^{2 \cdot 3^D} \text{ as } \|H_o\|",
    source="derived here: behind the layer its output enters cubically, so that H_f, residual times outputs, is not zero",
    tolerance=1e-5,
    because="H_o, and the outputs in the residual, are sigma^9 smaller: at sigma <= 0.1 they shift a slope by about 1e-6",
    slow=True,
    disagrees_with="Ormaniec, Dangel, Singh, arXiv 2410.10986, section 4.2, give the growth 2 * 3^D of the Hessian of D linear "
    "layers. It holds of H_o in every layer and of H in the last one; in an earlier layer H_f is not zero, and H grows with "
    "half the exponent (two layers without residual, square loss, targets that do not vanish). Where the residual "
    "vanishes with the outputs, the published exponent returns",
)
def earlier_linear_layers_grow_with_half_the_exponent(key: PRNGKey) -> Expectation:
    """Growth of the blocks of query, key and value of the whole Hessian and of H_o, in the first of two layers."""
    measured = [linear_stack_slopes(key, 2, 0, part, np.array([0.05, 0.1])) for part in (hessian, ggn)]
    return equal("exponents of QQ, KK, VV: of H, and of H_o", measured, [[9] * 3, [18] * 3], unit="relative")


def linear_stack_slopes(
    key: PRNGKey, depth: int, place: int, part: Callable[..., Operator], scales: np.ndarray
) -> np.ndarray:
    """Slopes of the diagonal blocks of layer `place` of linear-attention layers without residual."""
    attention = AttentionConfig(key_dim=3, value_dim=WIDTH, weights="linear")
    stack = Transformer(
        TransformerConfig(attention, depth, mlp_width=None, norm=None, final_norm=False, residual=False)
    )
    inputs, targets = jax.random.normal(key, (2, TOKENS, WIDTH))
    params = stack.init(key, inputs)["params"]
    return block_slopes(stack, params, inputs, targets, scales, [QQ, KK, VV], place, part)


@claim(
    statement=r"\|H[P,P]\| \sim \sigma^0 \text{ for } P \in \{Q, K, V\} \text{ behind a LayerNorm}",
    source=f"{PAPER}, section 4.4",
    tolerance=1e-3,
    because="LayerNorm's epsilon of 1e-12 relative to token variances of order 0.01 and more; rounding in the fit",
    slow=True,
)
def pre_norm_removes_the_growth(key: PRNGKey) -> Expectation:
    """Growth of the blocks of a pre-norm attention layer without residual, diagonal and off it."""
    attention = AttentionConfig(key_dim=3, value_dim=WIDTH)
    block = Transformer(
        TransformerConfig(attention, 1, mlp_width=None, norm="pre", final_norm=False, residual=False, epsilon=1e-12)
    )
    inputs, targets = jax.random.normal(key, (2, TOKENS, WIDTH))
    params = block.init(key, inputs)["params"]
    pairs = [VV, QQ, KK, QK, VQ, VK]
    return equal(
        "exponents of VV, QQ, KK, QK, VQ, VK",
        block_slopes(block, params, inputs, targets, np.geomspace(0.1, 10, 3), pairs),
        0.0,
    )


def block_slopes(
    module: Transformer,
    params: Params,
    inputs: Array,
    targets: Array,
    scales: np.ndarray,
    pairs: list[Pair],
    place: int = 0,
    part: Callable[..., Operator] = hessian,
) -> np.ndarray:
    """Slopes of the norms of blocks of attention layer `place` against the scale of the inputs, by autodiff."""
    rows, logs = block_slices(params[f"layer_{place}"]["attention"]), []
    for scale in scales:
        risk = objective(from_linen(module), square_loss, scale * inputs, targets)
        # One sequence, without an axis of examples: its tokens are coupled, and meant to be.
        matrix = part(risk, params, block=f"layer_{place}/attention", check=False).dense()
        logs.append([np.log(jnp.linalg.norm(matrix[rows[row], rows[column]])) for row, column in pairs])
    return np.polyfit(np.log(scales), np.array(logs), 1)[0]


@claim(
    statement=r"\|H[Q,Q]\| < \|H[V,V]\| \text{ as } \sigma \to 0 \text{ only: } H[Q,Q] \text{ overtakes, if at all, at a finite } \sigma_*,"
    r"\ \text{ and in linear attention at none}",
    source=f"{PAPER}, section 4.1, where the orders are sigma^5 and sigma^2",
    tolerance=0.01,
    because="the logarithm of sigma_* between two of twelve scales a 24th of a decade apart, against the root of the ratio of the blocks by autodiff",
    slow=True,
)
def queries_overtake_values_at_a_finite_scale(key: PRNGKey) -> list[Expectation]:
    """log sigma_* of softmax attention, the ratio of the blocks at the smallest scale, and the crossings of the control.
    Instances without a crossing, where attention saturates before (one in twenty: the ratio rises to 0.9 and falls), are
    drawn anew."""
    scales = np.geomspace(0.01, 3, 12)
    for part in range(10):
        params, inputs, targets = instance(jax.random.fold_in(key, part), SOFTMAX)
        softmax, linear = (_queries_and_values(config, params, inputs, targets, scales) for config in (SOFTMAX, LINEAR))
        (coarse,), (none,) = crossings(*softmax, scales), crossings(*linear, scales)
        if np.isfinite(coarse):
            break
    place = int(np.searchsorted(scales, coarse))
    fine = np.geomspace(scales[place - 1], scales[place], 12)
    (crossing,) = crossings(*_queries_and_values(SOFTMAX, params, inputs, targets, fine), fine)

    @jax.jit
    def log_ratio(log_scale: Array) -> Array:
        tokens = jnp.exp(log_scale) * inputs
        blocks = jax.hessian(partial(written_out, tokens, targets, SOFTMAX.score_scale))(params)
        return jnp.log(jnp.linalg.norm(blocks["query"]["query"]) / jnp.linalg.norm(blocks["value"]["value"]))

    root = scipy.optimize.brentq(lambda x: float(log_ratio(x)), *np.log(fine[[0, -1]]))
    return [
        equal("log sigma_* of softmax attention", np.log(crossing), root),
        at_most("||H[Q,Q]|| / ||H[V,V]|| of softmax at sigma = 0.01", softmax[0][0, 0] / softmax[1][0, 0], 1.0),
        equal("crossings of linear attention, the control", np.isfinite(none).sum(), 0.0, 0.0, because="a count"),
    ]


def _queries_and_values(
    config: AttentionConfig, params: Params, inputs: Array, targets: Array, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    risks = [layer_objective(config, scale * inputs, targets) for scale in scales]
    norms = [attention_hessian(risk, params).norms()["hessian"] for risk in risks]
    queries, values = (np.array([[float(blocks[pair]) for blocks in norms]]) for pair in (QQ, VV))
    return queries, values


@claim(
    statement=r"\|H[W_l, W_l]\| \sim \sigma^2 \text{ for every layer } l \text{ of a bias-free linear MLP, at any depth}",
    source=f"{PAPER}, section 4.2",
    tolerance=1e-10,
    because="homogeneous of degree two in the inputs",
    slow=True,
)
def linear_mlp_blocks_grow_quadratically(key: PRNGKey) -> Expectation:
    """Growth of the diagonal blocks of linear networks of depth 1 to 4."""
    measured = []
    for depth in (1, 2, 3, 4):
        network = MLP(MLPConfig((4,) * depth, "identity"))
        inputs, targets = jax.random.normal(key, (6, 4)), jax.random.normal(key, (6, 4))
        params = network.init(key, inputs)["params"]
        norms = []
        for scale in (1.0, 10.0):
            risk = objective(from_linen(network), square_loss, scale * inputs, targets)
            norms.append([jnp.linalg.norm(hessian(risk, params, block=name, check=False).dense()) for name in params])
        measured.extend(np.log10(np.array(norms[1]) / np.array(norms[0])))
    return equal("exponents of the layers at depths 1 to 4", measured, np.full(10, 2.0), unit="relative")
