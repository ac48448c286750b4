"""An attention layer inside a Flax model: its blocks of the Hessian of the whole network, in closed form.

The network is cut at the layer: what goes in, and `rest`, the map from the layer's output to the network's. For the
whole network H_o is the Gauss-Newton matrix at the network's outputs and H_f = H - H_o, so that with J the Jacobian of
the layer, f its output and g = dloss/df,

    H_o = J^T Λ_o J,                    Λ_o = J_rest^T (d²loss/doutputs²) J_rest,
    H_f = J^T Λ_f J + g . d²f,          Λ_f = (dloss/doutputs) . d²rest:

the functional part holds the curvature of what stands behind the layer. In the last block `rest` (residual, MLP, norm,
unembedding) treats every token by itself, so Λ_o and Λ_f are one matrix a token; and where the loss reads a few
positions only, the sums over tokens run over these.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.module import InterceptorContext
from jaxtyping import Array, Float

from attnlab.attention.blocks import AttentionHessian, Pair, Part, norms_of, oriented
from attnlab.attention.kronecker import KroneckerSum
from attnlab.attention.layer import Layer, layer
from attnlab.attention.moments import AttentionMoments, moments_of
from attnlab.attention.terms import (
    SCORE_PARAMETERS,
    TokenJacobian,
    TokenQuantities,
    functional_terms,
    leaves,
    merge_full,
    outer_term,
    token_jacobians,
    token_quantities,
)
from attnlab.checks import check_range
from attnlab.models.attention import SelfAttention
from attnlab.types import Params, PyTree

Rest = Callable[[Array], Array]


@dataclass(frozen=True)
class Cut:
    """A network cut at one attention layer: `rest(outputs)` is what it predicts.

    Attributes:
        point: the layer, its weights and the tokens it sees (after a pre-norm, say).
        outputs: its output.
        rest: everything behind, from outputs of that shape to the network's outputs (..., L, C).
    """

    point: Layer
    outputs: Float[Array, "B L O"]
    rest: Rest


def cut_at_attention(module: nn.Module, params: Params, inputs: PyTree, path: str) -> Cut:
    """Cut `module.apply({"params": params}, inputs)` at the `SelfAttention` called `path`.

    `path` is the layer's place in the parameters, such as `transformer/layer_0/attention`. Inputs of the layer must be
    (B, L, D). Raises `ValueError` where the module never calls an attention layer of that name.
    """
    wanted, calls = tuple(path.split("/")), []

    def run(replacement: Array | None) -> PyTree:
        def intercept(call: Callable, arguments: tuple, options: dict, context: InterceptorContext) -> Array:
            here = isinstance(context.module, SelfAttention) and context.method_name == "__call__"
            if not here or context.module.path != wanted:
                return call(*arguments, **options)
            if replacement is not None:
                return replacement
            outputs = call(*arguments, **options)
            calls.append((context.module.config, arguments, options, outputs))
            return outputs

        with nn.intercept_methods(intercept):
            return module.apply({"params": params}, inputs)

    run(None)
    if len(calls) != 1:
        raise ValueError(f"path is {path!r}; the model called such an attention layer {len(calls)} times, expected 1.")
    config, (tokens, *mask), options, outputs = calls[0]
    weights = params
    for name in wanted:
        weights = weights[name]
    return Cut(layer(config, weights, tokens, options.get("mask", *mask or [None])), outputs, run)


def attention_hessian_in(
    module: nn.Module,
    params: Params,
    inputs: PyTree,
    loss: Callable[[PyTree], Array],
    path: str,
    *,
    positions: Sequence[int] | None = None,
    piecewise_linear: bool = False,
) -> AttentionHessian:
    """The blocks of the network's Hessian for the weights of its last attention layer, in closed form.

    Args:
        module: a model around `SelfAttention`, such as a `LanguageModel`, whose outputs are (B, L, C).
        params: its parameters.
        inputs: its inputs.
        loss: the scalar loss of the outputs, convex in them (square loss, cross-entropy).
        path: the attention layer, such as `transformer/layer_0/attention`. Behind it every token must go by itself: it
            has to be the last one. (For others see `downstream_derivatives` with `coupled=True`.)
        positions: the tokens whose outputs the loss reads; None is all. Sums then run over these alone.
        piecewise_linear: the rest of the network is so (ReLU MLP, no norm): its curvature is zero, not computed.

    Returns the `AttentionHessian` whose `outer` part is that of the network's Gauss-Newton matrix, `functional` the
    rest of its Hessian, `full` their sum. Raises `ValueError` for unknown paths, positions out of range, and as
    `attention_hessian` does. Source: Ormaniec, Dangel, Singh, arXiv 2410.10986, in the form of the module docstring.
    """
    return assemble(cut_at_attention(module, params, inputs, path), loss, positions, piecewise_linear).hessian()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InNetwork:
    """A layer in a network, at the N = B P query tokens that the loss reads; a pytree. `assemble` makes it.

    Attributes:
        point: the layer.
        moments: its attention moments, at all tokens.
        gradient: g, (B, L, O).
        tokens: the closed form's quantities at the query tokens.
        roots: rows of a root of Λ_o = sum_a z_a z_a^T, one for each of the network's C outputs.
        bend: Λ_f, or None where the rest is piecewise linear.
    """

    point: Layer
    moments: AttentionMoments
    gradient: Float[Array, "B L O"]
    tokens: TokenQuantities
    roots: Float[Array, "N C O"]
    bend: Float[Array, "N O O"] | None

    def hessian(self) -> AttentionHessian:
        """Its blocks as an object."""
        curvature = jnp.einsum("nco,ncp->nop", self.roots, self.roots)
        by_sequence = curvature.reshape(self.point.inputs.shape[0], -1, *curvature.shape[1:])
        return AttentionHessian(self.point, self.moments, self.gradient, by_sequence, self.outer(), self.functional())

    def norms(self, names: Collection[str] | None = None) -> dict[Part, dict[Pair, Float[Array, ""]]]:
        """Frobenius norm of every block of every part, as `hessian().norms()`, in fewer operations: one compiled call.

        `names` are the parameters wanted, all if None: blocks that are not asked for cost nothing.
        """
        return _norms(self, self.point.names if names is None else tuple(names))

    def score_pair(self, pair: Pair) -> bool:
        """Whether both are parameters of the scores of softmax attention: H_o and H_f then share their vectors."""
        return all(name in SCORE_PARAMETERS for name in pair) and self.moments.kind == "softmax"

    def outer(self) -> dict[Pair, KroneckerSum]:
        """H_o = J^T Λ_o J = (Z J)^T (Z J) of every pair, Z the root of Λ_o."""
        jacobians, shapes = self._jacobians_times(self.roots), leaves(self.point)
        dtype, one = str(self.point.inputs.dtype), _one(self.point)
        return {
            (row, column): KroneckerSum(
                (outer_term(jacobians[row], jacobians[column], one),), shapes[row], shapes[column], dtype
            )
            for row, column in self.pairs
        }

    def _jacobians_times(self, rows: Float[Array, "N R O"]) -> dict[str, TokenJacobian]:
        """The Jacobians of the features `rows` f_i in place of those of f_i."""
        found = {}
        for name, jacobian in token_jacobians(self.point, self.tokens).items():
            axes = jacobian.matrix_indices.removeprefix("n").removesuffix("o")
            matrix = jnp.einsum(f"{jacobian.matrix_indices},npo->n{axes}p", jacobian.matrix, rows)
            found[name] = replace(jacobian, matrix=matrix, matrix_indices=f"n{axes}o")
        return found

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Pairs of parameters in flattening order, each once."""
        names = self.point.names
        return tuple((row, column) for i, row in enumerate(names) for column in names[i:])

    def functional(self) -> dict[Pair, KroneckerSum]:
        """H_f = J^T Λ_f J + g . d²f of every pair."""
        shapes, table = leaves(self.point), functional_terms(self.point, self.tokens)
        dtype = str(self.point.inputs.dtype)
        blocks = {pair: oriented(table, pair, shapes, dtype) for pair in self.pairs}
        if self.bend is None:
            return blocks
        jacobians, bent_jacobians = token_jacobians(self.point, self.tokens), self._jacobians_times(self.bend)
        for (row, column), block in blocks.items():
            bent = replace(block, terms=(outer_term(jacobians[row], bent_jacobians[column], _one(self.point)),))
            blocks[row, column] = merge_full(bent, block) if self.score_pair((row, column)) else bent + block
        return blocks


def _one(point: Layer) -> Float[Array, ""]:
    return jnp.ones((), point.inputs.dtype)


@partial(jax.jit, static_argnames="names")
def _norms(network: InNetwork, names: tuple[str, ...]) -> dict[Part, dict[Pair, Array]]:
    functional, bent = network.functional(), network.bend is not None
    outer = {pair: block for pair, block in network.outer().items() if set(pair) <= set(names)}
    return norms_of(outer, functional, [pair for pair in outer if bent or network.score_pair(pair)])


def assemble(
    cut: Cut, loss: Callable[[PyTree], Array], positions: Sequence[int] | None, piecewise_linear: bool
) -> InNetwork:
    """What the blocks are made of; see `attention_hessian_in`."""
    length = cut.outputs.shape[1]
    positions = range(length) if positions is None else positions
    for position in positions:
        check_range("an entry of positions", position, 0, length - 1, f"There are {length} tokens.")
    chosen = np.asarray(positions)
    slope, pull = jax.vjp(cut.rest, cut.outputs)
    cotangent = jax.grad(loss)(slope)
    (gradient,) = pull(cotangent)
    moments = moments_of(cut.point)
    everything = token_quantities(cut.point, moments, gradient)
    tokens = jax.tree.map(lambda x: _at(x.reshape(-1, length, *x.shape[1:]), chosen), everything)
    roots = _roots(pull, loss, slope, chosen)
    bend = None if piecewise_linear else _bend(cut, cotangent, chosen)
    return InNetwork(cut.point, moments, gradient, tokens, roots, bend)


def _at(by_sequence: Float[Array, "B L *rest"], chosen: np.ndarray) -> Float[Array, "N *rest"]:
    picked = by_sequence[:, chosen]
    return picked.reshape(-1, *picked.shape[2:])


def _unit_probes(like: Float[Array, "B L C"]) -> Float[Array, "C B L C"]:
    """Each feature of all tokens at once: no token answers for another."""
    width = like.shape[-1]
    return jnp.broadcast_to(jnp.eye(width, dtype=like.dtype)[:, None, None], (width, *like.shape))


def _roots(
    pull: Callable, loss: Callable[[PyTree], Array], outputs: Float[Array, "B L C"], chosen: np.ndarray
) -> Float[Array, "N C O"]:
    """z_a = sum_c R_ca dout_c/df with R R^T the loss's Hessian in the outputs of one token."""
    probes = _unit_probes(outputs)
    _, curve = jax.linearize(jax.grad(loss), outputs)
    curvature = _at(jnp.moveaxis(jax.lax.map(curve, probes), 0, -1), chosen)
    values, vectors = jnp.linalg.eigh(curvature)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    jacobian = jax.lax.map(lambda probe: pull(probe)[0], probes)
    return jnp.einsum("nca,nco->nao", root, _at(jnp.moveaxis(jacobian, 0, 2), chosen))


def _bend(cut: Cut, cotangent: Float[Array, "B L C"], chosen: np.ndarray) -> Float[Array, "N O O"]:
    """Λ_f: the Hessian of <dloss/doutputs, rest(.)> with the first factor held fixed."""
    _, product = jax.linearize(jax.grad(lambda out: jnp.vdot(cotangent, cut.rest(out))), cut.outputs)
    columns = jax.lax.map(product, _unit_probes(cut.outputs))
    return _at(jnp.moveaxis(columns, 0, -1), chosen)
