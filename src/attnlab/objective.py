"""The objective: what a model predicts, how that is scored, and on which data. All that curvature ever sees."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attnlab.checks import check_finite, check_floating, check_not_empty
from attnlab.trees import Selection
from attnlab.types import Loss, Params, Predict, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Objective:
    """The empirical risk `params -> loss(predict(params, inputs), targets)`.

    A pytree: data (and anything that `predict` binds with `jax.tree_util.Partial`) are leaves, so an objective crosses
    `jit` as an argument and one compiled function serves all data of one shape. Build it with `objective(...)`.
    """

    predict: Partial
    loss: Partial
    inputs: PyTree
    targets: PyTree

    def __call__(self, params: Params) -> jax.Array:
        """The risk at `params`, a scalar in the scale of `loss`."""
        return self.loss(self.predict(params, self.inputs), self.targets)

    def outputs(self, params: Params) -> PyTree:
        """What the model predicts on the objective's inputs."""
        return self.predict(params, self.inputs)


def objective(predict: Predict, loss: Loss, inputs: PyTree, targets: PyTree) -> Objective:
    """Join a model, a loss and data.

    `predict(params, inputs) -> outputs` and `loss(outputs, targets) -> scalar` are pure functions; a reduction over
    examples is `loss`'s own. Raises `ValueError` when inputs or targets are empty or not finite.
    """
    for name, data in (("inputs", inputs), ("targets", targets)):
        check_not_empty(name, data)
        check_finite(name, data)
    arrays = (jax.tree.map(jnp.asarray, inputs), jax.tree.map(jnp.asarray, targets))
    return Objective(as_partial(predict), as_partial(loss), *arrays)


def as_partial(function: Any) -> Partial:
    """A function as a pytree, which it may be already."""
    return function if isinstance(function, Partial) else Partial(function)


def check_objective(risk: Callable[[Params], jax.Array], params: Params) -> None:
    """Raise unless `params` are finite real arrays at which `risk` returns one floating-point number.

    Raises `TypeError` for integer parameters or a loss that is not a scalar, `ValueError` for empty or non-finite
    parameters.
    """
    check_not_empty("params", params)
    check_floating("params", params)
    check_finite("params", params)
    value = jax.eval_shape(risk, params)
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"the loss returned {value}; expected one real number. "
            "Reduce it over the examples, with jnp.mean for instance."
        )


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
