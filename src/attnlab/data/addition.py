"""Addition of two numbers as next-token prediction: the sequence `ddddd+ddddd=dddddd`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attnlab.checks import check_positive
from attnlab.data.dataset import Dataset
from attnlab.types import PRNGKey

VOCABULARY = "0123456789+="
"""The symbol of each of the 12 tokens."""


def addition(key: PRNGKey, count: int, digits: int = 5) -> Dataset:
    """`count` sums of two numbers of `digits` digits, drawn uniformly with replacement, leading zeros written out.

    Inputs are the whole sequences, (count, 3 digits + 3) tokens, with five digits 18 of them (Ormaniec, Dangel, Singh,
    arXiv 2410.10986, figure 3); targets are the tokens of the answer, (count, digits + 1), most significant first. A
    causal model predicts each one position ahead: read its logits at `answer_positions(digits)`, with
    `models.adapters.at_positions`, and the cross-entropy is that of the answer alone.
    """
    check_positive(count=count, digits=digits)
    first, second = jax.random.randint(key, (2, count, digits), 0, 10, dtype=jnp.int32)
    answer = add_digits(first, second)
    plus, equals = (jnp.full((count, 1), VOCABULARY.index(symbol), dtype=jnp.int32) for symbol in "+=")
    return Dataset(jnp.concatenate([first, plus, second, equals, answer], axis=-1), answer)


def add_digits(first: Int[Array, "*B digits"], second: Int[Array, "*B digits"]) -> Int[Array, "*B digits+1"]:
    """The digits of the sum of two numbers given by their digits, most significant first."""
    carry, answer = jnp.zeros_like(first[..., 0]), []
    for place in reversed(range(first.shape[-1])):
        total = first[..., place] + second[..., place] + carry
        carry = total // 10
        answer.append(total % 10)
    return jnp.stack([carry, *reversed(answer)], axis=-1)


def answer_positions(digits: int = 5) -> tuple[int, ...]:
    """Where a causal model predicts the answer: at the equals sign and at every digit of the answer but the last."""
    check_positive(digits=digits)
    equals = 2 * digits + 1
    return tuple(range(equals, equals + digits + 1))


def as_text(tokens: Int[Array, "*B L"]) -> list[str]:
    """The sequences as strings, such as `00017+00025=000042`."""
    return ["".join(VOCABULARY[token] for token in row) for row in np.atleast_2d(np.asarray(tokens))]
