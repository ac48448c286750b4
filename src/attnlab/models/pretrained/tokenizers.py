"""Tokenizers of pretrained models by the package `tokenizers`, and the tokens of next-token prediction."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.checks import check_range
from attnlab.models.text_encoder import TokenBatch


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a pretrained model: `encode(texts, length)`.

    Attributes:
        backend: the `tokenizers.Tokenizer`, without cutting or padding of its own.
    """

    backend: Any

    @property
    def vocabulary(self) -> int:
        """One above the largest number of a token, the special ones among them."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], length: int) -> TokenBatch:
        """Each text with the special tokens of its model, cut or padded at its end to `length` tokens: (texts, length).

        Padding is token 0, of no weight. Raises `ValueError` for a length without room for a token.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts are {texts!r:.60}, a str; expected a sequence of texts: wrap it in a list.")
        special = self.backend.num_special_tokens_to_add(False)
        check_range("length", length, special + 1, np.inf, f"There are {special} special tokens beside the text.")
        self.backend.enable_truncation(length)  # which keeps the special tokens at the end
        found = [encoding.ids for encoding in self.backend.encode_batch(list(texts))]
        self.backend.no_truncation()
        tokens = np.zeros((len(found), length), np.int32)
        mask = np.arange(length) < np.array([[len(row)] for row in found])
        tokens[mask] = [token for row in found for token in row]
        return TokenBatch(jnp.asarray(tokens), jnp.asarray(mask))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=False)


def next_tokens(batch: TokenBatch) -> tuple[Int[Array, "*B L-1"], Int[Array, "*B L-1"], Float[Array, "*B L-1"]]:
    """Inputs, targets and weights of next-token prediction: each token predicts the next, and padding counts for
    nothing.

    For `objective(predict, cross_entropy, inputs, targets, weights=weights)`. Raises `ValueError` where no token has a
    next one.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.models.pretrained import next_tokens
        >>> from attnlab.models.text_encoder import TokenBatch
        >>> padded = TokenBatch(jnp.array([[5, 6, 7, 0]]), jnp.array([[True, True, True, False]]))
        >>> [leaf.tolist() for leaf in next_tokens(padded)]
        [[[5, 6, 7]], [[6, 7, 0]], [[1.0, 1.0, 0.0]]]
    """
    tokens, mask = batch
    if not bool(jnp.any(mask[..., 1:])):
        raise ValueError(f"batch has shape {tokens.shape}, and no token in it a next one; expected longer texts.")
    return tokens[..., :-1], tokens[..., 1:], mask[..., 1:].astype(float)


def tokenizer_of_folder(folder: Path) -> Callable[[], Tokenizer] | None:
    """A function that reads `tokenizer.json`, or else BERT's `vocab.txt`; None where the folder has neither."""
    if (folder / "tokenizer.json").exists():
        return partial(_from_json, folder / "tokenizer.json")
    return partial(_from_vocabulary, folder / "vocab.txt") if (folder / "vocab.txt").exists() else None


def _from_vocabulary(path: Path) -> Tokenizer:
    settings = path.with_name("tokenizer_config.json")
    lower_case = not settings.exists() or json.loads(settings.read_text()).get("do_lower_case", True)
    return wordpiece(path.read_text(encoding="utf-8").splitlines(), lower_case=lower_case)


def wordpiece(vocabulary: Sequence[str], *, lower_case: bool = True) -> Tokenizer:
    """BERT's tokenizer (Devlin et al., arXiv 1810.04805) whose pieces are numbered in the order of `vocabulary`.

    Each text stands between `[CLS]` and `[SEP]`. Raises `ValueError` without BERT's special tokens.
    """
    missing = [piece for piece in SPECIAL if piece not in vocabulary]
    if missing:
        raise ValueError(f"vocabulary has no {', '.join(missing)}; expected BERT's special tokens in it.")
    library = _library()
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    backend = library.Tokenizer(library.models.WordPiece(numbers, unk_token="[UNK]"))
    backend.normalizer = library.normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    ends = [(piece, numbers[piece]) for piece in ("[CLS]", "[SEP]")]
    backend.post_processor = library.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    backend.decoder = library.decoders.WordPiece()
    return Tokenizer(backend)


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def _from_json(path: Path) -> Tokenizer:
    library = _library()
    try:
        backend = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower one
        raise ValueError(
            f"{path} is no tokenizer ({error}); is it cut short? Pass tokenizer=False to read the weights alone."
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend)


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the tokenizer is read by the package tokenizers; run pip install "attnlab[pretrained]".'
        ) from error
    return tokenizers


DIGITS_APART = {"smollm": True, "gpt-2": False}
"""By what a GGUF file calls its splitting of words: whether each digit is a word of its own before GPT-2's pattern."""
CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens in a GGUF file that are read as a whole, whatever stands around them."""


def tokenizer_of_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE from the vocabulary and the merges that a GGUF file holds.

    Raises `ValueError` for another kind of tokenizer, or words that are split in another way.
    """
    library = _library()
    held = {name.removeprefix("tokenizer.ggml."): field for name, field in fields.items()}
    kind, split = (held[name].contents() if name in held else "" for name in ("model", "pre"))
    if kind != "gpt2" or split not in DIGITS_APART:
        raise ValueError(
            f"the GGUF file has a tokenizer of kind {kind!r} that splits words as {split!r}; expected 'gpt2', "
            f"byte-level BPE, and one of {', '.join(DIGITS_APART)}. Pass tokenizer=False to read the weights alone."
        )
    pieces = held["tokens"].contents()
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ", 1)) for merge in held["merges"].contents()]
    backend = library.Tokenizer(library.models.BPE(vocabulary, merges))
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [library.pre_tokenizers.Digits(individual_digits=True)] if DIGITS_APART[split] else []
    backend.pre_tokenizer = library.pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = library.decoders.ByteLevel()
    kinds = held["token_type"].contents() if "token_type" in held else []
    whole = [piece for piece, kind in zip(pieces, kinds, strict=False) if kind in (CONTROL, USER_DEFINED)]
    backend.add_special_tokens([library.AddedToken(piece, special=True, normalized=False) for piece in whole])
    if "add_bos_token" in held and held["add_bos_token"].contents():
        number = held["bos_token_id"].contents()
        first = pieces[number]
        template = library.processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, number)])
        backend.post_processor = template
    return Tokenizer(backend)
