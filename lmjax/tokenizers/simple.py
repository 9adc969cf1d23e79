"""The tokenizers that need no training to speak of: bytes and characters."""

from __future__ import annotations

import abc
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from lmjax.errors import UserError
from lmjax.tokenizers.base import OWN_FILE, check_ids, digest, pieces, utf8, write_file


class _Simple(abc.ABC):
    """A table of units with the special tokens behind it."""

    kind: str
    bos: int | None
    eos: int | None
    pad: int | None

    def _mark(self, units: int, bos: str | None, eos: str | None, pad: str | None) -> None:
        self._units = units
        self._marks = {"bos": bos, "eos": eos, "pad": pad}
        names = list(dict.fromkeys(name for name in self._marks.values() if name is not None))
        self._specials = {name: units + i for i, name in enumerate(names)}
        self.bos, self.eos, self.pad = (self._specials.get(name) if name else None for name in (bos, eos, pad))
        self._names = {i: name for name, i in self._specials.items()}

    @property
    def vocab_size(self) -> int:
        return self._units + len(self._specials)

    @property
    def specials(self) -> dict[str, int]:
        return dict(self._specials)

    @abc.abstractmethod
    def _ordinary(self, text: str) -> np.ndarray:
        """Ids of text without special tokens."""

    @abc.abstractmethod
    def _text(self, ids: np.ndarray) -> str:
        """Text of ids that are not special tokens."""

    def _content(self) -> dict:
        return {"kind": self.kind, **self._marks}

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        if not special or not self._specials:
            return self._ordinary(text)
        parts = [
            self._ordinary(p) if isinstance(p, str) else np.array([p], np.int32) for p in pieces(text, self._specials)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        array = check_ids(ids, self.vocab_size)
        cuts = np.flatnonzero(array >= self._units)
        out: list[str] = []
        start = 0
        for cut in cuts.tolist():
            out += [self._text(array[start:cut]), self._names[int(array[cut])]]
            start = cut + 1
        return "".join(out) + self._text(array[start:])

    def fingerprint(self) -> str:
        return digest(self._content())

    def save(self, directory: str | os.PathLike) -> None:
        os.makedirs(directory, exist_ok=True)
        write_file(os.path.join(directory, OWN_FILE), json.dumps(self._content(), ensure_ascii=True))


class ByteTokenizer(_Simple):
    """Each UTF-8 byte is its own id; special tokens, if any, follow from 256.

    >>> ByteTokenizer().encode("hé").tolist()
    [104, 195, 169]
    """

    kind = "byte"

    def __init__(self, bos: str | None = None, eos: str | None = None, pad: str | None = None):
        self._mark(256, bos, eos, pad)

    def _ordinary(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def _text(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: 1 a byte, 0 a special token."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)


class CharTokenizer(_Simple):
    """Each character of a fixed, sorted alphabet is an id; special tokens, if any, follow.

    >>> CharTokenizer("hello").encode("hole").tolist()
    [1, 3, 2, 0]
    """

    kind = "char"

    def __init__(self, alphabet: str, bos: str | None = None, eos: str | None = None, pad: str | None = None):
        self._alphabet = "".join(sorted(set(alphabet)))
        if not self._alphabet:
            raise UserError("a character tokenizer needs at least one character: the text it was made from is empty")
        self._codes = np.array([ord(c) for c in self._alphabet], np.int64)
        self._table = np.full(int(self._codes[-1]) + 1, -1, np.int32)
        self._table[self._codes] = np.arange(len(self._codes))
        self._mark(len(self._codes), bos, eos, pad)

    @classmethod
    def train(
        cls, texts: Iterable[str], bos: str | None = None, eos: str | None = None, pad: str | None = None
    ) -> CharTokenizer:
        """The tokenizer of all characters that occur in the texts."""
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return cls("".join(alphabet), bos, eos, pad)

    def _ordinary(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        unknown = (ids < 0) | (codes >= len(self._table))
        if unknown.any():
            where = int(np.argmax(unknown))
            raise UserError(
                f"character {text[where]!r} (U+{codes[where]:04X}, at position {where}) is not in the "
                f"alphabet of {len(self._codes)} characters: use a byte tokenizer, or text like what it was made from"
            )
        return ids

    def _text(self, ids: np.ndarray) -> str:
        return "".join(map(chr, self._codes[ids]))

    def _content(self) -> dict:
        return {**super()._content(), "alphabet": self._alphabet}

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: the UTF-8 length of each character, 0 a special token."""
        lengths = [len(c.encode("utf-8", errors="surrogatepass")) for c in self._alphabet]
        return np.array(lengths + [0] * len(self._specials), np.int32)
