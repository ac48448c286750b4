"""Positions: sinusoidal codes, rotary embeddings in one and two dimensions."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_number, unknown_name
from attnlab.types import Real

BASE = 10_000.0


@dataclass(frozen=True)
class Rotary:
    """How an attention layer turns its queries and keys (Su et al., arXiv 2104.09864): token t by the angles w_i t.

    Attributes:
        base: frequencies are w_i = base^(-2 i / d), d the number of entries that are turned.
        pairs: which entries turn together, a key of `PAIRS`: `neighbours` 2 i and 2 i + 1 (the paper), `halves` i and
            i + d / 2 (Llama, GPT-NeoX). One is the other with the columns of the weights in another order.
        share: the share of each head's entries that are turned, the first ones (GPT-NeoX turns a quarter).

    Example:
        >>> import attnlab as al
        >>> from attnlab.models.positions import Rotary
        >>> al.AttentionConfig(key_dim=8, value_dim=8, rotary=Rotary(pairs="halves", share=0.5)).rotary.turned(8)
        4
    """

    base: float = BASE
    pairs: str = "halves"
    share: float = 1.0

    def __post_init__(self) -> None:
        check_number("base", self.base, 1.0, float("inf"), "Take 1e4, the usual one.")
        check_number("share", self.share, 0.0, 1.0, "Take 1, or rotary=None for no rotation.")
        if self.pairs not in PAIRS:
            raise unknown_name("pairing of rotary embeddings", self.pairs, PAIRS)

    def turned(self, width: int) -> int:
        """How many of a head's `width` entries are turned. Raises `ValueError` where that is no even number."""
        turned = round(self.share * width)
        if turned < 2 or turned % 2:
            raise ValueError(
                f"rotary turns {turned} of the {width} entries of a head; expected a positive even number. Choose an "
                "even key_dim, and a share of it that is even."
            )
        return turned

    def __call__(self, vectors: Float[Array, "*B L d"], positions: Float[Array, "*L"]) -> Float[Array, "*B L d"]:
        """The vectors, each turned as its position says."""
        turned = self.turned(vectors.shape[-1])
        if turned == vectors.shape[-1]:
            return rotate(vectors, positions, self.base, self.pairs)
        rest = vectors[..., turned:]
        return jnp.concatenate([rotate(vectors[..., :turned], positions, self.base, self.pairs), rest], axis=-1)


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
    vectors: Float[Array, "*B L d"], positions: Float[Array, "*L"], base: float = BASE, pairs: str = "neighbours"
) -> Float[Array, "*B L d"]:
    """Rotary embedding (Su et al., arXiv 2104.09864): the entries of pair i turned by the angle w_i t.

    `positions` (L,) broadcast over the leading axes; `pairs` as in `Rotary`. The score of rotated queries and keys
    depends on positions only through their difference.
    """
    split, join = PAIRS[pairs]
    first, second = split(vectors)
    angles = jnp.multiply.outer(positions, frequencies(vectors.shape[-1], base))
    cosine, sine = (jnp.broadcast_to(f(angles).astype(vectors.dtype), first.shape) for f in (jnp.cos, jnp.sin))
    return join(first * cosine - second * sine, first * sine + second * cosine)


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


def _neighbours(vectors: Float[Array, "*B d"]) -> tuple[Array, Array]:
    return vectors[..., ::2], vectors[..., 1::2]


def _halves(vectors: Float[Array, "*B d"]) -> tuple[Array, Array]:
    first, second = jnp.split(vectors, 2, axis=-1)
    return first, second


def _side_by_side(first: Float[Array, "*B h"], second: Float[Array, "*B h"]) -> Float[Array, "*B 2*h"]:
    return jnp.concatenate([first, second], axis=-1)


PAIRS: dict[str, tuple[Callable, Callable]] = {
    "neighbours": (_neighbours, _interleave),
    "halves": (_halves, _side_by_side),
}
"""How the entries of a vector are told apart into pairs, and put together again."""
