"""Rows of a batch from a stream of tokens. Each maker is a fixed list of rows: row i is a pure function of i.

All three give every token of every document as a target exactly once an epoch (`CropRows`: in expectation),
except a document's first, which has nothing before it; with document markers that first token is the bos.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Protocol

import numpy as np

from lmjax.batch import Batch
from lmjax.data.order import hash64


class Rows(Protocol):
    """A list of rows of `sequence_length` positions."""

    sequence_length: int

    def __len__(self) -> int:
        """Rows in one epoch."""
        ...

    def gather(self, index: np.ndarray) -> Batch:
        """The rows of an index int [B], as a `Batch` of NumPy arrays [B, T]."""
        ...

    def draw(self, place: np.ndarray, seed: int) -> np.ndarray:
        """Which row stands at each place (int64 [B], counted over epochs) of the shuffled stream."""
        ...


class Shuffled(Sized):
    def draw(self, place: np.ndarray, seed: int) -> np.ndarray:
        from lmjax.data.order import permute

        epoch, index = np.divmod(np.asarray(place, np.int64), len(self))
        return permute(index, len(self), seed, epoch)


def _windows(tokens: np.ndarray, count: int, stride: int, width: int) -> np.ndarray:
    """A view [count, width] of overlapping rows: no copy until rows are gathered."""
    step = tokens.strides[0]
    return np.lib.stride_tricks.as_strided(tokens, (count, width), (stride * step, step), writeable=False)


class _Constants:
    """Mask, segments and positions of rows of one full segment: the same read-only arrays each time."""

    def __init__(self, sequence_length: int):
        self._length = sequence_length
        self._held: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __call__(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if rows not in self._held:
            shape = (rows, self._length)
            arrays = (
                np.ones(shape, np.float32),
                np.ones(shape, np.int32),
                np.tile(np.arange(self._length, dtype=np.int32), (rows, 1)),
            )
            for array in arrays:
                array.flags.writeable = False
            self._held[rows] = arrays
        return self._held[rows]


class BlockRows(Shuffled):
    """Consecutive blocks: row i reads tokens [iT, (i+1)T) and predicts [iT+1, (i+1)T+1), the last padded.

    Args:
      tokens: int [N], the documents end to end.
      sequence_length: T.
      ends: int64 [D], where documents end: each becomes a segment, and no target crosses. None: all is one
        document.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, ends: np.ndarray | None = None):
        self.sequence_length = sequence_length
        self._tokens, self._ends = tokens, ends
        self._full = max(0, (len(tokens) - 1) // sequence_length)
        self._rows = max(0, -(-(len(tokens) - 1) // sequence_length))
        self._view = _windows(tokens, self._full, sequence_length, sequence_length + 1)
        self._constants = _Constants(sequence_length)

    def __len__(self) -> int:
        return self._rows

    def gather(self, index: np.ndarray) -> Batch:
        index = np.asarray(index, np.int64)
        T = self.sequence_length
        ragged = self._full < self._rows and int(index.max(initial=0)) == self._full
        if ragged:  # the padded row at the end of the stream
            ids = np.zeros((len(index), T + 1), np.int32)
            whole = index < self._full
            ids[whole] = self._view[index[whole]]
            tail = self._tokens[self._full * T :]
            ids[~whole, : len(tail)] = tail
        else:
            ids = self._view[index].astype(np.int32)
        if self._ends is None and not ragged:
            return Batch(ids[:, :-1], ids[:, 1:], *self._constants(len(index)))
        # A row is a run of spans: it starts one, and so does each document that starts inside it.
        starts = index * T
        row, column = np.arange(len(index)), np.zeros(len(index), np.int64)
        mask = np.ones((len(index), T), np.float32)
        if self._ends is not None:
            first = np.searchsorted(self._ends, starts, side="right")
            counts = np.searchsorted(self._ends, starts + T, side="right") - first
            cut_row = np.repeat(row, counts)
            which = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
            cut = self._ends[which] - starts[cut_row]  # 1..T: a document ends just before this column
            mask[cut_row, cut - 1] = 0.0
            inside = cut < T
            row, column = np.concatenate([row, cut_row[inside]]), np.concatenate([column, cut[inside]])
        if ragged:  # the stream's last token is an input without a target: padding, like all behind it
            padding = np.flatnonzero(~whole)
            mask[padding, len(tail) - 1 :] = 0.0
            row = np.concatenate([row, padding])
            column = np.concatenate([column, np.full(len(padding), len(tail) - 1)])
        segments, positions = _spans(row * T + column, len(index), T)
        if ragged:
            segments[padding, len(tail) - 1 :] = 0
        return Batch(ids[:, :-1], ids[:, 1:], mask, segments, positions)


def _spans(begins: np.ndarray, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """(segments, positions) int32 [B, T] of rows cut into spans that begin at these flat places."""
    begins = np.unique(begins)
    lengths = np.diff(begins, append=B * T)
    row = begins // T
    number = np.arange(len(begins)) - np.searchsorted(row, np.arange(B))[row] + 1
    segments = np.repeat(number.astype(np.int32), lengths)
    positions = np.arange(B * T, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)
    return segments.reshape(B, T), positions.reshape(B, T)


class CropRows:
    """Windows of T + 1 tokens at random places of one stream, documents not told apart (as nanoGPT).

    Args:
      tokens: int [N], N > T.
      sequence_length: T.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int):
        self.sequence_length = sequence_length
        self._places = max(0, len(tokens) - sequence_length)
        self._view = _windows(tokens, self._places, 1, sequence_length + 1)
        self._constants = _Constants(sequence_length)

    def __len__(self) -> int:
        return self._places

    def draw(self, place: np.ndarray, seed: int) -> np.ndarray:
        return (hash64(seed, place) % np.uint64(self._places)).astype(np.int64)

    def gather(self, index: np.ndarray) -> Batch:
        ids = self._view[index].astype(np.int32)
        return Batch(ids[:, :-1], ids[:, 1:], *self._constants(len(index)))


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit-decreasing bin packing (Johnson 1974; for language models Ding et al. 2024).

    Args:
      lengths: int [P], each in [1, capacity].
      capacity: size of a bin.

    Returns:
      (order int64 [P], starts int64 [R+1]): bin r holds the pieces order[starts[r]:starts[r+1]].

    >>> order, starts = best_fit(np.array([3, 5, 2, 4]), 7)
    >>> [order[a:b].tolist() for a, b in zip(starts, starts[1:])]
    [[1, 2], [3, 0]]
    """
    lengths = np.asarray(lengths, np.int64)
    bin_of = np.empty(len(lengths), np.int64)
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left
    # Bit s is set where open_bins[s] holds a bin: the tightest fit is the lowest set bit from `length` up.
    rooms = 0
    bins = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, chosen, bins = capacity, bins, bins + 1
        bin_of[piece] = chosen
        if room > length:
            open_bins[room - length].append(chosen)
            rooms |= 1 << (room - length)
    order = np.lexsort((-lengths, bin_of))
    return order, np.searchsorted(bin_of[order], np.arange(bins + 1))


class PackedRows(Shuffled):
    """Whole documents packed into rows, best fit first; documents longer than a row are cut into full ones.

    A document of n tokens makes n - 1 (input, target) pairs, and a piece of it holds up to T of them, so that
    pieces meet without losing a target. Nothing but the padding at the end of a row is wasted.

    Args:
      tokens: int [N].
      sequence_length: T.
      ends: int64 [D], where documents end.
      learned: bool [N], which tokens count as targets; None: all.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, ends: np.ndarray, learned: np.ndarray | None = None):
        self.sequence_length = T = sequence_length
        self._tokens, self._learned = tokens, learned
        ends = np.asarray(ends, np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
        pairs = np.maximum(ends - starts - 1, 0)
        pieces = -(-pairs // T)
        document = np.repeat(np.arange(len(ends)), pieces)
        number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = starts[document] + number * T
        length = np.minimum(pairs[document] - number * T, T)
        order, self._row_starts = best_fit(length, T)
        self._begin, self._length = begin[order], length[order]

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def gather(self, index: np.ndarray) -> Batch:
        index, T = np.asarray(index, np.int64), self.sequence_length
        B = len(index)
        counts = self._row_starts[index + 1] - self._row_starts[index]
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # piece within its row
        piece = np.repeat(self._row_starts[index], counts) + nth
        # The spans of all rows, the padding at the end of each row being one more, numbered 0.
        spans = counts.sum() + B
        last = np.cumsum(counts + 1) - 1
        real = np.ones(spans, bool)
        real[last] = False
        begin, length, number = (np.zeros(spans, np.int64) for _ in range(3))
        begin[real], length[real], number[real] = self._begin[piece], self._length[piece], nth + 1
        length[last] = T - np.add.reduceat(length, last - counts)
        offset = np.cumsum(length) - length
        place = np.arange(B * T)
        source = place + np.repeat(begin - offset, length)
        segments = np.repeat(number.astype(np.int32), length)
        inside = segments > 0
        # Padding reads whatever stands at the beginning (hence the clipping), and is blanked.
        tokens = self._tokens.take(source, mode="clip").astype(np.int32)
        tokens *= inside
        source += 1
        targets = self._tokens.take(source, mode="clip").astype(np.int32)
        targets *= inside
        mask = inside if self._learned is None else inside & self._learned.take(source, mode="clip")
        positions = (place - np.repeat(offset, length)).astype(np.int32)
        leaves = (tokens, targets, mask.astype(np.float32), segments, positions)
        return Batch(*(leaf.reshape(B, T) for leaf in leaves))
