"""The held-out text as batches that know how many bytes they predict."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from lmjax.batch import Batch
from lmjax.data.cache import TokenCache
from lmjax.data.packing import Rows
from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer


class Validation(Sequence[Batch]):
    """Fixed batches that cover the held-out text; the last one is filled up with rows of padding.

    `bytes` and `targets` count over all processes.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        caches: Sequence[TokenCache],
        tokenizer: Tokenizer,
        batch_size: int,
        max_batches: int | None,
        process_index: int,
        process_count: int,
        isolated: bool,
    ):
        if batch_size % process_count:
            raise UserError(
                f"batch size {batch_size} does not divide over {process_count} processes: choose a multiple"
            )
        self._rows, self._caches, self._tokenizer, self._isolated = rows, caches, tokenizer, isolated
        self._batch_size, self._local = batch_size, batch_size // process_count
        self._offset = process_index * self._local
        self._first = np.cumsum([0, *(len(r) for r in rows)])
        self._batches = -(-int(self._first[-1]) // batch_size)
        self._whole = max_batches is None or max_batches >= self._batches
        self._length = self._batches if self._whole else int(max_batches or 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        return self._gather(index % len(self) * self._batch_size + self._offset, self._local)

    def _gather(self, first: int, count: int) -> Batch:
        parts: list[Batch] = []
        for rows, begin, end in zip(self._rows, self._first, self._first[1:]):
            inside = np.arange(max(first, begin), min(first + count, end)) - begin
            if inside.size:
                parts.append(rows.gather(inside))
        missing = count - sum(len(p.tokens) for p in parts)
        if missing:
            T = self._rows[0].sequence_length
            ids, weight = np.zeros((missing, T), np.int32), np.zeros((missing, T), np.float32)
            parts.append(Batch(ids, ids, weight, ids, ids))
        fields = ("tokens", "targets", "mask", "segments", "positions")
        return Batch(*(np.concatenate([getattr(p, f) for p in parts]) for f in fields))

    @functools.cached_property
    def _counts(self) -> tuple[int, int]:
        """(targets, bytes of the targets if ids have fixed lengths, else 0)."""
        table = self._tokenizer.token_bytes()
        targets = total = 0
        for i in range(len(self)):
            batch = self._gather(i * self._batch_size, self._batch_size)
            counted = batch.targets[batch.mask > 0]
            targets += counted.size
            total += 0 if table is None else int(table[counted].sum(dtype=np.int64))
        return targets, total

    @property
    def targets(self) -> int:
        """Targets with weight, which is what losses are averaged over."""
        return self._counts[0]

    @functools.cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of text that these targets stand for: bits per byte = nats / ln 2 / bytes.

        Exact for tokenizers whose ids have fixed lengths, and for any tokenizer over the whole held-out text;
        an estimate in proportion to the targets for another tokenizer (WordPiece, SentencePiece) with
        `max_batches`.
        """
        if self._tokenizer.token_bytes() is not None:
            return self._counts[1]
        whole = self.text_bytes()
        if self._whole:
            return whole
        everything = Validation(self._rows, self._caches, self._tokenizer, self._batch_size, None, 0, 1, self._isolated)
        return round(whole * self.targets / everything.targets)

    def text_bytes(self) -> int:
        """Bytes of the whole held-out text less what its unpredicted tokens stand for, from document
        lengths."""
        total = 0
        for cache in self._caches:
            tokens, ends = cache.tokens("validation"), cache.ends("validation")
            if not tokens.size:
                continue
            total += int(cache.document_bytes("validation").sum())
            starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
            special = set(self._tokenizer.specials.values())
            for i in starts if self._isolated else starts[:1]:  # a stream's or document's first token is not predicted
                if int(tokens[i]) not in special:
                    total -= len(self._tokenizer.decode(tokens[i : i + 1].astype(np.int64)).encode())
        return total
