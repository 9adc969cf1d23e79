"""The Grain view of the data: the same batches, Grain's own checkpoints, Grain's own operators."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("grain")

from lmjax.data import DataConfig, SourceConfig, load
from lmjax.data import grain as our_grain

FIELDS = ("tokens", "targets", "mask", "segments", "positions")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grain")
    (folder / "a.txt").write_text("|".join(f"document {i} " * (1 + i % 9) for i in range(150)))
    (folder / "b.txt").write_text("|".join(f"DOCUMENT {i} " * (1 + i % 9) for i in range(150)))
    other = SourceConfig(path=str(folder / "b.txt"), separator="|")
    config = DataConfig(
        path=str(folder / "a.txt"),
        separator="|",
        mixture=(other,),
        sequence_length=16,
        packing="best_fit",
        cache_dir=str(folder / "cache"),
    )
    return load(config, 8, progress=False)


def test_grain_gives_the_batches_of_the_loader_and_resumes(data):
    iterator = iter(our_grain.batches(data))
    for step in range(5):
        got, want = next(iterator), data.batch(step)
        assert all(np.array_equal(getattr(got, f), getattr(want, f)) for f in FIELDS)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = iter(our_grain.batches(data))
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh).tokens, data.batch(5).tokens)


def test_grain_steps_end_where_told(data):
    assert len(list(our_grain.batches(data, steps=3))) == 3


def test_rows_go_through_grains_shuffle_mix_and_batch(data):
    mixed = our_grain.rows(data.plan.rows, [0.25, 0.75], seed=1).batch(40, batch_fn=our_grain.stack)
    batch = mixed[0]
    assert batch.tokens.shape == (40, 16) and batch.mask.dtype == np.float32
    tokens = np.concatenate([mixed[i].tokens for i in range(10)])
    lower = ((tokens >= 97) & (tokens < 123)).any(axis=1)
    assert lower.mean() == pytest.approx(0.25, abs=0.03)
    single = our_grain.rows(data.plan.rows[:1], seed=1)
    epoch = {single[i].tokens.tobytes() for i in range(len(data.plan.rows[0]))}
    everything = data.plan.rows[0].gather(np.arange(len(data.plan.rows[0]))).tokens
    assert epoch == {row.tobytes() for row in everything}
