"""Each kind of trouble is told, with what to do, and a step without trouble says nothing."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from lmjax import rl

FINE = {
    "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.5, "rollouts/left_out": 0.0, "ratio": 1.00002,
    "objective/kl": 1e-4, "loss/kl_reference": 1e-5, "sampling/sampling_logp_difference/max": 1e-5,
    "rollout/entropy": 0.7,
}  # fmt: skip


def test_nothing_to_say():
    assert rl.diagnose(FINE, first=True) == [] == rl.diagnose({}, first=True)


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ({"completions/clipped_ratio": 1.0}, "raise max_new_tokens"),
        ({"frac_reward_zero_std": 1.0}, "judged alike"),
        ({"ratio": 1.01}, "importance ratio is 1.0100 at the first update"),
        ({"ratio": 0.99}, "importance ratio is 0.9900"),
        ({"objective/kl": 0.3}, "(objective/kl) is 0.3000 before any update"),
        ({"loss/kl_reference": 0.3}, "(loss/kl_reference) is 0.3000"),
        ({"rollout/entropy": 0.001}, "certain of every token (entropy 0.0010)"),
        ({"sampling/sampling_logp_difference/max": 0.5}, "another distribution"),
        ({"rollouts/left_out": 1.0}, "no reward applies"),
    ],
)
def test_trouble_is_told(metrics, sentence):
    (said,) = rl.diagnose(FINE | metrics, first=True)
    assert sentence in said


def test_what_comes_with_learning_is_no_trouble():
    later = FINE | {"ratio": 1.2, "objective/kl": 4.0, "loss/kl_reference": 0.2}
    assert rl.diagnose(later) == []
    assert rl.diagnose(FINE | {"sampling/sampling_logp_difference/max": 0.5}, on_policy=False) == []
    alike = FINE | {"frac_reward_zero_std": 1.0, "advantage/mean_abs": 0.1}  # compared with something else
    assert rl.diagnose(alike) == []


def fails(rollout: rl.Rollout) -> float:
    raise ValueError("no")


async def hangs(rollout: rl.Rollout) -> float:
    await asyncio.sleep(60)
    return 1.0


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (rl.Reward("exact", fails), "raised 2"),
        (rl.Reward("exact", hangs, timeout=0.05), "timed out 2"),
        (rl.Reward("exact", lambda rollout: float("nan")), "gave no number 2"),
    ],
)
def test_rewards_that_failed_are_named(reward, text):
    nothing = np.zeros(2, np.float32)
    rollouts = [rl.Rollout(np.array([1]), np.array([2, 3]), 0, nothing, nothing, "eos", nothing == 0)] * 2
    with rl.Judge([reward]) as judge:
        metrics = judge(rollouts)().metrics()
    said = rl.diagnose(metrics | {"rollouts/left_out": 1.0})
    assert said == [f"every rollout was left out, so nothing is learned: the reward 'exact' {text} times"]


def test_limits_of_length_are_named_where_no_reward_failed():
    said = rl.diagnose({"rollouts/left_out": 1.0, "completions/clipped_ratio": 1.0})
    assert "all came to the limit" in said[1] and len(said) == 2
