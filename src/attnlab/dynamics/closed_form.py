"""Probe of the exact curvature of one attention layer along training, alone or in a network: H_o against H_f, block by
block."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from attnlab.attention import PARTS, AttentionMoments
from attnlab.attention.blocks import Pair, Part
from attnlab.attention.hessian import layer_curvature
from attnlab.objectives import Objective
from attnlab.training.probe import Probe, probe
from attnlab.types import Params


def attention_blocks(layer: str | None = None, *, piecewise_linear: bool = False) -> Probe:
    """Probe: Frobenius norms of all blocks of H (`hessian`), H_o (`ggn`) and H_f (`functional`) of one attention layer
    of the objective's model, in closed form, by `query/key` and so on; and the attention `moments` they are made of.

    `moments` holds the mean squared length of the tokens' mean under the attention of a query (`first`) and the mean
    trace of their covariance (`second`). `layer` and `piecewise_linear` are those of
    `attnlab.attention.attention_hessian`, which also says what is raised, before training starts. For a layer behind
    which others stand `sharpness.block_norms` estimates the norms at less cost.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> layer = al.SelfAttention(al.AttentionConfig(key_dim=2, value_dim=3, merged=True))
        >>> tokens = jax.random.normal(jax.random.key(0), (1, 4, 3))
        >>> params = layer.init(jax.random.key(1), tokens)["params"]
        >>> import optax
        >>> risk = al.objective(al.from_linen(layer), al.square_loss, tokens, 0 * tokens)
        >>> probes = {"blocks": al.attention_blocks()}
        >>> run = al.train(risk, params, optax.sgd(0.1), jax.random.key(0), steps=1, every=1, probes=probes)
        >>> sorted(run.records.values["blocks"])
        ['functional', 'ggn', 'hessian', 'moments']
    """
    return probe(_Blocks(layer, piecewise_linear))


@dataclass(frozen=True)
class _Blocks:
    """Hashed by its choices, so that equal ones share one compiled loop."""

    layer: str | None
    piecewise_linear: bool

    def __call__(self, risk: Objective, params: Params) -> dict[str, dict[str, Array]]:
        found = layer_curvature(risk, params, self.layer, piecewise_linear=self.piecewise_linear)
        return _values(found.norms(), found.moments)


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
