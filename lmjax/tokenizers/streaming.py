"""Text from ids that arrive a few at a time, and strings at which it stops.

Whatever the chunks, the parts joined are the `decode` of all ids, cut before the first stop string. Ids are fed one by
one, at a cost that does not grow with the text: see `lmjax.tokenizers.incremental`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer, check_ids
from lmjax.tokenizers.incremental import incremental_decoder


def find_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Where a text stops: at the stop string that is complete first, the longest of those complete at once.

    Args:
      text: the text.
      stop: stop strings.

    Returns:
      (the index it begins at, the string), or None where none occurs.

    >>> find_stop("one two", ("two", "wo", "ne"))
    (1, 'ne')
    """
    found = [(text.index(string) + len(string), -len(string), string) for string in stop if string in text]
    if not found:
        return None
    end, _, string = min(found)
    return end - len(string), string


class TextStream:
    r"""Turns ids into text as they come.

    Args:
      tokenizer: of the ids.
      stop: what ends the text: strings, and ids such as the mark of a turn's end. Neither is part of the text.

    Attributes:
      stopped: the stop string or id that was met, None before.

    Raises:
      UserError: an empty stop string.

    >>> from lmjax.tokenizers import ByteTokenizer
    >>> stream = TextStream(ByteTokenizer(), stop="END")
    >>> [stream.push(chunk) for chunk in (b"caf\xc3", b"\xa9 E", b"ast E", b"NDing")]
    ['caf', 'é ', 'East ', '']
    >>> stream.stopped, stream.text, stream.kept
    ('END', 'café East ', 11)
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | int | Sequence[str | int] = ()):
        stop = (stop,) if isinstance(stop, str | int) else tuple(stop)
        if "" in stop:
            raise UserError("a stop string is empty, which would stop before any text: leave it out")
        self._strings = tuple(each for each in stop if isinstance(each, str))
        self._ids = {int(each) for each in stop if not isinstance(each, str)}
        self._vocab_size = tokenizer.vocab_size
        self._decoder = incremental_decoder(tokenizer)
        self._released: list[str] = []
        self._length = 0  # characters released
        self._held = ""  # settled text that may be the beginning of a stop string
        self._pushed = 0
        # (ids, characters of their text) wherever ids end on a settled character, from the last one released on.
        self._marks = deque([(0, 0)])
        self._finished = False
        self.stopped: str | int | None = None

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._released)

    @property
    def kept(self) -> int:
        """How many of the pushed ids stand before the stop; all of them while there is none.

        An id that reaches into the stop string is not kept, nor are ids that only it would make whole characters
        of: what the kept ids decode to is `text` or the beginning of it.
        """
        if self.stopped is None:
            return self._pushed
        return max(ids for ids, characters in self._marks if characters <= self._length)

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids make certain; "" once a stop was met.

        Args:
          ids: the next ids, any number.

        Raises:
          UserError: an id outside the vocabulary, or a stream that is finished.
        """
        if self._finished:
            raise UserError("this stream of text is finished: begin another")
        first = len(self._released)
        for i in check_ids(ids, self._vocab_size).tolist():
            if self.stopped is not None:
                break
            if i in self._ids:
                self._settle(self._decoder.finish(), mark=True)
                self._end(i)
                break
            before, own = self._decoder.feed(i)
            if before:
                self._settle(before, mark=True)
            self._pushed += 1
            self._settle(own, mark=not self._decoder.pending)
        return "".join(self._released[first:])

    def finish(self) -> str:
        """The rest of the text: what an unfinished character decodes to, and what might have begun a stop string."""
        first = len(self._released)
        if not self._finished:
            self._settle(self._decoder.finish(), mark=True)
            self._end(None)
        self._finished = True
        return "".join(self._released[first:])

    def _settle(self, text: str, mark: bool) -> None:
        """Takes certain text in; gives out what no stop string can begin in."""
        if self.stopped is not None:
            return
        self._held += text
        if mark:
            self._marks.append((self._pushed, self._length + len(self._held)))
        if text:
            found = find_stop(self._held, self._strings)
            if found:
                self._release(found[0])
                self.stopped = found[1]
            else:
                self._release(len(self._held) - _open_stop(self._held, self._strings))
        while len(self._marks) > 1 and self._marks[1][1] <= self._length:
            self._marks.popleft()

    def _end(self, stopped: int | None) -> None:
        if self.stopped is None:
            self._release(len(self._held))
            self.stopped = stopped

    def _release(self, count: int) -> None:
        if count:
            self._released.append(self._held[:count])
            self._held = self._held[count:]
            self._length += count


def _open_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text, which holds no stop string, may begin one."""
    lengths = (n for string in stop for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n]))
    return max(lengths, default=0)
