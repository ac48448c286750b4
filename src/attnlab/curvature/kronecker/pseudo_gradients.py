"""Gradients whose second moment is the Gauss-Newton matrix, exactly, in the inputs and output slopes of each layer.

With the curvature of the loss in the outputs of example b written as S_b S_b^T, column k of S_b pulled back to a weight
W is the pseudo-gradient

    G_bk = sum_t a_bt g_bkt^T,        sum_bk vec(G_bk) vec(G_bk)^T = the block of W of the Gauss-Newton matrix,

over the positions t at which W is met: tokens, or several uses. No label is drawn; Martens, Grosse (arXiv 1503.05671,
section 2.1) draw them from the model, of which this is the expectation.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import is_concrete
from attnlab.curvature.kronecker.sites import Site, with_sites
from attnlab.curvature.operator import DENSE_LIMIT_BYTES
from attnlab.curvature.operators import Block
from attnlab.logits import Logits, widened
from attnlab.objectives import Objective, check_objective, known_loss, predict_from_block
from attnlab.trees import Selection, leaf_names, select
from attnlab.types import Params, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PseudoGradients:
    """Of one weight, in two factors.

    Attributes:
        inputs: a, (B, T, in), in for each of B examples and T positions.
        slopes: g, (K, B, T, out), for each of K columns.
        turned: whether the weight is (out, in) rather than (in, out).
        bias: whether it is a vector (out,); its inputs are ones.
    """

    inputs: Float[Array, "B T in"]
    slopes: Float[Array, "K B T out"]
    turned: bool = field(metadata={"static": True})
    bias: bool = field(metadata={"static": True})

    def matrices(self, slopes: Float[Array, "B T out"]) -> Float[Array, "B m n"]:
        """G of every example for one column, in the weight's own axes; (B, 1, out) for a bias."""
        ends = "bto,bti->boi" if self.turned else "bti,bto->bio"
        pair = (slopes, self.inputs) if self.turned else (self.inputs, slopes)
        return jnp.einsum(ends, *pair)

    def second_moment(self) -> Float[Array, "mn mn"]:
        """The block of the Gauss-Newton matrix itself, sum_bk vec(G_bk) vec(G_bk)^T, rows before columns."""

        def square(matrices: Array) -> Array:
            flat = matrices.reshape(matrices.shape[0], -1)
            return flat.T @ flat

        return self.total(square)

    def total(self, function: Callable[[Array], PyTree]) -> PyTree:
        """sum_k function(G_k), where G_k is (B, m, n)."""
        shapes = jax.eval_shape(lambda slopes: function(self.matrices(slopes)), self.slopes[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def step(total: PyTree, slopes: Array) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, function(self.matrices(slopes))), None

        return jax.lax.scan(step, zeros, self.slopes)[0]


def selection_of(params: Params, block: Block | None) -> Selection:
    """The leaves of a block, or all of them."""
    if block is not None:
        return select(params, block)
    names = leaf_names(params)
    return Selection(jax.tree.structure(params), tuple(range(len(names))), names)


def pseudo_gradients(risk: Objective, params: Params, selection: Selection) -> OrderedDict[str, PseudoGradients]:
    """The pseudo-gradients of each selected weight, by name.

    One column costs a gradient of the model; there are as many as an example has outputs (positions times classes).
    Memory: columns x examples x positions x width, for each weight. Raises `TypeError` for a loss whose curvature by
    position is not known or outputs that are not one array; `ValueError` for a weight that is no kernel or bias of a
    dense layer, examples that are not independent (a single sequence needs an axis of one example), or more than 4 GiB.
    """
    check_objective(risk, params)
    risk = replace(risk, predict=predict_from_block(risk.predict, params, selection))
    leaves = selection.take(params)
    _check(risk, leaves)
    found, defect = _pull(risk, leaves)
    coarsest = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves.values())
    if is_concrete(defect) and not np.asarray(defect) <= coarsest**0.5:
        raise ValueError(
            f"the pseudo-gradients' second moment differs from the Gauss-Newton matrix by {float(defect):.2g} of it; "
            "expected examples, along the first axis of inputs and outputs, that the model treats independently. Give "
            "a single sequence a first axis of length 1, and take the model in evaluation mode."
        )
    return found


def _check(risk: Objective, leaves: OrderedDict[str, Array]) -> None:
    if known_loss(risk.loss) is None:
        raise TypeError(
            f"the loss is {risk.loss.func}; Kronecker factors need its curvature position by position, as square_loss "
            "and cross_entropy have it. Take one of them."
        )
    outputs, sites = jax.eval_shape(lambda leaves: _outputs_and_sites(risk, leaves), leaves)
    if isinstance(outputs, Logits) or not hasattr(outputs, "shape"):
        raise TypeError(
            f"the model returns {type(outputs).__name__}; Kronecker factors need one array of outputs. Let the model "
            "multiply its logits out (factored=False)."
        )
    examples = outputs.shape[0] if outputs.ndim > 1 else 0
    for name, shape in sites.items():
        if not examples or math.prod(shape.shape[:-1]) % examples:
            raise ValueError(
                f"the layer of '{name}' has outputs of shape {shape.shape} and the model {outputs.shape}; expected a "
                "first axis of examples in both."
            )
    columns = math.prod(outputs.shape[1:])
    needed = columns * outputs.dtype.itemsize * sum(math.prod(shape.shape) for shape in sites.values())
    if needed > DENSE_LIMIT_BYTES:
        raise ValueError(
            f"{columns} columns of output slopes take {needed / 2**30:.1f} GiB; expected at most "
            f"{DENSE_LIMIT_BYTES / 2**30:.0f} GiB. Take fewer examples, or the weights one by one (block=...)."
        )


def _outputs_and_sites(risk: Objective, leaves: OrderedDict[str, Array]) -> tuple[PyTree, dict[str, Array]]:
    outputs, sites = with_sites(risk.outputs, leaves)(None)
    return outputs, {f"{site.name}, {i}": jnp.zeros(site.shape) for i, site in enumerate(sites)}


@jax.jit
def _pull(risk: Objective, leaves: OrderedDict[str, Array]) -> tuple[OrderedDict[str, PseudoGradients], Array]:
    """The pseudo-gradients, and how far their second moment along one vector is from the Gauss-Newton matrix's."""
    changed = with_sites(risk.outputs, leaves)
    outputs, sites = changed(None)
    zeros = [jnp.zeros(site.shape, outputs.dtype) for site in sites]
    _, pull = jax.vjp(lambda changes: changed(changes)[0], zeros)
    roots = curvature_roots(risk, widened(outputs))  # (B, positions, classes, classes)
    examples, places, classes = roots.shape[:3]

    def column(index: Array) -> list[Array]:
        place, column = index // classes, index % classes
        root = roots[:, place, :, column].astype(outputs.dtype)
        cotangent = jnp.zeros((examples, places, classes), outputs.dtype).at[:, place].set(root)
        (slopes,) = pull(cotangent.reshape(outputs.shape))
        return [widened(_by_example(leaf, examples)) for leaf in slopes]

    slopes = jax.lax.map(column, jnp.arange(places * classes), batch_size=8)
    found = OrderedDict((name, _joined(name, leaf, sites, slopes, examples)) for name, leaf in leaves.items())
    return found, _defect(risk, leaves, found, roots)


def _by_example(rows: Float[Array, "*rows width"], examples: int) -> Float[Array, "B T width"]:
    return rows.reshape(examples, -1, rows.shape[-1])


def _joined(name: str, leaf: Array, sites: list[Site], slopes: list[Array], examples: int) -> PseudoGradients:
    """All sites of a leaf side by side, as positions."""
    met = [index for index, site in enumerate(sites) if site.name == name]
    turned = {sites[index].turned for index in met}
    if len(turned) > 1:
        raise ValueError(
            f"the weight '{name}' is met as W and as its transpose; expected one of them. Leave it out, by block=..."
        )
    inputs = jnp.concatenate([widened(_by_example(sites[index].inputs, examples)) for index in met], axis=1)
    joined = jnp.concatenate([slopes[index] for index in met], axis=2)
    return PseudoGradients(inputs, joined, turned.pop(), leaf.ndim == 1)


def _defect(
    risk: Objective, leaves: OrderedDict[str, Array], found: OrderedDict[str, PseudoGradients], roots: Array
) -> Array:
    """Of <z, G z> for one z, from the pseudo-gradients and from the change of the outputs: the largest difference over
    the examples, relative to the largest value."""
    keys = jax.random.split(jax.random.key(0), len(leaves))
    z = OrderedDict(
        (name, jax.random.normal(key, leaf.shape, leaf.dtype))
        for key, (name, leaf) in zip(keys, leaves.items(), strict=True)
    )
    _, change = jax.jvp(risk.outputs, (leaves,), (z,))
    change = widened(change).reshape(roots.shape[:3])
    wanted = jnp.sum(jnp.einsum("bpok,bpo->bpk", roots, change) ** 2, axis=(1, 2))
    sums = sum(_along(pseudo, widened(z[name])) for name, pseudo in found.items())
    got = jnp.sum(jnp.asarray(sums) ** 2, axis=0)
    return jnp.max(jnp.abs(got - wanted)) / jnp.maximum(jnp.max(jnp.abs(wanted)), jnp.finfo(got.dtype).tiny)


def _along(pseudo: PseudoGradients, z: Array) -> Float[Array, "K B"]:
    matrix = z.reshape(1, -1) if pseudo.bias else z.T if pseudo.turned else z
    return jnp.einsum("bti,io,kbto->kb", pseudo.inputs, matrix, pseudo.slopes)


def curvature_roots(risk: Objective, outputs: Float[Array, "B *P C"]) -> Float[Array, "B P C C"]:
    """S of the curvature S S^T of the risk in the outputs, position by position (shares in the mean included).

    Of the cross-entropy diag p - p p^T = S S^T with S = diag(p^1/2) - p (p^1/2)^T.
    """
    loss = known_loss(risk.loss)
    assert loss is not None
    targets = jnp.asarray(risk.targets)
    full = loss.weights(targets, risk.weights, outputs.dtype)
    full = jnp.ones(loss.positions(targets), outputs.dtype) if full is None else full
    shares = full / jnp.sum(full)
    identity = jnp.eye(outputs.shape[-1], dtype=outputs.dtype)
    if loss.likelihood == "Gaussian":
        roots = jnp.einsum("...o,op->...op", jnp.sqrt(2 * shares), identity)
    else:
        p = jax.nn.softmax(outputs, axis=-1)
        mass = 1 if jnp.issubdtype(targets.dtype, jnp.integer) else jnp.sum(targets, axis=-1)
        root = jnp.sqrt(p)
        roots = jnp.einsum("...o,op->...op", root, identity) - p[..., :, None] * root[..., None, :]
        roots = jnp.sqrt(shares * mass)[..., None, None] * roots
    return roots.reshape(outputs.shape[0], -1, *roots.shape[-2:])
