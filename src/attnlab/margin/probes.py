"""What is watched on the way to a maximal margin: pure functions of parameters, to be wrapped in `training.probe`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.margin.training import attention_logits, attention_matrix, selected_probability
from attnlab.objective import Objective
from attnlab.training import Probe, probe
from attnlab.types import Params, Scalar


def correlation(first: Float[Array, "*shape"], second: Float[Array, "*shape"]) -> Scalar:
    """<A, B> / (||A|| ||B||), the cosine between two directions; 0 if one of them is zero."""
    first, second = jnp.ravel(first), jnp.ravel(second)
    norms = jnp.sqrt(jnp.vdot(first, first) * jnp.vdot(second, second))
    return jnp.vdot(first, second) / jnp.where(norms > 0, norms, 1)


def imbalance(params: Params) -> Float[Array, "k k"]:
    """K^T K - Q^T Q, which gradient flow of any loss of K Q^T conserves (arXiv 2403.08699); descent, to first order."""
    return params["key"].T @ params["key"] - params["query"].T @ params["query"]


def margin_probe(directions: dict[str, Float[Array, "..."]], selection: Float[Array, " n"] | None = None) -> Probe:
    """Probe: `norm` of W (or p), `correlation` of W with each of the named `directions`, `smallest_margin`, the least
    <a_k, W> / ||W|| over the tokens that are not selected, and `probability`, the mean attention to the selected ones.

    The last two with a `selection` only, one index a sequence.
    """
    named = {name: jnp.asarray(direction) for name, direction in directions.items()}

    def measure(risk: Objective, params: Params) -> dict[str, Array]:
        matrix = attention_matrix(params)
        norm = jnp.linalg.norm(matrix)
        values: dict[str, Array] = {"norm": norm}
        values |= {f"correlation/{name}": correlation(matrix, direction) for name, direction in named.items()}
        if selection is not None:
            index = jnp.asarray(selection)[:, None]
            logits = attention_logits(params, risk.inputs)
            least = jnp.take_along_axis(logits, index, axis=-1) - logits
            others = jnp.arange(logits.shape[-1])[None, :] != index
            values["smallest_margin"] = jnp.min(least, where=others, initial=jnp.inf) / jnp.where(norm > 0, norm, 1)
            values["probability"] = jnp.mean(selected_probability(params, risk.inputs, jnp.asarray(selection)))
        return values

    return probe(measure)
