"""Credit: what rollouts are worth reaches the right tokens, and diagnoses are told."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from lmjax import rl
from lmjax.rl import returns
from tests.rl.estimator_cases import CASES, FIXTURES, OPENRLHF_KL, arrays


def said(group: int, tokens: int = 4, finish: str = "eos", own: Any = None) -> rl.Rollout:
    zeros = np.zeros(tokens, np.float32)
    logprobs = -0.1 * np.arange(1, tokens + 1, dtype=np.float32)
    own = np.ones(tokens, bool) if own is None else np.array(own, bool)
    return rl.Rollout(np.array([1, 2]), zeros.astype(int), group, logprobs * own, logprobs * own, finish, own)


def scores(totals: list[float], steps: Any = None) -> rl.Scores:
    return rl.Scores(("r",), (1.0,), np.array([totals]), steps or ((),) * len(totals))


FOUR = [said(0), said(0, 3), said(1, 4, "length"), said(1, 2)]
REFERENCE = [np.full(len(rollout.tokens), -0.3, np.float32) for rollout in FOUR]


def read(reading: rl.Reading) -> list[np.ndarray]:
    if reading.what == "logprobs":
        return REFERENCE
    return [np.full(len(rollout.tokens) + 1, 0.2) for rollout in FOUR]


def test_outcomes():
    credit = rl.outcome_credit(rl.ESTIMATORS["trl_rloo"])(FOUR, scores([1.0, 0.0, 2.0, 2.0]), read)
    assert credit.advantages == [1.0, -1.0, 0.0, 0.0] and credit.left_out == [False] * 4
    assert credit.metrics["frac_reward_zero_std"] == 0.5 and credit.metrics["reward"] == 1.25


def test_what_was_cut_off_or_not_judged_is_left_out():
    credit = rl.outcome_credit(rl.ESTIMATORS["dr_grpo"], learn_truncated=False)
    found = credit(FOUR, scores([1.0, np.nan, 2.0, 5.0]), read)
    assert found.left_out == [False, True, True, False] and found.advantages == [0.0] * 4


def test_the_best_of_a_group_alone():
    best = rl.outcome_credit(rl.ESTIMATORS["verl_grpo_passk"])(FOUR, scores([1.0, 0.25, 2.0, 2.0]), read)
    np.testing.assert_allclose(best.advantages, [0.75 / (np.std([1, 0.25], ddof=1) + 1e-6), 0, 0, 0])
    of_two = rl.outcome_credit(functools.partial(rl.pass_at_k_advantages, k=2), learn_truncated=False)
    found = of_two(FOUR, scores([1.0, 0.25, 2.0, 0.0]), read)  # the third was cut off, so that the fourth has no other
    assert found.advantages == [1.5, 0.0, 0.0, 0.0] and found.left_out == [False, False, True, False]


def test_costs_of_whole_rollouts():
    kl = rl.KLReward(rl.Reading("logprobs"), 0.5)
    credit = rl.outcome_credit(rl.Estimator("none", "none"), kl=kl, largest=1.5)
    found = credit(FOUR, scores([1.0, 0.0, 2.0, 2.0]), read)
    costs = [float((rollout.logprobs + 0.3).sum()) for rollout in FOUR]
    np.testing.assert_allclose(found.advantages, np.clip([1, 0, 2, 2], -1.5, 1.5) - 0.5 * np.array(costs), rtol=1e-6)
    assert found.metrics["objective/kl"] == pytest.approx(np.mean(costs))
    for given, kept in zip(REFERENCE, found.fields["reference_logprobs"]):
        assert np.array_equal(given, kept)


def test_rewards_of_tokens_by_hand():
    """REINFORCE++: the KL of each token, the score at the last, summed from each on, whitened over what is learned."""
    kl, gamma = rl.KLReward(rl.Reading("logprobs"), 0.5), 0.9
    rollouts = [said(0, own=[1, 0, 1, 1]), *FOUR[1:]]
    credit = rl.outcome_credit(rl.Estimator("none", "none"), kl=kl, gamma=gamma, learn_truncated=False)
    found = credit(rollouts, scores([1.0, -0.5, 2.0, 0.25]), read)
    expected = []
    for rollout, score in zip(rollouts, (1.0, -0.5, None, 0.25)):
        rewards = [-0.5 * (logprob + 0.3) for logprob in rollout.logprobs[rollout.own]]
        togo = np.zeros(len(rollout.tokens))
        if score is not None:  # the third was cut off
            rewards[-1] += score
            togo[rollout.own] = [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        expected.append(togo)
    for own, other in zip(found.advantages, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6, atol=1e-9)
    white = rl.outcome_credit(
        rl.Estimator("none", "none"), kl=kl, gamma=gamma, learn_truncated=False, whitened=True
    )(rollouts, scores([1.0, -0.5, 2.0, 0.25]), read)  # fmt: skip
    kept = np.concatenate([togo[rollout.own] for togo, rollout in zip(expected, rollouts) if rollout.ended])
    together = np.concatenate([own[rollout.own] for own, rollout in zip(white.advantages, rollouts) if rollout.ended])
    np.testing.assert_allclose(together, (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), rtol=1e-6)
    # Without a KL or a discount it is the rollout's advantage, at each of its tokens.
    plain = rl.outcome_credit(rl.ESTIMATORS["trl_rloo"], gamma=1.0)(FOUR, scores([1.0, 0.0, 2.0, 2.0]), read)
    assert [row.tolist() for row in plain.advantages] == [[1.0] * 4, [-1.0] * 3, [0.0] * 4, [0.0] * 2]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("openrlhf") and not name.endswith("gae")])
def test_credit_gives_the_numbers_of_openrlhf(name):
    """Baseline, KL of tokens, return and whitening, put together as the library does."""
    a = arrays()
    rollouts = [
        dataclasses.replace(said(int(group), int(n)), logprobs=kl[:n])
        for group, n, kl in zip(a["groups"], a["lengths"], a["kl"])
    ]
    kl = rl.KLReward(rl.Reading("logprobs"), OPENRLHF_KL)
    gamma, whitened = 0.9 if name == "openrlhf_reinforce" else 1.0, rl.WHITENED.get(name, False)
    credit = rl.outcome_credit(rl.ESTIMATORS[name], kl=kl, gamma=gamma, whitened=whitened)
    found = credit(rollouts, scores(a["scores"].tolist()), lambda reading: [np.zeros(n) for n in a["lengths"]])
    with np.load(FIXTURES) as stored:
        np.testing.assert_allclose(returns.padded(found.advantages), stored[f"{name}/advantages"], rtol=1e-5, atol=1e-6)


def test_a_controller_follows():
    kl = rl.KLReward(rl.Reading("logprobs"), rl.AdaptiveKL(0.1, target=0.01, horizon=8))
    entropy, running = rl.AdaptiveEntropy(target=1.0, coefficient=0.0), rl.RunningMean()
    credit = rl.outcome_credit(rl.ESTIMATORS["reinforce_given"], kl=kl, entropy=entropy, running=running)
    first = credit(FOUR, scores([1.0, 0.0, 2.0, 2.0]), read)
    second = credit(FOUR, scores([1.0, 0.0, 2.0, 2.0]), read)
    assert first.coefficients == {"entropy": 0.0} and second.coefficients["entropy"] == 0.005
    assert kl.now != 0.1 and running.mean != 0
    assert second.advantages[0] < first.advantages[0]  # the baseline has come


def test_a_critic():
    rows = [np.array([0, 0, 0, 1.0]), np.array([0, 0, 0.0])]
    two = FOUR[:2]
    values = lambda reading: [np.full(len(rollout.tokens), 0.2) for rollout in two]
    credit = rl.critic_credit(gamma=0.9, lam=0.8, whiten_advantages=False)(two, scores([1.0, 0.0]), values)
    mask = returns.padded([np.ones(4), np.ones(3)])
    gains, wanted = returns.gae(returns.padded(rows), 0.2 * mask, mask, 0.9, 0.8)
    for i, n in enumerate((4, 3)):
        np.testing.assert_allclose(credit.advantages[i], gains[i, :n])
        np.testing.assert_allclose(credit.fields["returns"][i], wanted[i, :n])
    white = rl.critic_credit()(two, scores([1.0, 0.0]), values)
    whole = np.concatenate(white.advantages)
    assert whole.mean() == pytest.approx(0, abs=1e-6) and whole.std(ddof=1) == pytest.approx(1, abs=1e-4)


def test_a_score_behind_the_end_and_the_values_one_more():
    give = rl.critic_credit(position="after_eos", lam=1.0, whiten_advantages=False)
    credit = give(FOUR, scores([1.0, 0, 2.0, 2.0]), read)
    assert [len(row) for row in credit.fields["returns"]] == [5, 4, 5, 3]
    assert all((row == 1).all() for row in credit.fields["value_mask"])
    np.testing.assert_allclose(credit.fields["returns"][3], 2.0)
    np.testing.assert_allclose(credit.advantages[3], 1.8)
    assert [len(row) for row in credit.advantages] == [4, 3, 4, 2]


def test_rewards_of_steps_reach_their_tokens():
    steps = (((1, 1.0), (3, 0.0)), ((2, 0.5),), ((3, 0.0),), ((1, 1.0),))
    judged = scores([1.0, 0.5, 0.0, 1.0], steps)
    found = rl.process_credit()(FOUR, judged, read)
    assert found.advantages[0][0] == found.advantages[0][1] > found.advantages[0][2] == found.advantages[0][3]
    critic = rl.critic_credit(lam=1.0, whiten_advantages=False)(FOUR, judged, lambda reading: [
        np.zeros(len(rollout.tokens)) for rollout in FOUR])  # fmt: skip
    np.testing.assert_allclose(critic.fields["returns"][0], [1.0, 1.0, 0.0, 0.0])


def test_diagnoses():
    assert rl.diagnose({"ratio": 1.0, "frac_reward_zero_std": 0.4}) == []
    trouble = {
        "completions/clipped_ratio": 1.0, "frac_reward_zero_std": 1.0, "rollouts/left_out": 1.0, "ratio": 1.2,
        "objective/kl": 0.5, "rollout/entropy": 0.001, "sampling/sampling_logp_difference/max": 0.1,
    }  # fmt: skip
    found = rl.diagnose(trouble, first=True)
    assert len(found) == 7 and any("should be 1" in text for text in found) and any("limit" in text for text in found)
    assert len(rl.diagnose(trouble, first=False)) == 5
