"""Losses: weighted means over positions, with their derivatives in the outputs, as rows of one table.

A *position* is what one target belongs to: a token of a sequence, an example; for the square loss every entry of the
targets. With weights w_n of the positions a loss is

    loss = sum_n w_n l_n / sum_n w_n,

so that a weight of zero takes a position out (a mask is such a weight), and so does an ignored label.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real as RealNumber
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from attnlab.checks import check_finite, is_concrete, local_values, unknown_name
from attnlab.logits import Logits, along_slopes, cross_entropy_of, gauss_newton, widened
from attnlab.types import Scalar


@dataclass(frozen=True)
class Loss:
    """`loss(outputs, targets, weights=None) -> scalar`, a (weighted) mean over positions; static and hashable.

    `square_loss` and `cross_entropy` are the two of `LOSSES`; `ignoring(label)` gives one that leaves positions out.

    Attributes:
        name: of the loss, its key in `LOSSES`.
        entries: `entries(outputs, targets)`, the losses l_n of all positions.
        positions: `positions(targets)`, the shape of the positions.
        slopes: `slopes(outputs, targets)`, gradient and curvature of every l_n in the outputs of its position, times
            one; the curvature of the square loss is diagonal, and given as its diagonal.
        likelihood: of which distribution of the targets l_n is the negative logarithm, up to a constant.
        check: `check(outputs, targets)` raises for targets that do not fit outputs of this shape.
        factored: whether it also takes `attnlab.logits.Logits`, with labels as targets.
        ignored: the label whose positions do not count; None if all do.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> outputs, labels = jnp.zeros((3, 4)), jnp.array([0, 2, -1])
        >>> loss = al.cross_entropy.ignoring(-1)
        >>> round(float(loss(outputs, labels)), 4)  # log 4, of the two that count
        1.3863
        >>> round(float(loss(outputs, labels, jnp.array([1.0, 0.0, 1.0]))), 4)
        1.3863
    """

    name: str
    entries: Callable[[Array, Array], Array]
    positions: Callable[[Array], tuple[int, ...]]
    slopes: Callable[[Array, Array], tuple[Array, Array]]
    likelihood: str
    check: Callable[[Any, Array, Any], None]
    factored: bool = False
    ignored: float | None = None

    def __call__(self, outputs: Array, targets: Array, weights: Array | None = None) -> Scalar:
        """The mean over all positions, weighted where there are `weights`; of bfloat16 or float16 outputs in float32.

        Args:
            outputs: what a model predicts.
            targets: as each loss takes them.
            weights: not negative, one for each position; or of the leading axes of the positions alone (one for each
                example), and then all below one entry weigh the same. Truth values are a mask.

        Raises `ValueError` for shapes that do not fit and, where values can be looked at, for labels that are no class,
        weights that are negative or not finite, and for weights of which none counts. Under `jit`, where they cannot,
        the loss and all its derivatives are NaN instead.
        """
        self.check_answers(outputs, targets, weights)
        outputs, targets = widened((outputs, jnp.asarray(targets)))
        if isinstance(outputs, Logits):
            return cross_entropy_of(*self._factored(outputs, targets, weights))
        full = self.weights(targets, weights, outputs.dtype)
        if full is None:
            return jnp.mean(self.entries(outputs, targets))
        shares = _shares(full)
        return jnp.sum(shares * self.entries(*_counted(outputs, targets, full)))

    def curvature_of(self, outputs: Logits, targets: Array, weights: Array | None = None) -> Partial:
        """The map from a change of logits in factors to the curvature of the loss in the logits, times that change."""
        self.check_answers(outputs, targets, weights)
        logits, _, shares = self._factored(outputs, jnp.asarray(targets), weights)
        return Partial(gauss_newton, logits, shares)

    def along_slopes_at(self, outputs: Logits, targets: Array, weights: Array | None = None) -> Partial:
        """The scalar <dloss/dlogits, logits> as a function of logits in factors, its slopes those at `outputs`."""
        self.check_answers(outputs, targets, weights)
        return Partial(_along, *self._factored(outputs, jnp.asarray(targets), weights))

    def _factored(self, outputs: Logits, targets: Array, weights: Array | None) -> tuple[Logits, Array, Array]:
        """Logits, labels and shares in the mean: zero where a position does not count, NaN where a label that counts is
        no class, so that loss, gradient and curvature are."""
        outputs = widened(outputs)
        full = self.weights(targets, weights, outputs.dtype)
        full = jnp.ones(targets.shape, outputs.dtype) if full is None else full
        logits, labels = _counted(outputs, targets, full)
        return logits, labels, _shares(full) * _one_or_nan(labels, logits)

    def total_loss(self, outputs: Array, targets: Array, weights: Array | None = None) -> tuple[Scalar, Scalar]:
        """sum_n w_n l_n, and sum_n w_n: both are zero where nothing counts. Raises as the loss itself does."""
        self.check_answers(outputs, targets, weights)
        outputs, targets = widened((outputs, jnp.asarray(targets)))
        full = self.weights(targets, weights, outputs.dtype)
        if isinstance(outputs, Logits):
            full = jnp.ones(targets.shape, outputs.dtype) if full is None else full
            logits, labels = _counted(outputs, targets, full)
            return cross_entropy_of(logits, labels, full * _one_or_nan(labels, logits)), jnp.sum(full)
        if full is None:
            entries = self.entries(outputs, targets)
            return jnp.sum(entries), jnp.asarray(entries.size, entries.dtype)
        return jnp.sum(full * self.entries(*_counted(outputs, targets, full))), jnp.sum(full)

    def ignoring(self, label: float) -> "Loss":
        """The same loss in which positions whose target is `label` do not count, as -1 or -100 often says.

        For the square loss that is a value of single entries of the targets. Raises `TypeError` if it is no number.
        """
        if not isinstance(label, RealNumber) or isinstance(label, bool) or label != label:
            raise TypeError(f"label is {label!r}; expected the number that marks a target that does not count.")
        return replace(self, ignored=label)

    def total(self, targets: Array, weights: Array | None = None) -> Scalar:
        """The sum of the weights of the positions that count; their number where there are no weights.

        The share of a batch in the mean over several is its total over the sum of all.
        """
        targets = jnp.asarray(targets)
        full = self.weights(targets, weights, jnp.result_type(float))
        size = float(math.prod(self.positions(targets)))
        return jnp.asarray(size, jnp.result_type(float)) if full is None else jnp.sum(full)

    def derivatives(
        self, outputs: Float[Array, "B L O"], targets: Array, weights: Array | None = None
    ) -> tuple[Float[Array, "B L O"], Array]:
        """Gradient (B, L, O) and curvature of the loss in the outputs: a scalar times the identity, or (B, L, O, O).

        Raises as the loss itself does.
        """
        self.check_answers(outputs, targets, weights)
        targets = jnp.asarray(targets)
        full = self.weights(targets, weights, outputs.dtype)
        if full is None:
            gradient, curvature = self.slopes(outputs, targets)
            count = math.prod(self.positions(targets))
            return gradient / count, curvature / count
        gradient, curvature = self.slopes(*_counted(outputs, targets, full))
        shares = _shares(full)
        by_output = shares if shares.ndim == outputs.ndim else shares[..., None]
        if curvature.ndim == 0:
            identity = curvature * jnp.eye(outputs.shape[-1], dtype=outputs.dtype)
            curvature = jnp.broadcast_to(identity, (*outputs.shape, outputs.shape[-1]))
        return by_output * gradient, by_output[..., None] * curvature

    def check_answers(self, outputs: Any, targets: Array, weights: Array | None = None) -> None:
        """Raise as the loss itself does for targets and weights that do not fit; of the outputs it needs the shape."""
        if not hasattr(outputs, "shape"):
            raise TypeError(
                f"outputs is a {type(outputs).__name__}; the loss {self.name} expects one array. Wrap predict so that "
                "it returns that alone."
            )
        if isinstance(outputs, Logits) and not (
            self.factored and jnp.issubdtype(jnp.result_type(targets), jnp.integer)
        ):
            raise TypeError(
                f"outputs are Logits in two factors; the loss {self.name} of targets of dtype "
                f"{jnp.result_type(targets)} expects one array: only the cross-entropy of labels takes factors. Let "
                "the model multiply them out (factored=False, or outputs.dense())."
            )
        targets = jnp.asarray(targets)
        self.check(outputs, targets, self.ignored)
        if weights is not None:
            check_weights(weights, self.positions(targets))
        if is_concrete((targets, weights)) and (self.ignored is not None or weights is not None):
            self._check_any_counts(local_values(targets), None if weights is None else local_values(weights))

    def _check_any_counts(self, targets: np.ndarray, weights: np.ndarray | None) -> None:
        positions = self.positions(jnp.asarray(targets))
        counts = np.ones(positions, bool) if self.ignored is None else np.not_equal(targets, self.ignored)
        if weights is not None:
            counts = np.logical_and(counts, weights.reshape(*weights.shape, *[1] * (counts.ndim - weights.ndim)) > 0)
        if not counts.any():
            raise ValueError(
                f"no position counts: of {counts.size}, every weight is zero or the target ignored; expected at least "
                "one that counts. Look at the weights, and at the label that the loss ignores."
            )

    def _counts(self, targets: Array) -> Array | None:
        """Which positions count by their label."""
        if self.ignored is None:
            return None
        if jnp.shape(targets) != self.positions(targets):
            raise TypeError(
                f"the loss ignores the label {self.ignored}, but targets of shape {jnp.shape(targets)} are "
                "distributions; expected labels, whole numbers. Give positions that do not count a weight of 0."
            )
        if jnp.issubdtype(targets.dtype, jnp.integer) and not _holds(targets.dtype, self.ignored):
            return None
        return targets != jnp.asarray(self.ignored, targets.dtype)

    def weights(self, targets: Array, weights: Array | None, dtype: Any) -> Array | None:
        """The weights of all positions, zero where one does not count; None where each counts once."""
        counts, positions = self._counts(targets), self.positions(targets)
        if weights is None:
            return None if counts is None else counts.astype(dtype)
        weights = jnp.asarray(weights).astype(dtype)
        full = jnp.broadcast_to(weights.reshape(*weights.shape, *[1] * (len(positions) - weights.ndim)), positions)
        return full if counts is None else jnp.where(counts, full, 0)


def _shares(full: Array) -> Array:
    """w_n / sum w of all positions; NaN where nothing counts."""
    wide = widened(full)  # bfloat16 counts to 256
    return (wide / jnp.sum(wide)).astype(full.dtype)


def _along(held: Logits, labels: Array, shares: Array, outputs: Logits) -> Scalar:
    return along_slopes(widened(outputs), held, labels, shares)


def _counted(outputs: Any, targets: Array, full: Array) -> tuple[Any, Array]:
    """Outputs and targets, zero at positions that do not count: what stands there may be anything, NaN as well."""
    counts = full != 0
    if isinstance(outputs, Logits):
        outputs = replace(outputs, hidden=jnp.where(counts[..., None], outputs.hidden, 0))
    else:
        outputs = jnp.where(counts if counts.ndim == outputs.ndim else counts[..., None], outputs, 0)
    return outputs, jnp.where(counts if counts.ndim == targets.ndim else counts[..., None], targets, 0)


def _holds(dtype: Any, label: float) -> bool:
    """Whether whole numbers of this dtype hold `label` (unsigned labels no -100)."""
    limits = jnp.iinfo(dtype)
    return limits.min <= label <= limits.max and label == int(label)


def check_weights(weights: Any, positions: tuple[int, ...]) -> None:
    """Raise unless `weights` are of the leading axes of `positions`, and where values can be looked at, finite and not
    negative: `ValueError`; `TypeError` for weights that are no numbers."""
    dtype, shape = jnp.result_type(weights), jnp.shape(weights)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_):
        raise TypeError(f"weights have dtype {dtype}; expected real numbers, or truth values for a mask.")
    if shape != positions[: len(shape)] or not shape:
        raise ValueError(
            f"weights have shape {shape}; expected {positions}, one weight a position, or its leading axes. Add or "
            "drop axes."
        )
    check_finite("weights", weights)
    if is_concrete(weights) and (values := local_values(weights)).size and values.min() < 0:
        raise ValueError(
            f"weights hold {values.min()}; expected none below zero. Leave a position out by a weight of 0."
        )


def _square_entries(outputs: Array, targets: Array) -> Array:
    return (outputs - targets) ** 2


def _square_slopes(outputs: Array, targets: Array) -> tuple[Array, Array]:
    return 2 * (outputs - targets), jnp.asarray(2, outputs.dtype)


def _check_square(outputs: Any, targets: Array, ignored: float | None) -> None:
    if outputs.shape != jnp.shape(targets):
        raise ValueError(
            f"targets have shape {jnp.shape(targets)}; the square loss expects the outputs' {outputs.shape}. "
            "Reshape them, or one-hot encode class labels."
        )


def _cross_entropy_entries(outputs: Array, targets: Array) -> Array:
    log_probabilities = jax.nn.log_softmax(outputs, axis=-1)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        return -jnp.sum(targets * log_probabilities, axis=-1)
    picked = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1, mode="clip")[..., 0]
    return -picked * _one_or_nan(targets, outputs)


def _one_or_nan(labels: Int[Array, "*batch"], outputs: Any) -> Float[Array, "*batch"]:
    # As a factor, it makes the derivatives NaN as well: by `where` they would be finite, and wrong.
    known = (labels >= 0) & (labels < outputs.shape[-1])
    return jnp.where(known, 1, jnp.nan).astype(outputs.dtype)


def _cross_entropy_positions(targets: Array) -> tuple[int, ...]:
    labels = jnp.issubdtype(jnp.result_type(targets), jnp.integer)
    return jnp.shape(targets) if labels else jnp.shape(targets)[:-1]


def _cross_entropy_slopes(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """Gradient w p - y and curvature w (diag p - p p^T) of the cross-entropy of one position.

    w = sum_c y_c is 1 for labels and distributions. Where a prediction is all but certain, 1 - p_o is taken as the sum
    of the other probabilities, which has digits that the difference has lost.
    """
    if jnp.issubdtype(targets.dtype, jnp.integer):
        known = (targets >= 0) & (targets < outputs.shape[-1])
        one_hot = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
        targets = jnp.where(known[..., None], one_hot, jnp.nan)  # a factor of NaN would be optimised away beside a zero
    p = jax.nn.softmax(outputs, axis=-1)
    identity = jnp.eye(p.shape[-1], dtype=p.dtype)
    others = 1 - identity
    # (diag p - p p^T) has p_o (1 - p_o) on the diagonal; w p_o - y_o = p_o sum_{c != o} y_c - y_o sum_{c != o} p_c
    diagonal = jnp.einsum("...o,op->...op", p * (p @ others), identity)
    curvature = diagonal - jnp.einsum("...o,...p,op->...op", p, p, others)
    weight = jnp.sum(targets, axis=-1)[..., None, None]
    return p * (targets @ others) - targets * (p @ others), weight * curvature


def _check_cross_entropy(outputs: Any, targets: Array, ignored: float | None) -> None:
    if not outputs.shape:
        raise ValueError("outputs are one number; cross-entropy expects (..., classes). Add an axis of classes.")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets have shape {targets.shape}; target distributions for outputs of shape {outputs.shape} "
                f"have that same shape. If they are class labels, cast them from {targets.dtype} to whole numbers."
            )
        return
    if targets.shape != outputs.shape[:-1]:
        raise ValueError(
            f"targets have shape {targets.shape}; class labels for outputs of shape {outputs.shape} "
            f"have shape {outputs.shape[:-1]}. Reshape them."
        )
    if is_concrete(targets):
        _check_labels(local_values(targets), outputs.shape[-1], ignored)


def _check_labels(labels: np.ndarray, classes: int, ignored: float | None) -> None:
    bad = (labels < 0) | (labels >= classes)
    if ignored is not None:
        bad &= labels != ignored
    if bad.any():
        first = labels[bad].ravel()[0]
        raise ValueError(
            f"targets hold {int(bad.sum())} of {bad.size} labels that are no class, such as {first}; expected whole "
            f"numbers from 0 to {classes - 1} for {classes} outputs. Count classes from 0; for a label that marks what "
            f"does not count take cross_entropy.ignoring({first}), or weights of 0."
        )


square_loss = Loss(
    name="square",
    entries=_square_entries,
    positions=jnp.shape,
    slopes=_square_slopes,
    likelihood="Gaussian",
    check=_check_square,
)
"""Mean of the squared differences over all entries.

For one sequence of L tokens with v features it is ||F - Y||^2 / (L v), so that its Hessian in F is 2 / (L v) times the
identity (Ormaniec, Dangel, Singh, arXiv 2410.10986, section 2). Weights are of entries, or of leading axes: of tokens.
"""

cross_entropy = Loss(
    name="cross_entropy",
    entries=_cross_entropy_entries,
    positions=_cross_entropy_positions,
    slopes=_cross_entropy_slopes,
    likelihood="categorical",
    check=_check_cross_entropy,
    factored=True,
)
"""Mean over all positions of -sum_c y_c log softmax(outputs)_c.

`targets` are class labels (integers, one axis fewer than `outputs`) or distributions over the classes. The Hessian in
the outputs of one of n positions is (diag p - p p^T) / n.
"""

LOSSES: dict[str, Loss] = {loss.name: loss for loss in (square_loss, cross_entropy)}


def loss_by_name(name: str) -> Loss:
    """The loss called `name`, one of the keys of `LOSSES`; raises `ValueError` for another."""
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    return LOSSES[name]
