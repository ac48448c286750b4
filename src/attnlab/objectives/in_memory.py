"""The objective: what a model predicts, how that is scored, and on which data, all of it in memory."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float

from attnlab.checks import check_finite, check_floating, check_not_empty, is_concrete
from attnlab.derivatives import Route, hessian_product
from attnlab.display import Words, line, parameters, whatever_it_holds
from attnlab.logits import Logits, example_axes, map_examples, widened, with_examples
from attnlab.losses import LOSSES, Loss, check_weights
from attnlab.trees import Selection
from attnlab.types import LossFunction, Params, Predict, PyTree, Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Objective:
    """The empirical risk `params -> loss(predict(params, inputs), targets)`, with `weights` of the positions if given.

    A pytree: data (and anything that `predict` binds with `jax.tree_util.Partial`) are leaves, so an objective crosses
    `jit` as an argument and one compiled function serves all data of one shape. Build it with `objective(...)`.
    """

    predict: Partial
    loss: Partial
    inputs: PyTree
    targets: PyTree
    weights: jax.Array | None = None

    @whatever_it_holds
    def __repr__(self) -> str:
        """The loss and the sizes of the data."""
        inputs, targets = parameters(self.inputs), parameters(self.targets)
        return line("Objective", loss=Words(loss_name(self.loss)), inputs=inputs, targets=targets, weights=self.weights)

    def __call__(self, params: Params) -> jax.Array:
        """The risk at `params`, a scalar in the scale of `loss`."""
        return self.score(self.outputs(params))

    def outputs(self, params: Params) -> PyTree:
        """What the model predicts on the objective's inputs."""
        return self.predict(params, self.inputs)

    def score(self, outputs: PyTree) -> jax.Array:
        """The loss of `outputs` on the objective's targets."""
        return self.loss(outputs, *self.answers)

    @property
    def answers(self) -> tuple:
        """What the loss is given beside the outputs: targets, and weights where there are any."""
        return (self.targets,) if self.weights is None else (self.targets, self.weights)

    def on(self, function: Callable[[Any], Any]) -> "Objective":
        """The same objective on other data: `function` of every array of inputs, targets and weights."""
        inputs, targets, weights = jax.tree.map(function, (self.inputs, self.targets, self.weights))
        return replace(self, inputs=inputs, targets=targets, weights=weights)

    def total(self) -> Scalar:
        """What the data weigh in a mean over several parts: the sum of the weights of the positions that count, and
        without weights their number (for a loss that is not of `attnlab.losses`, the number of entries of targets)."""
        loss = known_loss(self.loss)
        if loss is not None:
            return loss.total(*self.answers)
        counted = self.targets if self.weights is None else self.weights
        if self.weights is not None:
            return jnp.sum(jnp.asarray(counted).astype(float))
        return jnp.asarray(float(sum(jnp.size(leaf) for leaf in jax.tree.leaves(counted))))


def objective(
    predict: Predict, loss: LossFunction, inputs: PyTree, targets: PyTree, *, weights: PyTree | None = None
) -> Objective:
    """Join a model, a loss and data.

    Args:
        predict: `predict(params, inputs) -> outputs`, pure.
        loss: `loss(outputs, targets) -> scalar`, pure; a reduction over examples is its own. With weights it is called
            as `loss(outputs, targets, weights)`, and a weighted mean is expected of it. Those of `attnlab.losses` can
            do that, and also leave out the positions of a label: `cross_entropy.ignoring(-100)`.
        inputs: of the model, arrays in any pytree.
        targets: of the loss.
        weights: of the positions, not negative: a mask, padding with a weight of 0, or the shares of examples; of the
            positions' shape, or of its leading axes.

    Raises `ValueError` when inputs, targets or weights are empty or not finite, or weights negative; `TypeError` for a
    loss or a model that is no function.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, jnp.eye(2), jnp.array([1.0, 3.0]))
        >>> float(risk(jnp.zeros(2)))
        5.0
    """
    _check_callable(predict, loss)
    for name, data in (("inputs", inputs), ("targets", targets)):
        check_not_empty(name, data)
        check_finite(name, data)
    if weights is not None:
        check_not_empty("weights", weights)
        known = known_loss(as_partial(loss))
        check_weights(weights, jnp.shape(weights) if known is None else known.positions(jnp.asarray(targets)))
        weights = jnp.asarray(weights)
    arrays = (jax.tree.map(jnp.asarray, inputs), jax.tree.map(jnp.asarray, targets), weights)
    return Objective(as_partial(predict), as_partial(loss), *arrays)


def _check_callable(predict: Any, loss: Any) -> None:
    if not callable(loss):
        raise TypeError(
            f"loss is {loss!r}; expected a function loss(outputs, targets) -> scalar. Those of attnlab.losses are "
            f"{', '.join(LOSSES)}: take attnlab.losses.loss_by_name(name) for one of them by its name."
        )
    if not callable(predict):
        raise TypeError(
            f"predict is a {type(predict).__name__}; expected a function predict(params, inputs) -> outputs. For a "
            "module take from_linen, from_nnx or from_equinox of attnlab.models.adapters."
        )


def known_loss(loss: Partial) -> Loss | None:
    """The loss of `attnlab.losses` that an objective holds; None for any other function."""
    return loss.func if isinstance(loss.func, Loss) and not loss.args and not loss.keywords else None


def loss_name(loss: Partial) -> str:
    """What a loss is called."""
    known = known_loss(loss)
    return known.name if known is not None else getattr(loss.func, "__name__", type(loss.func).__name__)


def as_partial(function: Any) -> Partial:
    """A function as a pytree, which it may be already."""
    return function if isinstance(function, Partial) else Partial(function)


def _loss_of_logits(risk: Objective) -> Loss:
    """The loss of an objective whose model returns logits in two factors, in which only one loss is known."""
    loss = known_loss(risk.loss)
    if loss is None:
        raise TypeError(
            f"the loss is {risk.loss.func} and the model returns Logits in two factors, where its Gauss-Newton matrix "
            "is not known; expected cross_entropy. Let the model multiply them out (factored=False, outputs.dense())."
        )
    return loss


def curvature_in_outputs(risk: Objective, outputs: PyTree, route: Route) -> tuple[jax.Array, Partial]:
    """The loss at `outputs` and its curvature there, a map of changes of the outputs.

    Of logits in two factors it is the curvature in the logits, of which the factors are a part of the model.
    """
    if isinstance(outputs, Logits):
        return risk.score(outputs), _loss_of_logits(risk).curvature_of(outputs, *risk.answers)
    loss, _, curvature = hessian_product(risk.score, outputs, route)
    return loss, curvature


def outputs_along_slopes(risk: Objective, outputs: PyTree) -> Callable[[PyTree], jax.Array]:
    """<dloss/doutputs, .> with the first factor held at `outputs`: of the model, its Hessian is the functional part."""
    if isinstance(outputs, Logits):
        return _loss_of_logits(risk).along_slopes_at(outputs, *risk.answers)
    slopes = jax.grad(risk.score)(widened(outputs))

    def along(changed: PyTree) -> jax.Array:
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, slopes, widened(changed)))

    return along


def check_objective(risk: Callable[[Params], jax.Array], params: Params) -> None:
    """Raise unless `params` are finite real arrays at which `risk` returns one floating-point number.

    Raises `TypeError` for integer parameters or a loss that is not a scalar, `ValueError` for empty or non-finite
    parameters, and, where values can be looked at, for targets that are no class or weights of which none counts.
    """
    check_floating("params", params)
    check_not_empty("params", params)
    check_finite("params", params)
    value = jax.eval_shape(risk, params)  # the data are constants of this trace: the loss looks at their values
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"the loss returned {value}; expected one real number. "
            "Reduce it over the examples, with jnp.mean for instance."
        )


def check_loss(value: Any) -> None:
    """Raise `ValueError` for a loss that is not finite; nothing under `jit`, where it cannot be looked at."""
    if is_concrete(value) and not np.isfinite(np.asarray(value)).all():
        raise ValueError(
            f"the loss is {np.asarray(value)} at these parameters; expected a finite number. Look at the outputs of "
            "the model there: an overflow, the logarithm of zero, or data that do not fit."
        )


def example_losses(risk: Objective, outputs: PyTree) -> tuple[Float[jax.Array, " N"], Float[jax.Array, " N"]]:
    """The loss of every example alone, and its share in the risk, which is their weighted mean.

    An example of which no position counts has the loss 0 and the share 0. Raises `ValueError` where the first axes of
    inputs, outputs and targets differ.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in (*with_examples(outputs), *jax.tree.leaves((risk.inputs, risk.answers)))}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"inputs, outputs and targets have first axes {sorted(lengths)}; expected one number of examples in all. "
            "Give every array a leading axis of examples."
        )
    # The first axis is that of the examples, and the second one of batches of a single one. Weights may be None.
    data, one_each = map_examples(lambda leaf: leaf[:, None], ((risk.targets, risk.weights), outputs))
    totals = jax.vmap(lambda answers: _answering(risk, answers).total())(data)
    axes = (0, example_axes(one_each), 0)
    losses = jax.vmap(lambda answers, *rest: _loss_or_zero(_answering(risk, answers), *rest), axes)(
        data, one_each, totals
    )
    shares = totals / jnp.sum(totals)
    return losses, shares.astype(losses.dtype)


def _answering(risk: Objective, answers: tuple[PyTree, PyTree]) -> Objective:
    targets, weights = answers
    return replace(risk, targets=targets, weights=weights)


def _loss_or_zero(risk: Objective, outputs: PyTree, total: jax.Array) -> jax.Array:
    """The loss; zero where nothing counts: a mean over nothing is 0 / 0, and its derivative so even behind `where`."""
    counts, loss = total > 0, known_loss(risk.loss)
    if loss is not None and (risk.weights is not None or loss.ignored is not None):
        summed, weight = loss.total_loss(outputs, *risk.answers)
        return summed / jnp.where(counts, weight, 1)
    if risk.weights is None:
        return risk.score(outputs)
    safe = jnp.where(counts, risk.weights, jnp.ones_like(risk.weights))
    return jnp.where(counts, replace(risk, weights=safe).score(outputs), 0)


@dataclass(frozen=True)
class _PredictFromBlock:
    """`predict` as a function of some leaves of the parameters only; the others are bound."""

    selection: Selection

    def __call__(self, params: Params, predict: Partial, block: OrderedDict[str, PyTree], inputs: PyTree) -> PyTree:
        return predict(self.selection.put(params, block), inputs)


def predict_from_block(predict: Partial, params: Params, selection: Selection) -> Partial:
    """`predict` as a function of the selected leaves (`selection.take(params)`), the others held at `params`.

    Linearised there, nothing is computed for the held leaves, so a product with one block costs less than a full one.
    """
    return Partial(_PredictFromBlock(selection), params, predict)
