"""What every tokenizer offers, and the few helpers they share."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lmjax.errors import UserError

OWN_FILE = "lmjax_tokenizer.json"


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    `bos`, `eos` and `pad` are ids or None. Text is text: a special token spelled out in it is encoded as
    ordinary characters unless `special=True`, so that no document can forge an end of document.
    """

    bos: int | None
    eos: int | None
    pad: int | None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def specials(self) -> dict[str, int]:
        """Special tokens: text to id."""
        ...

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """int32 [n], without bos or eos."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray | None:
        """int32 [V], UTF-8 bytes of text each id stands for (specials 0); None where lengths vary."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits that depend on nothing but the content."""
        ...

    def save(self, directory: str | os.PathLike) -> None:
        """Writes what `lmjax.tokenizers.load(directory)` needs."""
        ...


def digest(content: Any) -> str:
    """16 hex digits of a JSON-able value or of bytes."""
    raw = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of a text; a lone surrogate is a `UserError`."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
            "decode it as UTF-8 first"
        ) from None


def write_file(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file whole or not at all (temporary name, fsync, rename)."""
    content = content.encode() if isinstance(content, str) else content
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def pieces(text: str, specials: dict[str, int]) -> list[str | int]:
    """Splits a text at the special tokens in it: texts and ids in order.

    >>> pieces("ab<e>c", {"<e>": 7})
    ['ab', 7, 'c']
    """
    if not specials:
        return [text] if text else []
    pattern = "(" + "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)) + ")"
    return [specials.get(part, part) for part in re.split(pattern, text) if part]


def check_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """int64 [n]; an id outside the vocabulary is a `UserError`."""
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
    bad = array[(array < 0) | (array >= vocab_size)]
    if bad.size:
        raise UserError(f"id {int(bad[0])} is not in the vocabulary of {vocab_size}: another tokenizer made it")
    return array
