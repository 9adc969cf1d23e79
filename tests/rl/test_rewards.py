"""Rewards: weights, what does not apply, and every way in which one can fail."""

from __future__ import annotations

import asyncio
import os
import time
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
        (lambda: rewards.Workers({}, 0), "at least 1"),
    ],
)
def test_rewards_that_cannot_be(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()
