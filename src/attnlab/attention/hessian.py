"""The closed form of an objective's curvature in one attention layer: the one way in."""

import jax
import jax.numpy as jnp

from attnlab.attention.blocks import AttentionHessian, blocks_of
from attnlab.attention.cut import Cut, bare_layer, cut_at_attention
from attnlab.attention.downstream import check_second_order, second_order, second_order_derivatives
from attnlab.attention.in_network import TokenwiseNetwork, coupled_hessian, tokenwise
from attnlab.attention.layer import AttentionLayer
from attnlab.attention.moments import moments_of
from attnlab.losses import Loss
from attnlab.objectives import Objective, known_loss
from attnlab.types import Params, PyTree


def attention_hessian(
    risk: Objective,
    params: Params,
    layer: str | None = None,
    *,
    coupled: bool | None = None,
    piecewise_linear: bool = False,
) -> AttentionHessian:
    """The Hessian of an objective in the weights of one of its attention layers, in closed form.

    Args:
        risk: the objective, whose model is, or calls, a `SelfAttention` of `attnlab.models` without biases, with its
            parameters not stacked (`unstack_layers`):
            `objective(from_linen(module), loss, tokens, targets)`. A model that is that layer alone, under a loss of
            `attnlab.losses`, may have any leading axes of sequences and is never run; any other has tokens of shape
            (B, L, D) at the layer.
        params: its parameters.
        layer: path of the layer in the module, such as `transformer/layer_0/attention`; None is the only one.
        coupled: whether tokens meet behind the layer, which costs 2 L O products with what stands there (O the layer's
            output features) where otherwise C and O do (C outputs of the network). None: where attention layers stand
            behind, or the prediction is not one row for each token.
        piecewise_linear: the rest of the network is so (ReLU MLP, no norm): its curvature is zero, not computed.

    Returns the `AttentionHessian` whose parts are the diagonal blocks, for this layer's weights, of `hessian`, `ggn`
    and `functional` of `attnlab.curvature`. Where the model is read at some positions (`at_positions`), sums run over
    these.

    Raises `ValueError` for a model that calls no such layer or several and `layer` names none, for shapes that do not
    fit, values that are not finite, masks with an empty row, labels that are no class, weights of which none counts,
    and options without a closed form (biases); outside of `jit`, where values can be looked at, also where tokens meet
    without `coupled`, for a loss that is not convex in the outputs without `coupled`, where sequences meet, and for
    `piecewise_linear` where there is curvature. Raises `TypeError` for an objective over batches.

    For a layer behind which only derivatives are at hand, see `attnlab.attention.second_order`.

    Source: Ormaniec, Dangel, Singh, arXiv 2410.10986, theorems 3.1 and 3.2, in moment form and extended to several
    heads, an output projection, masks, batches, other kinds of attention and any network around.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> layer = al.SelfAttention(al.AttentionConfig(key_dim=2, value_dim=3))
        >>> tokens = jax.random.normal(jax.random.key(0), (1, 4, 3))
        >>> params = layer.init(jax.random.key(1), tokens)["params"]
        >>> risk = al.objective(al.from_linen(layer), al.square_loss, tokens, 0 * tokens)
        >>> exact = al.attention_hessian(risk, params)
        >>> exact.operator("ggn").dense().shape
        (21, 21)
    """
    found = layer_curvature(risk, params, layer, coupled=coupled, piecewise_linear=piecewise_linear)
    return found.hessian() if isinstance(found, TokenwiseNetwork) else found


def layer_curvature(
    risk: Objective,
    params: Params,
    layer: str | None = None,
    *,
    coupled: bool | None = None,
    piecewise_linear: bool = False,
) -> AttentionHessian | TokenwiseNetwork:
    """What `attention_hessian` returns, or, for a layer in a network behind which tokens go by themselves, what it is
    made of: its norms take fewer operations. Arguments and errors as there."""
    _check_objective(risk)
    by_itself = None if layer or coupled else _of_bare_layer(risk, params)
    if by_itself is not None:
        return by_itself
    cut = cut_at_attention(risk, params, layer)
    if cut.outputs.ndim != 3:
        raise ValueError(
            f"the tokens at the attention layer have shape {cut.outputs.shape[:-1]}; expected (sequences, tokens). "
            "Give the inputs one axis of sequences, of length 1 for a single one."
        )
    if _meet(cut) if coupled is None else coupled:
        return coupled_hessian(cut, risk)
    return tokenwise(cut, risk, piecewise_linear)


def _meet(cut: Cut) -> bool:
    batch, length, _ = cut.outputs.shape
    rows = length if cut.positions is None else len(cut.positions)
    shape = getattr(cut.predicted, "shape", ())
    return bool(cut.behind) or len(shape) != 3 or shape[:2] != (batch, rows)


def _check_objective(risk: Objective) -> None:
    if not isinstance(risk, Objective):
        raise TypeError(
            f"risk is a {type(risk).__name__}; expected an objective with its data in one piece, as "
            "objective(from_linen(SelfAttention(config)), loss, tokens, targets)."
        )


def _of_bare_layer(risk: Objective, params: Params) -> AttentionHessian | None:
    """The closed form of a layer that is the whole model, under a loss whose derivatives are known; None for others."""
    loss = known_loss(risk.loss)
    if loss is None and risk.loss.func is not second_order:
        return None
    point = bare_layer(risk, params)
    if point is None:
        return None
    layer, leading = point
    outputs = jax.ShapeDtypeStruct((*leading, layer.output_features), layer.inputs.dtype)
    # Before the program that cannot look at values: shapes, labels, weights.
    if loss is None:
        check_second_order(outputs, risk.targets)
    else:
        loss.check_answers(outputs, *risk.answers)
    return _from_loss(layer, risk.answers, loss, leading)


@jax.jit(static_argnames=("loss", "leading"))
def _from_loss(
    layer: AttentionLayer, answers: tuple[PyTree, ...], loss: Loss | None, leading: tuple[int, ...]
) -> AttentionHessian:
    moments = moments_of(layer)
    outputs = jnp.einsum("bhia,hav,hvo->bio", moments.first, layer.value, layer.output)
    derivatives = second_order_derivatives if loss is None else loss.derivatives
    gradient, curvature = derivatives(outputs.reshape(*leading, -1), *answers)
    if curvature.ndim:
        curvature = curvature.reshape(*outputs.shape[:2], *curvature.shape[len(leading) :])
    return blocks_of(layer, moments, gradient.reshape(outputs.shape), curvature)
