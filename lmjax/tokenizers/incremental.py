"""Ids to text one at a time, whatever the tokenizer.

Each id costs the same however long the text has become:

  - Where ids stand for bytes (byte and tiktoken tokenizers, byte-level BPE and Unigram), their bytes go through an
    incremental UTF-8 decoder, which keeps up to three of an unfinished character.
  - Elsewhere (characters, WordPiece, SentencePiece, Metaspace) the text of an id depends on whether it comes first. So
    the ids not settled yet are decoded behind one or two settled ones, whose own text is then taken off.
    Unsettled are byte pieces ("<0xE2>") that a later one may complete: the bytes of one character in SentencePiece; in
    a tokenizer.json the whole run of them, which its decoder replaces as a whole where it is not UTF-8.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Protocol

from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


def incremental_decoder(tokenizer: Tokenizer) -> IncrementalDecoder:
    """A decoder of one text; its parts joined are `tokenizer.decode` of all ids."""
    read = _byte_reader(tokenizer)
    return PieceDecoder(tokenizer) if read is None else ByteDecoder(read)


class IncrementalDecoder(Protocol):
    """Ids to certain text, one at a time."""

    @property
    def pending(self) -> bool:
        """Whether ids were fed whose text is not certain."""
        ...

    def feed(self, i: int) -> tuple[str, str]:
        """(text that this id makes certain of those before it alone, the rest that is certain now)."""
        ...

    def finish(self) -> str:
        """The text of what is pending, nothing coming behind it."""
        ...


class ByteDecoder:
    """Ids that stand for bytes."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def feed(self, i: int) -> tuple[str, str]:
        return "", self._utf8.decode(self._read(i))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class PieceDecoder:
    """Ids whose text depends on whether they come first."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._byte, self._whole_runs, self._known = _byte_pieces(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._open: list[int] = []  # not settled
        self._in_run = False  # the open ones are byte pieces
        # Settled ids to decode the open ones behind: all there are until one shows, then the last that shows by
        # itself, and the last.
        self._context: list[int] = []
        self._context_text = ""

    @property
    def pending(self) -> bool:
        return bool(self._open)

    def feed(self, i: int) -> tuple[str, str]:
        byte = self._byte(i)
        if byte is None:
            before = self._close(len(self._open)) if self._in_run else ""
            self._in_run = False
            self._open.append(i)
            if not self._known and self._text(self._open).endswith(_REPLACEMENT):
                return before, ""
            return before, self._close(len(self._open))
        before = "" if self._in_run else self._close(len(self._open))
        if not self._in_run:
            self._utf8.reset()
        self._in_run = True
        self._open.append(i)
        self._utf8.decode(bytes([byte]))
        unsettled = len(self._open) if self._whole_runs else len(self._utf8.getstate()[0])
        return before, self._close(len(self._open) - unsettled)

    def finish(self) -> str:
        return self._close(len(self._open))

    def _text(self, ids: list[int]) -> str:
        """The text of ids behind the context."""
        text = self._decode([*self._context, *ids])
        if not text.startswith(self._context_text):
            raise UserError(
                "this tokenizer's decoder changes text that it already gave, which cannot be streamed: decode the ids "
                "at once"
            )
        return text[len(self._context_text) :]

    def _close(self, count: int) -> str:
        """Settles the first of the open ids."""
        if not count:
            return ""
        text = self._text(self._open[:count])
        ids = self._context + self._open[:count]
        self._open = self._open[count:]
        last = next((k for k in reversed(range(len(ids))) if self._decode([ids[k]])), None)
        if last is None:  # nothing shows yet; the same id again would change nothing
            self._context = list(dict.fromkeys(ids))
        else:
            self._context = [ids[last]] if last == len(ids) - 1 else [ids[last], ids[-1]]
        self._context_text = self._decode(self._context)
        return text


def _byte_reader(tokenizer: Tokenizer) -> Callable[[int], bytes] | None:
    """The bytes of each id, where the text is the UTF-8 decoding of all of them; None where it is not."""
    from lmjax.tokenizers.foreign import TiktokenTokenizer
    from lmjax.tokenizers.simple import ByteTokenizer
    from lmjax.tokenizers.subword import SubwordTokenizer

    if isinstance(tokenizer, ByteTokenizer):
        names = {i: text.encode() for text, i in tokenizer.specials.items()}
        return lambda i: bytes([i]) if i < 256 else names[i]
    if isinstance(tokenizer, TiktokenTokenizer):
        ranks = tokenizer._inner

        def read(i: int) -> bytes:
            try:
                return ranks.decode_single_token_bytes(i)
            except KeyError:
                raise UserError(f"id {i} is a gap in this tokenizer's vocabulary: another made it") from None

        return read
    if isinstance(tokenizer, SubwordTokenizer):
        from tokenizers import decoders

        inner, table = tokenizer.inner, _byte_alphabet()
        if not isinstance(inner.decoder, decoders.ByteLevel):
            return None

        def read_letters(i: int) -> bytes:
            token = inner.id_to_token(i) or ""  # the library passes over a gap
            return bytes(map(table.__getitem__, token)) if table.keys() >= set(token) else token.encode()

        return read_letters
    return None


def _byte_alphabet() -> dict[str, int]:
    """The letter of each byte in byte-level vocabularies (GPT-2): itself where it prints, else one from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_pieces(tokenizer: Tokenizer) -> tuple[Callable[[int], int | None], bool, bool]:
    """(the byte of an id or None, whether runs are decoded as a whole, whether nothing else makes U+FFFD)."""
    from lmjax.tokenizers.foreign import SentencePieceTokenizer
    from lmjax.tokenizers.simple import CharTokenizer
    from lmjax.tokenizers.subword import SubwordTokenizer

    def byte(piece: str | None) -> int | None:
        match = _BYTE_PIECE.fullmatch(piece or "")
        return int(match[1], 16) if match else None

    if isinstance(tokenizer, SentencePieceTokenizer):
        model = tokenizer._inner
        return lambda i: byte(model.id_to_piece(i)) if model.is_byte(i) else None, False, True
    if isinstance(tokenizer, SubwordTokenizer):
        inner = tokenizer.inner
        return lambda i: byte(inner.id_to_token(i)), True, False
    return lambda i: None, False, isinstance(tokenizer, CharTokenizer)
