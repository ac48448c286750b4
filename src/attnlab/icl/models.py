"""Self-attention on prompts as pure functions: one layer, a stack, a looped layer, and a state-space layer to compare.

A prompt becomes N + 1 tokens (x_i, y_i), the last one (x_q, 0). All tokens attend to the first N only, so the query is
never among the keys, and scores carry the factor 1/N (linear attention) or go through a softmax. Layers write to a
residual stream and the prediction is minus the label slot of the query: that is what makes a layer that subtracts
its fit from the labels (gradient descent, arXiv 2212.07677, proposition 1) predict with the right sign.

`transformer_predict` reads a prompt with a whole transformer: LayerNorms, MLPs, a read-in and a read-out.

A *layer* is a dict of `query`, `key` D x (H K), `value` D x (H V) and `output` (H V) x D, in the layout of
`attnlab.models.heads`; optionally also `hidden` D x W and `hidden_output` W x D, a ReLU network after the attention.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.icl.tasks import Prompt, check_prompt
from attnlab.models import heads as equations
from attnlab.models.transformer import Transformer, TransformerConfig
from attnlab.models.weightings import weighting
from attnlab.types import Params, PRNGKey, Scalar

Layer = dict[str, Array]


def prompt_tokens(prompt: Prompt) -> Float[Array, "T D"]:
    """The tokens (x_i, y_i) of one prompt and (x_q, 0) of its query."""
    check_prompt(prompt)
    inputs = jnp.concatenate([prompt.inputs, prompt.query[None, :]])
    labels = jnp.append(prompt.labels, jnp.zeros((), prompt.labels.dtype))
    return jnp.concatenate([inputs, labels[:, None]], axis=1)


def attention_layer(
    layer: Layer, tokens: Float[Array, "T D"], *, weights: str = "linear", heads: int = 1
) -> Float[Array, "T D"]:
    """One residual attention layer whose keys are all tokens but the last.

    `weights` is `linear` (scores / N) or `softmax`; H = `heads`.
    """
    context = tokens.shape[0] - 1
    queries, keys, values = (
        equations.split_heads(z @ layer[name], heads)
        for z, name in ((tokens, "query"), (tokens[:-1], "key"), (tokens[:-1], "value"))
    )
    scores = equations.attention_scores(queries, keys, 1 / context if weights == "linear" else 1.0)
    attended = equations.merge_heads(equations.attend(weighting(weights).weights(scores, None), values))
    tokens = tokens + attended @ layer["output"]
    if "hidden" in layer:
        tokens = tokens + jax.nn.relu(tokens @ layer["hidden"]) @ layer["hidden_output"]
    return tokens


def stack_predict(layers: list[Layer], prompt: Prompt, *, weights: str = "linear", heads: int = 1) -> Scalar:
    """Prediction of a stack of layers for one prompt: minus the label slot of the query."""
    tokens = prompt_tokens(prompt)
    for layer in layers:
        tokens = attention_layer(layer, tokens, weights=weights, heads=heads)
    return -tokens[-1, -1]


def looped_predict(layer: Layer, prompt: Prompt, loops: int, *, weights: str = "linear", heads: int = 1) -> Scalar:
    """Prediction of one layer applied `loops` times: all steps share their weights."""
    if loops < 1:
        raise ValueError(f"loops is {loops}; expected at least one pass through the layer.")

    def once(tokens, _):
        return attention_layer(layer, tokens, weights=weights, heads=heads), None

    tokens, _ = jax.lax.scan(once, prompt_tokens(prompt), length=loops)
    return -tokens[-1, -1]


def init_layer(key: PRNGKey, width: int, scale: float, *, heads: int = 1, head_dim: int | None = None) -> Layer:
    """A layer for tokens of the given width with N(0, scale^2) entries; heads of width `head_dim` (the tokens' own)."""
    head_dim = width if head_dim is None else head_dim
    shapes = dict.fromkeys(("query", "key", "value"), (width, heads * head_dim))
    shapes["output"] = (heads * head_dim, width)
    keys = jax.random.split(key, len(shapes))
    return {name: scale * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def init_effective(key: PRNGKey, dimension: int, scale: float, *, heads: int = 1) -> Layer:
    """N(0, scale^2) effective weights, `value` (H, d+1) and `query_key` (H, d+1, d), for `layer_predict`."""
    shapes = {"value": (heads, dimension + 1), "query_key": (heads, dimension + 1, dimension)}
    keys = jax.random.split(key)
    return {name: scale * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def init_transformer(key: PRNGKey, config: TransformerConfig, dimension: int, width: int) -> Params:
    """Parameters of `transformer_predict` for inputs of the given dimension and tokens of the given width.

    `read_in` (d + 1, width), the `transformer`'s own, and `read_out` (width,), a tenth of its usual size so that
    predictions start near 0.
    """
    key_in, key_stack, key_out = jax.random.split(key, 3)
    return {
        "read_in": jax.random.normal(key_in, (dimension + 1, width)) / (dimension + 1) ** 0.5,
        "transformer": Transformer(config).init(key_stack, jnp.zeros((2, width)))["params"],
        "read_out": 0.1 * jax.random.normal(key_out, (width,)) / width**0.5,
    }


def transformer_predict(params: Params, prompt: Prompt, *, config: TransformerConfig) -> Scalar:
    """Prediction of a transformer for one prompt, read out at the query; no token attends to the query.

    There are no positions: permuting the examples changes nothing.
    """
    tokens = prompt_tokens(prompt)
    count = len(tokens)
    mask = jnp.broadcast_to(jnp.arange(count) < count - 1, (count, count))
    hidden = Transformer(config).apply({"params": params["transformer"]}, tokens @ params["read_in"], mask)
    return hidden[-1] @ params["read_out"]


def layer_predict(effective: dict[str, Array], prompt: Prompt) -> Scalar:
    """Prediction sum_h a_h^T G B_h x_q of one linear layer in its effective weights, G = (1/N) sum z_i z_i^T.

    `effective` holds `value` a (H, d+1) and `query_key` B (H, d+1, d), all that one layer's prediction depends on
    (arXiv 2306.09927; see `effective_weights`).
    """
    check_prompt(prompt)
    tokens = jnp.concatenate([prompt.inputs, prompt.labels[:, None]], axis=1)
    keys = jnp.einsum("nz,hzd,d->hn", tokens, effective["query_key"], prompt.query)
    return jnp.sum(keys * (effective["value"] @ tokens.T)) / tokens.shape[0]


def effective_weights(layer: Layer, heads: int = 1) -> dict[str, Array]:
    """The `value` a_h (H, d+1) and `query_key` B_h (H, d+1, d) of a linear layer for tokens (x, y).

    The query token is (x_q, 0), so only the first d rows of W_Q count, and only the label slot is read, so only the
    last column of W_O does; its sign turns since the prediction is minus that slot. The label slot must not feed back
    (no `hidden` network).
    """
    query, key, value = (jnp.stack(jnp.split(layer[name], heads, axis=1)) for name in ("query", "key", "value"))
    output = jnp.stack(jnp.split(layer["output"][:, -1], heads))
    return {
        "value": -jnp.einsum("hzv,hv->hz", value, output),
        "query_key": jnp.einsum("hzk,hdk->hzd", key, query[:, :-1]),
    }


def reduced_predict(preconditioner: Float[Array, "d d"], prompt: Prompt) -> Scalar:
    """One preconditioned step of gradient descent from zero: x_q^T Gamma^T (1/N) sum_i y_i x_i.

    The layer with value (0, 1) and query_key [Gamma; 0], to which the best one-layer model reduces.
    """
    check_prompt(prompt)
    return prompt.query @ preconditioner.T @ (prompt.labels @ prompt.inputs) / prompt.labels.shape[0]


def state_space_predict(params: dict[str, Array], prompt: Prompt) -> Scalar:
    """One H3 layer: a convolution `filter` f (N,) weighs the examples, x_q^T W^T sum_i f_i y_i x_i, W `preconditioner`.

    f_i multiplies example i; N f_i = 1 is linear attention (arXiv 2407.10005).
    """
    check_prompt(prompt)
    weighted = (params["filter"] * prompt.labels) @ prompt.inputs
    return prompt.query @ params["preconditioner"].T @ weighted
