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
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.module import InterceptorContext
from jaxtyping import Array, Float

from attnlab.attention.blocks import AttentionHessian, Pair, Part, norms_of, oriented
from attnlab.attention.downstream import check_apart
from attnlab.attention.kronecker import KroneckerSum
from attnlab.attention.layer import Layer, layer
from attnlab.attention.moments import AttentionMoments, moments_of
from attnlab.attention.terms import (
    TokenJacobian,
    TokenQuantities,
    functional_terms,
    leaves,
    outer_term,
    sum_of_parts,
    token_jacobians,
    token_quantities,
)
from attnlab.checks import check_range, is_concrete
from attnlab.derivatives import choose_route, hessian_product
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
        behind: paths of the attention layers that the model calls after it; there tokens meet again.
    """

    point: Layer
    outputs: Float[Array, "B L O"]
    rest: Rest
    behind: tuple[str, ...]


def cut_at_attention(module: nn.Module, params: Params, inputs: PyTree, path: str) -> Cut:
    """Cut `module.apply({"params": params}, inputs)` at the `SelfAttention` called `path`.

    `path` is the layer's place in the parameters, such as `transformer/layer_0/attention`. Inputs of the layer must be
    (B, L, D). Raises `ValueError` where the module does not call an attention layer of that name once, or the tokens
    have another number of axes.
    """
    wanted, calls, order = tuple(path.split("/")), [], []

    def run(replacement: Array | None) -> PyTree:
        def intercept(call: Callable, arguments: tuple, options: dict, context: InterceptorContext) -> Array:
            if not isinstance(context.module, SelfAttention) or context.method_name != "__call__":
                return call(*arguments, **options)
            if replacement is None:
                order.append("/".join(context.module.path))
            if context.module.path != wanted:
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
    if outputs.ndim != 3:
        raise ValueError(
            f"the tokens at {path!r} have shape {tokens.shape}; expected (sequences, tokens, features). "
            "Give the inputs one axis of sequences, of length 1 for a single one."
        )
    behind = tuple(order[order.index(path) + 1 :])
    weights = params
    for name in wanted:
        weights = weights[name]
    return Cut(layer(config, weights, tokens, options.get("mask", *mask or [None])), outputs, run, behind)


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
    rest of its Hessian, `full` their sum. Raises `ValueError` for unknown paths, attention layers behind this one,
    inputs or outputs with other axes, positions out of range, and as `attention_hessian` does; outside of `jit`, where
    values can be looked at, also for a loss that is not convex, couples tokens or reads others than `positions`, for a
    model that couples tokens behind the layer, and for `piecewise_linear` where there is curvature. Source: Ormaniec,
    Dangel, Singh, arXiv 2410.10986, in the form of the module docstring.
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
        positions: the P query tokens of every sequence.
    """

    point: Layer
    moments: AttentionMoments
    gradient: Float[Array, "B L O"]
    tokens: TokenQuantities
    roots: Float[Array, "N C O"]
    bend: Float[Array, "N O O"] | None
    positions: tuple[int, ...] = field(metadata={"static": True})

    def hessian(self) -> AttentionHessian:
        """Its blocks as an object."""
        curvature = jnp.einsum("nco,ncp->nop", self.roots, self.roots)
        curvature, bend = jax.tree.map(
            lambda x: x.reshape(-1, len(self.positions), *x.shape[1:]), (curvature, self.bend)
        )
        parts = (self.outer(), self.functional())
        return AttentionHessian(self.point, self.moments, self.gradient, curvature, *parts, bend, self.positions)

    def norms(self, names: Collection[str] | None = None) -> dict[Part, dict[Pair, Float[Array, ""]]]:
        """Frobenius norm of every block of every part, as `hessian().norms()`, in fewer operations: one compiled call.

        `names` are the parameters wanted, all if None: blocks that are not asked for cost nothing. Raises `ValueError`
        for one that the layer does not have.
        """
        known = self.point.names
        wanted = known if names is None else tuple(names)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(
                f"names is {names!r}, where {unknown[0]!r} is no parameter of the layer; expected some of "
                f"{', '.join(known)}. Leave names out for all."
            )
        return _norms(self, wanted)

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
            term = outer_term(jacobians[row], bent_jacobians[column], _one(self.point))
            term = replace(term, formula=term.formula.replace("Λ_i", "Λf_i"))
            bent = replace(block, terms=(term,))
            blocks[row, column] = sum_of_parts(bent, block)
        return blocks


def _one(point: Layer) -> Float[Array, ""]:
    return jnp.ones((), point.inputs.dtype)


@partial(jax.jit, static_argnames="names")
def _norms(network: InNetwork, names: tuple[str, ...]) -> dict[Part, dict[Pair, Array]]:
    outer = {pair: block for pair, block in network.outer().items() if set(pair) <= set(names)}
    return norms_of(outer, network.functional())


def assemble(
    cut: Cut, loss: Callable[[PyTree], Array], positions: Sequence[int] | None, piecewise_linear: bool
) -> InNetwork:
    """What the blocks are made of; see `attention_hessian_in`."""
    if cut.behind:
        raise ValueError(
            f"behind the attention layer come others, {', '.join(cut.behind)}, where its tokens meet again; expected "
            "the last attention layer. For an earlier one pass downstream_derivatives(..., coupled=True) to "
            "attention_hessian_from_downstream."
        )
    length = cut.outputs.shape[1]
    chosen = _chosen(range(length) if positions is None else positions, length)
    predicted, pull = jax.vjp(cut.rest, cut.outputs)
    if jnp.ndim(predicted) != 3 or predicted.shape[:2] != cut.outputs.shape[:2]:
        raise ValueError(
            f"the model's outputs have shape {jnp.shape(predicted)} for (sequences, tokens) {cut.outputs.shape[:2]}; "
            "expected (sequences, tokens, features), one row for each token."
        )
    cotangent = jax.grad(loss)(predicted)
    _check_read(cotangent, chosen)
    (gradient,) = pull(cotangent)
    moments = moments_of(cut.point)
    everything = token_quantities(cut.point, moments, gradient)
    tokens = jax.tree.map(lambda x: _at(x.reshape(-1, length, *x.shape[1:]), chosen), everything)
    roots = _roots(pull, loss, predicted, chosen)
    bend = _bend(cut, cotangent, chosen, piecewise_linear)
    return InNetwork(cut.point, moments, gradient, tokens, roots, bend, tuple(chosen.tolist()))


def _chosen(positions: Sequence[int], length: int) -> np.ndarray:
    chosen = np.asarray(positions)
    if chosen.ndim != 1 or not chosen.size or not np.issubdtype(chosen.dtype, np.integer):
        raise TypeError(f"positions are {positions!r}; expected a list of whole numbers, at least one.")
    for position in chosen:
        check_range("an entry of positions", int(position), 0, length - 1, f"There are {length} tokens.")
    if len(set(chosen.tolist())) < len(chosen):
        raise ValueError(f"positions are {chosen.tolist()}; expected each token once. Take out what is double.")
    return chosen


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
    route = choose_route(lambda route, point: hessian_product(loss, point, route)[2](point), outputs)
    _, _, curve = hessian_product(loss, outputs, route)
    check_apart("the second derivative of the loss", curve, outputs, "tokens")
    check_apart("the model behind the attention layer", lambda probe: pull(probe)[0], outputs, "tokens")
    curvature = _at(jnp.moveaxis(jax.lax.map(curve, probes), 0, -1), chosen)
    values, vectors = jnp.linalg.eigh(curvature)
    _check_convex(values)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    jacobian = jax.lax.map(lambda probe: pull(probe)[0], probes)
    return jnp.einsum("nca,nco->nao", root, _at(jnp.moveaxis(jacobian, 0, 2), chosen))


def _bend(
    cut: Cut, cotangent: Float[Array, "B L C"], chosen: np.ndarray, piecewise_linear: bool
) -> Float[Array, "N O O"] | None:
    """Λ_f: the Hessian of <dloss/doutputs, rest(.)> with the first factor held fixed; None for zero."""
    if piecewise_linear and not is_concrete(cut.outputs):
        return None
    along = lambda out: jnp.vdot(cotangent, cut.rest(out))  # noqa: E731
    route = choose_route(lambda route, point: hessian_product(along, point, route)[2](point), cut.outputs)
    _, _, product = hessian_product(along, cut.outputs, route)
    if piecewise_linear:
        _check_flat(product, cut.outputs)
        return None
    columns = jax.lax.map(product, _unit_probes(cut.outputs))
    return _at(jnp.moveaxis(columns, 0, -1), chosen)


def _check_read(cotangent: Float[Array, "B L C"], chosen: np.ndarray) -> None:
    """Raise `ValueError` if the loss reads tokens that are not among the chosen ones."""
    if not is_concrete(cotangent):
        return
    read = np.flatnonzero(np.any(np.asarray(cotangent) != 0, axis=(0, 2)))
    others = sorted(set(read.tolist()) - set(chosen.tolist()))
    if others:
        raise ValueError(
            f"positions are {chosen.tolist()}, but the loss also reads the outputs at {others}; expected all tokens "
            "that it reads. Add them, or leave positions out."
        )


def _check_convex(values: Float[Array, "N C"]) -> None:
    """Raise `ValueError` if curvature of the loss in the outputs of a token is below zero, rounding aside."""
    if not is_concrete(values):
        return
    lowest, largest = float(jnp.min(values)), float(jnp.max(jnp.abs(values)))
    # Where all predictions are certain, cross-entropy's own curvature drowns in rounding of the size of eps.
    if lowest < -_slack(values) * largest - 10 * float(jnp.finfo(values.dtype).eps):
        raise ValueError(
            f"the loss has curvature {lowest:.3g} in the outputs of a token (the largest is {largest:.3g}); expected a "
            "loss that is convex in the outputs. Use downstream_derivatives with part='full'."
        )


def _check_flat(product: Callable[[Array], Array], like: Float[Array, "B L O"]) -> None:
    """Raise `ValueError` unless the second derivative behind the layer is zero, which autodiff gives exactly."""
    probe = jax.random.normal(jax.random.key(0), like.shape, like.dtype)
    if bool(jnp.any(product(probe) != 0)):
        raise ValueError(
            "piecewise_linear is True, but what stands behind the layer has curvature (a smooth activation or a norm); "
            "expected none. Pass piecewise_linear=False."
        )


def _slack(like: Array) -> float:
    return float(jnp.finfo(like.dtype).eps) ** 0.5
