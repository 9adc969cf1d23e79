"""One example a row, in batches of similar lengths: few shapes, little padding, and a state of one integer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmjax.batch import Batch
from lmjax.data.loader import BatchPlan
from lmjax.data.order import hash64, permute
from lmjax.data.packing import Shuffled

_WINDOW = 1 << 16  # the most places that are sorted together


class Order(Shuffled):
    """Examples 0, 1, ... of one source, for a plan that says only which comes when: each epoch a permutation."""

    sequence_length = 0

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def gather(self, index: np.ndarray) -> Batch:
        raise NotImplementedError("an order has no rows")


class BucketRows:
    """Padded rows of several sources, one example each; the rows of a batch are all of one length.

    The shuffled stream of examples is cut into windows of whole batches. In each window the examples are sorted by
    bucket and cut into batches, and the batches are shuffled. What does not fill a batch of its own bucket goes
    into the next longer one, so that every example is a row and no row is without one.

    Args:
      tokens: int [N], the examples of all sources end to end.
      learned: bool [N], which tokens count as targets.
      ends: int64 [D], where examples end; each has from 2 to T + 1 tokens.
      sizes: examples of each source, in order; they add up to D.
      edges: the lengths of rows, increasing; the last one is T.
      batch_size: rows of the global batch.
      weights: share of each source.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        learned: np.ndarray,
        ends: np.ndarray,
        sizes: Sequence[int],
        edges: Sequence[int],
        batch_size: int,
        weights: Sequence[float] | None = None,
    ):
        self.sequence_length = int(edges[-1])
        self._tokens, self._learned = tokens, learned
        self._ends = np.asarray(ends, np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), self._ends[:-1]])
        self._edges = np.asarray(edges, np.int64)
        self._bucket = np.searchsorted(self._edges, self._ends - self._starts - 1)
        self._sizes, self._weights = list(sizes), weights
        self._first = np.cumsum([0, *sizes])
        self._batch_size = batch_size
        largest = max(_WINDOW // batch_size, 1) * batch_size
        self._window = min(-(-len(self._ends) // batch_size) * batch_size, largest)
        self._plans: dict[int, BatchPlan] = {}
        self._held: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def draw(self, place: np.ndarray, seed: int) -> np.ndarray:
        """Row numbers: that of the example, and the bucket of its batch times D."""
        window, within = np.divmod(np.asarray(place, np.int64), self._window)
        row = np.empty(len(within), np.int64)
        for number in np.unique(window).tolist():
            mine = window == number
            row[mine] = self._arranged(number, seed)[within[mine]]
        return row

    def _arranged(self, window: int, seed: int) -> np.ndarray:
        """The row at each place of a window."""
        held = self._held
        if held[0] == (window, seed):
            return held[1]
        if seed not in self._plans:
            self._plans[seed] = BatchPlan([Order(size) for size in self._sizes], 1, self._weights, seed)
        source, example = self._plans[seed].locate(window * self._window, self._window)
        example = example + self._first[source]
        example = example[np.argsort(self._bucket[example], kind="stable")].reshape(-1, self._batch_size)
        bucket = self._bucket[example].max(axis=1, keepdims=True)
        shuffled = permute(np.arange(len(example)), len(example), int(hash64(seed, 1)), window)
        rows = (bucket * len(self) + example)[shuffled].reshape(-1)
        self._held = ((window, seed), rows)
        return rows

    def gather(self, index: np.ndarray) -> Batch:
        bucket, example = np.divmod(np.asarray(index, np.int64), len(self))
        T = int(self._edges[bucket.max()])
        place = np.arange(T)
        inside = place < (self._ends - self._starts - 1)[example][:, None]
        source = np.where(inside, self._starts[example][:, None] + place, 0)
        tokens = np.where(inside, self._tokens[source], 0).astype(np.int32)
        after = np.where(inside, source + 1, 0)
        targets = np.where(inside, self._tokens[after], 0).astype(np.int32)
        mask = (inside & self._learned[after]).astype(np.float32)
        positions = np.where(inside, place, 0).astype(np.int32)
        return Batch(tokens, targets, mask, inside.astype(np.int32), positions)
