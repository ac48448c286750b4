"""English text that every Python carries: the language reference's help topics, as a sequence of words."""

import re
from functools import cache
from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np

from attnlab.checks import check_range
from attnlab.data.dataset import Dataset


@cache
def help_topics() -> tuple[str, ...]:
    """The words, in lower case, of the standard library's help topics (`pydoc_data.topics`) in alphabetical order.

    Some 64,000 words, 3,000 of them different; the text differs a little between versions of Python.
    """
    text = "\n".join(topics[name] for name in sorted(topics))
    return tuple(re.findall("[a-z]+", text.lower()))


def next_words(count: int, length: int = 16) -> tuple[Dataset, tuple[str, ...]]:
    """The first `count` sequences of `length` words as whole numbers, with the word after each as its target, and the
    vocabulary.

    Inputs and targets are (count, length) whole numbers. The vocabulary is the words of these sequences, the most
    frequent first, so that a token is the rank of its word. Raises `ValueError` beyond the end of the text.
    """
    words = help_topics()
    check_range("count", count, 1, (len(words) - 1) // length, f"The text has {len(words)} words.")
    known, found, counts = np.unique(words[: count * length + 1], return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(known), dtype=np.int32)
    rank[order] = np.arange(len(known))
    tokens = jnp.asarray(rank[found])
    shape = (count, length)
    return Dataset(tokens[:-1].reshape(shape), tokens[1:].reshape(shape)), tuple(known[order].tolist())
