"""Claims about attention at its limits, and about what is made of it: large prompts, infinite width, prompting, laws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, equal
from attnlab.memory.scaling import fit_power_law
from attnlab.models.heads import attend, softmax_weights
from attnlab.statistics import estimate
from attnlab.types import PRNGKey

LENGTHS = (64, 128, 256, 512, 1024)


@partial(jax.jit, static_argnames=("length", "count", "law"))
def _prompt_errors(
    key: PRNGKey, root: Float[Array, "d d"], query: Float[Array, " d"], length: int, count: int, law: str = "normal"
) -> tuple[Float[Array, "count d"], Float[Array, "count d"]]:
    """Softmax attention over `count` prompts less the limit of Gaussian tokens, and the same less its linear part.

    With m the limit, A = mean(x e^{x.z}), B = mean(e^{x.z}) and b = E[B], the linear part (A - m B) / b has mean zero
    for Gaussian tokens and holds all fluctuations of order n^{-1/2}: what is left shows the bias, of order 1 / n.
    """
    limit, mean = root.T @ root @ query, jnp.exp(jnp.sum((root @ query) ** 2) / 2)
    draw = jax.random.normal if law == "normal" else lambda k, shape: jax.random.rademacher(k, shape, root.dtype)

    def one(key):
        tokens = draw(key, (length, len(query))) @ root
        scores = tokens @ query
        error = attend(softmax_weights(scores[None]), tokens)[0] - limit
        return error, error - jnp.mean((tokens - limit) * jnp.exp(scores)[:, None], axis=0) / mean

    return jax.lax.map(one, jax.random.split(key, count), batch_size=500)


@claim(
    statement=r"f_n = \textstyle\sum_j \mathrm{softmax}(\langle x_j, z \rangle)\, x_j \to \Sigma z \text{ for } x_j \sim N(0, \Sigma): "
    r"n\, \mathrm{Cov} f_n \to e^s (\Sigma + \Sigma z z^\top \Sigma), \ n (E f_n - \Sigma z) \to -e^s \Sigma z, \ s = z^\top \Sigma z",
    source="arXiv 2512.11784 (that softmax attention on large prompts tends to linear attention); both constants: derived "
    "here, the delta method on A / B with moments of N(2 Sigma z, Sigma)",
    tolerance=4.5,
    because="in standard errors over 4,000 prompts, beside a remainder of order 1 / n that is a smaller part",
    slow=True,
)
def softmax_attention_on_large_gaussian_prompts_is_linear(key: PRNGKey) -> list[Expectation]:
    """Prompts of 64 to 1,024 tokens in three dimensions with a random covariance, s = 0.3: exponents by regression over
    the length, constants at the greatest; Rademacher tokens, whose limit is tanh(z) and not z."""
    root_key, query_key, key = jax.random.split(key, 3)
    root = jnp.eye(3) + 0.3 * jax.random.normal(root_key, (3, 3))
    query = jax.random.normal(query_key, (3,))
    query = query * jnp.sqrt(0.3) / jnp.linalg.norm(root @ query)
    keys, count = jax.random.split(key, len(LENGTHS) + 1), 4000
    found = [_prompt_errors(k, root, query, n, count) for k, n in zip(keys, LENGTHS, strict=False)]
    limit, growth, n = root.T @ root @ query, np.exp(0.3), LENGTHS[-1]
    direction = limit / jnp.linalg.norm(limit)
    squares = [estimate(jnp.sum(errors**2, axis=1)) for errors, _ in found]
    biases = [estimate(-rest @ direction) for _, rest in found]
    spread, bias = (fit_power_law(LENGTHS, *np.array(list(map(np.asarray, e))).T) for e in (squares, biases))
    covariance = growth * (root.T @ root + jnp.outer(limit, limit))
    outer = estimate(n * jnp.einsum("ci,cj->cij", found[-1][0], found[-1][0]))
    rest = estimate(n * found[-1][1])
    return [
        equal("exponent of the fluctuations", spread.exponent / 2, -0.5, standard_error=spread.error / 2),
        equal("exponent of the bias", bias.exponent, -1.0, standard_error=bias.error),
        equal("covariance times n", outer.value, covariance, standard_error=outer.error),
        equal("bias times n", rest.value, -growth * limit, standard_error=rest.error),
        *_rademacher_limit(keys[-1], query / jnp.linalg.norm(query), n, count),
    ]


def _rademacher_limit(key: PRNGKey, query: Float[Array, " d"], length: int, count: int) -> list[Expectation]:
    """E[x e^{x z}] / E[e^{x z}] = tanh(z) for signs; the bias, of order 1 / n, is within the bars of single prompts."""
    errors, _ = _prompt_errors(key, jnp.eye(len(query)), query, length, count, "rademacher")
    tokens = estimate(errors + query)
    off = jnp.max(jnp.abs(tokens.value - query) / tokens.error)
    return [
        equal(
            "limit of signs", tokens.value, jnp.tanh(query), 0.01, because="the bias, at most e / n, three times over"
        ),
        at_least("the Gaussian limit for signs, off by standard errors", off, 20.0, 0.0, because="the control"),
    ]
