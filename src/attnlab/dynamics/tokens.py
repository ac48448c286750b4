"""Probes of attention maps and token representations: entropy and its spectral bound, rank, cosine."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from attnlab.models import heads as equations
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.transformer import TransformerBlock
from attnlab.objectives import Objective
from attnlab.training.probe import Probe, probe
from attnlab.types import Params, Predict, PyTree


class LayerCall(NamedTuple):
    """One attention layer at work: its config, weights, the tokens (..., L, D) that it was given, and its matrix A."""

    config: AttentionConfig
    params: dict[str, Array]
    inputs: Float[Array, "*B L D"]
    attention: Float[Array, "*B H L L"]


def attention_calls(predict: Predict, params: Params, inputs: PyTree) -> dict[str, LayerCall]:
    """Every attention layer that `predict(params, inputs)` calls, by its path (`layer_0/attention`; a bare layer's is
    empty). `predict` may be written in any way around linen modules."""
    calls: dict[str, LayerCall] = {}

    def look(module: nn.Module, method: str, arguments: tuple, output: PyTree) -> None:
        if isinstance(module, SelfAttention) and method == "_attention_weights":
            weights = dict(module.variables["params"])
            calls["/".join(module.path)] = LayerCall(module.config, weights, arguments[0], output)

    _run_looking(partial(predict, params, inputs), look)
    return calls


def representations(predict: Predict, params: Params, inputs: PyTree) -> dict[str, Float[Array, "*B L D"]]:
    """The tokens after every transformer block that `predict` calls, or where there is none after every attention
    layer, by path."""
    found: dict[type, dict[str, Array]] = {TransformerBlock: {}, SelfAttention: {}}

    def look(module: nn.Module, method: str, arguments: tuple, output: PyTree) -> None:
        if type(module) in found and method == "__call__":
            found[type(module)]["/".join(module.path)] = output

    _run_looking(partial(predict, params, inputs), look)
    return found[TransformerBlock] or found[SelfAttention]


def _run_looking(run: Callable[[], PyTree], look: Callable) -> None:
    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        output = next_function(*args, **kwargs)
        look(context.module, context.method_name, args, output)
        return output

    with nn.intercept_methods(interceptor):
        run()


def entropy(weights: Float[Array, "*B L"]) -> Float[Array, "*B"]:
    """-sum_j A_j log A_j of distributions in the last axis, in nats; 0 log 0 is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.dynamics.tokens import entropy
        >>> round(float(entropy(jnp.full(4, 0.25))), 4)  # log 4
        1.3863
    """
    return -jnp.sum(xlogy(weights, weights), axis=-1)


def least_entropy(norm: Float[Array, "*B"], tokens: Float[Array, "*B"] | float) -> Float[Array, "*B"]:
    """The least entropy of a softmax over `tokens` scores whose vector has Euclidean norm at most `norm`.

    Zhai et al., arXiv 2303.06296, theorem 3.1: with b = exp(-norm sqrt(T / (T - 1))),

        log(1 + (T - 1) b) + norm sqrt(T (T - 1)) b / (1 + (T - 1) b),

    attained by one score norm sqrt((T - 1) / T), the others all -norm / sqrt(T (T - 1)). Zero for one token.
    """
    tokens = jnp.asarray(tokens, norm.dtype)
    others = jnp.maximum(tokens - 1, 1)  # one token sees only itself: its value is replaced below
    small = jnp.exp(-norm * jnp.sqrt(tokens / others))
    total = 1 + others * small
    bound = jnp.log(total) + norm * jnp.sqrt(tokens * others) * small / total
    return jnp.where(tokens > 1, bound, 0)


def entropy_bound(call: LayerCall) -> Float[Array, "*B H L"]:
    """A lower bound of the attention entropy of each query from the spectral norms of weights and tokens.

    The scores of token i are scale X W_K W_Q^T x_i, of norm at most scale ||W_K W_Q^T||_2 ||X||_2^2, for every subset
    of visible tokens too. Raises `ValueError` for linear attention, which has no distribution, or biases.
    """
    config, params = call.config, call.params
    if config.weights != "softmax" or config.bias:
        raise ValueError(
            f"the layer has weights='{config.weights}' and bias={config.bias}; the entropy bound holds for softmax "
            "attention without biases. Leave this probe out for it."
        )
    if config.merged:
        products = equations.split_heads(params["query_key"], config.heads)
    else:
        query, key = (equations.split_heads(params[name], config.heads) for name in ("query", "key"))
        products = jnp.einsum("hak,hbk->hab", query, key)
    weight_norms = jnp.linalg.norm(products, ord=2, axis=(-2, -1))
    token_norms = jnp.linalg.norm(call.inputs, ord=2, axis=(-2, -1))
    norms = config.score_scale * jnp.einsum("...,h->...h", token_norms**2, weight_norms)
    length = call.inputs.shape[-2]
    visible = jnp.arange(1, length + 1) if config.causal else jnp.full(length, length)
    shape = (*norms.shape, length)
    return least_entropy(
        jnp.broadcast_to(norms[..., None], shape), jnp.broadcast_to(visible.astype(norms.dtype), shape)
    )


def attention_entropy() -> Probe:
    """Probe: by attention layer of the objective's model, the mean `entropy` of its rows in each head (H,), the mean
    lower `bound` from the spectral norms (H,), and the least `slack` of entropy over bound of any row, negative by
    rounding at most.

    Raises as `entropy_bound`, before training starts, and `ValueError` for a model without attention layers.
    """
    return probe(_attention_entropy)


def _attention_entropy(risk: Objective, params: Params) -> dict[str, dict[str, Array]]:
    calls = attention_calls(risk.predict, params, risk.inputs)
    _check_any("attention layers", calls)
    return {name: _entropy_of(call) for name, call in calls.items()}


def _entropy_of(call: LayerCall) -> dict[str, Array]:
    found, bound = entropy(call.attention), entropy_bound(call)
    over = tuple(axis for axis in range(found.ndim) if axis != found.ndim - 2)
    return {"entropy": jnp.mean(found, axis=over), "bound": jnp.mean(bound, axis=over), "slack": jnp.min(found - bound)}


def rank_residual(tokens: Float[Array, "*B L D"]) -> Float[Array, ""]:
    """||X - 1 x_mean^T|| / ||X|| in Frobenius norm, mean over sequences: 0 where all tokens of a sequence agree, the
    rank collapse of Dong, Cordonnier, Loukas (arXiv 2103.03404).

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.dynamics.tokens import rank_residual
        >>> float(rank_residual(jnp.ones((1, 3, 2))))  # all tokens agree
        0.0
    """
    centred = tokens - jnp.mean(tokens, axis=-2, keepdims=True)
    return jnp.mean(jnp.linalg.norm(centred, axis=(-2, -1)) / jnp.linalg.norm(tokens, axis=(-2, -1)))


def effective_rank(tokens: Float[Array, "*B L D"]) -> Float[Array, ""]:
    """exp(entropy of the normalised singular values), mean over sequences (Roy & Vetterli 2007)."""
    singular = jnp.linalg.svd(tokens, compute_uv=False)
    return jnp.mean(jnp.exp(entropy(singular / jnp.sum(singular, axis=-1, keepdims=True))))


def mean_cosine(tokens: Float[Array, "*B L D"]) -> Float[Array, ""]:
    """Mean cosine between two different tokens of a sequence; raises `ValueError` where there is one token only."""
    length = tokens.shape[-2]
    if length < 2:
        raise ValueError(
            f"tokens has shape {tokens.shape}; the cosine of two tokens expects sequences of at least two. Give it the "
            "axes (..., tokens, features)."
        )
    unit = tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    total = jnp.sum(jnp.sum(unit, axis=-2) ** 2, axis=-1)  # L on the diagonal, both orders of each pair
    return jnp.mean((total - length) / (length * (length - 1)))


def token_geometry() -> Probe:
    """Probe: by block of the objective's model, `rank_residual`, `effective_rank` and `cosine` of the tokens that leave
    it.

    Raises `ValueError` before training starts for a model without blocks, or sequences of one token.
    """
    return probe(_token_geometry)


def _token_geometry(risk: Objective, params: Params) -> dict[str, dict[str, Array]]:
    found = representations(risk.predict, params, risk.inputs)
    _check_any("transformer blocks", found)
    return {
        name: {
            "rank_residual": rank_residual(tokens),
            "effective_rank": effective_rank(tokens),
            "cosine": mean_cosine(tokens),
        }
        for name, tokens in found.items()
    }


def _check_any(what: str, found: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the objective's model calls none of `what` is looked for."""
    if not found:
        raise ValueError(
            f"the objective's model calls no {what} of attnlab.models; expected at least one. Leave this probe out."
        )
