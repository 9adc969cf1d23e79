"""The order of examples: permutations, schedules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.data.order import mixture_schedule, permute


@settings(max_examples=60, deadline=None, derandomize=True)
@given(length=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_each_epoch_is_a_permutation(length, seed, epoch):
    out = permute(np.arange(length), length, seed, epoch)
    np.testing.assert_array_equal(np.sort(out), np.arange(length))


def test_any_element_alone_and_epochs_together():
    length = 777
    whole = [permute(np.arange(length), length, 5, e) for e in range(3)]
    assert permute(np.array([13]), length, 5, 2)[0] == whole[2][13]
    mixed = permute(np.tile(np.arange(length), 3), length, 5, np.repeat(np.arange(3), length))
    np.testing.assert_array_equal(mixed, np.concatenate(whole))


def test_seeds_and_epochs_differ_and_neighbours_part():
    length = 10_000
    a, b = (permute(np.arange(length), length, 1, e) for e in range(2))
    c = permute(np.arange(length), length, 2, 0)
    for other in (b, c, np.arange(length)):
        assert (a == other).sum() < 20  # about one coincidence is expected of chance
    # Neighbours land independently: mean distance of two uniform draws is a third of the range.
    assert np.abs(np.diff(a)).mean() == pytest.approx(length / 3, rel=0.03)
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.05


def test_a_small_set_sees_every_permutation_about_equally_often():
    seen = {}
    for seed in range(1200):
        key = tuple(permute(np.arange(3), 3, seed))
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 6 and min(seen.values()) > 130 and max(seen.values()) < 270


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_mixture_proportions_are_exact_and_evenly_spread(weights):
    source, counts = mixture_schedule([w / 10 for w in weights])
    np.testing.assert_array_equal(counts * sum(weights), np.array(weights) * len(source))
    for k, count in enumerate(counts):
        so_far = np.cumsum(source == k)
        expected = np.arange(1, len(source) + 1) * count / len(source)
        assert np.abs(so_far - expected).max() <= len(weights)


def test_a_mixture_without_short_period_is_rounded_and_leaves_no_source_out():
    source, counts = mixture_schedule([1e-9, 0.3333333, 0.6666667])
    assert len(source) == 65536 and counts.min() == 1 and counts.sum() == 65536
    np.testing.assert_allclose(counts[1:] / 65536, [1 / 3, 2 / 3], atol=1 / 30000)
