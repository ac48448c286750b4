"""Positions: sinusoidal codes, rotary embeddings in one and two dimensions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.types import Real

BASE = 10_000.0


def frequencies(width: int, base: float = BASE) -> Float[Array, " width/2"]:
    """Angular frequencies base^(-2 i / width), i = 0 ... width / 2 - 1. Raises `ValueError` for an odd width."""
    if width < 2 or width % 2:
        raise ValueError(
            f"width is {width}; expected a positive even number: each frequency takes a sine and a cosine."
        )
    return base ** (-jnp.arange(0.0, width, 2) / width)


def sinusoidal(positions: Float[Array, "*L"], width: int, base: float = BASE) -> Float[Array, "*L width"]:
    """Codes with entries sin(w_i t), cos(w_i t) in turn (Vaswani et al., arXiv 1706.03762, section 3.5)."""
    angles = jnp.multiply.outer(positions, frequencies(width, base))
    return _interleave(jnp.sin(angles), jnp.cos(angles))


def sinusoidal_shift(offset: Real, width: int, base: float = BASE) -> Float[Array, "width width"]:
    """The rotation R with sinusoidal(t + offset) = R sinusoidal(t) for every t."""
    angles = jnp.asarray(offset) * frequencies(width, base)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    blocks = jnp.stack([jnp.stack([cosine, sine], -1), jnp.stack([-sine, cosine], -1)], -2)
    return jax.scipy.linalg.block_diag(*blocks)


def rotate(
    vectors: Float[Array, "*B L d"], positions: Float[Array, "*L"], base: float = BASE
) -> Float[Array, "*B L d"]:
    """Rotary embedding (Su et al., arXiv 2104.09864): entries 2 i and 2 i + 1 turned by the angle w_i t.

    `positions` (L,) broadcast over the leading axes. The score of rotated queries and keys depends on positions only
    through their difference.
    """
    angles = jnp.multiply.outer(positions, frequencies(vectors.shape[-1], base))
    cosine, sine = (jnp.broadcast_to(f(angles), vectors[..., ::2].shape) for f in (jnp.cos, jnp.sin))
    even, odd = vectors[..., ::2], vectors[..., 1::2]
    return _interleave(even * cosine - odd * sine, even * sine + odd * cosine)


def rotate_2d(
    vectors: Float[Array, "*B L d"], rows: Float[Array, " L"], columns: Float[Array, " L"], base: float = BASE
) -> Float[Array, "*B L d"]:
    """Rotary embedding of places in a grid: the first half of the entries turned by the row, the second by the column.

    Raises `ValueError` for a d that is not a multiple of 4.
    """
    if vectors.shape[-1] % 4:
        raise ValueError(
            f"vectors have {vectors.shape[-1]} entries; expected a multiple of 4, half for each direction."
        )
    halves = jnp.split(vectors, 2, axis=-1)
    turned = [rotate(half, places, base) for half, places in zip(halves, (rows, columns), strict=True)]
    return jnp.concatenate(turned, axis=-1)


def _interleave(even: Float[Array, "*B h"], odd: Float[Array, "*B h"]) -> Float[Array, "*B 2*h"]:
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], -1)
