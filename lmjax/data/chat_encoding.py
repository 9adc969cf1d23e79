"""A rendered conversation to ids, so that no message can forge a special token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.chat_turns import Message, Piece
from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer, pieces


def _map(value: Any, function: Callable[[str], str]) -> Any:
    """A message, or a list of them, with a function applied to every string in it but roles and keys."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {key: part if key == "role" else _map(part, function) for key, part in value.items()}
    return [_map(part, function) for part in value] if isinstance(value, list | tuple) else value


def unused_characters(messages: Sequence[Message]) -> Iterator[str]:
    """Private-use characters that no message holds."""
    used: set[str] = set()

    def collect(text: str) -> str:
        used.update(text)
        return text

    _map(list(messages), collect)
    return (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in used)


def disguise(messages: Sequence[Message], specials: Mapping[str, int]) -> tuple[list[Message], dict[int, str]]:
    r"""The messages with the first character of every special token spelled out in them replaced.

    Args:
      messages: the conversation.
      specials: special tokens, text to id.

    Returns:
      (the messages, what `str.translate` needs to undo it).

    >>> disguise([{"role": "user", "content": "a<s>"}], {"<s>": 1})[0] == [{"role": "user", "content": "a\U00100000s>"}]
    True
    """
    if not specials:
        return list(messages), {}
    pattern = _any_of(specials)
    unused = unused_characters(messages)
    stand_ins: dict[str, str] = {}

    def stand_in(match: re.Match[str]) -> str:
        first = match[0][0]
        if first not in stand_ins:
            stand_ins[first] = next(unused)
        return stand_ins[first] + match[0][1:]

    def replace(text: str) -> str:
        # Again until none is left: where two overlap, breaking the first brings out the second.
        while pattern.search(text):
            text = pattern.sub(stand_in, text)
        return text

    replaced = _map(list(messages), replace)
    return replaced, {ord(private): first for first, private in stand_ins.items()}


def _any_of(specials: Mapping[str, int]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True)))


class _Segment(NamedTuple):
    """A stretch that is encoded at once."""

    text: str
    learned: bool | None
    forged: bool  # it spells out special tokens that are text
    last: str  # the special token it ends with, or ""


def _segments(written: Sequence[Piece], specials: Mapping[str, int], undo: dict[int, str]) -> Iterator[_Segment]:
    """Pieces of equal `learned` joined; stretches between special tokens that forge one stand alone."""
    names = {i: text for text, i in specials.items()}
    for learned, run in itertools.groupby(written, key=lambda piece: piece.learned):
        held, last = "", ""
        for part in pieces("".join(piece.text for piece in run), dict(specials)):
            text = names[part] if isinstance(part, int) else part
            if (true := text.translate(undo)) != text:
                if held:
                    yield _Segment(held, learned, False, last)
                yield _Segment(true, learned, True, "")
                held, last = "", ""
            else:
                held, last = held + text, text if isinstance(part, int) else ""
        if held:
            yield _Segment(held, learned, False, last)


def encode_pieces(
    tokenizer: Tokenizer, written: Sequence[Piece], undo: dict[int, str], bos: int | None = None
) -> tuple[np.ndarray, list[bool | None]]:
    """Ids of a disguised conversation, and the `learned` of the piece that each came from.

    The text is cut where `learned` changes, and nowhere else unless it spells out special tokens; what follows a cut
    is encoded as what follows, not as the beginning of a text.

    Args:
      tokenizer: reads special tokens in the pieces.
      written: the pieces, from disguised messages.
      undo: the second value of `disguise`.
      bos: an id to begin with.

    Returns:
      (ids int32 [n], one `learned` an id).
    """
    specials = tokenizer.specials
    special_ids = set(specials.values())
    before = next((text for text, i in specials.items() if i == bos), None)
    ids: list[np.ndarray] = [] if bos is None else [np.array([bos], np.int32)]
    flags: list[bool | None] = [] if bos is None else [False]
    for segment in _segments(written, specials, undo):
        found = _encode_after(tokenizer, before, segment)
        if not segment.forged:
            _check_specials(tokenizer, segment.text, found, special_ids)
        ids.append(found)
        flags += [segment.learned] * len(found)
        before = segment.last
    return np.concatenate([np.zeros(0, np.int32), *ids]), flags


def _encode_after(tokenizer: Tokenizer, before: str | None, segment: _Segment) -> np.ndarray:
    """The ids of a segment behind: nothing (None), ordinary text (""), or a special token (its text)."""
    text, special = segment.text, not segment.forged
    if before is None:
        return tokenizer.encode(text, special=special)
    if before:
        # What a special token does to the text behind it (a space added, or white space taken) is the tokenizer's
        # affair; a forged text must not be read along with one, so a letter stands in for it.
        if special:
            return tokenizer.encode(before + text, special=True)[1:]
        if _same(lambda: tokenizer.encode(before + "a", special=True)[1:], lambda: tokenizer.encode("a")):
            return tokenizer.encode(text)
    guard = _guard(tokenizer)
    head = tokenizer.encode(guard) if guard else np.zeros(0, np.int32)
    ids = tokenizer.encode(guard + text, special=special)
    if np.array_equal(ids[: len(head)], head):
        return ids[len(head) :]
    return tokenizer.encode(text, special=special)


def _check_specials(tokenizer: Tokenizer, text: str, ids: np.ndarray, special_ids: set[int]) -> None:
    """Refuses ids with other special tokens than are spelled out letter by letter."""
    wanted = [part for part in pieces(text, tokenizer.specials) if isinstance(part, int)]
    found = [i for i in ids.tolist() if i in special_ids]
    if found == wanted:
        return
    unknown = set(tokenizer.encode(text).tolist())  # what stands for unknown text is no forgery
    if [i for i in found if i not in unknown] != [i for i in wanted if i not in unknown]:
        raise UserError(
            "a message holds text that this tokenizer normalises to a special token: take it out of the content"
        )


def _same(one: Callable[[], np.ndarray], other: Callable[[], np.ndarray]) -> bool:
    try:
        return np.array_equal(one(), other())
    except UserError:  # an alphabet without the letter
        return True


def _guard(tokenizer: Tokenizer) -> str:
    """A text to encode in front of a continuation, so that no space is put before it; "" where none would be."""
    try:
        letter = tokenizer.encode("a")
        if tokenizer.decode([*letter, *letter]) == "aa":
            return ""
        for guard in "\n.-0|":
            head, ids = tokenizer.encode(guard), tokenizer.encode(guard + "a")
            behind = len(head) > 0 and np.array_equal(ids[: len(head)], head)
            if behind and tokenizer.decode([*letter, *ids[len(head) :]]) == "aa":
                return guard
    except UserError:  # an alphabet without these characters adds no space
        pass
    return ""
