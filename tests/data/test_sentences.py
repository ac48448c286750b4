"""Neighbouring sentences: they stand so in the text, and none occurs twice."""

import re
from pydoc_data.topics import topics

import jax
import pytest

from attnlab.data.sentences import SHORTEST, sentence_pairs


def test_pairs_are_neighbours_in_the_text_and_all_different(key):
    firsts, seconds = sentence_pairs(key, 40)
    text = re.sub(r"\s+", " ", " ".join(topics.values()))
    for first, second in zip(firsts, seconds, strict=True):
        assert f"{first} {second}" in text
        assert min(len(first.split()), len(second.split())) >= SHORTEST
    assert len({*firsts, *seconds}) == 80
    assert sentence_pairs(key, 40) == (firsts, seconds)


def test_other_keys_draw_other_pairs():
    assert sentence_pairs(jax.random.key(1), 10) != sentence_pairs(jax.random.key(2), 10)


@pytest.mark.parametrize("count", [0, 10**6])
def test_bad_count(count):
    with pytest.raises(ValueError, match=f"count is {count}; expected 1 <= count"):
        sentence_pairs(jax.random.key(1), count)
