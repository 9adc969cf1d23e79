"""Rewards: weights, what does not apply, and every way in which one can fail."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax import rl
from lmjax.errors import UserError
from lmjax.rl import rewards


def said(text: str = "", tokens: int = 4, finish: str = "eos", **record: Any) -> rl.Rollout:
    zeros = np.zeros(tokens, np.float32)
    return rl.Rollout(np.array([1]), np.arange(tokens), 0, zeros, zeros, finish, zeros == 0, "", text, record)


def judged(given: list[rl.Reward], rollouts: list[rl.Rollout]) -> rl.Scores:
    with rl.Judge(given) as judge:
        return judge(rollouts)()


def hangs(rollout: rl.Rollout) -> float:
    """For a process of its own: does what the text says."""
    if rollout.text == "hang":
        time.sleep(60)
    if rollout.text == "die":
        os._exit(1)
    if rollout.text == "exit":
        raise SystemExit(3)
    if rollout.text == "nan":
        return float("nan")
    return float(os.getpid())


async def asynchronous(rollout: rl.Rollout) -> float:
    await asyncio.sleep(60 if rollout.text == "hang" else 0.01)
    if rollout.text == "raise":
        raise ValueError("no")
    return 2.0


def test_weighted_sums_leave_out_what_does_not_apply():
    scores = judged(
        [
            rl.Reward("length", lambda rollout: len(rollout.text)),
            rl.Reward("rare", lambda rollout: None if rollout.text != "b" else 1.0, weight=0.5),
        ],
        [said("a"), said("b"), said("ccc")],
    )
    assert scores.total.tolist() == [1.0, 1.5, 3.0]
    metrics = scores.metrics()
    assert metrics["reward"] == pytest.approx(11 / 6) and metrics["rewards/rare/mean"] == 1.0
    assert metrics["rewards/length/std"] == pytest.approx(np.std([1, 1, 3], ddof=1))
    none = judged([rl.Reward("never", lambda rollout: None)], [said()])
    assert np.isnan(none.total).all() and not none.failures


def test_failures_are_counted_and_told_and_the_others_go_on():
    def bad(rollout: rl.Rollout) -> Any:
        if rollout.text == "raise":
            raise ValueError("cannot read it")
        return {"nan": float("nan"), "text": "many"}.get(rollout.text, 1.0)

    texts = ["raise", "fine", "nan", "text", "raise"]
    scores = judged([rl.Reward("bad", bad), rl.Reward("good", lambda rollout: 2.0)], [said(t) for t in texts])
    assert np.isnan(scores.values[0]).tolist() == [True, False, True, True, True]
    assert scores.total.tolist() == [2.0, 3.0, 2.0, 2.0, 2.0]
    assert scores.failures[("bad", "raised")] == (2, "ValueError: cannot read it")
    assert scores.failures[("bad", "not a number")][0] == 2
    assert scores.metrics()["rewards/bad/raised"] == 2.0
    assert "'bad' of 2 of 5 rollouts is missing (raised), the first: ValueError" in scores.report()[0]


def test_a_process_that_hangs_or_dies_is_replaced():
    reward = rl.Reward("apart", hangs, timeout=1.0, apart=True)
    with rl.Judge([reward], workers=1) as judge:
        scores = judge([said(text) for text in ("hang", "fine", "die", "fine", "nan", "exit", "fine")])()
        again = judge([said("fine"), said("fine")])()
    assert np.isnan(scores.values[0]).tolist() == [True, False, True, False, True, True, False]
    assert scores.failures[("apart", "timed out")] == (1, "after 1.0 seconds")
    assert scores.failures[("apart", "raised")][0] == 2  # died, and asked to exit
    assert os.getpid() not in scores.values[0]
    first, second, third = scores.values[0, [1, 3, 6]]
    assert first != second == third == again.values[0, 0]  # the process lives on between calls


def test_async_rewards_run_together():
    rollouts = [said("fine") for _ in range(50)] + [said("hang"), said("raise")]
    scores = judged([rl.Reward("async", asynchronous, timeout=1.0)], rollouts)
    assert (scores.values[0, :50] == 2.0).all()
    assert {kind: count for (_, kind), (count, _) in scores.failures.items()} == {"timed out": 1, "raised": 1}


def test_rewards_of_all_rollouts_together():
    model = rl.of_reward_model(lambda prompts, answers: [len(p) + 0.1 * len(a) for p, a in zip(prompts, answers)])
    scores = judged([rl.Reward("model", model, together=True)], [said(tokens=3), said(tokens=5)])
    assert scores.total.tolist() == [1.3, 1.5]
    short = judged([rl.Reward("short", lambda rollouts: [1.0], together=True)], [said(), said()])
    assert short.failures[("short", "raised")] == (2, "it gave 1 numbers for 2 rollouts")


def test_rewards_of_steps():
    steps = rl.Reward("steps", lambda rollout: [(1, 1.0), (3, 0.5)], weight=2.0)
    late = rl.Reward("late", lambda rollout: [(9, 1.0)])
    scores = judged([steps, late], [said()])
    assert scores.steps == (((1, 2.0), (3, 1.0)),) and scores.total.tolist() == [3.0]
    assert "outside the rollout's 4 tokens" in scores.failures[("late", "not a number")][1]


def test_lots_that_are_judged_apart_are_joined():
    reward = rl.Reward("length", lambda rollout: 1 / 0 if rollout.text == "bad" else len(rollout.text))
    lots = [[said("a"), said("bad")], [said("bbb"), said("bad"), said("bad")]]
    with rl.Judge([reward]) as judge:
        waiting = [judge(lot) for lot in lots]
        joined = rl.join_scores([wait() for wait in waiting])
    whole = judged([reward], [rollout for lot in lots for rollout in lot])
    assert np.array_equal(joined.values, whole.values, equal_nan=True) and joined.failures == whole.failures
    assert joined.take([0, 2]).total.tolist() == [1.0, 3.0]


def test_rules_for_ends():
    constant = lambda rollout: 2.0
    open_end = said(finish="length")
    assert rl.without_end(constant, 1.0)(said()) == 2.0
    assert rl.without_end(constant, 1.0)(open_end) == 1.0
    assert rl.without_end(constant, 1.0, "replace")(open_end) == -1.0
    penalty = rl.overlong(10, 4, 2.0)
    assert [penalty(said(tokens=n)) for n in (5, 6, 7, 8, 10, 12)] == [0.0, 0.0, -0.5, -1.0, -2.0, -2.0]
    assert rl.of_text(lambda text, answer: float(text == answer), "answer")(said("4", answer="4")) == 1.0


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: rl.Judge([]), "no reward"),
        (lambda: rl.Judge([rl.Reward("a", hangs), rl.Reward("a", hangs)]), "one name"),
        (lambda: rl.Judge([rl.Reward("a", lambda rollout: 1.0, apart=True)]), "cannot be sent to another process"),
        (lambda: rl.Reward("a", hangs, weight=float("nan")), "finite"),
        (lambda: rl.Reward("a", hangs, timeout=1.0), "apart=True"),
        (lambda: rl.Reward("a", hangs, timeout=-1.0, apart=True), "more than 0"),
        (lambda: rl.Reward("a", hangs, apart=True, together=True), "runs here"),
        (lambda: rl.overlong(4, 5), "buffer"),
        (lambda: rl.without_end(hangs, -1.0), "penalty"),
        (lambda: rl.Reward("a", asynchronous, apart=True), "no process of its own"),
        (lambda: rl.join_scores([]), "joined"),
        (lambda: rewards.Workers({}, 0), "at least 1"),
    ],
)
def test_rewards_that_cannot_be(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()


def test_what_makers_give_can_be_sent_to_a_process():
    length = rl.of_text(len)
    made = {
        "text": length,
        "subtract": rl.without_end(length, 1.0),
        "replace": rl.without_end(length, 1.0, "replace"),
        "long": rl.overlong(4, 4),
    }
    rollouts = [said("ab", tokens=2), said("abc", tokens=3, finish="length")]
    with rl.Judge([rl.Reward(name, function, apart=True) for name, function in made.items()]) as judge:
        scores = judge(rollouts)()
    assert scores.values.tolist() == [[2.0, 3.0], [2.0, 2.0], [2.0, -1.0], [-0.5, -0.75]]
    assert not scores.failures


async def length_later(text: str) -> float | None:
    await asyncio.sleep(0.01)
    return float(len(text)) if text else None


def test_makers_take_async_functions():
    cut = said("abc", finish="length")
    late = rl.of_text(length_later)
    scores = judged(
        [rl.Reward("late", late, timeout=5.0), rl.Reward("end", rl.without_end(late, 1.0))],
        [said("ab"), cut, said("", finish="length")],
    )
    assert np.array_equal(scores.values, [[2.0, 3.0, np.nan], [2.0, 2.0, np.nan]], equal_nan=True)
    assert not scores.failures


def test_async_rewards_wait_for_each_other():
    """Two rewards that meet: neither ends unless both run at once, with the rollouts of each."""
    met: list[int] = []

    async def meets(rollout: rl.Rollout) -> float:
        met.append(1)
        while len(met) < 6:
            await asyncio.sleep(0.001)
        return 1.0

    rewards_ = [rl.Reward("one", meets, timeout=10.0), rl.Reward("other", meets, timeout=10.0)]
    assert judged(rewards_, [said(), said(), said()]).total.tolist() == [2.0, 2.0, 2.0]


def sleeps(rollout: rl.Rollout) -> float:
    Path(rollout.text).touch()
    time.sleep(600)
    return 1.0


def test_closing_ends_what_hangs_in_a_process(tmp_path):
    judge = rl.Judge([rl.Reward("hangs", sleeps, apart=True)], workers=1)
    begun = tmp_path / "begun"
    judge([said(str(begun)), said(str(begun))])
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    judge.close()
    assert begun.exists() and time.monotonic() - began < 30 and not judge._workers._alive


class Unloadable:
    """A function that no other process can make."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> Any:
    raise ImportError("no such module there")


def test_what_cannot_be_sent_is_a_failure_in_words():
    with rl.Judge([rl.Reward("apart", hangs, apart=True)], workers=1) as judge:
        scores = judge([said("x", open=lambda: 1), said("fine")])()
    assert "cannot be sent" in scores.failures["apart", "raised"][1] and np.isfinite(scores.values[0, 1])
    with rl.Judge([rl.Reward("apart", Unloadable(), apart=True)], workers=1) as judge:
        failures = judge([said(), said()])().failures
    assert failures["apart", "raised"] == (
        2, "no process could be started for it: ImportError: no such module there"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (10**400, "not a number"), (1j, "not a number"), (float("-inf"), "not a number"), ({"a": 1}, "not a number"),
        ([(0.5, 1.0)], "not a number"), ([1.0, 2.0], "not a number"), (np.float32(0.5), None), (np.array(1), None),
        ((), None),
    ],
)  # fmt: skip
def test_odd_results(result, kind):
    scores = judged([rl.Reward("odd", lambda rollout: result)], [said()])
    assert [name for _, name in scores.failures] == ([] if kind is None else [kind])
    assert np.isnan(scores.total[0]) == (kind is not None)


def test_a_reward_of_all_together_that_gives_no_list():
    scores = judged([rl.Reward("none", lambda rollouts: None, together=True)], [said(), said()])
    assert scores.failures["none", "raised"][0] == 2


def starts_a_program(rollout: rl.Rollout) -> float:
    """Runs a program that never ends, as a reward may that tries out what a policy wrote."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(rollout.text).write_text(str(program.pid))
    program.wait()
    return 1.0


def test_what_a_process_started_ends_with_it(tmp_path):
    file = tmp_path / "program"
    reward = rl.Reward("tries", starts_a_program, apart=True, timeout=2.0)
    assert judged([reward], [said(str(file))]).failures == {("tries", "timed out"): (1, "after 2.0 seconds")}
    state, deadline = Path(f"/proc/{file.read_text()}/stat"), time.monotonic() + 30
    if not Path("/proc/self/stat").exists():
        pytest.skip("there is no /proc to look into")
    running = lambda: state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX"
    while running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running()


def test_what_is_missing_stays_with_its_rollouts():
    scores = judged([rl.Reward("text", lambda rollout: float(rollout.text))], [said(t) for t in ("1", "x", "2", "y")])
    kept = scores.take([3, 0])
    assert [(one.rollout, one.kind) for one in kept.missing] == [(0, "raised")] and "'y'" in kept.missing[0].text
    joined = rl.join_scores([scores.take([2]), kept, scores.take([1])])
    assert np.array_equal(joined.total, [2.0, np.nan, 1.0, np.nan], equal_nan=True)
    assert [one.rollout for one in joined.missing] == [1, 3] and joined.failures["text", "raised"][0] == 2


def test_episodes_that_broke_are_judged_by_nothing():
    asked: list[str] = []

    def function(rollout: rl.Rollout) -> float:
        asked.append(rollout.text)
        return 1.0

    rollouts = [said("a"), said("b", finish="failed", environment_failure="OSError: gone"), said("c")]
    together = rl.Reward("all", lambda lot: [2.0 for _ in lot], together=True)
    scores = judged([rl.Reward("one", function), together], rollouts)
    assert np.array_equal(scores.total, [3.0, np.nan, 3.0], equal_nan=True) and asked == ["a", "c"]
    assert scores.report() == ["the environment of 1 of 3 rollouts failed, the first: OSError: gone"]
    assert scores.metrics()["rewards/environment/failed"] == 1.0
    assert np.isnan(judged([together], rollouts[1:2]).total).all()
