"""Replay: which groups are kept, given again, and that a run with it goes on bit for bit."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax import rl
from lmjax.data import Prompt
from lmjax.errors import UserError

PLAN = rl.Plan(prompts=4, samples=2, max_new_tokens=3, max_prompt=2, epochs=2)


def rollout(prompt: Any, group: int, sample: int, version: int) -> rl.Rollout:
    random = np.random.default_rng([group, sample, version])
    logprobs = random.normal(-1, 0.1, 3).astype(np.float32)
    return rl.Rollout(
        prompt.ids, random.integers(0, 4, 3).astype(np.int32), group, logprobs, logprobs, "eos", np.ones(3, bool),
        version=version, number=prompt.number,
    )  # fmt: skip


def roll_out(variables: Any, prompts: Any, key: Any, *, first_group: int, version: int) -> list[rl.Rollout]:
    return [rollout(p, first_group + i, n, version) for i, p in enumerate(prompts) for n in range(2)]


def group(number: int, version: int = 0, numbers: tuple[float, float] = (0.0, 1.0)) -> tuple[list[Any], rl.Scores]:
    prompt = Prompt(np.array([1]), number=number)
    scores = rl.Scores(("r",), (1.0,), np.array([numbers]), ((), ()))
    return [rollout(prompt, 10 + number, n, version) for n in range(2)], scores


def numbers(groups: list[list[rl.Rollout]]) -> list[int]:
    return [some[0].number for some in groups]


def test_what_is_kept():
    replay = rl.Replay(3, oldest=5)
    for n, both in enumerate([(0.0, 1.0), (1.0, 1.0), (np.nan, 1.0), (2.0, 1.0)]):
        replay.add(*group(n, numbers=both))
    key = jax.random.key(0)
    assert len(replay) == 2 and numbers(replay.draw(2, 0, key)) == [0, 3]  # the others teach nothing
    replay.add(*group(0))  # what was replayed comes by again
    replay.add(group(1)[0])  # without scores there is nothing to tell
    assert len(replay) == 3
    replay.add(*group(4, version=4))
    assert numbers(replay.draw(3, 5, key)) == [3, 1, 4]  # the first to come is the first to go
    assert replay.draw(2, 6, key) == []  # too old, and too few are left
    assert numbers(replay.draw(1, 6, key)) == [4]
    drawn = {tuple(numbers(replay.draw(2, 5, jax.random.key(n)))) for n in range(30)}
    assert drawn == {(3, 1), (3, 4), (1, 4)}


def test_kept_groups_take_the_place_of_the_last_prompts():
    replay = rl.Replay(8, oldest=5, share=0.5)
    mixed = replay.mixing(roll_out, PLAN)
    prompts = rl.Prompts([Prompt(np.array([n])) for n in range(4)]).prompts
    whole = mixed(None, prompts, jax.random.key(0), first_group=4, version=3)
    assert [r.group for r in whole] == [4, 4, 5, 5, 6, 6, 7, 7] and {r.version for r in whole} == {3}
    kept = {}
    for n in range(5, 8):
        some = group(n, version=1)
        kept[n] = some[0]
        replay.add(*some)
    found = mixed(None, prompts, jax.random.key(0), first_group=4, version=3)
    assert [r.group for r in found] == [4, 4, 5, 5, 6, 6, 7, 7]
    assert [r.version for r in found] == [3] * 4 + [1] * 4 and [r.number for r in found[:4]] == [0, 0, 1, 1]
    for old, new in zip(kept[found[4].number] + kept[found[6].number], found[4:], strict=True):
        assert np.array_equal(old.tokens, new.tokens) and np.array_equal(old.logprobs, new.logprobs)


def experience() -> tuple[rl.Experience, rl.Replay]:
    policy = lm.Policy(lm.models.small(4, num_layers=1, embed_dim=8, num_heads=2, max_length=8))  # never called
    replay = rl.Replay(6, oldest=4, share=0.5)

    def judge(rollouts: list[rl.Rollout]) -> Any:
        values = np.array([[float(r.tokens.sum()) for r in rollouts]])
        return lambda: rl.Scores(("r",), (1.0,), values, ((),) * len(rollouts))

    source = rl.Prompts([Prompt(np.array([n % 4])) for n in range(16)])
    made = rl.Experience(
        policy, source, PLAN, roll_out=replay.mixing(roll_out, PLAN), judge=judge, join=rl.join_scores,
        credit=rl.outcome_credit(rl.ESTIMATORS["trl_rloo"]), key=jax.random.key(1), parts={"replay": replay},
        report=lambda number, rollouts, scores, credit: replay.add(rollouts, scores),
    )  # fmt: skip
    made.follow({}, 0)
    return made, replay


def take(made: rl.Experience, first: int, count: int) -> list[Any]:
    found = []
    for update in range(first, first + count):
        made.follow({}, update)
        found.append(next(made))
    return found


def test_a_run_with_replay_is_off_policy_and_goes_on_bit_for_bit():
    made, replay = experience()
    first = take(made, 0, 5)
    kept = json.loads(json.dumps(made.get_state()()))
    rest = take(made, 5, 5)
    assert all(batch.old_logprobs is not None for batch in first)  # ratios are taken to the policy that spoke
    assert made.metrics["rollout/staleness"] > 0 and len(replay) == 6
    again, _ = experience()
    again.set_state(kept)
    for old, new in zip(rest, take(again, 5, 5), strict=True):
        jax.tree.map(np.testing.assert_array_equal, old, new)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: rl.Curriculum(2).update([2], [1.0]), "curriculum of 2 prompts"),
        (lambda: rl.Curriculum(2).update([0, 1], [1.0]), "one score for each"),
        (lambda: rl.Curriculum(2).set_state(rl.Curriculum(3).get_state()), "state is of 3"),
        (lambda: rl.Replay(0, oldest=1), "size 0"),
        (lambda: rl.Replay(1, oldest=1, share=1.0), "share 1.0"),
        (lambda: rl.Replay(1, oldest=1).mixing(roll_out, rl.Plan(4, 2, 3, 2)), "stale=1"),
        (lambda: rl.Replay(1, oldest=1, share=0.2).mixing(roll_out, PLAN), "share of 0.2 of 4"),
    ],
)
def test_what_cannot_be(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()
