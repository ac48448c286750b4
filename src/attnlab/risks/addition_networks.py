"""The networks of the growth experiment on digit addition, untrained, and the norms of their blocks.

Figure 3 of Ormaniec, Dangel, Singh, arXiv 2410.10986, and its appendix: a causal head in a transformer without or with
pre-LN (cross-entropy of the answer's digits), stacks of linear attention without residual, MLP or projection, and
linear MLPs (square loss); all weights N(0, 0.64 / width), biases zero, embeddings N(0, sigma^2).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.attention.blocks import AttentionHessian
from attnlab.attention.hessian import layer_curvature
from attnlab.attention.in_network import TokenwiseNetwork
from attnlab.curvature.estimators import squared_frobenius_norm
from attnlab.curvature.operators import PARTS
from attnlab.data.addition import addition, answer_positions
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.networks import MLP, MLPConfig
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import Objective, objective
from attnlab.statistics import Estimate
from attnlab.types import Params, PRNGKey

VOCABULARY = 12
LETTERS = {"value": "V", "query": "Q", "key": "K", "output": "O"}


@dataclass(frozen=True)
class AdditionNetwork:
    """One network and the size of its task.

    Attributes:
        weights: `softmax` (a transformer) or `linear` (a stack of linear attention).
        norm: `pre` or None.
        depth: attention layers.
        width: of the model and its one head; the MLP of a transformer is four times as wide.
        digits: of the summands.
        sequences: sums in the batch.
        dtype: precision of weights and outputs.
    """

    weights: Literal["softmax", "linear"]
    norm: Literal["pre"] | None
    depth: int
    width: int
    digits: int
    sequences: int
    dtype: str

    @property
    def module(self) -> LanguageModel:
        """The Flax model."""
        softmax = self.weights == "softmax"
        scheme: dict[str, Any] = {"init": "normal", "gain": _gain(self.width)}
        projection = self.width if softmax else None
        attention = AttentionConfig(
            self.width, self.width, weights=self.weights, causal=True, output_dim=projection, **scheme
        )
        blocks = TransformerConfig(
            attention,
            self.depth,
            mlp_width=4 * self.width if softmax else None,
            activation="relu",
            norm=self.norm,
            residual=softmax,
            bias=True,
            **scheme,
        )
        length = 3 * self.digits + 3
        return LanguageModel(
            LanguageModelConfig(blocks, VOCABULARY, length, width=self.width, dtype=self.dtype, **scheme)
        )

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions whose outputs predict the answer."""
        return answer_positions(self.digits)

    @property
    def loss(self) -> Callable:
        """Cross-entropy of transformers, square loss of linear attention."""
        return cross_entropy if self.weights == "softmax" else square_loss

    def draw(self, key: PRNGKey) -> tuple[Params, tuple[Array, Array]]:
        """Weights, with embeddings of scale 1, and (tokens, targets): labels, or one-hot vectors for the square loss.

        The last token of a sequence predicts nothing, and in a causal model no other sees it: it is left out.
        """
        data_key, init_key = jax.random.split(key)
        data = addition(data_key, self.sequences, self.digits)
        tokens, module = data.inputs[:, :-1], self.module
        params = jax.jit(module.init)(init_key, tokens)["params"]
        labels = data.targets
        return params, (
            tokens,
            labels if self.weights == "softmax" else jax.nn.one_hot(labels, VOCABULARY, dtype=self.dtype),
        )


def _gain(width: int) -> float:
    return 0.8 / width**0.5


def with_embedding_scale(params: Params, sigma: float) -> Params:
    """The parameters with embeddings N(0, sigma^2) in place of N(0, 1), in the same precision."""
    # float: a NumPy scalar of 64 bits would carry the embeddings, and all behind them, to 64 bits
    embeddings = {name: float(sigma) * params[name] for name in ("token_embedding", "position_embedding")}
    return {**params, **embeddings}


def last_layer_norms(
    network: AdditionNetwork, params: Params, data: tuple[Array, Array], names: Collection[str] | None = None
) -> dict[str, dict[str, float]]:
    """Exact Frobenius norm of every block of the last attention layer by part and pair: `["ggn"]["KQ"]` and so on,
    letters in order.

    `names` are the parameters wanted, all if None."""
    return {
        part: {
            f"{LETTERS[row]}{LETTERS[column]}": float(norm) for (row, column), norm in blocks.items() if row <= column
        }
        for part, blocks in _last_layer(network, params, data).norms(names).items()
    }


def precision_error(network: AdditionNetwork, key: PRNGKey, sigma: float) -> float:
    """Largest relative error of `last_layer_norms` against float64, for the same weights; blocks that are zero are left
    out. Needs 64 bits switched on."""
    params, data = network.draw(key)
    norms = []
    for dtype in (network.dtype, "float64"):
        weights = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), with_embedding_scale(params, sigma))
        norms.append(last_layer_norms(replace(network, dtype=dtype), weights, data))
    found, expected = (np.array(jax.tree.leaves(each)) for each in norms)
    return float(np.max(np.abs(found - expected)[expected > 0] / expected[expected > 0]))


@partial(jax.jit, static_argnames="network")
def _last_layer(
    network: AdditionNetwork, params: Params, data: tuple[Array, Array]
) -> AttentionHessian | TokenwiseNetwork:
    last = f"transformer/layer_{network.depth - 1}/attention"
    return layer_curvature(_risk(network, data), params, last, piecewise_linear=network.norm is None)


def _risk(network: AdditionNetwork, data: tuple[Array, Array]) -> Objective:
    predict = at_positions(from_linen(network.module), network.positions)
    return objective(predict, network.loss, *data)


@partial(jax.jit, static_argnames=("network", "samples"))
def first_layer_squares(
    network: AdditionNetwork, params: Params, data: tuple[Array, Array], key: PRNGKey, *, samples: int
) -> dict[str, dict[str, Estimate]]:
    """Squared norms of the first layer's value and query blocks from random samples, with standard errors, by part and
    pair (`["ggn"]["VV"]`).

    Behind the first layer tokens meet again: the closed form would take a product for every number of its output.
    """
    risk = _risk(network, data)
    return {
        part: {
            LETTERS[name] * 2: squared_frobenius_norm(
                operator(risk, params, block=f"layer_0/attention/{name}"), key, samples=samples
            )
            for name in ("value", "query")
        }
        for part, operator in PARTS.items()
    }


def first_layer_norms(
    network: AdditionNetwork, params: Params, data: tuple[Array, Array], key: PRNGKey, *, samples: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Roots of `first_layer_squares`, by part and pair: `first`, and their standard errors, `first error`."""
    norms: dict[str, dict[str, dict[str, float]]] = {"first": {}, "first error": {}}
    for part, squares in first_layer_squares(network, params, data, key, samples=samples).items():
        roots = {pair: float(square.value) ** 0.5 for pair, square in squares.items()}
        # d sqrt(s) = ds / (2 sqrt(s))
        errors = {
            pair: float(squares[pair].standard_error) / (2 * root) if root > 0 else 0.0 for pair, root in roots.items()
        }
        norms["first"][part], norms["first error"][part] = roots, errors
    return norms


def linear_mlp_norms(network: AdditionNetwork, depth: int, key: PRNGKey) -> dict[str, Float[Array, ""]]:
    """Norms of the first and last layer's blocks, at sigma = 1, of a linear MLP on the embedded tokens of `network`.

    The network draws the embeddings; the MLP sees those at the answer's positions. With X_l the inputs of layer l and
    B_l the product of the matrices behind it the outputs are X_l W_l B_l, so that the square loss of n entries has the
    block (2 / n) X_l^T X_l (x) B_l B_l^T; it is linear in W_l, and H_f is zero. Both norms grow like sigma^2.
    """
    params, (tokens, targets) = network.draw(key)
    embedded = params["token_embedding"][tokens] + params["position_embedding"][None, : tokens.shape[1]]
    inputs = embedded[:, jnp.asarray(network.positions)].reshape(-1, network.width)
    widths = (*(network.width,) * (depth - 1), VOCABULARY)
    mlp = MLP(MLPConfig(widths, activation="identity", init="normal", gain=_gain(network.width)))
    matrices = list(mlp.init(key, inputs)["params"].values())
    identity = jnp.eye(VOCABULARY, dtype=inputs.dtype)
    behind, before = identity, inputs
    for matrix in matrices[:0:-1]:
        behind = matrix @ behind
    for matrix in matrices[:-1]:
        before = before @ matrix
    sides = {"first": (inputs, behind), "last": (before, identity)}
    return {
        place: 2 / targets.size * jnp.linalg.norm(left.T @ left) * jnp.linalg.norm(right @ right.T)
        for place, (left, right) in sides.items()
    }
