"""The last layer under cross-entropy: its block of the Hessian in norm and by class, without forming it.

Logits z_n = h_n W are linear in W, so that its block of the Hessian is that of the Gauss-Newton matrix,

    H_(ic)(jd) = sum_n s_n h_ni h_nj (p_nc [c = d] - p_nc p_nd),

and its squared norm a sum over pairs of positions: of (h_n . h_m)^2 times the inner product of their curvatures.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.curvature.kronecker.sites import with_sites
from attnlab.objectives import Objective, known_loss, predict_from_block
from attnlab.trees import select
from attnlab.types import Params


@jax.jit
def _met(risk: Objective, leaves: OrderedDict[str, Array]) -> tuple[Float[Array, "N D"], Float[Array, "N C"]]:
    """The inputs of the one layer, and the logits."""
    outputs, sites = with_sites(risk.outputs, leaves)(None)
    if len(sites) != 1 or sites[0].turned or sites[0].shape[-1] != outputs.shape[-1]:
        raise _not_last(next(iter(leaves)))
    return sites[0].inputs.reshape(-1, sites[0].inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])


def _not_last(name: str) -> ValueError:
    return ValueError(f"'{name}' is not the last layer; expected one kernel (D, C) whose products are the logits.")


class Readout(NamedTuple):
    """Of N positions: the `inputs` (N, D) of the last layer, `probabilities` (N, C), `shares` (N,) in the mean."""

    inputs: Float[Array, "N D"]
    probabilities: Float[Array, "N C"]
    shares: Float[Array, " N"]

    def squared_norms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """||H||_F^2 of the last layer's block, and of its diagonal blocks by class."""
        p, q = self.probabilities, self.probabilities**2
        pairs = jnp.outer(self.shares, self.shares) * (self.inputs @ self.inputs.T) ** 2
        cubic = q @ p.T
        whole = p @ p.T - cubic - cubic.T + (p @ p.T) ** 2
        by_class = (p - q) @ (p - q).T
        return jnp.sum(pairs * whole), jnp.sum(pairs * by_class)

    def class_blocks(self) -> Float[Array, "C D D"]:
        """The diagonal blocks by class, sum_n s_n p_nc (1 - p_nc) h_n h_n^T."""
        p = self.probabilities
        return jnp.einsum("n,nc,ni,nj->cij", self.shares, p - p**2, self.inputs, self.inputs)


def readout(risk: Objective, params: Params, name: str) -> Readout:
    """The last layer `name`, a kernel (D, C) whose products are the logits.

    Raises `ValueError` where it is none, or not the last one, and `TypeError` for another loss than the cross-entropy
    of labels.
    """
    loss = known_loss(risk.loss)
    if loss is None or loss.name != "cross_entropy" or not jnp.issubdtype(risk.targets.dtype, jnp.integer):
        raise TypeError(f"the loss is {risk.loss.func}; the last layer is known under the cross-entropy of labels.")
    selection = select(params, name)
    leaves = selection.take(params)
    inputs, logits = _met(replace(risk, predict=predict_from_block(risk.predict, params, selection)), leaves)
    (leaf,) = jax.tree.leaves(leaves)
    if inputs.shape[0] != logits.shape[0] or not jnp.allclose(inputs @ leaf, logits, rtol=1e-3, atol=1e-4):
        raise _not_last(name)
    full = loss.weights(risk.targets, risk.weights, logits.dtype)
    full = jnp.ones(risk.targets.shape, logits.dtype) if full is None else full
    return Readout(inputs, jax.nn.softmax(logits, axis=-1), (full / jnp.sum(full)).ravel())
