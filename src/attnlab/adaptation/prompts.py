"""Prompt-tuning as a change of the inputs: learned tokens before those of the data, the model held fixed."""

from dataclasses import replace

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.objectives import Objective
from attnlab.types import Params, Predict


def prompt_tuned(risk: Objective, params: Params) -> Objective:
    """`risk` as an objective in a prompt (P, D) that is put before the tokens (..., L, D) of every input.

    The outputs at the prompt's own positions are dropped, so the targets stay as they are. `params` is held fixed.
    Raises `ValueError`, when called, for a model without an output for every token.
    """
    return replace(risk, predict=Partial(_predict_prompted, risk.predict, params))


def _predict_prompted(
    predict: Predict, params: Params, prompt: Float[Array, "P D"], inputs: Float[Array, "*B L D"]
) -> Float[Array, "*B L O"]:
    shared = jnp.broadcast_to(prompt, (*inputs.shape[:-2], *prompt.shape))
    prompted = jnp.concatenate([shared, inputs], axis=-2)
    outputs = predict(params, prompted)
    if outputs.shape[:-1] != prompted.shape[:-1]:
        raise ValueError(
            f"the model's outputs have shape {outputs.shape} for tokens of shape {prompted.shape}; expected "
            f"{(*prompted.shape[:-1], 'O')}, one output a token. Take the model without its pooling or read-out of the "
            "sequence, and pool in the loss."
        )
    return outputs[..., prompt.shape[0] :, :]
