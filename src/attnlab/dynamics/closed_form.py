"""A probe of the exact curvature of one attention layer along training: H_o against H_f, block by block."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from attnlab.attention import PARTS, attention_hessian
from attnlab.losses import LOSSES
from attnlab.models.attention import AttentionConfig
from attnlab.objective import Objective
from attnlab.training.probe import Probe, probe
from attnlab.types import Params


def attention_blocks(config: AttentionConfig) -> Probe:
    """Probe: Frobenius norms of all blocks of H (`full`), H_o (`outer`) and H_f (`functional`), in closed form, by
    `query/key` and so on; and the attention `moments` that they are made of.

    `moments` holds the mean squared length of the tokens' mean under the attention of a query (`first`) and the mean
    trace of their covariance (`second`). For objectives that are a bare `SelfAttention(config)` under one of the losses
    of `attnlab.losses`; raises `ValueError` for another loss. Within a network, `block_norms` estimates the same.
    """
    return probe(_Blocks(config))


@dataclass(frozen=True)
class _Blocks:
    config: AttentionConfig

    def __call__(self, risk: Objective, params: Params) -> dict[str, dict[str, Array]]:
        names = {loss: name for name, loss in LOSSES.items()}
        function = risk.loss.func
        if function not in names:
            raise ValueError(
                f"the loss is {function}; the closed form knows those of attnlab.losses: {', '.join(LOSSES)}. "
                "Take one of them, or estimate with the probe block_norms."
            )
        exact = attention_hessian(self.config, params, risk.inputs, risk.targets, loss=names[function])
        norms = exact.norms()
        values: dict[str, dict[str, Array]] = {
            part: {f"{a}/{b}": norm for (a, b), norm in norms[part].items()} for part in PARTS
        }
        moments = exact.moments
        values["moments"] = {
            "first": jnp.mean(jnp.sum(moments.first**2, axis=-1)),
            "second": jnp.mean(jnp.trace(moments.second, axis1=-2, axis2=-1)),
        }
        return values
