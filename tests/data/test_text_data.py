"""Words of the help topics as tokens: ranks, targets one word ahead, and the law of their frequencies."""

from collections import Counter

import numpy as np
import pytest

from attnlab.data.text import help_topics, next_words


def test_tokens_are_ranks_and_targets_the_next_words():
    data, vocabulary = next_words(50, 8)
    assert data.inputs.shape == data.targets.shape == (50, 8)
    words = help_topics()[:401]
    assert [vocabulary[token] for token in data.inputs.ravel()] == list(words[:-1])
    assert [vocabulary[token] for token in data.targets.ravel()] == list(words[1:])
    counts = Counter(words)
    assert len(vocabulary) == len(counts)
    assert [counts[word] for word in vocabulary] == sorted(counts.values(), reverse=True)


def test_frequencies_follow_the_law_of_zipf():
    counts = np.array([count for _, count in Counter(help_topics()).most_common(300)])
    slope = np.polyfit(np.log(np.arange(1, 301)), np.log(counts), 1)[0]
    assert -1.1 < slope < -0.8


@pytest.mark.parametrize("count", [0, 10**6])
def test_the_text_ends(count):
    with pytest.raises(ValueError, match=r"count is -?\d+; expected 1 <= count"):
        next_words(count)
