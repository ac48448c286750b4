"""English text, word by word, through one attention layer."""

from attnlab.data.text import next_words
from attnlab.losses import cross_entropy
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import Objective, objective
from attnlab.types import Params, PRNGKey


def next_word_prediction(key: PRNGKey, count: int = 2048, length: int = 16) -> tuple[Objective, Params]:
    """The next word of English text by one causal pre-norm attention layer of width 32, with cross-entropy.

    The data of `data.text.next_words`; its tokens are ranks, the most frequent word first, so that the frequencies
    fall by the law of Zipf. The unembedding starts at zero: every word is equally likely at first.
    """
    data, vocabulary = next_words(count, length)
    attention = AttentionConfig(32, 32, causal=True, output_dim=32)
    blocks = TransformerConfig(attention, final_norm=True)
    model = LanguageModel(LanguageModelConfig(blocks, len(vocabulary), length, 32, init="zeros"))
    return objective(from_linen(model), cross_entropy, *data), model.init(key, data.inputs[:1])["params"]
