"""Byte-level tokenizers of GGUF files and of tokenizer.json, against a naive one written from the definition."""

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from published import SETTINGS
from test_pretrained import REFERENCE, write

from attnlab.data.sentences import paragraphs
from attnlab.models.pretrained import load
from attnlab.models.pretrained.loading import SMOLLM2
from attnlab.models.pretrained.tokenizers import tokenizer_of_folder, tokenizer_of_gguf

TEXT = "In 1905 they've 27 names,\n\n\t12 of   them: the café's\n  x=3.14  "
CONTROL = "<|end|>"


def letters_of_bytes():
    """GPT-2's letter of each byte: its own if it is printed, else those from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def naive_tokens(text, numbers, merges, digits_apart):
    """The two pieces of a word that were merged first are merged first, until none can be."""
    parts = re.split(r"(\d)", text) if digits_apart else [text]
    pattern = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+"
    letters, ranks, found = letters_of_bytes(), {merge: rank for rank, merge in enumerate(merges)}, []
    for word in (word for part in parts for word in re.findall(pattern, part)):
        pieces = [letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
            best, merged = min(pairs, key=ranks.get), []
            while pieces:
                size = 2 if tuple(pieces[:2]) == best else 1
                merged.append("".join(pieces[:size]))
                pieces = pieces[size:]
            pieces = merged
        found += [numbers[piece] for piece in pieces]
    return found


@pytest.fixture(scope="module")
def trained():
    """The pieces and the merges of a small vocabulary."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=[CONTROL], initial_alphabet=alphabet)
    backend.train_from_iterator([*paragraphs()[:60], TEXT * 5, "19 27 314 " * 9], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]], backend


def fields_of_gguf(path, trained, split="gpt-2", model="gpt2", first=False):
    numbers, merges, _ = trained
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(split)
    pieces = sorted(numbers, key=numbers.get)
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece == CONTROL else 1 for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(numbers[CONTROL])
    writer.add_add_bos_token(first)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path).fields


def encoded(tokenizer, text, length=400):
    tokens, mask = tokenizer.encode([text], length)
    return tokens[mask].tolist()


@pytest.mark.parametrize("split", ["smollm", "gpt-2"])
def test_tokens_are_those_of_the_definition(split, trained, tmp_path):
    tokenizer = tokenizer_of_gguf(fields_of_gguf(tmp_path / "tiny.gguf", trained, split))
    for text in (TEXT, *paragraphs()[100:102]):
        assert encoded(tokenizer, text) == naive_tokens(text, *trained[:2], split == "smollm")
        assert tokenizer.decode(encoded(tokenizer, text)) == text
    assert (encoded(tokenizer, TEXT) == naive_tokens(TEXT, *trained[:2], digits_apart=False)) == (split == "gpt-2")
    assert encoded(tokenizer, f"a{CONTROL}b") == [trained[0][piece] for piece in ("a", CONTROL, "b")]


def test_texts_are_cut_and_padded(trained, tmp_path):
    plain, with_first = (
        tokenizer_of_gguf(fields_of_gguf(tmp_path / f"{first}.gguf", trained, first=first)) for first in (False, True)
    )
    text = "the name of the module"
    whole = encoded(plain, text)
    assert encoded(plain, text, 3) == whole[:3]
    assert encoded(with_first, text) == [trained[0][CONTROL], *whole]
    tokens, mask = with_first.encode(["a", "", text], 3)
    assert mask.sum(axis=1).tolist() == [2, 1, 3]
    assert np.all(np.asarray(tokens)[~np.asarray(mask)] == 0)


def test_a_folder_has_its_own_tokenizer(trained, tmp_path):
    backend = trained[2]
    backend.enable_padding(length=9)
    backend.enable_truncation(9)
    backend.save(str(tmp_path / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    tokenizer = tokenizer_of_folder(tmp_path)()
    assert encoded(tokenizer, TEXT) == backend.encode(TEXT).ids
    with pytest.raises(
        ValueError, match="the tokenizer has 600 tokens, and the model embeds 19; expected the tokenizer"
    ):
        load(write(tmp_path, "llama"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer .* cut short"):
        load(tmp_path)
    assert load(tmp_path, tokenizer=False).tokenizer is None
    (tmp_path / "tokenizer.json").unlink()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    assert SETTINGS["bert"]["vocab_size"] >= len(pieces)
    assert encoded(load(write(tmp_path, "llama")).tokenizer, "A b") == [2, 4, 1, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert encoded(load(tmp_path).tokenizer, "A a") == [2, 1, 4, 3]


def test_another_kind_of_tokenizer_is_an_error(trained, tmp_path):
    with pytest.raises(ValueError, match=r"that splits words as 'qwen2'; expected 'gpt2', .* one of smollm, gpt-2"):
        tokenizer_of_gguf(fields_of_gguf(tmp_path / "a.gguf", trained, split="qwen2"))
    with pytest.raises(ValueError, match=r"a tokenizer of kind 'bert' .* Pass tokenizer=False"):
        tokenizer_of_gguf(fields_of_gguf(tmp_path / "b.gguf", trained, model="bert"))


@pytest.mark.slow
def test_tokens_of_smollm2_are_those_of_another_implementation():
    """It splits white space before a digit otherwise: there the definition counts."""
    if find_spec(SMOLLM2) is None:  # not to be imported without its dependencies
        pytest.skip("the weights are not installed")
    (path,) = Path(find_spec(SMOLLM2).origin).parent.glob("*.gguf")
    fields = gguf.GGUFReader(path).fields
    tokenizer, expected = tokenizer_of_gguf(fields), REFERENCE["smollm2"]
    assert encoded(tokenizer, expected["text"]) == expected["text_tokens"]
    assert encoded(tokenizer, expected["passage"]) == expected["tokens"]
    numbers = {piece: number for number, piece in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    for text in (TEXT, *paragraphs()[:20]):
        assert encoded(tokenizer, text, 2000) == naive_tokens(text, numbers, merges, digits_apart=True)
