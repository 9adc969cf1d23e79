"""Batches from documents that can only be read in order: packed as they come, a remainder in the state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lmjax.batch import Batch, next_token_batch
from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer


class StreamingBatches(Iterator[Batch]):
    """Packs a pass over texts into batches [B, T], block after block, documents isolated by segment ids.

    Nothing is dropped: what does not fill a batch waits in a remainder, which the state carries. Row and row
    overlap by one token, so that each token is a target once. At the end of the texts another pass begins
    (`repeat`), or the last batch is padded and the iterator ends.

    Args:
      documents: opens a fresh pass over the texts, always the same one.
      tokenizer: encodes them.
      batch_size: rows of this process's batch.
      sequence_length: T.
      markers: put bos (or else eos) before and eos behind each document, where the tokenizer has them.
      repeat: begin again at the end.
      process_index, process_count: this process takes every process_count-th document.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[str]],
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_length: int,
        *,
        markers: bool = True,
        repeat: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._open, self._tokenizer = documents, tokenizer
        self._shape = (batch_size, sequence_length)
        self._repeat, self._share = repeat, (process_index, process_count)
        prefix = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
        self._prefix = [prefix] if markers and prefix is not None else []
        self._suffix = [tokenizer.eos] if markers and tokenizer.eos is not None else []
        self._epoch = self._taken = 0  # passes finished, documents of this pass taken
        self._ids = np.zeros(0, np.int32)  # the remainder: tokens not yet handed out as inputs
        self._starts = np.zeros(0, np.int64)  # where in it documents start
        self._pass: Iterator[str] | None = None
        self._over = False

    def __iter__(self) -> StreamingBatches:
        return self

    def _document(self) -> np.ndarray | None:
        """The next document's ids, or None at the end of everything."""
        for fresh in (False, True):
            if self._pass is None:
                first = self._share[0] + self._taken * self._share[1]
                self._pass = itertools.islice(iter(self._open()), first, None, self._share[1])
            text = next(self._pass, None)
            if text is not None:
                self._taken += 1
                ids = self._tokenizer.encode(text) if text else np.zeros(0, np.int32)
                return np.concatenate([self._prefix, ids, self._suffix]).astype(np.int32) if text else ids
            if fresh and self._taken == 0:
                raise UserError("the stream of documents is empty: there is no text to train on")
            if not self._repeat:
                return None
            self._pass, self._taken, self._epoch = None, 0, self._epoch + 1
        raise UserError("the stream of documents is empty: there is no text to train on")

    def __next__(self) -> Batch:
        B, T = self._shape
        blocks, starts, held, epoch = [self._ids], [self._starts], len(self._ids), self._epoch
        while held < B * T + 1 and not self._over:
            ids = self._document()
            if ids is None:
                self._over = True
            elif ids.size:
                blocks.append(ids)
                starts.append(np.array([held], np.int64))
                held += ids.size
                epoch = self._epoch
            elif self._epoch > epoch + 1:  # a whole pass gave nothing
                raise UserError("the stream of documents is empty: there is no text to train on")
        ids, begin = np.concatenate(blocks), np.concatenate(starts)
        if len(ids) < 2:
            raise StopIteration
        used = min(B * T + 1, len(ids))
        flat = np.zeros(B * T + 1, np.int32)
        flat[:used] = ids[:used]
        document = np.zeros(B * T + 1, np.int32)
        document[begin[begin < used]] = 1
        document = np.cumsum(document, dtype=np.int32) + 1
        document[used:] = 0
        rows = np.arange(B)[:, None] * T + np.arange(T + 1)
        segments = document[rows]
        segments = np.where(segments > 0, segments - segments[:, :1] + 1, 0)
        self._ids = ids[B * T :]  # the last token handed out as a target is the first input to come
        begin = begin - B * T
        self._starts = begin[begin >= 0]
        if self._over:
            self._ids = self._ids if len(self._ids) > 1 else self._ids[:0]
        return next_token_batch(flat[rows], segments)

    def get_state(self) -> dict[str, Any]:
        """JSON-able: pass, documents taken, and the remainder."""
        return {
            "epoch": self._epoch,
            "documents": self._taken,
            "over": self._over,
            "remainder": self._ids.tolist(),
            "starts": self._starts.tolist(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where a state was taken; the documents before it are read past, not tokenized."""
        try:
            self._epoch, self._taken, self._over = state["epoch"], state["documents"], state["over"]
            self._ids = np.array(state["remainder"], np.int32)
            self._starts = np.array(state["starts"], np.int64)
        except (KeyError, TypeError, ValueError):
            raise UserError("the state of a stream of documents is damaged: use one that get_state returned") from None
        self._pass = None

    def close(self) -> None:
        """Forgets the open pass; the next batch opens it again."""
        self._pass = None
