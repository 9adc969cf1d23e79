"""Documents read in order: nothing lost, nothing doubled, the remainder in the state."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.data.streaming import StreamingBatches
from lmjax.errors import UserError
from lmjax.tokenizers import ByteTokenizer

FIELDS = ("tokens", "targets", "mask", "segments", "positions")
TEXTS = ["alpha beta", "", "x", "a much longer document than a row can hold, by far", "end", "é漢"] * 3


def batches(texts=TEXTS, B=2, T=7, **kwargs):
    return StreamingBatches(lambda: iter(texts), ByteTokenizer(eos="<e>"), B, T, **kwargs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 9))
def test_each_token_is_a_target_once_and_documents_stay_apart(texts, B, T):
    if not any(texts):
        return
    got = list(batches(texts, B, T, repeat=False))
    targets = np.concatenate([b.targets[b.mask > 0] for b in got])
    expected = np.concatenate([[*t.encode(), 256] for t in texts if t])
    np.testing.assert_array_equal(targets, expected)
    for b in got:
        assert b.tokens.shape == (B, T)
        inside = b.segments[:, 1:] > 0
        follows = (b.segments[:, 1:] == b.segments[:, :-1]) & inside
        np.testing.assert_array_equal(b.tokens[:, 1:][follows], b.targets[:, :-1][follows])
        np.testing.assert_array_equal(b.positions[:, 1:][inside & ~follows], 0)
        assert (b.tokens[:, 1:][inside & ~follows] == 256).all()  # a new segment begins with the mark of a document
        ended = follows & (b.tokens[:, 1:] == 256)  # and nothing follows the mark of its end
        assert not (ended[:, :-1] & follows[:, 1:]).any()


@pytest.mark.parametrize("share", [{}, {"process_index": 1, "process_count": 2}])
def test_resume_at_any_step_is_exact_including_the_remainder(share):
    straight = batches(**share)
    expected = [next(straight) for _ in range(60)]  # several passes
    for stop in (0, 1, 7, 20, 45):
        first = batches(**share)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = batches(**share)
        second.set_state(state)
        for want in expected[stop:]:
            got = next(second)
            assert all(np.array_equal(getattr(got, f), getattr(want, f)) for f in FIELDS)
    assert expected[-1].tokens.any() and straight.get_state()["epoch"] > 1


def test_a_finished_stream_stays_finished_after_resume():
    first = batches(repeat=False)
    assert len(list(first)) > 1
    second = batches(repeat=False)
    second.set_state(first.get_state())
    assert list(second) == []


def test_processes_share_the_documents():
    texts = [f"document {i}" for i in range(11)]
    seen = []
    for p in range(3):
        part = batches(texts, repeat=False, process_index=p, process_count=3)
        ids = np.concatenate([b.targets[b.mask > 0] for b in part])
        seen += bytes(ids[ids < 256].astype(np.uint8)).decode().replace("document", "\ndocument").split("\n")[1:]
    assert sorted(seen) == sorted(texts)


def test_an_empty_stream_is_refused():
    for texts in ([], ["", ""]):
        with pytest.raises(UserError, match="empty"):
            next(StreamingBatches(lambda texts=texts: iter(texts), ByteTokenizer(), 2, 4))


def test_a_damaged_state_is_refused():
    with pytest.raises(UserError, match="damaged"):
        batches().set_state({"epoch": 0})
