"""Symmetric linear operators on parameter pytrees: the Hessian of an objective, its two parts, Fisher matrices.

H = J^T (d2 loss / d outputs^2) J  +  sum_n (d loss / d outputs)_n d2 outputs_n / d params^2
  = GGN (outer-product part)       +  functional part.

Each is built by one jitted linearisation at the point, whose linear part is a pytree: data, weights and saved
activations travel as arguments, so that one compiled product serves every point of the same shapes. Over a
`BatchedObjective`, or where that would take too much memory, nothing is saved: each product linearises anew.
"""

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.tree_util import Partial
from jaxtyping import Array

from attnlab.checks import check_number, is_concrete
from attnlab.curvature.guards import available_bytes
from attnlab.curvature.operator import Operator, apply
from attnlab.curvature.self_checks import CurvatureWarning, check_operator, check_risk, once
from attnlab.derivatives import Jacobian, Route, choose_route, hessian_product, jacobian
from attnlab.objectives import (
    BatchedObjective,
    Objective,
    Risk,
    check_loss,
    check_objective,
    curvature_in_outputs,
    example_losses,
    known_loss,
    outputs_along_slopes,
    predict_from_block,
)
from attnlab.sharding import layout_of
from attnlab.trees import Selection, select, zeros_like
from attnlab.types import Params, PyTree

Block = str | re.Pattern[str]


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


def hessian(
    risk: Risk, params: Params, *, block: Block | None = None, check: bool = True, budget: int | None = None
) -> Operator:
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
    With `budget` (bytes; by default half of what the device has left) the arrays that the linearisation saves between
    products are bounded: where they would be more, every product linearises anew, for about the time of one more
    gradient, and a `CurvatureWarning` says so.
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
    return _build(_hessian, risk, params, block, check, budget)


def ggn(
    risk: Risk, params: Params, *, block: Block | None = None, check: bool = True, budget: int | None = None
) -> Operator:
    """The generalized Gauss-Newton matrix J^T (d2 loss / d outputs^2) J: the outer-product part H_o of the Hessian.

    Schraudolph (2002); H_o of Ormaniec, Dangel, Singh (arXiv 2410.10986). Arguments and errors as for `hessian`.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> risk = al.objective(lambda params, x: jnp.exp(params) * x, al.square_loss, jnp.ones(1), jnp.zeros(1))
        >>> al.ggn(risk, jnp.zeros(1)).dense().tolist(), al.hessian(risk, jnp.zeros(1)).dense().tolist()
        ([[2.0]], [[4.0]])
    """
    return _build(_ggn, risk, params, block, check, budget)


def functional(
    risk: Risk, params: Params, *, block: Block | None = None, check: bool = True, budget: int | None = None
) -> Operator:
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
    return _build(_functional, risk, params, block, check, budget)


def fisher(
    risk: Risk, params: Params, *, block: Block | None = None, check: bool = True, budget: int | None = None
) -> Operator:
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
    return _build(_ggn, risk, params, block, check, budget)


def empirical_fisher(
    risk: Risk, params: Params, *, block: Block | None = None, check: bool = True, budget: int | None = None
) -> Operator:
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
    return _build(_empirical_fisher, risk, params, block, check, budget)


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
    point = selection.take(operator.point)
    return replace(operator, linear=linear, point=point, layout=layout_of(point))


def _build(kind: Kind, risk: Risk, params: Params, block: Block | None, check: bool, budget: int | None) -> Operator:
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
    saved = isinstance(risk, BatchedObjective) or _fits(linearize, risk, params, budget)
    if check:
        # Of batches the first is tested, on its own.
        linear = linearize.linear if saved else partial(_afresh, linearize)
        gradient = linearize.gradient if kind is _hessian else None
        once(partial(check_operator, linear, apply, gradient), risk, params, linearize, saved)
    if isinstance(risk, BatchedObjective) or not saved:
        return Operator(_afresh(linearize, risk, params), params, linearize.route, layout_of(params))
    found = linearize(risk, params)
    check_loss(found.loss)
    return Operator(found.linear, params, linearize.route, layout_of(params))


def _fits(linearize: "Linearization", risk: Objective, params: Params, budget: int | None) -> bool:
    """Whether the arrays that a linearisation saves fit the budget; warns where they do not. Nothing is run."""
    if budget is not None:
        check_number("budget", budget, 0, math.inf, "It is in bytes; leave it out for half of what is left.")
    if budget is None and not is_concrete((risk, params, jnp.zeros(()))):
        return True  # within one program, which keeps nothing between products
    available = available_bytes() if budget is None else 2 * budget
    saved = _saved_bytes(linearize, risk, params)
    if available is None or saved <= available // 2:
        return True
    warnings.warn(
        f"a linearisation would save {saved / 2**30:.3g} GiB, and the budget is {available / 2**31:.3g} GiB: each "
        "product linearises anew. A model that computes its blocks again saves less (remat='elementwise' in a "
        "TransformerConfig); a larger budget allows more.",
        CurvatureWarning,
        stacklevel=4,
    )
    return False


def _saved_bytes(linearize: "Linearization", risk: Objective, params: Params) -> int:
    """Of the arrays that a linearisation makes; those that it is given take no more memory."""
    program = _linearize.trace(linearize.kind, linearize.route, risk, params).jaxpr.jaxpr
    given = set(program.invars)
    made = {variable for variable in program.outvars if isinstance(variable, Var) and variable not in given}
    arrays = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in made]  # type: ignore[attr-defined]
    return sum(array.size * array.dtype.itemsize for array in arrays)


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


def _afresh(linearize: Linearization, risk: Risk, params: Params) -> Partial:
    """The product that saves nothing: it linearises, batch after batch, whenever it is called."""
    product = _BatchedProduct if isinstance(risk, BatchedObjective) else _ProductAfresh
    return Partial(product(linearize), risk, params)


@dataclass(frozen=True)
class _BatchedProduct:
    linearize: Linearization

    def __call__(self, risk: BatchedObjective, params: Params, vector: Params) -> Params:
        return risk.total(lambda part: self.linearize.linear(part, params)(vector))


@dataclass(frozen=True)
class _ProductAfresh:
    linearize: Linearization

    def __call__(self, risk: Objective, params: Params, vector: Params) -> Params:
        return self.linearize.linear(risk, params)(vector)


@jax.jit(static_argnums=(0, 1))
def _linearize(kind: Kind, route: Route, risk: Objective, params: Params) -> Linearized:
    return kind(risk, params, route)


def _hessian(risk: Objective, params: Params, route: Route) -> Linearized:
    return Linearized(*hessian_product(risk, params, route))


def _ggn(risk: Objective, params: Params, route: Route) -> Linearized:
    outputs, outer = jacobian(risk.outputs, params, route)
    loss, curvature = curvature_in_outputs(risk, outputs, route)
    return Linearized(loss, None, Partial(_apply_ggn, outer, curvature))


def _functional(risk: Objective, params: Params, route: Route) -> Linearized:
    outputs = risk.outputs(params)
    along = outputs_along_slopes(risk, outputs)
    _, _, product = hessian_product(lambda params: along(risk.outputs(params)), params, route)
    return Linearized(risk.score(outputs), None, product)


def _empirical_fisher(risk: Objective, params: Params, route: Route) -> Linearized:
    losses, jacobian_of_losses = jacobian(lambda params: example_losses(risk, risk.outputs(params))[0], params, route)
    _, shares = example_losses(risk, risk.outputs(params))
    return Linearized(jnp.vdot(shares, losses), None, Partial(_apply_gram, jacobian_of_losses, shares))


def _apply_gram(outer: Jacobian, shares: Array, vector: Params) -> Params:
    return outer.pull(shares * outer.push(vector), vector)  # the changes of the losses: <g_n, vector>


def _apply_ggn(outer: Jacobian, curvature: Partial, vector: Params) -> Params:
    return outer.pull(curvature(outer.push(vector)), vector)


@dataclass(frozen=True)
class _Restricted:
    selection: Selection

    def __call__(self, linear: Partial, zeros: Params, block: OrderedDict[str, PyTree]) -> OrderedDict[str, PyTree]:
        return self.selection.take(linear(self.selection.put(zeros, block)))
