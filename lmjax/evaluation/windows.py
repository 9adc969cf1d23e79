"""Batches that score documents token by token: each whole, or through a sliding window.

A target is scored exactly once. The first token of a document has nothing to be predicted from, so it is
scored only where a marker (bos or eos) stands before it; the bytes counted are those of scored tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lmjax.batch import Batch
from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Row:
    """A stretch of one document: tokens[start : end] are inputs, and targets from `scored` on count.

    Target i of a document is its token i + 1.
    """

    document: int
    start: int
    end: int
    scored: int


@dataclasses.dataclass(frozen=True)
class TextBatches(Sequence[Batch]):
    """Batches over documents; the last of a length is filled up with rows of padding.

    Attributes:
      documents: arrays of ids, markers included.
      groups: the rows of each batch, and its length.
      batch_size: rows of a batch.
      bytes: UTF-8 bytes that the scored targets stand for, or None where the tokenizer cannot tell.
    """

    documents: Sequence[np.ndarray]
    groups: Sequence[tuple[int, Sequence[_Row]]]
    batch_size: int
    bytes: int | None

    def __len__(self) -> int:
        return len(self.groups)

    @functools.cached_property
    def targets(self) -> int:
        """How many targets are scored."""
        return sum(row.end - row.scored for _, rows in self.groups for row in rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        length, rows = self.groups[index]
        shape = (self.batch_size, length)
        tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        mask = np.zeros(shape, np.float32)
        for b, row in enumerate(rows):
            ids, n = self.documents[row.document], row.end - row.start
            tokens[b, :n] = ids[row.start : row.end]
            targets[b, :n] = ids[row.start + 1 : row.end + 1]
            segments[b, :n] = 1
            positions[b, :n] = np.arange(n)
            mask[b, row.scored - row.start : n] = 1.0
        return Batch(tokens, targets, mask, segments, positions)


def document_batches(
    documents: Sequence[Any], *, batch_size: int, max_length: int | None = None, bytes_of: Any = None
) -> TextBatches:
    """Each document in one row, seen whole. Rows are padded to powers of two: few shapes to compile.

    Args:
      documents: arrays of ids, markers included.
      batch_size: rows of a batch.
      max_length: the most tokens that may be read at once; None for any.
      bytes_of: int [V], the bytes each id stands for (`tokenizer.token_bytes()`), or None.

    Raises:
      UserError: a document is longer than `max_length`, or there is nothing to score.

    >>> batches = document_batches([np.arange(4), np.arange(2)], batch_size=2)
    >>> batches.targets, [batch.tokens.shape for batch in batches]
    (4, [(2, 4), (2, 1)])
    """
    longest = max((len(document) - 1 for document in documents), default=0)
    if max_length is not None and longest > max_length:
        raise UserError(
            f"a document of {longest + 1} tokens is longer than the {max_length} that are read at once; "
            "evaluate with a sliding window instead"
        )
    return _batches(documents, batch_size, bytes_of, lambda n: [(0, n, 0)])


def sliding_batches(
    documents: Sequence[Any], *, window: int, stride: int, batch_size: int, bytes_of: Any = None
) -> TextBatches:
    """Windows of `window` tokens that move on by `stride`; each scores what the one before had not reached.

    Every target but those of the first window has at least `window - stride` tokens before it. A stride of
    `window` is the fastest, a stride of 1 gives each target all the context there can be.

    Args:
      documents: arrays of ids, markers included.
      window: tokens read at once.
      stride: tokens from one window to the next, from 1 to `window`.
      batch_size: rows of a batch.
      bytes_of: as in `document_batches`.

    Raises:
      UserError: a stride outside 1 to `window`, or nothing to score.

    >>> batches = sliding_batches([np.arange(8)], window=4, stride=2, batch_size=4)
    >>> batches[0].mask.astype(int).tolist()
    [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    """
    if window < 1 or not 1 <= stride <= window:
        raise UserError(
            f"a stride of {stride} does not fit a window of {window}; choose one from 1 to the window"
        )

    def cut(targets: int) -> Iterator[tuple[int, int, int]]:
        done = 0
        for start in range(0, targets, stride):
            end = min(start + window, targets)
            yield start, end, done
            if (done := end) == targets:
                return

    return _batches(documents, batch_size, bytes_of, cut, window)


def _batches(
    documents: Sequence[Any],
    batch_size: int,
    bytes_of: Any,
    cut: Callable[[int], Any],
    window: int | None = None,
) -> TextBatches:
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} rows cannot be made; give at least 1")
    ids = [np.asarray(document) for document in documents]
    rows: dict[int, list[_Row]] = {}
    for number, document in enumerate(ids):
        for start, end, scored in cut(len(document) - 1) if len(document) > 1 else ():
            bucket = 1 << (end - start - 1).bit_length()
            length = bucket if window is None else min(bucket, window)
            rows.setdefault(length, []).append(_Row(number, start, end, scored))
    if not rows:
        raise UserError("there is nothing to score: the text has fewer than two tokens")
    groups = [
        (length, rows[length][first : first + batch_size])
        for length in sorted(
            rows, reverse=True
        )  # the largest first: what does not fit in memory fails at once
        for first in range(0, len(rows[length]), batch_size)
    ]
    scored = None
    if bytes_of is not None:
        scored = sum(int(bytes_of[document[1:]].sum(dtype=np.int64)) for document in ids if len(document) > 1)
    return TextBatches(ids, groups, batch_size, scored)
