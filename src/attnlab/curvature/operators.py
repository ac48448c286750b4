"""Symmetric linear operators on parameter pytrees: the Hessian of an objective, its two parts, Fisher matrices.

H = J^T (d2 loss / d outputs^2) J  +  sum_n (d loss / d outputs)_n d2 outputs_n / d params^2
  = GGN (outer-product part)       +  functional part.

Each is built by one jitted linearisation at the point, whose linear part is a pytree: data, weights and saved
activations travel as arguments, so that one compiled product serves every point of the same shapes. Over a
`BatchedObjective` nothing is saved: each product linearises batch after batch.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_same_structure, is_concrete
from attnlab.curvature.self_checks import check_operator, check_risk, once
from attnlab.derivatives import FORWARD, Jacobian, Route, choose_route, hessian_product, jacobian
from attnlab.objectives import (
    BatchedObjective,
    Objective,
    Risk,
    check_loss,
    check_objective,
    example_losses,
    known_loss,
    predict_from_block,
)
from attnlab.trees import Selection, block_slices, dimension, power_of_two, select, zeros_like
from attnlab.types import Params, PyTree

Block = str | re.Pattern[str]

DENSE_LIMIT_BYTES = 4 * 2**30
ROWS_AT_ONCE_BYTES = 12 * 2**20
"""About what a cache holds: more products at once wait for memory, fewer make the matrix products thin."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operator:
    """A symmetric linear map on parameters, as a pytree that crosses `jit`.

    Attributes:
        linear: the map; takes and returns a pytree like `point`.
        point: the parameters at which it was taken (its structure and shapes are those of its vectors).
        route: in which order derivatives are taken. Forward over reverse, but for a model or loss with a
            `jax.custom_vjp` rule, which has no forward mode: reverse over reverse, at up to twice the cost.
    """

    linear: Partial
    point: Params
    route: Route = field(default=FORWARD, metadata={"static": True})

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return dimension(self.point)

    def mv(self, vector: Params) -> Params:
        """The product with `vector`, a pytree like `point`; raises `ValueError` if it is not one."""
        check_same_structure("vector", vector, self.point)
        return _apply(self.linear, vector)

    @property
    def flat_dtype(self) -> jnp.dtype:
        """The dtype of flat vectors: the widest of the parameters', and float32 at least."""
        return flat_dtype(self.point)

    @property
    def epsilon(self) -> float:
        """The machine epsilon of the coarsest floating-point dtype that takes part in a product: of the parameters, or
        of what the linearisation saved. Tolerances are made of it."""
        return max(float(jnp.finfo(dtype).eps) for dtype in _dtypes((self.point, self.linear)))

    def flat_mv(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """The product on flat vectors, in the flattening order of `point`. For jitted code: it is not jitted itself.

        Vectors are of `flat_dtype`; each leaf takes part in its own dtype. Where one of them is float16, whose smallest
        number is 6e-8, the vector is brought to entries of at most 1 for the product.
        """
        dtype = self.flat_dtype
        half = any(jnp.result_type(leaf) == jnp.float16 for leaf in jax.tree.leaves(self.point))
        size = power_of_two(jnp.max(jnp.abs(vector))) if half else jnp.ones((), dtype)
        image = self.linear(self.unravel(vector / size if half else vector))
        flat = self.ravel(image)
        return flat * size if half else flat

    def ravel(self, vector: Params) -> Float[Array, " n"]:
        """A pytree like `point` as a flat vector of `flat_dtype`."""
        return ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(self.flat_dtype), vector))[0]

    def unravel(self, vector: Float[Array, " n"]) -> Params:
        """The pytree like `point`, in its dtypes, of a flat vector."""
        wide = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), self.flat_dtype), self.point)
        leaves = ravel_pytree(wide)[1](vector)
        return jax.tree.map(lambda leaf, own: leaf.astype(jnp.result_type(own)), leaves, self.point)

    def dense(self) -> Float[Array, "n n"]:
        """The matrix, one product a row, or at once where the map has a `dense` of its own (a closed form).

        Raises `ValueError` when it would take more than 4 GiB.
        """
        _check_dense_size(self)
        own = getattr(self.linear.func, "dense", None)
        return _dense(self) if own is None else own(*self.linear.args)

    def blocks(self) -> dict[tuple[str, str], Float[Array, "rows columns"]]:
        """The dense matrix cut at the leaves of the parameters: (row leaf, column leaf) -> block."""
        matrix, slices = self.dense(), block_slices(self.point)
        return {(row, column): matrix[slices[row], slices[column]] for row in slices for column in slices}

    def __add__(self, other: "Operator") -> "Operator":
        """The sum; both must act on parameters of one structure."""
        check_same_structure("the other operator's point", other.point, self.point)
        return replace(self, linear=Partial(_sum, self.linear, other.linear))

    def __rmul__(self, factor: float) -> "Operator":
        """The operator scaled by a number."""
        return replace(self, linear=Partial(_scaled, jnp.asarray(factor), self.linear))


class Linearized(NamedTuple):
    """An operator at one point: the loss there, of the Hessian the gradient, and the product."""

    loss: Array
    gradient: Params | None
    linear: Partial


Kind = Callable[[Objective, Params, Route], Linearized]


@dataclass(frozen=True)
class Linearization:
    """A kind of operator and how it is had: static, and one compiled program for every structure of its arguments."""

    kind: Kind
    route: Route

    def __call__(self, risk: Objective, params: Params) -> Linearized:
        """The operator at `params`."""
        return _linearize(self.kind, self.route, risk, params)

    def linear(self, risk: Objective, params: Params) -> Partial:
        """Its product alone."""
        return self(risk, params).linear

    def gradient(self, risk: Objective, params: Params) -> Params:
        """Of the program that linearises, so that gradients at other points compile nothing."""
        return self(risk, params).gradient


def flat_dtype(point: Params) -> jnp.dtype:
    """The dtype of flat vectors at a point: the widest of its leaves', and float32 at least."""
    wide = max(jnp.finfo(dtype).bits for dtype in _dtypes(point)) > 32
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def hessian(risk: Risk, params: Params, *, block: Block | None = None, check: bool = True) -> Operator:
    """The Hessian of `risk` at `params`.

    With `block` (a name such as `query` or `layer_0/attention`, or a compiled regular expression) it is the diagonal
    block of the matching parameters, linearised in them alone: its vectors are dicts from leaf name to leaf.
    Raises `ValueError` for an unknown block or non-finite parameters, `TypeError` for a loss that is not a scalar.

    Outside of `jit` and `vmap`, the first operator of its kind over a model, loss, block and shapes is tested, with
    fixed vectors, at the price of compiling one product and the model's outputs; later ones of that structure, at other
    points or data, are not. `check=False` skips it. What is tested, and what happens when it fails:

    - determinism: two programs traced afresh are equal, two linearisations give one product (`VerificationError`);
    - symmetry: <u, H v> = <H u, v> (`VerificationError`);
    - finite difference, of the Hessian alone: the product is a central difference of gradients, unless two steps
      disagree as much (`CurvatureWarning`: relu networks can fail it);
    - examples: the outputs of a part of the batch are those of the whole, and the loss is the mean over parts
      (`CurvatureWarning`: single sequences, sums and contrastive losses fail it).

    Of a `BatchedObjective` the first batch is tested, but every batch is read a second time and compared, and its
    examples are: coupled ones raise `ValueError`, and so does a batch that reads differently. Whatever `check` is, a
    loss that is not finite and labels that are no class raise `ValueError`, where values can be looked at.
    `check_curvature(risk, params, key)` tests more, at the point it is given; every Lanczos run tests the symmetry on
    its way.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> operator = al.hessian(risk, jnp.ones(2))
        >>> operator.mv(jnp.array([1.0, 1.0])).tolist(), operator.dense().tolist()
        ([1.0, 4.0], [[1.0, 0.0], [0.0, 4.0]])
    """
    return _build(_hessian, risk, params, block, check)


def ggn(risk: Risk, params: Params, *, block: Block | None = None, check: bool = True) -> Operator:
    """The generalized Gauss-Newton matrix J^T (d2 loss / d outputs^2) J: the outer-product part H_o of the Hessian.

    Schraudolph (2002); H_o of Ormaniec, Dangel, Singh (arXiv 2410.10986). Arguments and errors as for `hessian`.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> risk = al.objective(lambda params, x: jnp.exp(params) * x, al.square_loss, jnp.ones(1), jnp.zeros(1))
        >>> al.ggn(risk, jnp.zeros(1)).dense().tolist(), al.hessian(risk, jnp.zeros(1)).dense().tolist()
        ([[2.0]], [[4.0]])
    """
    return _build(_ggn, risk, params, block, check)


def functional(risk: Risk, params: Params, *, block: Block | None = None, check: bool = True) -> Operator:
    """The functional part H_f = H - GGN: the Hessian of <g, outputs> with g = d loss / d outputs held fixed.

    Its own product, not a difference: where H_f vanishes it is zero to rounding of H_f itself. Arguments and errors as
    for `hessian`.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> risk = al.objective(lambda params, x: jnp.exp(params) * x, al.square_loss, jnp.ones(1), jnp.zeros(1))
        >>> al.functional(risk, jnp.zeros(1)).dense().tolist()  # the Hessian, 4, less the Gauss-Newton matrix, 2
        [[2.0]]
    """
    return _build(_functional, risk, params, block, check)


def fisher(risk: Risk, params: Params, *, block: Block | None = None, check: bool = True) -> Operator:
    """The Fisher information: the mean over positions of E[s s^T], s = d log p(y | outputs) / d params, y ~ the model.

    The model is the one whose negative log-likelihood the loss of a position is: categorical for `cross_entropy`; for
    `square_loss`, which is a mean over the C outputs (the last axis) of a position, Gaussian with variance C / 2 in
    each of them. With weights it is the weighted mean over positions. For both losses the Fisher equals the GGN, the
    expectation taken exactly (Martens, arXiv 1412.1193, section 9.2), at the GGN's cost and with no sampling. Raises
    `TypeError` for another loss: what it is the likelihood of is not known; otherwise arguments and errors as for
    `hessian`.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> risk = al.objective(lambda params, x: x @ params, al.cross_entropy, jnp.ones((1, 1)), jnp.array([0]))
        >>> al.fisher(risk, jnp.zeros((1, 2))).dense().tolist()  # diag(p) - p p^T, p = (1/2, 1/2)
        [[0.25, -0.25], [-0.25, 0.25]]
    """
    if known_loss(risk.loss) is None:
        known = "square_loss, cross_entropy"
        raise TypeError(
            f"the loss is {risk.loss.func}; the Fisher information needs a negative log-likelihood, one of: {known}. "
            "Take ggn, or empirical_fisher, for another loss."
        )
    return _build(_ggn, risk, params, block, check)


def empirical_fisher(risk: Risk, params: Params, *, block: Block | None = None, check: bool = True) -> Operator:
    """The uncentred second moment of the examples' gradients, (1/N) sum_n g_n g_n^T.

    With weights or ignored labels the mean is weighted: an example has the share of its positions that count, as in the
    risk, sum_n s_n g_n g_n^T with sum_n s_n g_n the gradient. An example is an entry of the first axis of inputs,
    outputs and targets, and g_n the gradient of the loss of that example alone: of a sequence's mean over its tokens,
    for a language model. Not the Fisher information: the labels are those of the data (Kunstner, Balles, Hennig, arXiv
    1905.12558). The model must treat examples independently. Raises `ValueError` where the first axes differ; otherwise
    arguments and errors as for `hessian`.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> risk = al.objective(lambda params, x: x @ params, al.cross_entropy, jnp.ones((1, 1)), jnp.array([0]))
        >>> al.empirical_fisher(risk, jnp.zeros((1, 2))).dense().tolist()  # (p - y)(p - y)^T
        [[0.25, -0.25], [-0.25, 0.25]]
    """
    return _build(_empirical_fisher, risk, params, block, check)


PARTS = {"hessian": hessian, "ggn": ggn, "functional": functional}
FISHERS = {"fisher": fisher, "empirical_fisher": empirical_fisher}


def restrict(operator: Operator, rows: Block) -> Operator:
    """The diagonal block of any operator. For one of an objective, `hessian(risk, params, block=...)` costs less.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> from attnlab.curvature import restrict
        >>> risk = al.objective(lambda p, x: p["a"] * x + p["b"], al.square_loss, jnp.array([3.0]), jnp.zeros(1))
        >>> params = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
        >>> restrict(al.hessian(risk, params), "a").dense().tolist()
        [[18.0]]
    """
    selection = select(operator.point, rows)
    linear = Partial(_Restricted(selection), operator.linear, zeros_like(operator.point))
    return replace(operator, linear=linear, point=selection.take(operator.point))


def _build(kind: Kind, risk: Risk, params: Params, block: Block | None, check: bool) -> Operator:
    params = jax.tree.map(jnp.asarray, params)
    check_objective(risk, params)
    check = check and is_concrete((risk, params, jnp.zeros(())))  # under jit the last is a tracer, whatever the others
    if check:
        once(check_risk, risk, params)
    if block is not None:
        selection = select(params, block)
        risk = replace(risk, predict=predict_from_block(risk.predict, params, selection))
        params = selection.take(params)
    linearize = Linearization(kind, _route(kind, risk, params))
    if check:
        gradient = linearize.gradient if kind is _hessian else None
        once(partial(check_operator, linearize.linear, _apply, gradient), risk, params, linearize)
    if isinstance(risk, BatchedObjective):
        return Operator(Partial(_BatchedProduct(linearize), risk, params), params, linearize.route)
    found = linearize(risk, params)
    check_loss(found.loss)
    return Operator(found.linear, params, linearize.route)


def _route(kind: Kind, risk: Risk, params: Params) -> Route:
    """How this kind of operator can be had; it is looked for once for every structure, by tracing."""
    part = risk.shape() if isinstance(risk, BatchedObjective) else risk
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda tree: tree, (part, params)))
    return _route_of(kind, structure, tuple(leaves))


@lru_cache(maxsize=1024)
def _route_of(kind: Kind, structure: jax.tree_util.PyTreeDef, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Route:
    arguments = jax.tree.unflatten(structure, leaves)

    def product(route: Route, risk: Objective, params: Params) -> Params:
        return _linearize(kind, route, risk, params).linear(params)

    return choose_route(product, *arguments)


@dataclass(frozen=True)
class _BatchedProduct:
    linearize: Linearization

    def __call__(self, risk: BatchedObjective, params: Params, vector: Params) -> Params:
        return risk.total(lambda part: self.linearize.linear(part, params)(vector))


@jax.jit(static_argnums=(0, 1))
def _linearize(kind: Kind, route: Route, risk: Objective, params: Params) -> Linearized:
    return kind(risk, params, route)


def _hessian(risk: Objective, params: Params, route: Route) -> Linearized:
    return Linearized(*hessian_product(risk, params, route))


def _ggn(risk: Objective, params: Params, route: Route) -> Linearized:
    outputs, outer = jacobian(risk.outputs, params, route)
    loss, _, curvature = hessian_product(risk.score, outputs, route)
    return Linearized(loss, None, Partial(_apply_ggn, outer, curvature))


def _functional(risk: Objective, params: Params, route: Route) -> Linearized:
    outputs = risk.outputs(params)
    loss, cotangent = jax.value_and_grad(risk.score)(outputs)
    along = Objective(risk.predict, Partial(_inner_product), risk.inputs, cotangent)
    return Linearized(loss, None, hessian_product(along, params, route)[2])


def _empirical_fisher(risk: Objective, params: Params, route: Route) -> Linearized:
    losses, jacobian_of_losses = jacobian(lambda params: example_losses(risk, risk.outputs(params))[0], params, route)
    _, shares = example_losses(risk, risk.outputs(params))
    return Linearized(jnp.vdot(shares, losses), None, Partial(_apply_gram, jacobian_of_losses, shares))


def _apply_gram(outer: Jacobian, shares: Array, vector: Params) -> Params:
    return outer.pull(shares * outer.push(vector), vector)  # the changes of the losses: <g_n, vector>


def _apply_ggn(outer: Jacobian, curvature: Partial, vector: Params) -> Params:
    return outer.pull(curvature(outer.push(vector)), vector)


def _inner_product(left: PyTree, right: PyTree) -> jax.Array:
    products = jax.tree.map(jnp.vdot, left, right)
    return jax.tree.reduce(jnp.add, products)


def _sum(first: Partial, second: Partial, vector: Params) -> Params:
    return jax.tree.map(jnp.add, first(vector), second(vector))


def _scaled(factor: jax.Array, linear: Partial, vector: Params) -> Params:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, linear(vector))


@dataclass(frozen=True)
class _Restricted:
    selection: Selection

    def __call__(self, linear: Partial, zeros: Params, block: OrderedDict[str, PyTree]) -> OrderedDict[str, PyTree]:
        return self.selection.take(linear(self.selection.put(zeros, block)))


def _dtypes(tree: PyTree) -> list[jnp.dtype]:
    """Of the floating-point leaves."""
    found = {jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)}
    return [dtype for dtype in found if jnp.issubdtype(dtype, jnp.floating)] or [jnp.dtype(jnp.float32)]


@jax.jit
def _apply(linear: Partial, vector: Params) -> Params:
    return linear(vector)


@jax.jit
def _dense(operator: Operator) -> Float[Array, "n n"]:
    identity = jnp.eye(operator.dimension, dtype=operator.flat_dtype)
    return jax.lax.map(operator.flat_mv, identity, batch_size=_rows_at_once(operator))


def _rows_at_once(operator: Operator) -> int:
    """As many products as keep the changes of the saved activations, one set each, within `ROWS_AT_ONCE_BYTES`."""
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(operator.linear))
    return max(1, min(ROWS_AT_ONCE_BYTES // max(saved, 1), operator.dimension))


def _check_dense_size(operator: Operator) -> None:
    n = operator.dimension
    needed = n * n * jnp.result_type(*jax.tree.leaves(operator.point)).itemsize
    if needed > DENSE_LIMIT_BYTES:
        raise ValueError(
            f"the dense matrix of dimension {n} takes {needed / 2**30:.1f} GiB; expected at most "
            f"{DENSE_LIMIT_BYTES / 2**30:.0f} GiB. Take a block of it, or its spectrum without forming it."
        )
