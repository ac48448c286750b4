"""WordPiece: text to the whole numbers that BERT-like models embed, lower-cased and without accents."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.checks import check_range

PADDING, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
LONGEST_WORD = 100
"""Characters of a word; a longer one is unknown."""


class TokenBatch(NamedTuple):
    """Sequences of tokens, padded at their end: the whole numbers, and where a token stands."""

    tokens: Int[Array, "*B L"]
    mask: Bool[Array, "*B L"]


@dataclass(frozen=True)
class WordPiece:
    """A tokenizer with a vocabulary: `encode(texts, length)`.

    Words are what stands between white space, every punctuation mark and every CJK ideograph a word of its own. From
    its start a word is cut into the longest pieces that the vocabulary has, those that continue it with a `##` before
    them; one that cannot be cut is unknown (Wu et al., arXiv 1609.08144; Devlin et al., arXiv 1810.04805). Special
    tokens are added, never read: in a text `[MASK]` is a word between brackets.

    Attributes:
        numbers: of every piece in the vocabulary, the special ones among them.
    """

    numbers: dict[str, int]

    def __post_init__(self) -> None:
        missing = [piece for piece in (PADDING, UNKNOWN, FIRST, LAST) if piece not in self.numbers]
        if missing:
            raise ValueError(f"numbers has no {', '.join(missing)}; expected a vocabulary with BERT's special tokens.")

    @property
    def vocabulary(self) -> int:
        """One above the largest number of a piece."""
        return max(self.numbers.values()) + 1

    def encode(self, texts: Sequence[str], length: int) -> TokenBatch:
        """Each text between `[CLS]` and `[SEP]`, cut or padded to `length` tokens: (texts, length)."""
        check_range("length", length, 2, 512, "There must be room for [CLS] and [SEP].")
        rows = np.full((len(texts), length), self.numbers[PADDING], np.int32)
        for row, text in zip(rows, texts, strict=True):
            pieces = [FIRST, *self.pieces(text)[: length - 2], LAST]
            row[: len(pieces)] = [self.numbers[piece] for piece in pieces]
        return TokenBatch(jnp.asarray(rows), jnp.asarray(rows != self.numbers[PADDING]))

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, without special tokens."""
        return [piece for word in split_words(text) for piece in self._cut(word)]

    def _cut(self, word: str) -> list[str]:
        pieces: list[str] = []
        start = 0
        while start < len(word) <= LONGEST_WORD:
            prefix = "##" if start else ""
            known = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.numbers)
            end = next(known, None)
            if end is None:
                return [UNKNOWN]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces or [UNKNOWN]


def split_words(text: str) -> list[str]:
    """The words of a text in lower case and without accents, punctuation and ideographs apart."""
    spaced = "".join(_spaced(character) for character in text)
    plain = "".join(c for c in unicodedata.normalize("NFD", spaced) if unicodedata.category(c) != "Mn")
    return [part for word in plain.lower().split() for part in _parts(word)]


def _spaced(character: str) -> str:
    """White space as a blank, control characters as nothing, ideographs between blanks."""
    if character.isspace():
        return " "
    if character in "\0\ufffd" or unicodedata.category(character).startswith("C"):
        return ""
    ideograph = any(low <= ord(character) <= high for low, high in IDEOGRAPHS)
    return f" {character} " if ideograph else character


IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""The blocks of Chinese characters that BERT sets apart; not kana, nor hangul."""


def _parts(word: str) -> Iterator[str]:
    part = ""
    for character in word:
        if _is_punctuation(character):
            yield from filter(None, (part, character))
            part = ""
        else:
            part += character
    if part:
        yield part


def _is_punctuation(character: str) -> bool:
    """Unicode's punctuation, and every printed ASCII character that is neither letter nor digit ($, +, ^ ...)."""
    ascii_mark = character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    return ascii_mark or unicodedata.category(character).startswith("P")


def wordpiece(vocabulary: Iterable[str]) -> WordPiece:
    """The tokenizer whose pieces are numbered in the order of `vocabulary`, as the lines of a `vocab.txt` are."""
    return WordPiece({piece.rstrip("\n"): number for number, piece in enumerate(vocabulary)})
