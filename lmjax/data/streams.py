"""Several iterators of batches as one of named batches, for objectives over more than one stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lmjax.batch import Batch


class Together(Iterator[dict[str, Batch]]):
    """A batch of each stream at a time; ends where the first one does.

    >>> both = Together({"a": iter([1, 2]), "b": iter([3, 4])})
    >>> next(both)
    {'a': 1, 'b': 3}
    """

    def __init__(self, streams: Mapping[str, Iterator[Batch]]):
        self._streams = dict(streams)

    def __next__(self) -> dict[str, Batch]:
        return {name: next(stream) for name, stream in self._streams.items()}

    def get_state(self) -> dict[str, Any]:
        """The position of every stream."""
        return {name: stream.get_state() for name, stream in self._streams.items()}  # type: ignore[attr-defined]

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves every stream."""
        for name, stream in self._streams.items():
            stream.set_state(state[name])  # type: ignore[attr-defined]

    def close(self) -> None:
        """Ends the threads that read ahead."""
        for stream in self._streams.values():
            if hasattr(stream, "close"):
                stream.close()
