"""What is watched on the way to a maximal margin: pure functions of parameters, to be wrapped in `training.probe`."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_names
from attnlab.margin.checking import check_selection
from attnlab.margin.training import attention_logits, attention_matrix, selected_probability
from attnlab.objectives import Objective
from attnlab.training import Probe, probe
from attnlab.types import Params, Scalar


def correlation(first: Float[Array, "*shape"], second: Float[Array, "*shape"]) -> Scalar:
    """<A, B> / (||A|| ||B||), the cosine between two directions; 0 if one of them is zero."""
    if jnp.size(first) != jnp.size(second):
        raise ValueError(
            f"second has shape {jnp.shape(second)}; expected {jnp.shape(first)}, as first. Compare W with the solution "
            "of a matrix problem, p with that of a vector problem."
        )
    first, second = (jnp.ravel(part) / jnp.where(size > 0, size, 1) for part, size in _with_largest(first, second))
    norms = jnp.linalg.norm(first) * jnp.linalg.norm(second)
    return jnp.vdot(first, second) / jnp.where(norms > 0, norms, 1)


def _with_largest(*arrays: Array) -> list[tuple[Array, Array]]:
    """Arrays with their largest entry: divided by it, no square of theirs underflows."""
    return [(array, jnp.max(jnp.abs(array))) for array in map(jnp.asarray, arrays)]


def _norm(matrix: Array) -> Scalar:
    ((_, largest),) = _with_largest(matrix)
    return largest * jnp.linalg.norm(matrix / jnp.where(largest > 0, largest, 1))


def imbalance(params: Params) -> Float[Array, "k k"]:
    """K^T K - Q^T Q, which gradient flow of any loss of K Q^T conserves (arXiv 2403.08699); descent, to first order.

    Raises `ValueError` for parameters without `key` and `query`.
    """
    check_names("parameter", ("key", "query"), params)
    return params["key"].T @ params["key"] - params["query"].T @ params["query"]


def margin_probe(directions: dict[str, Float[Array, "..."]], selection: Float[Array, " n"] | None = None) -> Probe:
    """Probe: `norm` of W (or p), `correlation` of W with each of the named `directions`, `smallest_margin`, the least
    <a_k, W> / ||W|| over the tokens that are not selected, and `probability`, the mean attention to the selected ones.

    The last two with a `selection` only, one index a sequence.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from attnlab.margin import attention_risk, margin_probe, normalized_descent
    >>> from attnlab.training import train
    >>> tokens = jnp.array([[[2.0, 0.0], [0.0, 0.0]]])
    >>> risk = attention_risk(tokens, jnp.ones(1), readout=jnp.array([1.0, 0.0]))
    >>> probes = {"margin": margin_probe({"svm": jnp.array([1.0, 0.0])})}
    >>> start, key = {"prompt": jnp.ones(2)}, jax.random.key(0)
    >>> trained = train(risk, start, normalized_descent(1.0), key, steps=4, every=4, probes=probes)
    >>> np.asarray(trained.records.values["margin"]["correlation/svm"]).round(3).tolist()
    [0.707, 0.981]
    """
    if not isinstance(directions, Mapping):
        raise TypeError(
            f"directions is a {type(directions).__name__}; expected a dict of names and directions, as "
            '{"svm": max_margin(problem).direction}.'
        )
    check_finite("directions", directions)
    named = {name: jnp.asarray(direction) for name, direction in directions.items()}

    def measure(risk: Objective, params: Params) -> dict[str, Array]:
        matrix = attention_matrix(params)
        norm = _norm(matrix)
        values: dict[str, Array] = {"norm": norm}
        values |= {f"correlation/{name}": correlation(matrix, direction) for name, direction in named.items()}
        if selection is not None:
            check_selection("selection", selection, *risk.inputs["tokens"].shape[:2])
            index = jnp.asarray(selection)[:, None]
            logits = attention_logits({"query_key": matrix / jnp.where(norm > 0, norm, 1)}, risk.inputs)
            least = jnp.take_along_axis(logits, index, axis=-1) - logits
            others = jnp.arange(logits.shape[-1])[None, :] != index
            values["smallest_margin"] = jnp.min(least, where=others, initial=jnp.inf)
            values["probability"] = jnp.mean(selected_probability(params, risk.inputs, jnp.asarray(selection)))
        return values

    return probe(measure)
