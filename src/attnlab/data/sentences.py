"""Pairs of neighbouring English sentences, from the language reference that the standard library carries."""

import re

import jax
import numpy as np

from attnlab.checks import check_range
from attnlab.types import PRNGKey

SHORTEST = 6
"""Words of a sentence."""


def sentence_pairs(key: PRNGKey, count: int) -> tuple[list[str], list[str]]:
    """`count` different sentences, drawn by `key`, and after each the sentence that follows it in its paragraph.

    The text is `pydoc_data.topics`, so that another version of Python may have others. No sentence occurs twice: a
    second text belongs to one first text only. Raises `ValueError` for a count above the number of such pairs.
    """
    pairs = _pairs()
    check_range("count", count, 1, len(pairs), f"There are {len(pairs)} pairs in this version of Python.")
    chosen = [pairs[i] for i in np.asarray(jax.random.permutation(key, len(pairs))[:count])]
    return [first for first, _ in chosen], [second for _, second in chosen]


def paragraphs() -> list[str]:
    """The paragraphs of English prose in the standard library's help topics, in alphabetical order of their topics.

    Some hundreds of them; the text differs a little between versions of Python.
    """
    from pydoc_data.topics import topics

    return [paragraph for topic in sorted(topics) for paragraph in _prose(topics[topic])]


def _pairs() -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for paragraph in paragraphs():
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)
        for first, second in zip(sentences[::2], sentences[1::2], strict=False):
            if {first, second} & seen or min(len(first.split()), len(second.split())) < SHORTEST:
                continue
            seen |= {first, second}
            pairs.append((first, second))
    return pairs


def _prose(text: str) -> list[str]:
    """The paragraphs that are sentences: not code, which is indented, nor headings, lists or tables."""
    paragraphs = (paragraph for paragraph in text.split("\n\n") if re.match(r"[A-Z]", paragraph))
    joined = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs)
    return [paragraph for paragraph in joined if paragraph.endswith((".", "!", "?"))]
