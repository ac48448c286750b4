"""The Hessian of a loss in the parameters of one attention layer, as an object."""

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.attention.downstream import named_loss
from attnlab.attention.kronecker import KroneckerSum, Leaf, Term, brought_to_scale, contract, meeting, times_power
from attnlab.attention.layer import Layer, layer
from attnlab.attention.moments import AttentionMoments, moments_of
from attnlab.attention.terms import (
    functional_terms,
    leaves,
    outer_term,
    same_vectors,
    sum_of_parts,
    token_jacobians,
    token_quantities,
)
from attnlab.checks import check_finite, check_same_structure, unknown_name
from attnlab.losses import Loss
from attnlab.models.attention import AttentionConfig
from attnlab.types import Params

Part = Literal["full", "outer", "functional"]
PARTS: tuple[Part, ...] = ("full", "outer", "functional")
Pair = tuple[str, str]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionHessian:
    """Every block of H = H_o + H_f of one layer, for its parameters V, Q, K (or QK) and O; a pytree.

    `full` is H, the Hessian of the loss; `outer` is H_o = J^T Λ J, the outer-product Hessian (with a loss on the
    layer's output, the generalised Gauss-Newton matrix); `functional` is H_f = sum_i g_i . d²f_i. Nothing of the size
    of a block is formed before `dense` is called.

    Attributes:
        point: the layer: config, weights, tokens, mask.
        moments: its attention moments.
        gradient: g, the gradient of the loss at the layer's output.
        curvature: Λ, its curvature there: a scalar times the identity, (B, L, O, O), or (B, L, O, L, O).
        outer: blocks of H_o, for pairs of parameter names in flattening order.
        functional: blocks of H_f likewise.
        bend: for a layer inside a network Λ_f, the curvature of what stands behind it in H_f; None where there is none.
        positions: the query tokens that the sums run over, which `curvature` and `bend` hold; None is all.
    """

    point: Layer
    moments: AttentionMoments
    gradient: Float[Array, "B L O"]
    curvature: Array
    outer: dict[Pair, KroneckerSum]
    functional: dict[Pair, KroneckerSum]
    bend: Float[Array, "B P O O"] | None = None
    positions: tuple[int, ...] | None = field(default=None, metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameter blocks, in flattening order."""
        return self.point.names

    def block(self, row: str, column: str, part: Part = "full") -> KroneckerSum:
        """The block that couples parameter `row` with parameter `column`."""
        for name in (row, column):
            if name not in self.names:
                raise unknown_name("parameter block", name, self.names)
        if part not in PARTS:
            raise unknown_name("part of the Hessian", part, PARTS)
        if (row, column) not in self.outer:
            return self.block(column, row, part).T
        if part != "full":
            return (self.outer if part == "outer" else self.functional)[row, column]
        return sum_of_parts(self.outer[row, column], self.functional[row, column])

    def norms(self) -> dict[Part, dict[Pair, Float[Array, ""]]]:
        """Frobenius norm of every block of every part (for both orders of each pair): one compiled call."""
        return _norms(self)

    def traces(self) -> dict[Part, dict[str, Float[Array, ""]]]:
        """Trace of every diagonal block of every part: one compiled call."""
        return _traces(self)

    def mv(self, vector: Params, part: Part = "full") -> Params:
        """The Hessian times a dict shaped like the parameters; compiled."""
        check_same_structure("vector", vector, self.point.params)
        return _mv(self, vector, part)

    def dense(self, part: Part = "full") -> Float[Array, "n n"]:
        """The whole matrix in the flattening order of the parameters, the order of `jax.flatten_util.ravel_pytree`.

        The one method that forms blocks.
        """
        if part not in PARTS:
            raise unknown_name("part of the Hessian", part, PARTS)
        return _dense(self, part)


def attention_hessian(
    config: AttentionConfig,
    params: Params,
    inputs: Float[Array, "*B L D"],
    targets: Float[Array, "*B L O"] | Int[Array, "*B L"],
    loss: str | Loss = "square",
    *,
    mask: Bool[Array, "..."] | None = None,
    weights: Float[Array, "*B L"] | None = None,
) -> AttentionHessian:
    """The Hessian of `loss(SelfAttention(config)(inputs), targets)` in the layer's parameters, in closed form.

    Args:
        config: the layer; biases have no closed form here.
        params: its parameters, `SelfAttention(config).init(key, inputs)["params"]`.
        inputs: tokens; leading axes are sequences.
        targets: as the loss takes them: features for `square`, labels or distributions for `cross_entropy`.
        loss: `square` or `cross_entropy`, in the scaling of `attnlab.losses` (a mean over all positions), or one of
            these itself, such as `cross_entropy.ignoring(-100)`.
        mask: boolean, broadcast against (..., H, L, L), true where a query may look; a causal config adds its own.
        weights: of the tokens in the loss, as in `attnlab.losses`: padding has a weight of 0.

    Raises `ValueError` for shapes that do not fit, values that are not finite, masks with an empty row, unknown losses,
    labels that are no class, weights of which none counts, and options without a closed form. For a layer inside
    a network see `attention_hessian_from_downstream`.

    Source: Ormaniec, Dangel, Singh, arXiv 2410.10986, theorems 3.1 and 3.2, in moment form and extended to several
    heads, an output projection, masks, batches and any curvature downstream.
    """
    point = layer(config, params, inputs, mask)
    check_finite("targets", targets)
    targets = jnp.asarray(targets)
    leading = len(jnp.shape(inputs)) - 1
    if targets.shape[:leading] != jnp.shape(inputs)[:-1]:
        raise ValueError(
            f"targets have shape {targets.shape} for inputs of shape {jnp.shape(inputs)}; "
            "expected one target per token."
        )
    loss = named_loss(loss)
    # Before the program that cannot look at values: labels, weights.
    outputs = jax.ShapeDtypeStruct((*jnp.shape(inputs)[:-1], point.output_features), point.inputs.dtype)
    loss.check_answers(outputs, targets, weights)
    targets = targets.reshape(*point.inputs.shape[:2], *targets.shape[leading:])
    if weights is not None:
        weights = jnp.asarray(weights)
        positions = (*jnp.shape(inputs)[:-1], *weights.shape[leading:])
        weights = jnp.broadcast_to(weights.reshape(*weights.shape, *[1] * (leading - weights.ndim)), positions)
        weights = weights.reshape(*point.inputs.shape[:2], *weights.shape[leading:])
    return _from_loss(point, targets, weights, loss)


def attention_hessian_from_downstream(
    config: AttentionConfig,
    params: Params,
    inputs: Float[Array, "*B L D"],
    gradient: Float[Array, "*B L O"],
    curvature: Array | float,
    *,
    mask: Bool[Array, "..."] | None = None,
) -> AttentionHessian:
    """The closed form for a layer inside a network, from what stands behind it.

    `inputs` are the tokens the layer sees (after a pre-norm, say), `gradient` is g = dloss/df at the layer's output,
    and `curvature` is Λ = d²loss/df²: a scalar (times the identity), (*B, L, O, O) where the rest of the network treats
    tokens one by one, or (*B, L, O, L, O) where it couples them. `downstream_derivatives` makes both. The full blocks
    are those of the network's Hessian if Λ is the Hessian of everything behind the layer; the outer blocks those of its
    Gauss-Newton matrix if Λ is the Gauss-Newton matrix of everything behind. Errors as `attention_hessian`.
    """
    point = layer(config, params, inputs, mask)
    (batch, length), features = point.inputs.shape[:2], point.output_features
    gradient, curvature = jnp.asarray(gradient), jnp.asarray(curvature, point.inputs.dtype)
    for name, array in (("gradient", gradient), ("curvature", curvature)):
        check_finite(name, array)
    tokens = jnp.shape(inputs)[:-1]
    if gradient.shape != (*tokens, features):
        raise ValueError(f"gradient has shape {gradient.shape}; expected that of the output, {(*tokens, features)}.")
    known = ((), (*tokens, features, features), (*tokens, features, length, features))
    if curvature.shape not in known:
        raise ValueError(f"curvature has shape {curvature.shape}; expected one of {', '.join(map(str, known))}.")
    curvature = curvature.reshape(batch, *curvature.shape[len(tokens) - 1 :]) if curvature.ndim else curvature
    return _from_downstream(point, moments_of(point), gradient.reshape(batch, length, features), curvature)


@jax.jit(static_argnames="loss")
def _from_loss(point: Layer, targets: Array, weights: Array | None, loss: Loss) -> AttentionHessian:
    moments = moments_of(point)
    outputs = jnp.einsum("bhia,hav,hvo->bio", moments.first, point.value, point.output)
    return _from_downstream(point, moments, *loss.derivatives(outputs, targets, weights))


@jax.jit
def _from_downstream(
    point: Layer, moments: AttentionMoments, gradient: Float[Array, "B L O"], curvature: Array
) -> AttentionHessian:
    tokens = token_quantities(point, moments, gradient)
    jacobians = token_jacobians(point, tokens)
    by_token = curvature.reshape(-1, *curvature.shape[2:]) if curvature.ndim == 4 else curvature
    shapes, second = leaves(point), functional_terms(point, tokens)
    pairs = [(row, column) for i, row in enumerate(point.names) for column in point.names[i:]]
    dtype = str(point.inputs.dtype)
    outer = {
        (row, column): KroneckerSum(
            (outer_term(jacobians[row], jacobians[column], by_token),), shapes[row], shapes[column], dtype
        )
        for row, column in pairs
    }
    functional = {pair: oriented(second, pair, shapes, dtype) for pair in pairs}
    return AttentionHessian(point, moments, gradient, curvature, outer, functional)


def oriented(table: dict[Pair, tuple[Term, ...]], pair: Pair, shapes: dict[str, Leaf], dtype: str) -> KroneckerSum:
    """The block of `pair` from a table that holds each pair in one order."""
    row, column = pair
    if (column, row) in table and row != column:
        return KroneckerSum(table[column, row], shapes[column], shapes[row], dtype).T
    return KroneckerSum(table.get(pair, ()), shapes[row], shapes[column], dtype)


@jax.jit
def _norms(hessian: AttentionHessian) -> dict[Part, dict[Pair, Array]]:
    return norms_of(hessian.outer, hessian.functional)


def norms_of(outer: dict[Pair, KroneckerSum], functional: dict[Pair, KroneckerSum]) -> dict[Part, dict[Pair, Array]]:
    """Norms of the blocks of H_o, H_f and their sum, whose square is ||H_o||^2 + ||H_f||^2 + 2 <H_o, H_f>."""
    norms: dict[Part, dict[Pair, Array]] = {part: {} for part in PARTS}
    for pair in outer:
        (main, rest), exponent = brought_to_scale(outer[pair], functional[pair])
        squares = _joint_squares if same_vectors(main, rest) else _squares
        ours, theirs, mixed = squares(main, rest)
        found: dict[Part, Array] = {"outer": ours, "functional": theirs, "full": ours + 2 * mixed + theirs}
        for part, square in found.items():
            norm = times_power(jnp.sqrt(jnp.maximum(square, 0)), exponent)
            norms[part][pair] = norms[part][pair[::-1]] = norm
    return norms


def _squares(outer: KroneckerSum, functional: KroneckerSum) -> tuple[Array, Array, Array]:
    """||H_o||^2, ||H_f||^2 and <H_o, H_f> of one block."""
    return outer.square(), functional.square(), outer.inner(functional)


def _joint_squares(outer: KroneckerSum, functional: KroneckerSum) -> tuple[Array, Array, Array]:
    """The same in fewer products, where the first term of H_f stands on the vectors of H_o, sum_i (l_i l'_i^T) (x) C_i
    beside sum_i (l_i l'_i^T) (x) B_i: what meets these vectors once gives the products with both B and C."""
    (term,), (first, *others) = outer.terms, functional.terms
    ours, theirs = term.operands[2], contract(first.indices[2:], term.indices[2], first.operands[2:])
    rest = replace(functional, terms=tuple(others))
    of_ours = meeting(term, term, 2)
    of_theirs = meeting(replace(term, operands=(*term.operands[:2], theirs)), term, 2)
    of_rest = sum((meeting(other, term, 2) for other in others), jnp.zeros((), ours.dtype))
    square = jnp.sum(of_theirs * theirs) + 2 * jnp.sum(of_rest * theirs) + rest.square()
    return jnp.sum(of_ours * ours), square, jnp.sum((of_theirs + of_rest) * ours)


@jax.jit
def _traces(hessian: AttentionHessian) -> dict[Part, dict[str, Array]]:
    return {part: {name: hessian.block(name, name, part).trace() for name in hessian.names} for part in PARTS}


@jax.jit(static_argnames="part")
def _mv(hessian: AttentionHessian, vector: Params, part: Part) -> Params:
    return {
        row: sum(hessian.block(row, column, part).mv(vector[column]) for column in hessian.names)
        for row in hessian.names
    }


@jax.jit(static_argnames="part")
def _dense(hessian: AttentionHessian, part: Part) -> Array:
    ends = [0, *itertools.accumulate(math.prod(hessian.point.params[name].shape) for name in hessian.names)]
    start = dict(zip(hessian.names, ends, strict=False))
    matrix = jnp.zeros((ends[-1], ends[-1]), hessian.point.inputs.dtype)
    # Written block by block into one array: joining finished blocks would take the memory, and its first touch, twice.
    for row, column in hessian.outer:
        block = hessian.block(row, column, part).dense()
        matrix = jax.lax.dynamic_update_slice(matrix, block, (start[row], start[column]))
        if row != column:
            matrix = jax.lax.dynamic_update_slice(matrix, block.T, (start[column], start[row]))
    return matrix
