"""Tokens that attention moves on the unit sphere, in continuous time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_number, is_concrete
from attnlab.types import PRNGKey, Real, Scalar

OFF_SPHERE = 1e-4
"""Of the length of a token, from 1: as float32 rounds it, and no more."""


def uniform_tokens(key: PRNGKey, count: int, dimension: int) -> Float[Array, "n d"]:
    """`count` tokens drawn uniformly on the unit sphere."""
    tokens = jax.random.normal(key, (count, dimension))
    return tokens / jnp.linalg.norm(tokens, axis=1, keepdims=True)


def equiangular_tokens(count: int, cosine: Real) -> Float[Array, "n n"]:
    """`count` tokens in as many dimensions, each two at this cosine. Raises `ValueError` unless -1 / (n - 1) < cosine
    < 1, which is where they exist."""
    if is_concrete(cosine) and not -1 / (count - 1) < float(cosine) < 1:
        raise ValueError(
            f"cosine is {cosine}; expected {-1 / (count - 1):.3g} < cosine < 1, as {count} tokens can have pairwise."
        )
    return jnp.linalg.cholesky((1 - cosine) * jnp.eye(count) + cosine * jnp.ones((count, count)))


def attention_of(
    tokens: Float[Array, "n d"], beta: Real, *, normalised: bool = True, causal: bool = False
) -> Float[Array, "n n"]:
    """e^{beta <x_i, x_j>}, rows normalised to sum 1 or divided by n; `causal` with j <= i alone (of a row without
    normalisation, divided by i)."""
    scores = beta * tokens @ tokens.T
    seen = jnp.tril(jnp.ones_like(scores)) if causal else jnp.ones_like(scores)
    if normalised:
        return jax.nn.softmax(jnp.where(seen > 0, scores, -jnp.inf), axis=1)
    return seen * jnp.exp(scores) / jnp.sum(seen, axis=1, keepdims=True)


def velocity(
    tokens: Float[Array, "n d"],
    beta: Real,
    value: Float[Array, "d d"] | None = None,
    *,
    normalised: bool = True,
    causal: bool = False,
) -> Float[Array, "n d"]:
    """x_i' = P_{x_i} sum_j A_ij V x_j, P_x y = y - <x, y> x: attention with queries and keys x, and a norm behind it.

    Geshkovski, Letrouit, Polyanskiy, Rigollet, arXiv 2312.10794, (SA), and without normalisation (USA). V is the
    identity where it is left out.
    """
    pulled = attention_of(tokens, beta, normalised=normalised, causal=causal) @ tokens
    pulled = pulled if value is None else pulled @ value.T
    return pulled - jnp.sum(pulled * tokens, axis=1, keepdims=True) * tokens


def token_flow(
    tokens: Float[Array, "n d"],
    times: Float[Array, " t"],
    beta: Real,
    value: Float[Array, "d d"] | None = None,
    *,
    normalised: bool = True,
    causal: bool = False,
    tolerance: float = 1e-8,
) -> Float[Array, "t n d"]:
    """The tokens at ascending `times`, of which the first is that of `tokens`.

    Dormand-Prince with adaptive steps, `tolerance` relative and absolute to each. The flow keeps every token on the
    sphere; what the steps leave it by, less than about the tolerance times the time, is divided out at the end.

    Raises `ValueError` for tokens off the sphere, times that do not ascend, a beta or tolerance that is not positive,
    or a value matrix of another dimension.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from attnlab.particles.flow import token_flow, uniform_tokens
        >>> path = token_flow(uniform_tokens(jax.random.key(0), 8, 3), jnp.array([0.0, 30.0]), 1.0)
        >>> bool(jnp.min(path[-1] @ path[-1].T) > 0.999)  # all have met
        True
    """
    _check_tokens(tokens)
    _check_times(times)
    check_number("beta", beta, np.nextafter(0, 1), np.inf, "It is an inverse temperature.")
    check_number("tolerance", tolerance, np.nextafter(0, 1), 1.0, "It is of every step.")
    if value is not None and jnp.shape(value) != (tokens.shape[1],) * 2:
        raise ValueError(f"value has shape {jnp.shape(value)}; expected {(tokens.shape[1],) * 2}, that of the tokens.")
    numbers = jnp.asarray(times, tokens.dtype), jnp.asarray(beta, tokens.dtype)
    path = _flow(tokens, *numbers, value, normalised, causal, float(tolerance))
    return path / jnp.linalg.norm(path, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames=("normalised", "causal", "tolerance"))
def _flow(
    tokens: Float[Array, "n d"],
    times: Float[Array, " t"],
    beta: Scalar,
    value: Float[Array, "d d"] | None,
    normalised: bool,
    causal: bool,
    tolerance: float,
) -> Float[Array, "t n d"]:
    def slope(tokens: Array, time: Array, beta: Array, value: Array | None) -> Array:
        return velocity(tokens, beta, value, normalised=normalised, causal=causal)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return odeint(slope, tokens, times, beta, value, rtol=tolerance, atol=tolerance)


def _check_tokens(tokens: Float[Array, "n d"]) -> None:
    if jnp.ndim(tokens) != 2 or tokens.shape[0] < 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens has shape {jnp.shape(tokens)}; expected (n, d), each of them 2 or more.")
    check_finite("tokens", tokens)
    if is_concrete(tokens):
        off = float(jnp.max(jnp.abs(jnp.linalg.norm(tokens, axis=1) - 1)))
        if off > OFF_SPHERE:
            raise ValueError(
                f"tokens has a row of length off 1 by {off:.3g}; expected unit vectors. Divide each by its norm."
            )


def _check_times(times: Float[Array, " t"]) -> None:
    if jnp.ndim(times) != 1 or jnp.size(times) < 2:
        raise ValueError(f"times has shape {jnp.shape(times)}; expected a vector: a start, and a horizon.")
    check_finite("times", times)
    if is_concrete(times) and not (np.diff(np.asarray(times)) > 0).all():
        raise ValueError(f"times is {np.asarray(times)}; expected ascending times, the first that of the tokens.")
