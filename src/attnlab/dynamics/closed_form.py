"""Probes of the exact curvature of one attention layer along training, alone or in a network: H_o against H_f, block by
block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from attnlab.attention import PARTS, AttentionMoments, attention_hessian
from attnlab.attention.blocks import Pair, Part
from attnlab.attention.in_transformer import assemble, cut_at_attention
from attnlab.dynamics.same_model import same_model
from attnlab.losses import LOSSES
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objective import Objective, known_loss
from attnlab.training.probe import Probe, probe
from attnlab.types import Params


def attention_blocks(config: AttentionConfig) -> Probe:
    """Probe: Frobenius norms of all blocks of H (`full`), H_o (`outer`) and H_f (`functional`), in closed form, by
    `query/key` and so on; and the attention `moments` that they are made of.

    `moments` holds the mean squared length of the tokens' mean under the attention of a query (`first`) and the mean
    trace of their covariance (`second`). For objectives that are a bare `SelfAttention(config)` under one of the losses
    of `attnlab.losses`; raises `ValueError` before training starts for another loss, or a model that does not predict
    what that layer does. Within a network, see `attention_blocks_in`.
    """
    return probe(_Blocks(config))


@dataclass(frozen=True)
class _Blocks:
    config: AttentionConfig

    def __call__(self, risk: Objective, params: Params) -> dict[str, dict[str, Array]]:
        loss = known_loss(risk.loss)
        if loss is None:
            raise ValueError(
                f"the loss is {risk.loss.func}; the closed form knows those of attnlab.losses: {', '.join(LOSSES)}. "
                "Take one of them, or estimate with the probe block_norms."
            )
        exact = attention_hessian(self.config, params, risk.inputs, risk.targets, loss, weights=risk.weights)
        if not same_model(risk.predict, from_linen(SelfAttention(self.config)), params, risk.inputs):
            raise ValueError(
                "the objective's model does not predict what SelfAttention(config) does; attention_blocks expects that "
                f"layer and nothing around it, with {self.config}. Give the config of the model, or take "
                "attention_blocks_in for a layer within a network."
            )
        return _values(exact.norms(), exact.moments)


def attention_blocks_in(
    module: nn.Module, path: str, *, positions: Sequence[int] | None = None, piecewise_linear: bool = False
) -> Probe:
    """Probe: what `attention_blocks` measures, for the last attention layer inside a network, in closed form.

    H_o is then the block of the network's Gauss-Newton matrix, and H_f = H - H_o holds the curvature of what stands
    behind the layer (`attention.in_transformer`).

    Args:
        module: the linen module of the objective, around `SelfAttention`, called on the objective's inputs alone; its
            outputs are (B, L, C).
        path: the attention layer, such as `transformer/layer_1/attention`. It has to be the last one: behind it every
            token goes by itself.
        positions: the tokens that the objective reads by `models.adapters.at_positions`; None is all.
        piecewise_linear: what stands behind the layer is so (ReLU MLP, no norm): its curvature is zero, not computed.

    Before training starts it raises `ValueError` for a path that is no attention layer, positions out of range, or an
    objective that does not predict what `module` does at these positions. For earlier layers `sharpness.block_norms`
    estimates the norms.
    """
    return probe(_BlocksIn(module, path, None if positions is None else tuple(positions), piecewise_linear))


@dataclass(frozen=True)
class _BlocksIn:
    """Hashed by its choices, so that equal ones share one compiled loop."""

    module: nn.Module
    path: str
    positions: tuple[int, ...] | None
    piecewise_linear: bool

    def __call__(self, risk: Objective, params: Params) -> dict[str, dict[str, Array]]:
        read = slice(None) if self.positions is None else jnp.asarray(self.positions)
        cut = cut_at_attention(self.module, params, risk.inputs, self.path)
        whole = from_linen(self.module)
        expected = whole if self.positions is None else at_positions(whole, self.positions)
        if not same_model(risk.predict, expected, params, risk.inputs):
            raise ValueError(
                f"the objective's model does not predict what module does at positions {self.positions or 'all'}; "
                "attention_blocks_in expects the objective's own module, and the positions that it reads. Build the "
                "objective's predict with from_linen(module), and at_positions where it reads some tokens only."
            )
        network = assemble(cut, lambda outputs: risk.score(outputs[:, read]), self.positions, self.piecewise_linear)
        return _values(network.norms(), network.moments)


def _values(norms: Mapping[Part, Mapping[Pair, Array]], moments: AttentionMoments) -> dict[str, dict[str, Array]]:
    """By part and pair of parameters the norm, and the size of the attention moments."""
    values: dict[str, dict[str, Array]] = {
        part: {f"{row}/{column}": norm for (row, column), norm in norms[part].items()} for part in PARTS
    }
    values["moments"] = {
        "first": jnp.mean(jnp.sum(moments.first**2, axis=-1)),
        "second": jnp.mean(jnp.trace(moments.second, axis1=-2, axis2=-1)),
    }
    return values
