"""The same data as Grain datasets, for pipelines that want Grain's transformations, workers or checkpoints.

`batches(dataset)` is the whole pipeline with one element a batch: Grain's per-element costs are paid once a
batch, not once a row. `rows(...)` gives single rows, to shuffle, mix and batch with Grain's own operators.
Importing Grain takes about a second, so it happens here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.batch import Batch
from lmjax.data.dataset import Dataset
from lmjax.data.loader import BatchPlan
from lmjax.data.packing import Rows
from lmjax.errors import UserError

_ENDLESS = 1 << 40


def _grain() -> Any:
    try:
        import grain
    except ImportError:
        raise UserError("Grain pipelines need the package grain: pip install grain") from None
    return grain


class BatchSource:
    """Grain's RandomAccessDataSource over a plan: element s is batch number s."""

    def __init__(self, plan: BatchPlan, steps: int = _ENDLESS):
        self._plan, self._steps = plan, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        return self._plan.batch(int(step))


class RowSource:
    """Grain's RandomAccessDataSource over rows: element i is row i, a `Batch` of arrays [T]."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        row = self._rows.gather(np.array([index], np.int64))
        return Batch(row.tokens[0], row.targets[0], row.mask[0], row.segments[0], row.positions[0])


def batches(dataset: Dataset, steps: int | None = None) -> Any:
    """`grain.IterDataset` of training batches, equal to `dataset.train()`; its iterators checkpoint.

    Reads in the calling thread: Grain's default of 16 threads is slower for work this small.
    """
    grain = _grain()
    source = BatchSource(dataset.plan, steps or _ENDLESS)
    return grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def rows(makers: Sequence[Rows], weights: Sequence[float] | None = None, seed: int = 0) -> Any:
    """`grain.MapDataset` of single rows: each source shuffled and repeated, mixed by weight.

    Batch it with `stack`: `rows(makers).batch(32, batch_fn=stack)`.
    """
    grain = _grain()
    each = [grain.MapDataset.source(RowSource(m)).shuffle(seed=seed + i).repeat() for i, m in enumerate(makers)]
    return each[0] if len(each) == 1 else grain.MapDataset.mix(each, weights)


def stack(elements: Sequence[Batch]) -> Batch:
    """Rows [T] into a batch [B, T]."""
    fields = ("tokens", "targets", "mask", "segments", "positions")
    return Batch(*(np.stack([getattr(e, f) for e in elements]) for f in fields))
