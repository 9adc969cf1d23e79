"""The training stream: exact resume, processes that partition it, mixtures, prefetch."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from lmjax.data.loader import BatchIterator, BatchPlan
from lmjax.data.packing import BlockRows, CropRows, PackedRows
from lmjax.errors import UserError

FIELDS = ("tokens", "targets", "mask", "segments", "positions")
TOKENS = np.arange(1, 602).astype(np.uint16)
ENDS = np.array([50, 51, 200, 450, 601])
MAKERS = {
    "blocks": lambda: [BlockRows(TOKENS, 6, ENDS)],
    "packed": lambda: [PackedRows(TOKENS, 6, ENDS)],
    "crop": lambda: [CropRows(TOKENS, 6)],
    "mixture": lambda: [
        BlockRows(TOKENS, 6, ENDS),
        PackedRows(TOKENS + 1000, 6, ENDS),
        CropRows(TOKENS + 2000, 6),
    ],
}


def plan(name="blocks", batch_size=8, **kwargs):
    makers = MAKERS[name]()
    return BatchPlan(makers, batch_size, [0.5, 0.3, 0.2][: len(makers)], seed=7, **kwargs)


def equal(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_at_any_step_equals_the_uninterrupted_stream(name, prefetch):
    straight = [plan(name).batch(s) for s in range(30)]  # more than two epochs of 100 rows
    for stop in (0, 1, 13, 29):
        first = BatchIterator(plan(name), "data", prefetch)
        before = [next(first) for _ in range(stop)]
        state = json.loads(json.dumps(first.get_state()))
        for _ in range(stop % 3):
            next(first)  # handed out after the state was taken: must not matter
        first.close()
        second = BatchIterator(plan(name), "data", prefetch)
        if stop == 13:
            next(second)  # a used iterator is moved all the same
        second.set_state(state)
        after = [next(second) for _ in range(30 - stop)]
        second.close()
        assert all(equal(a, b) for a, b in zip(before + after, straight))


def test_the_state_counts_what_was_handed_out_not_what_was_prefetched():
    iterator = BatchIterator(plan(), "data", prefetch=4)
    for n in range(1, 4):
        next(iterator)
        time.sleep(0.02)  # let the thread run ahead
        assert iterator.get_state() == {"examples": 8 * n, "data": "data"}
    iterator.close()


@pytest.mark.parametrize("name", MAKERS)
def test_processes_partition_every_batch(name):
    for step in (0, 3, 600):
        whole = plan(name).batch(step)
        parts = [plan(name, process_index=p, process_count=4).batch(step) for p in range(4)]
        for field in FIELDS:
            np.testing.assert_array_equal(np.concatenate([getattr(p, field) for p in parts]), getattr(whole, field))


def test_the_stream_does_not_depend_on_the_batch_size():
    a, b = plan(batch_size=8), plan(batch_size=12)
    rows_a = np.concatenate([a.batch(s).tokens for s in range(1500)])
    rows_b = np.concatenate([b.batch(s).tokens for s in range(1000)])
    np.testing.assert_array_equal(rows_a, rows_b)  # over a chunk boundary of the lookup too
    iterator = BatchIterator(plan(batch_size=12), "data", 0)
    iterator.set_state({"examples": 40, "data": "data"})
    np.testing.assert_array_equal(next(iterator).tokens, rows_a[40:52])


def test_each_epoch_holds_each_row_once_in_another_order():
    rows = BlockRows(TOKENS, 6, ENDS)
    assert len(rows) == 100
    starts = np.concatenate([plan(batch_size=10).batch(s).tokens[:, 0] for s in range(20)])
    for epoch in (starts[:100], starts[100:]):
        np.testing.assert_array_equal(np.sort(epoch), TOKENS[:600:6])
    assert (starts[:100] != starts[100:]).sum() > 80


def test_another_seed_is_another_order():
    a, b = (BatchPlan([BlockRows(TOKENS, 6, ENDS)], 50, seed=s).batch(0).tokens for s in (0, 1))
    assert not np.array_equal(a, b)


def test_a_mixture_keeps_its_proportions_and_each_source_its_epochs():
    tokens = np.concatenate([plan("mixture", 10).batch(s).tokens for s in range(100)])
    which = (tokens[:, 0] - 1) // 1000
    assert np.bincount(which).tolist() == [500, 300, 200]
    first = tokens[which == 0][:100, 0]
    np.testing.assert_array_equal(np.sort(first), TOKENS[:600:6])


def test_an_error_in_the_thread_reaches_the_caller_each_time():
    class Broken(BlockRows):
        def gather(self, index):
            raise OSError("the disk is gone")

    iterator = BatchIterator(BatchPlan([Broken(TOKENS, 6)], 4), prefetch=2)
    for _ in range(2):
        with pytest.raises(OSError, match="disk is gone"):
            next(iterator)
    iterator.close()


def test_closing_and_forgetting_ends_the_thread():
    def running():
        return sum(t.name == "lmjax-data" for t in threading.enumerate())

    before = running()
    iterator = BatchIterator(plan(), prefetch=2)
    next(iterator)
    assert running() == before + 1
    iterator.close()
    assert running() == before
    next(iterator)
    del iterator
    assert running() == before


@pytest.mark.parametrize("state", [{}, {"examples": -1}, {"examples": "3"}, None, {"examples": 8, "data": "other"}])
def test_a_foreign_or_damaged_state_is_refused(state):
    with pytest.raises(UserError, match=r"data position|data state"):
        BatchIterator(plan(), "data").set_state(state)


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="does not divide over 3 processes"):
        plan(process_count=3)
    with pytest.raises(UserError, match="too little text"):
        BatchPlan([CropRows(TOKENS[:5], 6)], 4)
    with pytest.raises(UserError, match="at least 1"):
        plan(batch_size=0)
