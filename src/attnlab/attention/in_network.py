"""An attention layer inside a model: its blocks of the Hessian of the whole network, in closed form.

The network is cut at the layer: what goes in, and `rest`, the map from the layer's output to the network's. For the
whole network H_o is the Gauss-Newton matrix at the network's outputs and H_f = H - H_o, so that with J the Jacobian of
the layer, f its output and g = dloss/df,

    H_o = J^T Λ_o J,                    Λ_o = J_rest^T (d²loss/doutputs²) J_rest,
    H_f = J^T Λ_f J + g . d²f,          Λ_f = (dloss/doutputs) . d²rest:

the functional part holds the curvature of what stands behind the layer. In the last block `rest` (residual, MLP, norm,
unembedding) treats every token by itself, so Λ_o and Λ_f are one matrix a token (`TokenwiseNetwork`); and where the
loss reads a few positions only, the sums over tokens run over these. Where tokens meet behind the layer, both couple
every pair of tokens of a sequence (`coupled_hessian`).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.attention.blocks import AttentionHessian, Pair, Part, blocks_of, norms_of, oriented
from attnlab.attention.cut import Cut
from attnlab.attention.downstream import REMEDIES, check_apart, columns, gauss_newton_product
from attnlab.attention.kronecker import KroneckerSum
from attnlab.attention.layer import AttentionLayer
from attnlab.attention.moments import AttentionMoments, moments_of
from attnlab.attention.terms import (
    TokenJacobian,
    TokenQuantities,
    bent_term,
    functional_terms,
    leaves,
    outer_term,
    shared,
    sum_of_parts,
    token_jacobians,
    token_quantities,
)
from attnlab.checks import is_concrete
from attnlab.derivatives import Route, choose_route, hessian_product
from attnlab.logits import Logits
from attnlab.objectives import Objective, curvature_in_outputs, outputs_along_slopes
from attnlab.types import PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenwiseNetwork:
    """A layer in a network, at the N = B P query tokens that the loss reads; a pytree. `tokenwise` makes it.

    Attributes:
        point: the layer.
        moments: its attention moments, at all tokens.
        gradient: g, (B, L, O).
        tokens: the closed form's quantities at the query tokens.
        roots: rows of a root of Λ_o = sum_a z_a z_a^T, one for each of the network's C outputs.
        bend: Λ_f, or None where the rest is piecewise linear.
        positions: the P query tokens of every sequence.
    """

    point: AttentionLayer
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
        parts = (self.ggn(), self.functional())
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

    def ggn(self) -> dict[Pair, KroneckerSum]:
        """H_o = J^T Λ_o J = (Z J)^T (Z J) of every pair, Z the root of Λ_o."""
        jacobians, shapes = self._jacobians_times(self.roots), leaves(self.point)
        dtype, one = str(self.point.inputs.dtype), _one(self.point)
        blocks = {
            (row, column): KroneckerSum(
                (outer_term(jacobians[row], jacobians[column], one),), shapes[row], shapes[column], dtype
            )
            for row, column in self.pairs
        }
        return self._shared(blocks)

    def _shared(self, blocks: dict[Pair, KroneckerSum]) -> dict[Pair, KroneckerSum]:
        heads = self.point.config.heads
        return {pair: shared(block, (heads, heads)) for pair, block in blocks.items()}

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
            return self._shared(blocks)
        jacobians, bent_jacobians = token_jacobians(self.point, self.tokens), self._jacobians_times(self.bend)
        for (row, column), block in blocks.items():
            bent = replace(block, terms=(bent_term(jacobians[row], bent_jacobians[column], _one(self.point)),))
            blocks[row, column] = sum_of_parts(bent, block)
        return self._shared(blocks)


def _one(point: AttentionLayer) -> Float[Array, ""]:
    return jnp.ones((), point.inputs.dtype)


@partial(jax.jit, static_argnames="names")
def _norms(network: TokenwiseNetwork, names: tuple[str, ...]) -> dict[Part, dict[Pair, Array]]:
    ggn = {pair: block for pair, block in network.ggn().items() if set(pair) <= set(names)}
    return norms_of(ggn, network.functional())


def tokenwise(cut: Cut, risk: Objective, piecewise_linear: bool) -> TokenwiseNetwork:
    """What the blocks are made of where every token goes by itself behind the layer.

    Raises `ValueError` where one does not, where the loss is not convex in the outputs or couples tokens, and for
    `piecewise_linear` where there is curvature; not under `jit`, where values cannot be looked at.
    """
    length = cut.outputs.shape[1]
    chosen = np.arange(length) if cut.positions is None else np.asarray(cut.positions)
    if len(set(chosen.tolist())) < len(chosen):
        raise ValueError(f"positions are {chosen.tolist()}; expected each token once. Take out what is double.")
    predicted, pull = jax.vjp(cut.rest, cut.outputs)
    (gradient,) = pull(jax.grad(risk.score)(predicted))
    moments = moments_of(cut.layer)
    everything = token_quantities(cut.layer, moments, gradient)
    tokens = jax.tree.map(lambda x: _at(x.reshape(-1, length, *x.shape[1:]), chosen), everything)
    if isinstance(predicted, Logits):
        roots = _roots_of_logits(cut, risk, chosen)
    else:
        roots = _roots(_Reader(cut, chosen, pull), risk.score, predicted)
    bend = _bend(cut, outputs_along_slopes(risk, predicted), chosen, piecewise_linear)
    return TokenwiseNetwork(cut.layer, moments, gradient, tokens, roots, bend, tuple(chosen.tolist()))


@dataclass(frozen=True)
class _Reader:
    """Cotangents of the outputs that the loss reads, pulled back to the layer's output at the same tokens."""

    cut: Cut
    chosen: np.ndarray
    pull: Callable

    def __call__(self, probe: Float[Array, "B P C"]) -> Float[Array, "B P O"]:
        (pulled,) = self.pull(probe)
        read = pulled[:, self.chosen]
        if is_concrete(pulled) and float(jnp.linalg.norm(pulled)) > (1 + _slack(pulled)) * float(jnp.linalg.norm(read)):
            raise ValueError(
                f"the outputs at positions {self.chosen.tolist()} depend on other tokens behind the attention layer; "
                f"expected each by itself. {REMEDIES['tokens']}"
            )
        return read


def coupled_hessian(cut: Cut, risk: Objective) -> AttentionHessian:
    """The blocks where tokens meet behind the layer: 2 L O products with what stands there for (B, L, O, L, O) numbers.

    Raises `ValueError` where sequences meet; not under `jit`.
    """
    slopes = outputs_along_slopes(risk, cut.predicted)
    along = lambda outputs: slopes(cut.rest(outputs))  # noqa: E731
    outer = lambda route, outputs: _gauss_newton_product(cut, risk, outputs, route)  # noqa: E731
    name, outputs = "what stands behind the attention layer", cut.outputs
    route = choose_route(lambda route, outputs: outer(route, outputs)(outputs), outputs)
    curvature = columns(outer(route, outputs), outputs, name, coupled=True)
    _, gradient, bent = hessian_product(along, outputs, route)
    bend = columns(bent, outputs, name, coupled=True)
    return blocks_of(cut.layer, moments_of(cut.layer), gradient, curvature, bend)


def _gauss_newton_product(cut: Cut, risk: Objective, outputs: Array, route: Route) -> Callable[[Array], Array]:
    return gauss_newton_product(cut.rest, lambda logits: curvature_in_outputs(risk, logits, route)[1], outputs, route)


def _at(by_sequence: Float[Array, "B L *rest"], chosen: np.ndarray) -> Float[Array, "N *rest"]:
    picked = by_sequence[:, chosen]
    return picked.reshape(-1, *picked.shape[2:])


def _unit_probes(like: Float[Array, "B L C"]) -> Float[Array, "C B L C"]:
    """Each feature of all tokens at once: no token answers for another."""
    width = like.shape[-1]
    return jnp.broadcast_to(jnp.eye(width, dtype=like.dtype)[:, None, None], (width, *like.shape))


def _roots(
    pull: Callable[[Array], Array], loss: Callable[[PyTree], Array], outputs: Float[Array, "B P C"]
) -> Float[Array, "N C O"]:
    """z_a = sum_c R_ca dout_c/df with R R^T the loss's Hessian in the outputs of one token."""
    probes = _unit_probes(outputs)
    route = choose_route(lambda route, point: hessian_product(loss, point, route)[2](point), outputs)
    _, _, curve = hessian_product(loss, outputs, route)
    check_apart("the second derivative of the loss", curve, outputs, "tokens")
    check_apart("the model behind the attention layer", pull, outputs, "tokens")
    curvature = _by_token(jax.lax.map(curve, probes), -1)
    values, vectors = jnp.linalg.eigh(curvature)
    _check_convex(values)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    jacobian = _by_token(jax.lax.map(pull, probes), 2)
    return jnp.einsum("nca,nco->nao", root, jacobian)


def _roots_of_logits(cut: Cut, risk: Objective, chosen: np.ndarray) -> Float[Array, "N O O"]:
    """Rows of the root of Λ_o itself, O products: the logits are too many to go through one by one."""
    name, outputs = "what stands behind the attention layer", cut.outputs
    build = lambda route, outputs: _gauss_newton_product(cut, risk, outputs, route)  # noqa: E731
    route = choose_route(lambda route, outputs: build(route, outputs)(outputs), outputs)
    curvature = columns(build(route, outputs), outputs, name, coupled=False)
    values, vectors = jnp.linalg.eigh(_at(curvature, chosen))
    return jnp.swapaxes(vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :], -1, -2)


def _by_token(by_probe: Float[Array, "C B P O"], place: int) -> Float[Array, "N *rest"]:
    """The axis of probes at `place`, the tokens of all sequences in one axis."""
    moved = jnp.moveaxis(by_probe, 0, place)
    return moved.reshape(-1, *moved.shape[2:])


def _bend(
    cut: Cut, slopes: Callable[[PyTree], Array], chosen: np.ndarray, piecewise_linear: bool
) -> Float[Array, "N O O"] | None:
    """Λ_f: the Hessian of <dloss/doutputs, rest(.)> with the first factor held fixed; None for zero."""
    if piecewise_linear and not is_concrete(cut.outputs):
        return None
    along = lambda out: slopes(cut.rest(out))  # noqa: E731
    route = choose_route(lambda route, point: hessian_product(along, point, route)[2](point), cut.outputs)
    _, _, product = hessian_product(along, cut.outputs, route)
    if piecewise_linear:
        _check_flat(product, cut.outputs)
        return None
    columns = jax.lax.map(product, _unit_probes(cut.outputs))
    return _at(jnp.moveaxis(columns, 0, -1), chosen)


def _check_convex(values: Float[Array, "N C"]) -> None:
    """Raise `ValueError` if curvature of the loss in the outputs of a token is below zero, rounding aside."""
    if not is_concrete(values):
        return
    lowest, largest = float(jnp.min(values)), float(jnp.max(jnp.abs(values)))
    # Where all predictions are certain, cross-entropy's own curvature drowns in rounding of the size of eps.
    if lowest < -_slack(values) * largest - 10 * float(jnp.finfo(values.dtype).eps):
        raise ValueError(
            f"the loss has curvature {lowest:.3g} in the outputs of a token (the largest is {largest:.3g}); expected a "
            "loss that is convex in the outputs. Pass coupled=True, which takes any loss."
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
