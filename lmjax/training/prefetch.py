"""Batches read and put on the device ahead of the step that wants them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

_END = object()


def placer(sharding: Any) -> Callable[[Any], Any]:
    """What puts a batch in its place: a function as it is, a sharding by `jax.device_put`, None nothing."""
    if sharding is None:
        return lambda batch: batch
    if callable(sharding):
        return sharding
    return lambda batch: jax.device_put(batch, sharding)


class Feed:
    """Iterates over (batch, data_state): `data_state` is the position right after that batch.

    The position travels with its batch, so that a checkpoint never counts batches that were read ahead and
    not used.

    Args:
      batches: an iterator; its `get_state()`, if it has one, returns a snapshot as JSON values, or a function that
        makes them of it when a checkpoint is written.
      depth: batches ahead, read by a thread; 0 reads each when it is asked for.
      sharding: see `placer`.
    """

    def __init__(self, batches: Iterator[Any], depth: int = 2, sharding: Any = None) -> None:
        self._batches = iter(batches)
        self._get_state = getattr(batches, "get_state", None) or (lambda: None)
        self._place = placer(sharding)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
            self._thread = threading.Thread(target=self._fill, name="lmjax-prefetch", daemon=True)
            self._thread.start()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> tuple[Any, Any]:
        if self._thread is None:
            return self._read()
        item = self._queue.get()
        if item is _END:
            self._queue.put(_END)
            raise StopIteration
        if isinstance(item, BaseException):
            self._queue.put(_END)
            raise item
        return item

    def close(self) -> None:
        """Stops reading; the iterator is not touched after this returns."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():
                try:
                    self._queue.get(timeout=0.02)  # a thread that waits for room must see the stop
                except queue.Empty:
                    continue
            self._thread.join()

    def _read(self) -> tuple[Any, Any]:
        batch = next(self._batches)
        return self._place(batch), self._get_state()

    def _fill(self) -> None:
        while not self._stop.is_set():
            try:
                item: Any = self._read()
            except StopIteration:
                item = _END
            except BaseException as error:  # to be raised where the batch is asked for
                item = error
            self._queue.put(item)
            if item is _END or isinstance(item, BaseException):
                return
