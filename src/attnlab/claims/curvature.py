"""Claims about the structure of the Hessian of attention, and the points where parts of it vanish.

Source, unless said otherwise: Ormaniec, Dangel, Singh, "What does it mean to be a Transformer? Insights from a
theoretical Hessian analysis" (arXiv 2410.10986). Where a claim is about the closed form itself, it is measured by
autodiff.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from attnlab.attention import attention_hessian
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
    instance,
    layer_objective,
)
from attnlab.claims.registry import claim
from attnlab.curvature import ggn, hessian
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from attnlab.types import PRNGKey


@claim(
    statement=r"H = H_o + H_f \text{ in moment form equals autodiff}",
    source=f"{PAPER}, theorems 3.1 and 3.2, rewritten in attention moments and extended to heads and an output projection",
    tolerance=1e-12,
    because="an identity in float64, to rounding",
    slow=True,
)
def closed_form_equals_autodiff(key: PRNGKey, size: int = 1) -> Expectation:
    """The whole Hessian of softmax, linear, and causal multi-head layers under both losses."""
    errors = []
    for options in VARIANTS:
        config = AttentionConfig(key_dim=3, value_dim=4, **options)
        params, inputs, targets = instance(key, config, size)
        labels = jnp.argmax(targets, axis=-1)
        for loss, wanted in (("square", targets), ("cross_entropy", labels)):
            risk = layer_objective(config, inputs, wanted, loss)
            expected = hessian(risk, params, check=False).dense()
            difference = attention_hessian(risk, params).dense() - expected
            errors.append(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))
    return equal("relative error of the whole Hessian, by layer and loss", jnp.stack(errors), 0.0)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"weights": "linear"},
    {"heads": 2, "output_dim": 4, "scale": 3.0, "causal": True},
]


@claim(
    statement=r"H_f[V,V] = 0; \text{ for linear attention also } H_f[Q,Q] = H_f[K,K] = 0, \text{ not so for softmax}",
    source=f"{PAPER}, theorem 3.2",
    tolerance=1e-12,
    because="zero to rounding, relative to the block of the Gauss-Newton matrix; measured as H - GGN by autodiff",
    slow=True,
)
def functional_diagonal_blocks_vanish(key: PRNGKey) -> list[Expectation]:
    """Functional blocks over outer ones, by autodiff; those of softmax in queries and keys exceed a tenth."""
    ratios = []
    for config, blocks in ((SOFTMAX, ["value", "query", "key"]), (LINEAR, ["value", "query", "key"])):
        params, inputs, targets = instance(key, config)
        risk = objective(from_linen(SelfAttention(config)), square_loss, inputs, targets)
        for block in blocks:
            whole, outer = (build(risk, params, block=block, check=False).dense() for build in (hessian, ggn))
            ratios.append(jnp.linalg.norm(whole - outer) / jnp.linalg.norm(outer))
    return [
        equal(
            "||H_f|| / ||H_o||: value of softmax; value, query, key of linear attention", ratios[:1] + ratios[3:], 0.0
        ),
        at_least("the same of query and key of softmax", ratios[1:3], 0.1, because="the negative control"),
    ]


@claim(
    statement=r"\lambda_{\min}(H[Q,Q]) < 0 \text{ and } \lambda_{\min}(H[K,K]) < 0 \text{ for softmax at small tokens};"
    r" \ge 0 \text{ for linear attention}",
    source=f"{PAPER}, section 4",
    because="below zero by more than rounding, 1e-6 of the largest eigenvalue; above it but for rounding, 1e-12",
)
def softmax_makes_query_and_key_blocks_indefinite(key: PRNGKey) -> list[Expectation]:
    """Negative curvature of the query and key blocks, at small token scale, where H_f outweighs H_o."""
    lowest = []
    for config in (SOFTMAX, LINEAR):
        params, inputs, targets = instance(key, config)
        exact = attention_hessian(layer_objective(config, 0.3 * inputs, targets), params)
        for pair in (QQ, KK):
            eigenvalues = jnp.linalg.eigvalsh(exact.block(*pair).dense())
            lowest.append(eigenvalues[0] / jnp.max(jnp.abs(eigenvalues)))
    return [
        at_most("lowest over largest |eigenvalue| of the query and key blocks: softmax", lowest[:2], -1e-6),
        at_least("the same of linear attention", lowest[2:], -1e-12),
    ]


@claim(
    statement=r"A_{ij} \in \{0, 1\} \implies H[P, \cdot] = 0 \text{ for } P \in \{Q, K\}",
    source=f"{PAPER}, section 4.3: the second and third central moments vanish",
    tolerance=1e-12,
    because="attention of logits a thousand times apart is one-hot to rounding",
    slow=True,
)
def one_hot_attention_has_no_query_key_curvature(key: PRNGKey) -> Expectation:
    """All blocks of the query and key vanish under one-hot attention."""
    params, inputs, targets = instance(key, SOFTMAX)
    sharp = AttentionConfig(key_dim=3, value_dim=4, scale=1e6)
    norms = attention_hessian(layer_objective(sharp, inputs, targets), params).norms()["hessian"]
    # The blocks carry powers of the scale: divide them out, and compare with the value block.
    powers = {QQ: 2, KK: 2, QK: 2, VQ: 1, VK: 1}
    measured = [norms[pair] / 1e6**power / norms[VV] for pair, power in powers.items()]
    return equal("||H[P, .]|| over ||H[V,V]||, powers of the scale divided out", np.array(measured), 0.0)


@claim(
    statement=r"A = \tfrac1L 1 1^\top,\ \sum_i x_i = 0 \implies H[V,V] = 0",
    source=f"{PAPER}, section 4.3: the first moment vanishes",
    tolerance=1e-14,
    because="zero to rounding, relative to tr(X^T X)",
    slow=True,
)
def uniform_attention_over_centred_tokens_has_no_value_curvature(key: PRNGKey) -> Expectation:
    """The value block vanishes where every first moment does."""
    params, inputs, targets = instance(key, SOFTMAX)
    flat = {**params, "query": jnp.zeros_like(params["query"])}
    centred = inputs - jnp.mean(inputs, axis=0, keepdims=True)
    measured = attention_hessian(layer_objective(SOFTMAX, centred, targets), flat).norms()["hessian"][VV]
    return equal("||H[V,V]|| over tr(X^T X)", measured / jnp.sum(centred**2), 0.0)


@claim(
    statement=r"\tau \to c\tau,\ W_K \to W_K / c:\ H[V,V], H[V,Q], H[Q,Q] \text{ stay};\ H[V,K], H[Q,K] \to c;\ H[K,K] \to c^2;"
    r"\ W_{QK} \to W_{QK} / c:\ H[V,QK] \to c,\ H[QK,QK] \to c^2",
    source=f"{PAPER}, equation 4, where every query or key index of a block brings one factor of the scale; derived here",
    tolerance=1e-10,
    because="an identity: the attention matrix is the same. The sharper layer's blocks are by autodiff, the other's in "
    "closed form; to rounding, 1e-13 on seeds 0 to 9",
    slow=True,
)
def temperature_scales_the_blocks(key: PRNGKey) -> Expectation:
    """Norms of the blocks at scale 1 in closed form; at scale c, with the key weights or the merged query-key weights
    divided by c, from the Hessian by autodiff of a layer written out here."""
    factor, predicted, measured = 3.0, [], []
    merged_powers = {VV: 0, ("value", "query_key"): 1, ("query_key", "query_key"): 2}
    for config, divided, powers in (
        (SOFTMAX, "key", {VV: 0, VQ: 0, QQ: 0, VK: 1, QK: 1, KK: 2}),
        (replace(SOFTMAX, merged=True), "query_key", merged_powers),
    ):
        params, inputs, targets = instance(key, config)
        before = attention_hessian(layer_objective(config, inputs, targets), params).norms()["hessian"]
        predicted += [factor**power * before[pair] for pair, power in powers.items()]
        same_attention = {**params, divided: params[divided] / factor}
        written = partial(written_out, inputs, targets, factor * config.score_scale)
        after = jax.jit(jax.hessian(written))(same_attention)
        measured += [jnp.linalg.norm(after[row][column]) for row, column in powers]
    return equal("norms of the blocks of the sharper layer", jnp.stack(measured), jnp.stack(predicted), unit="relative")


def written_out(inputs: Array, targets: Array, scale: float, params: dict[str, Array]) -> Array:
    """Mean squared error of softmax attention with scores `scale` X W_QK X^T."""
    product = params["query_key"] if "query_key" in params else params["query"] @ params["key"].T
    weights = jnp.exp(scale * inputs @ product @ inputs.T)
    outputs = weights / jnp.sum(weights, axis=1, keepdims=True) @ inputs @ params["value"]
    return jnp.mean((outputs - targets) ** 2)


@claim(
    statement=r"\partial m / \partial z = \Sigma,\quad \partial^2 m / \partial z^2 = \kappa \quad (m = X^\top \mathrm{softmax}(Xz))",
    source=f"{PAPER}, lemma on the derivatives of softmax attention; the cumulants of the attention distribution",
    tolerance=1e-10,
    because="an identity in float64, by autodiff",
    slow=True,
)
def derivatives_of_attention_are_its_moments(key: PRNGKey) -> Expectation:
    """First and second derivative of a token's attention average in its logit direction."""
    params, inputs, targets = instance(key, SOFTMAX)
    moments = attention_hessian(layer_objective(SOFTMAX, inputs, targets), params).moments
    directions = SOFTMAX.score_scale * inputs @ params["query"] @ params["key"].T

    def mean(direction: Array) -> Array:
        return inputs.T @ jax.nn.softmax(inputs @ direction)

    second, third = jax.jit(jax.vmap(lambda z: (jax.jacobian(mean)(z), jax.hessian(mean)(z))))(directions)
    predicted = jnp.concatenate([moments.second[0, 0].ravel(), moments.third()[0, 0].ravel()])
    return equal(
        "first and second derivatives of a token's average",
        jnp.concatenate([second.ravel(), third.ravel()]),
        predicted,
        unit="relative",
    )


@claim(
    statement=r"H_f[P_h, P'_{h'}] = 0 \text{ for heads } h \ne h' \text{ and } P, P' \in \{Q, K, V\}, \text{ while } H_o \ne 0",
    source="derived here: each token's output is a sum of one term per head",
    tolerance=1e-12,
    because="zero to rounding, relative to the blocks within a head; H - GGN by autodiff",
    slow=True,
)
def heads_are_coupled_by_the_outer_part_only(key: PRNGKey) -> list[Expectation]:
    """Curvature between two heads behind one output projection over that within a head: H_f, and H_o."""
    config = AttentionConfig(key_dim=2, value_dim=2, heads=2, output_dim=4)
    params, inputs, targets = instance(key, config)
    risk = objective(from_linen(SelfAttention(config)), square_loss, inputs, targets)
    whole, outer = (part(risk, params, check=False).dense() for part in (hessian, ggn))
    # Every matrix but the projection has the heads side by side in its columns; -1 marks the projection.
    heads = {name: jnp.broadcast_to(jnp.array([0, 0, 1, 1]), leaf.shape) for name, leaf in params.items()}
    head = ravel_pytree({**heads, "output": jnp.full_like(heads["output"], -1)})[0]
    inside = (head[:, None] >= 0) & (head[None] >= 0)
    same = head[:, None] == head[None]
    functional, coupling = (
        jnp.linalg.norm(jnp.where(inside & ~same, matrix, 0)) / jnp.linalg.norm(jnp.where(inside & same, matrix, 0))
        for matrix in (whole - outer, outer)
    )
    return [
        equal("||H_f|| between heads over that within", functional, 0.0),
        at_least("||H_o|| between heads over that within", coupling, 0.03, because="the negative control"),
    ]


@claim(
    statement=r"\Lambda_{CE}(F = 0) = \tfrac12 \Lambda_{MSE} (I - \tfrac1v 1 1^\top)",
    source="derived here",
    tolerance=1e-12,
    because="an identity in float64; both by autodiff of the losses",
    slow=True,
)
def cross_entropy_curvature_at_zero_is_half_the_square_loss(key: PRNGKey) -> Expectation:
    """Curvature of the two losses in the outputs of one layer, at outputs zero."""
    tokens, classes = TOKENS, 4
    labels = jax.random.randint(key, (tokens,), 0, classes)
    outputs = jnp.zeros((tokens, classes))
    square = jax.hessian(square_loss)(outputs, jax.nn.one_hot(labels, classes))
    entropy = jax.hessian(cross_entropy)(outputs, labels)
    centring = jnp.eye(classes) - 1 / classes
    return equal(
        "Hessian of the cross-entropy in the outputs",
        entropy,
        jnp.einsum("iajb,bc->iajc", square, centring) / 2,
        unit="relative",
    )


@claim(
    statement=r"\text{tokens } X + 30:\ \text{the relative float32 error of } H[Q,Q] \text{ is } 10^{-5.46} \text{ in closed form, and }"
    r" 10^{-2.15} \text{ by autodiff}",
    source="derived here: moments are centred before they are squared; the sizes are measured",
    tolerance=4.5,
    because="in standard errors over 24 layers; the sizes are means over 720 layers of seeds 20 to 49; query weights of a hundredth keep the attention "
    "soft, and the block from vanishing",
    slow=True,
)
def centred_moments_beat_autodiff_in_float32(key: PRNGKey) -> list[Expectation]:
    """Errors in the query block, whose entries lose all digits to an offset of the tokens when moments are not centred."""
    errors = [_single_precision_errors(each) for each in jax.random.split(key, 24)]
    means, scatter = (getattr(np.log10(errors), which)(axis=0) for which in ("mean", "std"))
    what = ("log10 of the relative error of the closed form, mean", "the same of autodiff, the negative control")
    return [
        equal(name, mean, expected, standard_error=error / len(errors) ** 0.5)
        for name, mean, expected, error in zip(what, means, (-5.46, -2.15), scatter, strict=True)
    ]


def _single_precision_errors(key: PRNGKey) -> list[float]:
    """Of the closed form and of autodiff, relative to the float64 block."""
    params, inputs, targets = instance(key, SOFTMAX)
    params, offset = {**params, "query": params["query"] / 100}, inputs + 30.0
    exact = attention_hessian(layer_objective(SOFTMAX, offset, targets), params).block("query", "query").dense()
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, offset, targets))
    risk = objective(from_linen(SelfAttention(SOFTMAX)), square_loss, *single[1:])
    ours = attention_hessian(layer_objective(SOFTMAX, *single[1:]), single[0]).block("query", "query").dense()
    autodiff = hessian(risk, single[0], block="query", check=False).dense()
    return [float(np.linalg.norm(np.asarray(each, float) - exact) / np.linalg.norm(exact)) for each in (ours, autodiff)]
