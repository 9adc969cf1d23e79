"""Rows: every token a target once, no crossing of documents, positions and masks right."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.batch import positions_within_segments
from lmjax.data.packing import BlockRows, CropRows, PackedRows, best_fit

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
CHECKED = settings(max_examples=60, deadline=None, derandomize=True)


def corpus(lengths):
    """Tokens that name their own place (1..N) and where documents end."""
    return np.arange(1, sum(lengths) + 1).astype(np.uint16), np.cumsum(lengths).astype(np.int64)


def everything(rows):
    return rows.gather(np.arange(len(rows)))


def check_batch(batch, ends):
    """What holds for every isolating batch over `corpus`."""
    for leaf, dtype in (
        (batch.tokens, np.int32),
        (batch.targets, np.int32),
        (batch.segments, np.int32),
        (batch.positions, np.int32),
        (batch.mask, np.float32),
    ):
        assert leaf.dtype == dtype and leaf.shape == batch.tokens.shape
    counted = batch.mask > 0
    assert (batch.segments[counted] > 0).all()
    assert (batch.targets[counted] == batch.tokens[counted] + 1).all()
    document = np.searchsorted(ends, batch.tokens - 1, side="right")  # of each input
    following = np.searchsorted(ends, batch.targets - 1, side="right")
    assert (document[counted] == following[counted]).all()
    for row in range(len(batch.tokens)):
        segments = batch.segments[row]
        inside = segments > 0
        number = {}
        for d, s in zip(document[row][inside], segments[inside]):
            number.setdefault(s, set()).add(int(d))
        assert sorted(number) == list(range(1, len(number) + 1))
        assert all(len(documents) == 1 for documents in number.values())  # no cross-talk
        cut = np.flatnonzero(~inside)
        assert cut.size == 0 or (cut == np.arange(cut[0], len(segments))).all()  # padding only at the end
    real = batch.segments > 0
    np.testing.assert_array_equal(batch.positions[real], positions_within_segments(batch.segments)[real])


def targets_of(lengths, ends):
    """Every token but the first of each document."""
    firsts = {1, *(int(e) + 1 for e in ends[:-1])}
    return {t for t in range(1, sum(lengths) + 1) if t not in firsts}


@CHECKED
@given(LENGTHS, st.integers(1, 17))
def test_blocks_cover_every_target_once(lengths, T):
    tokens, ends = corpus(lengths)
    rows = BlockRows(tokens, T, ends)
    assert len(rows) == -(-(len(tokens) - 1) // T)
    if not len(rows):
        return
    batch = everything(rows)
    check_batch(batch, ends)
    seen = collections.Counter(batch.targets[batch.mask > 0].tolist())
    assert seen == dict.fromkeys(targets_of(lengths, ends), 1)
    inputs = collections.Counter(batch.tokens[batch.segments > 0].tolist())
    assert inputs == dict.fromkeys(range(1, len(tokens)), 1)  # the stream without its last token


@CHECKED
@given(LENGTHS, st.integers(1, 17))
def test_packed_rows_cover_every_target_once(lengths, T):
    tokens, ends = corpus(lengths)
    rows = PackedRows(tokens, T, ends)
    if not len(rows):
        assert max(lengths) == 1
        return
    batch = everything(rows)
    check_batch(batch, ends)
    seen = collections.Counter(batch.targets[batch.mask > 0].tolist())
    assert seen == dict.fromkeys(targets_of(lengths, ends), 1)
    # Every position that is not padding carries a target, and no two rows would fit into one.
    np.testing.assert_array_equal(batch.mask > 0, batch.segments > 0)
    used = np.sort((batch.segments > 0).sum(axis=1))
    assert len(used) < 2 or used[0] + used[1] > T


@CHECKED
@given(LENGTHS, st.integers(2, 17))
def test_documents_that_fit_a_row_are_never_cut(lengths, T):
    lengths = [min(n, T + 1) for n in lengths]
    tokens, ends = corpus(lengths)
    rows = PackedRows(tokens, T, ends)
    if not len(rows):
        return
    batch = everything(rows)
    pieces = collections.Counter()
    for row in range(len(rows)):
        for s in range(1, batch.segments[row].max() + 1):
            pieces[int(np.searchsorted(ends, batch.tokens[row][batch.segments[row] == s][0] - 1, side="right"))] += 1
    assert set(pieces.values()) == {1}


@CHECKED
@given(LENGTHS, st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_neighbours(lengths, T, random):
    tokens, ends = corpus(lengths)
    for rows in (BlockRows(tokens, T, ends), PackedRows(tokens, T, ends), BlockRows(tokens, T)):
        if not len(rows):
            continue
        index = np.array([random.randrange(len(rows)) for _ in range(5)])
        together = rows.gather(index)
        for i, one in enumerate(index):
            alone = rows.gather(np.array([one]))
            for field in ("tokens", "targets", "mask", "segments", "positions"):
                np.testing.assert_array_equal(getattr(together, field)[i], getattr(alone, field)[0])


def test_joined_blocks_are_one_segment_and_pad_the_last_row():
    tokens = np.arange(10, 21).astype(np.uint16)
    batch = everything(BlockRows(tokens, 4))
    assert batch.tokens.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 0]]
    assert batch.targets.tolist()[:2] == [[11, 12, 13, 14], [15, 16, 17, 18]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_crops_are_windows_spread_over_the_whole_text():
    tokens = np.arange(1, 101).astype(np.uint16)
    rows = CropRows(tokens, 8)
    index = rows.draw(np.arange(20_000), seed=3)
    assert index.min() == 0 and index.max() == 91  # the first and the last window there is
    counts = np.bincount(index, minlength=92)
    assert counts.min() > 140 and counts.max() < 300  # 217 each expected
    batch = rows.gather(index[:50])
    np.testing.assert_array_equal(batch.tokens[:, 0], index[:50] + 1)
    np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
    np.testing.assert_array_equal(np.diff(batch.tokens, axis=1), 1)


@CHECKED
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_fills_bins_within_the_known_bound(lengths):
    order, starts = best_fit(np.array(lengths), 20)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in order[a:b]) for a, b in itertools.pairwise(starts)]
    assert max(loads) <= 20
    assert len(loads) <= 11 / 9 * -(-sum(lengths) // 20) * 20 / 20 + 1 + len([n for n in lengths if n > 10])


def test_packing_wastes_little_when_rows_hold_several_documents():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, size=2000)
    rows = PackedRows(np.zeros(lengths.sum(), np.uint16), 256, np.cumsum(lengths))
    assert (lengths - 1).sum() / (len(rows) * 256) > 0.99


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_large_ids_survive(dtype):
    tokens = np.array([1, np.iinfo(dtype).max if dtype == np.uint16 else 200_000, 3, 4], dtype)
    for rows in (BlockRows(tokens, 3), PackedRows(tokens, 3, np.array([4])), CropRows(tokens, 3)):
        batch = rows.gather(np.array([0]))
        assert batch.tokens[0].tolist() == tokens[:3].tolist()
        assert batch.targets[0].tolist() == tokens[1:].tolist()
