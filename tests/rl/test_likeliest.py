"""ReMax: likeliest answers are judged beside the rollouts, are their baseline, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax import rl
from lmjax.data import Prompt
from lmjax.errors import UserError
from lmjax.rl import saving
from tests.rl.test_rewards import judged, said

V, EOS = 8, 7
POLICY = lm.Policy(lm.models.small(V, num_layers=1, embed_dim=16, num_heads=2, max_length=32, init_std=0.5))
REMAX = rl.ESTIMATORS["verl_remax"]


def number(rollout: rl.Rollout) -> float:
    return float(rollout.text)


def pairs(*texts: str, best: tuple[str, ...]) -> list[rl.Rollout]:
    """As many rollouts of each group, beside its likeliest answer."""
    per = len(texts) // len(best)
    rollouts = [dataclasses.replace(said(text), group=i // per) for i, text in enumerate(texts)]
    return rl.with_likeliest(rollouts, [dataclasses.replace(said(text), group=g) for g, text in enumerate(best)])


def test_scores_less_that_of_the_likeliest_answer():
    rollouts = pairs("1", "3", "0", "5", best=("2", "4"))
    scores = judged([rl.Reward("number", number, weight=0.5)], rollouts)
    assert scores.total.tolist() == [0.5, 1.5, 0.0, 2.5] and scores.given.tolist() == [1.0, 1.0, 2.0, 2.0]
    assert scores.metrics()["reward"] == np.mean([0.5, 1.5, 0.0, 2.5])  # likeliest answers are not among them
    found = rl.outcome_credit(REMAX)(rollouts, scores, lambda reading: [])
    assert found.advantages == [-0.5, 0.5, -2.0, 0.5] and found.metrics["baseline/mean"] == 1.5
    held = rl.outcome_credit(REMAX, largest=1.0)(rollouts, scores, lambda reading: [])
    assert held.advantages == [-0.5, 0.0, -1.0, 0.0]  # the baseline is held as the scores are
    joined = rl.join_scores(
        [scores.take([2, 3]), scores.take([0]), judged([rl.Reward("number", number, 0.5)], [said("1")])]
    )
    assert np.array_equal(joined.given, [2.0, 2.0, 1.0, np.nan], equal_nan=True)


def test_what_cannot_be_compared_is_left_out_and_told_once():
    rollouts = pairs("1", "x", "0", "5", best=("y", "4"))
    scores = judged([rl.Reward("number", number)], rollouts)
    assert [(one.rollout, one.reward) for one in scores.missing] == [(1, "number"), (0, "number/likeliest")]
    found = rl.outcome_credit(REMAX)(rollouts, scores, lambda reading: [])
    assert found.left_out == [True, True, False, False] and found.advantages == [0.0, 0.0, -4.0, 1.0]
    assert not any(rl.outcome_credit(rl.ESTIMATORS["trl_rloo"])(rollouts, scores, lambda reading: []).left_out[2:])


@pytest.mark.parametrize(("texts", "teaches"), [("11", True), ("22", False), ("12", True), ("xx", False), ("x1", True)])
def test_a_group_teaches_by_its_gap_to_the_likeliest(texts, teaches):
    rollouts = pairs(*texts, best=("2",))
    assert rl.scores_differ(rollouts, judged([rl.Reward("number", number)], rollouts)) is teaches


def test_they_are_kept_with_their_rollouts():
    rollouts = pairs("1", "3", "0", "5", best=("2", "4")) + [said("6")]
    again = saving.unpack_rollouts(json.loads(json.dumps(saving.pack_rollouts(rollouts))))
    assert [r.likeliest and r.likeliest.text for r in again] == ["2", "2", "4", "4", None]
    assert again[0].likeliest is again[1].likeliest
    with pytest.raises(UserError, match="one for each prompt"):
        rl.with_likeliest(rollouts, [rollouts[0]])


def roll_out(variables: Any, prompts: Any, key: Any, **numbers: Any) -> list[rl.Rollout]:
    options = dict(max_new_tokens=5, eos=EOS) | numbers
    found = rl.roll_out(POLICY, variables, prompts, key, samples=2, **options)
    return rl.with_likeliest(found, rl.roll_out(POLICY, variables, prompts, key, samples=1, temperature=0.0, **options))


def run(updates: range, state: Any = None, **fields: Any) -> tuple[list[Any], list[Any], Any]:
    """The batches and reports of some updates by other variables each, and the state behind the second last."""
    plan = rl.Plan(prompts=4, samples=2, max_new_tokens=5, max_prompt=3, **fields)
    source = rl.Prompts([Prompt(np.arange(1 + n % 3), record={"n": n}) for n in range(12)], seed=3)
    batches, reports, kept = [], [], None
    with rl.Judge([rl.Reward("sum", lambda rollout: float(rollout.tokens.sum()))]) as judge:
        experience = rl.Experience(
            POLICY, source, plan, roll_out=roll_out, judge=judge, join=rl.join_scores, credit=rl.outcome_credit(REMAX),
            key=jax.random.key(1), teaches=rl.scores_differ, report=lambda *what: reports.append(what),
        )  # fmt: skip
        if state is not None:
            experience.set_state(state)
        for update in updates:
            if update == updates[-1]:
                kept = json.loads(json.dumps(experience.get_state()()))
            experience.follow(POLICY.init(jax.random.key(update)), update)
            batches.append(next(experience))
        assert "baseline/mean" in experience.metrics
    return batches, reports, kept


@pytest.mark.parametrize("fields", [{}, {"stale": 1, "minibatches": 2}, {"chunks": 2, "redraws": 2}])
def test_an_iteration_rolls_out_likeliest_answers_of_its_own_variables_and_goes_on_bit_for_bit(fields):
    batches, reports, kept = run(range(4), **fields)
    again, _, _ = run(range(3, 4), kept, **fields)
    jax.tree.map(np.testing.assert_array_equal, again[0], batches[3])
    for _, rollouts, scores, _ in reports:
        assert len(rollouts) == 8 == len(scores.given)
        assert fields or batches[0].tokens.shape[0] == 4  # they take no room
        for rollout, given in zip(rollouts, scores.given):
            variables, prompt = POLICY.init(jax.random.key(rollout.version)), Prompt(rollout.prompt)
            (best,) = rl.roll_out(
                POLICY, variables, [prompt], jax.random.key(9), samples=1, max_new_tokens=5, eos=EOS, temperature=0.0
            )
            assert given == best.tokens.sum()
