"""The loop: what is recorded, when hooks run, how it stops, and that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import gc
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.training.checkpoint import Checkpointer, read_metadata, steps
from lmjax.training.config import CheckpointConfig, LoopConfig
from lmjax.training.loop import Hook, resume, run
from lmjax.training.metrics import read_metrics
from lmjax.training.prefetch import Feed
from lmjax.training.run_directory import RunDirectory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    x: Any
    rng: Any


def new_state():
    return State(jnp.int32(0), jnp.ones(5), jax.random.key_data(jax.random.key(7)))


@jax.jit
def quadratic_step(state, batch):
    """Noisy gradient descent on |x - target|^2 / 2. A batch that holds a NaN is skipped."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    loss = jnp.mean((state.x - batch) ** 2) / 2
    noise = 0.01 * jax.random.normal(key, state.x.shape)
    bad = ~jnp.isfinite(loss)
    x = jnp.where(bad, state.x, state.x - 0.1 * (state.x - batch + noise))
    metrics = {"loss": loss, "nonfinite/quadratic": bad.astype(jnp.float32), "tokens": jnp.float32(5)}
    return State(state.step + 1, x, state.rng), metrics


class Counter:
    """Batches 0, 1, 2, ... with a position that can be saved."""

    def __init__(self, bad=()):
        self.at, self.bad = 0, bad

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return np.full(5, np.nan if self.at in self.bad else np.sin(self.at), np.float32)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


QUIET: dict[str, Any] = dict(progress=False)


def test_records_every_interval_and_the_first_and_last_step(tmp_path):
    with RunDirectory.open(tmp_path / "run") as directory:
        result = run(
            quadratic_step,
            new_state(),
            Counter(),
            config=LoopConfig(23, log_every=5),
            run_directory=directory,
            **QUIET,
        )
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 5, 10, 15, 20, 23]
    state = new_state()
    for record_step, batch in enumerate(Counter(), start=1):
        state, metrics = quadratic_step(state, batch)
        for record in records:
            if record["step"] == record_step:
                assert record["loss"] == float(metrics["loss"])
        if record_step == 23:
            break
    np.testing.assert_array_equal(result.state.x, state.x)
    assert result.step == 23 and result.exit_code == 0 and result.metrics["loss"] == records[-1]["loss"]
    assert records[1]["tokens_per_second"] == pytest.approx(5 / records[1]["step_seconds"])
    assert "tokens_per_second" not in records[0], "the step that compiles has no speed"


def test_metrics_are_read_one_step_late():
    events = []

    class Lazy:
        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            events.append(("read", self.step))
            return np.zeros(())

    def step_fn(state, batch):
        events.append(("step", state + 1))
        return state + 1, {"loss": Lazy(state + 1)}

    import lmjax.training.recording as recording

    def fetch(tree):
        return {name: np.asarray(value) for name, value in tree.items()}

    original, recording.jax.device_get = recording.jax.device_get, fetch
    try:
        run(step_fn, 0, Counter(), config=LoopConfig(9, log_every=4, prefetch=0), start=0, **QUIET)
    finally:
        recording.jax.device_get = original
    assert [event for event in events if event[0] == "read"] == [
        ("read", 1),
        ("read", 4),
        ("read", 8),
        ("read", 9),
    ]
    assert events.index(("read", 4)) == events.index(("step", 5)) + 1
    assert events.index(("read", 8)) == events.index(("step", 9)) + 1


def test_hooks_run_at_their_steps_in_order(tmp_path):
    calls = []
    evaluate = lambda state: calls.append(("evaluate", int(state.step))) or {"loss": 10.0 - int(state.step)}
    sample = lambda state: calls.append(("sample", int(state.step))) or f"text {int(state.step)}"
    hook = Hook(4, lambda step, state: calls.append(("hook", step)) or {"extra": float(step)})
    config = LoopConfig(10, log_every=3, eval_every=4, sample_every=5)
    with RunDirectory.open(tmp_path / "run") as directory:
        with Checkpointer(directory.checkpoints, CheckpointConfig(every=3, keep_last=9)) as checkpointer:
            result = run(
                quadratic_step, new_state(), Counter(), config=config, checkpointer=checkpointer,
                run_directory=directory, evaluate=evaluate, sample=sample, hooks=[hook], **QUIET,
            )  # fmt: skip
        assert steps(directory.checkpoints) == [3, 6, 9, 10]
        # Evaluated at 3, 6 and 9 too: their checkpoints are ranked by the validation loss.
        assert calls == [
            ("evaluate", 3), ("evaluate", 4), ("hook", 4), ("sample", 5), ("evaluate", 6), ("evaluate", 8),
            ("hook", 8), ("evaluate", 9), ("evaluate", 10), ("sample", 10),
        ]  # fmt: skip
        assert read_metadata(directory.checkpoints, "best")["step"] == 10
        assert read_metadata(directory.checkpoints, 6)["metric"] == 4.0
        assert (directory.path / "samples" / "step_00000005.txt").read_text() == "text 5"
        assert [r["validation/loss"] for r in directory.records() if "validation/loss" in r] == [
            7,
            6,
            4,
            2,
            1,
            0,
        ]
        assert (directory.path / "plots" / "loss.png").stat().st_size > 5000
    assert result.metrics["validation/loss"] == 0.0 and result.metrics["extra"] == 8.0


def test_an_unknown_best_metric_is_refused(tmp_path):
    config = CheckpointConfig(every=2, best_metric="validation/bleu")
    with (
        Checkpointer(tmp_path, config) as checkpointer,
        pytest.raises(UserError, match="'validation/bleu' is not among"),
    ):
        run(
            quadratic_step, new_state(), Counter(), config=LoopConfig(4), checkpointer=checkpointer,
            evaluate=lambda state: {"loss": 1.0}, **QUIET,
        )  # fmt: skip


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, prefetch):
    def train(folder, stops):
        for stop in stops:
            with RunDirectory.open(folder) as directory, Checkpointer(directory.checkpoints) as checkpointer:
                batches = Counter()
                state, start = resume(checkpointer, new_state(), batches, directory)
                result = run(
                    quadratic_step, state, batches, config=LoopConfig(stop, log_every=1, prefetch=prefetch),
                    start=start, checkpointer=checkpointer, run_directory=directory, **QUIET,
                )  # fmt: skip
        records = read_metrics(folder / "metrics.jsonl")
        return result.state, [(record["step"], record["loss"]) for record in records]

    whole, losses = train(tmp_path / "whole", [20])
    parts, again = train(tmp_path / "parts", [7, 8, 20])
    assert losses == again and [step for step, _ in losses] == list(range(1, 21))
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        np.testing.assert_array_equal(x, y)


def test_records_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    with RunDirectory.open(tmp_path) as directory, Checkpointer(directory.checkpoints) as checkpointer:
        run(
            quadratic_step, new_state(), Counter(), config=LoopConfig(4, log_every=1),
            checkpointer=checkpointer, run_directory=directory, **QUIET,
        )  # fmt: skip
        directory.write(5, {"loss": 1.0})
        directory.write_sample(5, "of a step that will be made again")
        batches = Counter()
        _, start = resume(checkpointer, new_state(), batches, directory)
        assert start == 4 and batches.at == 4
        assert [record["step"] for record in directory.records()] == [1, 2, 3, 4]
        assert not list((directory.path / "samples").iterdir())


def test_a_finished_run_is_evaluated_and_left_as_it_is(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        run(quadratic_step, new_state(), Counter(), config=LoopConfig(3), checkpointer=checkpointer, **QUIET)
        state, start = resume(checkpointer, new_state(), Counter())
        result = run(
            quadratic_step, state, Counter(), config=LoopConfig(3), start=start, checkpointer=checkpointer,
            evaluate=lambda state: {"loss": float(state.x[0])}, **QUIET,
        )  # fmt: skip
    assert result.step == 3 and result.metrics == {"validation/loss": float(state.x[0])}
    assert steps(tmp_path) == [3]


def test_resuming_with_data_that_has_no_position_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        run(quadratic_step, new_state(), Counter(), config=LoopConfig(3), checkpointer=checkpointer, **QUIET)
        with pytest.raises(UserError, match="resume with the data the run began with"):
            resume(checkpointer, new_state(), iter([np.ones(5)]))


def test_skipped_updates_are_warned_of_by_name_and_end_the_run():
    config = LoopConfig(50, log_every=10, max_skipped=3)
    with pytest.warns(RuntimeWarning, match="step 7 was skipped: quadratic or its gradient was not finite"):
        result = run(quadratic_step, new_state(), Counter(bad=(7, 8)), config=config, **QUIET)
    assert result.metrics["skipped"] == 2.0
    with (
        pytest.warns(RuntimeWarning, match="step 20"),
        pytest.raises(UserError, match="3 updates in a row up to step 22"),
    ):
        run(quadratic_step, new_state(), Counter(bad=range(20, 50)), config=config, **QUIET)
    never = dataclasses.replace(config, max_skipped=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(quadratic_step, new_state(), Counter(bad=range(20, 50)), config=never, **QUIET).step == 50


def test_data_that_ends_early_ends_the_run_and_saves(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        batches = iter([np.ones(5, np.float32)] * 4)
        result = run(quadratic_step, new_state(), batches, config=LoopConfig(9), checkpointer=checkpointer, **QUIET)
    assert result.step == 4 and result.exit_code == 0 and steps(tmp_path) == [4]


def test_an_error_in_the_data_is_raised_and_no_thread_is_left():
    def broken():
        yield np.ones(5, np.float32)
        raise RuntimeError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        run(quadratic_step, new_state(), broken(), config=LoopConfig(9), **QUIET)
    assert threading.active_count() == before
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_feed_gives_the_position_of_the_batch_in_hand():
    batches = Counter()
    feed = Feed(batches, depth=4)
    for expected in (1, 2, 3):
        _, position = next(feed)
        assert position == {"at": expected}
    deadline = time.monotonic() + 5
    while batches.at < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batches.at > 3, "nothing was read ahead"
    feed.close()
    at = batches.at
    time.sleep(0.05)
    assert batches.at == at


def test_a_feed_puts_batches_on_a_sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    feed = Feed(iter([np.ones((4, 3))]), sharding=sharding)
    batch, position = next(feed)
    assert batch.sharding == sharding and position is None
    assert next(feed, None) is None and next(feed, None) is None
    feed.close()


def test_the_loop_costs_few_calls_a_step():
    """What the loop costs beside the step is its calls, counted on its own thread: some 34 of them."""
    step_fn = lambda state, batch: (state, {"loss": loss})
    loss = jnp.float32(1)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    config = LoopConfig(2000, log_every=10)
    sys.setprofile(count)
    try:
        run(step_fn, 0, iter([0] * config.steps), config=config, start=0, **QUIET)
    finally:
        sys.setprofile(None)
    assert 0 < calls / config.steps < 60


TRAIN = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_loop import *
with RunDirectory.open(sys.argv[1]) as directory, Checkpointer(directory.checkpoints) as checkpointer:
    batches = Counter()
    state, start = resume(checkpointer, new_state(), batches, directory)
    def slow(state, batch):
        time.sleep(0.005)
        return quadratic_step(state, batch)
    result = run(slow, state, batches, config=LoopConfig(int(sys.argv[3]), log_every=1), start=start,
                 checkpointer=checkpointer, run_directory=directory)
sys.exit(result.exit_code)
"""


@pytest.mark.parametrize("kind, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_and_the_run_goes_on(tmp_path, kind, code):
    def start(steps):
        command = [sys.executable, "-c", TRAIN, str(tmp_path), str(Path(__file__).parent), str(steps)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    process = start(100_000)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while (not metrics.exists() or metrics.read_text().count("\n") < 10) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(kind)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert f"{kind.name}: stopping after step" in text
    (step,) = steps(tmp_path / "checkpoints")
    assert [record["step"] for record in read_metrics(metrics)] == list(range(1, step + 1))
    process = start(step + 5)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0, text
    state, batches = new_state(), Counter()
    expected = []
    for _ in range(step + 5):
        state, values = quadratic_step(state, next(batches))
        expected.append(float(values["loss"]))
    assert [record["loss"] for record in read_metrics(metrics)] == expected
