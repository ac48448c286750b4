"""Losses whose gradient descent diverges towards a maximal margin, accurate however far it has gone.

With attention close to one-hot, the gradient of softmax written plainly is a difference of equal numbers: it keeps no
digit once the other tokens' probabilities fall below 1e-16. Here the output is written around a reference token r,

    f = gamma_r + sum_{t != r} s_t (gamma_t - gamma_r),   s_t = exp(u_t) / (1 + sum_{t' != r} exp(u_t')),

with u_t the score of t less that of r. The same function; its gradient in u_t is a product of s_t, to full precision.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from attnlab.checks import is_concrete
from attnlab.losses import cross_entropy
from attnlab.margin.checking import check_floating_vectors, check_selection, check_signs
from attnlab.objectives import Objective, objective
from attnlab.types import Params, Scalar

Data = Mapping[str, Array]


def attention_risk(
    tokens: Float[Array, "n T d"],
    labels: Float[Array, " n"],
    *,
    queries: Float[Array, "n e"] | None = None,
    readout: Float[Array, " d"] | None = None,
) -> Objective:
    """The mean of log(1 + exp(-Y_i f_i)), f_i = v^T X_i^T softmax(X_i W z_i), whose parameters are a dict of

    - `query_key` (d, e): W (arXiv 2308.16898); or `key` (d, k) and `query` (e, k): W = K Q^T; or, without `queries`,
      `prompt` (d,): the vector p in place of W z_i (arXiv 2306.13596);
    - `readout` (d,): v, if it is trained and not given here.

    `labels` are -1 and 1. Traceable, so `jax.vmap` makes the objectives of an ensemble (see `training.train`). Raises
    `ValueError` for shapes that do not agree and for other labels, `TypeError` for token numbers in place of vectors.

    >>> import jax, jax.numpy as jnp
    >>> from attnlab.margin import attention_risk
    >>> tokens = jnp.array([[[2.0, 0.0], [0.0, 0.0]]])
    >>> risk = attention_risk(tokens, labels=jnp.ones(1), readout=jnp.array([1.0, 0.0]))
    >>> value, gradient = jax.jit(jax.value_and_grad(risk))({"prompt": jnp.zeros(2)})  # half attention to each token
    >>> print(f"{value:.4f}, {gradient['prompt'][0]:.4f}")  # log(1 + exp(-1)); descent lengthens p_1
    0.3133, -0.2689
    """
    _check_tokens(tokens)
    n, _, d = tokens.shape
    check_signs("labels", labels)
    queries = jnp.ones((n, 1), tokens.dtype) if queries is None else queries
    data = {"tokens": tokens, "queries": queries} | ({} if readout is None else {"readout": readout})
    for name, array, shape in (("labels", labels, (n,)), ("queries", queries, (n, queries.shape[-1]))):
        if array.shape != shape:
            raise ValueError(f"{name} have shape {array.shape}; expected {shape}, one for each sequence.")
    if readout is not None and readout.shape != (d,):
        raise ValueError(f"readout has shape {readout.shape}; expected {(d,)}, the token dimension.")
    return objective(_attention_output, logistic_loss, data, labels)


def _check_tokens(tokens: Array) -> None:
    if not hasattr(tokens, "shape"):
        raise TypeError(
            f"tokens is a {type(tokens).__name__}; expected an array (sequences, tokens, token dimension). Pad "
            "sequences of unequal lengths to one."
        )
    if tokens.ndim != 3 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens have shape {tokens.shape}; expected (sequences, tokens, token dimension), two tokens at least."
        )
    check_floating_vectors("tokens", tokens)


def logistic_loss(outputs: Float[Array, " n"], labels: Float[Array, " n"]) -> Scalar:
    """Mean of log(1 + exp(-Y_i f_i))."""
    return jnp.mean(jax.nn.softplus(-labels * outputs))


def attention_matrix(params: Params) -> Float[Array, "d e"]:
    """W of any of the parametrisations of `attention_risk`: W itself, K Q^T, or p as a column."""
    if "query_key" in params:
        return params["query_key"]
    if "prompt" in params:
        return params["prompt"][:, None]
    return params["key"] @ params["query"].T


def attention_logits(params: Params, inputs: Data) -> Float[Array, "n T"]:
    """X_i W z_i."""
    return _logits(attention_matrix(params), inputs)


def _logits(matrix: Float[Array, "d e"], inputs: Data) -> Float[Array, "n T"]:
    return (inputs["tokens"] @ (inputs["queries"] @ matrix.T)[..., None])[..., 0]


def selected_probability(params: Params, inputs: Data, selection: Int[Array, " n"]) -> Float[Array, " n"]:
    """Attention to the token `selection[i]` of each sequence."""
    check_selection("selection", selection, *inputs["tokens"].shape[:2])
    return _take(jax.nn.softmax(attention_logits(params, inputs), axis=-1), selection)


def _take(array: Float[Array, "n T"], index: Int[Array, " n"]) -> Float[Array, " n"]:
    return jnp.take_along_axis(array, index[:, None], axis=-1)[:, 0]


def _token_outputs(params: Params, inputs: Data) -> Float[Array, "n T"]:
    return inputs["tokens"] @ (params["readout"] if "readout" in params else inputs["readout"])


def _log_weights(logits: Float[Array, "n T"], reference: Int[Array, " n"]) -> Float[Array, "n T"]:
    """log s_t of the tokens other than the reference, minus infinity at the reference itself."""
    is_reference = jnp.arange(logits.shape[-1])[None, :] == reference[:, None]
    relative = jnp.where(is_reference, -jnp.inf, logits - _take(logits, reference)[:, None])
    rest = jax.nn.logsumexp(relative, axis=-1, keepdims=True)
    return relative - jax.nn.softplus(rest)


def _attention_output(params: Params, inputs: Data) -> Float[Array, " n"]:
    logits, values = attention_logits(params, inputs), _token_outputs(params, inputs)
    reference = jnp.argmax(logits, axis=-1)
    at_reference = _take(values, reference)
    weights = jnp.exp(_log_weights(logits, reference))
    return at_reference + jnp.sum(weights * (values - at_reference[:, None]), axis=-1)


def rescaled(risk: Objective, selection: Int[Array, " n"] | None = None) -> Objective:
    """exp(-c) (L(W) - L_r) of an `attention_risk` L, with L_r the loss of attention to one token of each sequence.

    The reference r is `selection`, or the token that is attended most; log-weight c is the largest log s_t of another
    token. Both, and L_r, are constants to the gradient, which therefore is exp(-c) times that of L and neither
    underflows nor loses digits: with it normalised descent does not stall. Where the selection is optimal, the value is
    never negative, so Polyak steps (`optax.polyak_sgd`, invariant to exp(-c)) need no other minimum than 0. Raises
    `ValueError` at parameters with a `readout`, which moves L_r: there normalise the blocks of the plain risk.

    >>> import jax, jax.numpy as jnp
    >>> from attnlab.margin import attention_risk, rescaled
    >>> tokens = jnp.array([[[2.0, 0.0], [0.0, 0.0]]])
    >>> risk = attention_risk(tokens, jnp.ones(1), readout=jnp.array([1.0, 0.0]))
    >>> gradients = jax.jit(lambda params: [jax.grad(loss)(params)["prompt"] for loss in (risk, rescaled(risk))])
    >>> plain, scaled = gradients({"prompt": jnp.array([4e3, 0.0])})  # exp(-8000) is the other token's probability
    >>> print(f"{plain[0]}, {scaled[0]:.2f}")
    0.0, -0.48
    """
    if selection is not None:
        check_selection("selection", selection, *risk.inputs["tokens"].shape[:2])
    return replace(risk, predict=Partial(_rescaled_outputs, selection), loss=Partial(_rescaled_loss))


Rescaled = tuple[Array, Array, Array]


def _rescaled_outputs(selection: Array | None, params: Params, inputs: Data) -> Rescaled:
    """gamma_r, exp(-c) (f - gamma_r) and c."""
    if "readout" in params:
        raise ValueError("params hold a trained readout; rescaled expects it fixed, as an argument of attention_risk.")
    logits, values = attention_logits(params, inputs), _token_outputs(params, inputs)
    reference = jnp.argmax(logits, axis=-1) if selection is None else selection
    log_weights = _log_weights(logits, reference)
    largest = jax.lax.stop_gradient(jnp.max(log_weights))
    at_reference = _take(values, reference)
    deviation = jnp.sum(jnp.exp(log_weights - largest) * (values - at_reference[:, None]), axis=-1)
    return at_reference, deviation, largest


def _rescaled_loss(outputs: Rescaled, labels: Float[Array, " n"]) -> Scalar:
    """exp(-c) (l(a + delta) - l(a)) with l(a) = log(1 + exp(-a)), a = Y gamma_r, delta = exp(c) Y deviation.

    l(a + delta) - l(a) = log(1 + sigmoid(-a) (exp(-delta) - 1)), to full precision by log1p and expm1. Where this is
    the logarithm of a small number, because the reference is very wrong, it is taken as the difference that it is.
    """
    at_reference, deviation, largest = outputs
    margin, scaled = labels * at_reference, labels * deviation
    smallest = 0.5 * float(np.log(jnp.finfo(scaled.dtype).tiny))
    slope = jax.nn.sigmoid(-margin)
    scale = jnp.exp(jnp.maximum(largest, smallest))
    step = slope * jnp.expm1(-scale * scaled)
    near = jnp.log1p(jnp.where(step > -0.5, step, 0.0))
    far = jax.nn.softplus(-margin - scale * scaled) - jax.nn.softplus(-margin)
    exact = jnp.where(step > -0.5, near, far) / scale
    # below exp(smallest) the second order is beneath rounding, and exp(c) would soon be 0
    return jnp.mean(jnp.where(largest < smallest, -slope * scaled, exact))


def decision_risk(
    tokens: Float[Array, "n T d"], queries: Float[Array, "n e"], probabilities: Float[Array, "n T"]
) -> Objective:
    """Mean cross-entropy of softmax(X_i W z_i) to a distribution over the tokens; parameter `query_key` (d, e).

    On one-hot tokens it is next-token prediction by a linear decoder (arXiv 2402.18551); with the label's copies in the
    sequence as target, one layer of attention that predicts the next token (arXiv 2403.08081, up to the constant
    log(number of copies)).
    """
    _check_tokens(tokens)
    n, length, _ = tokens.shape
    if probabilities.shape != (n, length) or queries.shape[:1] != (n,):
        raise ValueError(
            f"queries and probabilities have shapes {queries.shape} and {probabilities.shape}; "
            f"expected {(n,)} + (e,) and {(n, length)}."
        )
    if is_concrete(probabilities):
        values = np.asarray(probabilities)
        if values.min() < 0 or not np.allclose(values.sum(axis=1), 1, atol=1e-4):
            raise ValueError(
                f"probabilities hold values from {values.min():.3g} and sums from {values.sum(axis=1).min():.3g} to "
                f"{values.sum(axis=1).max():.3g}; expected distributions over the tokens. Divide by their sums."
            )
    return objective(attention_logits, cross_entropy, {"tokens": tokens, "queries": queries}, probabilities)


def decoupled(risk: Objective, inside: Bool[Array, "n T"], basis: Float[Array, "r d e"]) -> Objective:
    """A `decision_risk` split where it stays undecided (`inside`, which holds the targets' supports) and where not:

        L = mean_i CE(softmax inside) + log(1 + exp(h_i)),   h = logsumexp(scores outside) - logsumexp(inside).

    Parameters `finite` and `diverging` (d, e) stand for W = P finite + (1 - P) diverging, P the projection on the span
    of the orthonormal `basis` (`equality_basis`), in which scores inside differ. The first term is taken at the finite
    part; the second at W, as a function of the diverging part alone and times exp(-max h), a constant to the gradient,
    so that the two can be trained side by side, the second by normalised steps that never underflow.
    """
    shape = risk.inputs["tokens"].shape[:2]
    if jnp.shape(inside) != shape or not jnp.issubdtype(jnp.result_type(inside), jnp.bool_):
        raise ValueError(
            f"inside has shape {jnp.shape(inside)} and dtype {jnp.result_type(inside)}; expected a boolean for each "
            f"token, of shape {shape}. Compare the probabilities with 0."
        )
    return replace(risk, predict=Partial(_decoupled_outputs, inside, basis), loss=Partial(_decoupled_loss))


def decoupled_matrix(params: Params, basis: Float[Array, "r d e"]) -> Float[Array, "d e"]:
    """W = P finite + (1 - P) diverging."""
    return _project(basis, params["finite"]) + params["diverging"] - _project(basis, params["diverging"])


def _project(basis: Float[Array, "r d e"], matrix: Float[Array, "d e"]) -> Float[Array, "d e"]:
    return jnp.einsum("rde,r->de", basis, jnp.einsum("rde,de->r", basis, matrix))


def _decoupled_outputs(
    inside: Array, basis: Array, params: Params, inputs: Data
) -> tuple[Float[Array, "n T"], Float[Array, " n"]]:
    """Log-probabilities inside (0 elsewhere), and h."""
    logits = _logits(_project(basis, params["finite"]), inputs)
    among = jnp.where(inside, jax.nn.log_softmax(jnp.where(inside, logits, -jnp.inf), axis=-1), 0.0)
    held = {**params, "finite": jax.lax.stop_gradient(params["finite"])}
    whole = _logits(decoupled_matrix(held, basis), inputs)
    outer = jax.nn.logsumexp(whole, axis=-1, where=~inside)
    return among, outer - jax.nn.logsumexp(whole, axis=-1, where=inside)


def _decoupled_loss(outputs: tuple[Array, Array], probabilities: Float[Array, "n T"]) -> Scalar:
    among, excess = outputs
    largest = jax.lax.stop_gradient(jnp.max(excess))
    # log(softplus(h)) is h to rounding for h < -40
    log_terms = jnp.where(excess < -40, excess, jnp.log(jax.nn.softplus(jnp.maximum(excess, -40.0))))
    return jnp.mean(jnp.exp(log_terms - largest)) - jnp.mean(jnp.sum(probabilities * among, axis=-1))
