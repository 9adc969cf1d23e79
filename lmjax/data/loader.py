"""Batches in a fixed, seeded order: batch s is a pure function of (seed, s), so a state is one integer."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lmjax.batch import Batch
from lmjax.data.order import hash64, mixture_schedule
from lmjax.data.packing import Rows
from lmjax.errors import UserError

_CHUNK = 4096  # places whose rows are looked up together: the permutation costs far less by the thousand


class BatchPlan:
    """Which rows each batch holds.

    The training stream is an endless sequence of places. With one source, place p is row `draw(p)` of it:
    each epoch is a permutation. With several, a periodic schedule spreads the places over the sources in
    exact proportion. Batch s covers the places from s * batch_size on; the processes share each batch in
    equal slices.

    Args:
      rows: the rows of each source; all of one sequence length.
      batch_size: rows of the global batch.
      weights: share of each source.
      seed: names the order.
      process_index, process_count: which slice of each batch is ours.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        batch_size: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} must be at least 1")
        if batch_size % process_count:
            raise UserError(
                f"batch size {batch_size} does not divide over {process_count} processes: choose a multiple"
            )
        if not 0 <= process_index < process_count:
            raise UserError(f"process index {process_index} must lie in [0, {process_count})")
        for number, source in enumerate(rows):
            if len(source) == 0:
                raise UserError(
                    f"source {number} has too little text for one row of {source.sequence_length} tokens: "
                    "shorten data.sequence_length or add text"
                )
        self.rows, self.batch_size, self.seed = list(rows), batch_size, seed
        self._local = batch_size // process_count
        self._offset = process_index * self._local
        self._schedule, self._counts = mixture_schedule([1.0] * len(rows) if weights is None else weights)
        self._rank = np.zeros_like(self._schedule)
        for number in range(len(rows)):
            mine = self._schedule == number
            self._rank[mine] = np.arange(mine.sum())
        self._seeds = [int(hash64(seed, number)) for number in range(len(rows))]
        self._held: tuple[int, np.ndarray, np.ndarray] = (-1, np.zeros(0), np.zeros(0))

    def _chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) of the places of one chunk."""
        held = self._held
        if held[0] == number:
            return held[1], held[2]
        place = np.arange(number * _CHUNK, (number + 1) * _CHUNK, dtype=np.int64)
        period, slot = np.divmod(place, len(self._schedule))
        source = self._schedule[slot]
        own = period * self._counts[source] + self._rank[slot]  # place within the source's own stream
        row = np.empty(_CHUNK, np.int64)
        for k, maker in enumerate(self.rows):
            mine = source == k
            row[mine] = maker.draw(own[mine], self._seeds[k])
        self._held = (number, source, row)  # one assignment: readers in other threads see the old or the new
        return source, row

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source [count], row [count]) at the places from `first` on."""
        number, begin = divmod(first, _CHUNK)
        source, row = self._chunk(number)
        if begin + count <= _CHUNK:
            return source[begin : begin + count], row[begin : begin + count]
        rest_source, rest_row = self.locate((number + 1) * _CHUNK, begin + count - _CHUNK)
        return np.concatenate([source[begin:], rest_source]), np.concatenate([row[begin:], rest_row])

    def at(self, place: int) -> Batch:
        """This process's slice of the batch that starts at a place."""
        source, row = self.locate(place + self._offset, self._local)
        if len(self.rows) == 1:
            return self.rows[0].gather(row)
        return self._interleave(source, row)

    def batch(self, step: int) -> Batch:
        """This process's slice of batch number `step`, from 0."""
        return self.at(step * self.batch_size)

    def _interleave(self, source: np.ndarray, row: np.ndarray) -> Batch:
        present = np.unique(source)
        parts = [self.rows[k].gather(row[source == k]) for k in present]
        back = np.empty(len(source), np.int64)
        back[np.concatenate([np.flatnonzero(source == k) for k in present])] = np.arange(len(source))
        fields = ("tokens", "targets", "mask", "segments", "positions")
        return Batch(*(np.concatenate([getattr(p, f) for p in parts])[back] for f in fields))


class BatchIterator(Iterator[Batch]):
    """Endless iterator over a plan, with prefetch in a thread and a state of one integer.

    `get_state` counts what was handed out, never what was prefetched. The state names the data it was taken
    on (`fingerprint`), and does not depend on batch size or process count: a run may resume with others.

    Args:
      plan: where batches come from.
      fingerprint: what the order depends on besides the place; checked by `set_state`.
      prefetch: batches made ahead; 0 makes each when asked.
    """

    def __init__(self, plan: BatchPlan, fingerprint: str = "", prefetch: int = 2):
        self._plan, self._fingerprint, self._prefetch = plan, fingerprint, prefetch
        self._place = 0
        self._worker: _Worker | None = None

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._prefetch == 0:
            batch = self._plan.at(self._place)
        else:
            if self._worker is None:
                self._worker = _Worker(self._plan, self._place, self._prefetch)
            batch = self._worker.next()
        self._place += self._plan.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able: {"examples": rows handed out over all processes, "data": fingerprint}."""
        return {"examples": self._place, "data": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues behind the batches a state has counted; `UserError` if it was taken on other data."""
        if not isinstance(state, dict) or not isinstance(state.get("examples"), int) or state["examples"] < 0:
            raise UserError(f"data state {state!r} is not one that get_state returned: the checkpoint is damaged")
        if state.get("data", self._fingerprint) != self._fingerprint:
            raise UserError(
                f"the checkpoint's data position was taken on other data ({state['data']}, here "
                f"{self._fingerprint}): restore the data settings, or start a new run from its parameters"
            )
        self.close()
        self._place = state["examples"]

    def close(self) -> None:
        """Ends the thread; the iterator may be used on and starts another."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def __del__(self) -> None:
        if getattr(self, "_worker", None) is not None:
            self.close()


class _Worker:
    """A daemon thread that makes batches ahead of the one who asks. It holds no reference to the iterator."""

    def __init__(self, plan: BatchPlan, place: int, depth: int):
        self._ready: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(plan, place), daemon=True, name="lmjax-data")
        self._thread.start()

    def _run(self, plan: BatchPlan, place: int) -> None:
        while not self._stopped.is_set():
            try:
                item: Any = plan.at(place)
            except BaseException as error:  # raised again where the batch is asked for
                item = error
            self._ready.put(item)
            if isinstance(item, BaseException):
                return
            place += plan.batch_size

    def next(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)
            raise item
        return item

    def stop(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)
