"""Experience: a policy that learns from its own rollouts, stopped anywhere and gone on with."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import rl
from lmjax.data import Prompt
from lmjax.errors import UserError
from lmjax.objectives import term
from lmjax.rl import saving

V, EOS = 6, 5
POLICY = lm.Policy(lm.models.small(V, num_layers=1, embed_dim=16, num_heads=2, max_length=32))


@term()
def surrogate(outputs: Any, batch: Any) -> Any:
    old = outputs.logprobs if batch.old_logprobs is None else batch.old_logprobs
    ratio = jnp.exp(outputs.logprobs - jax.lax.stop_gradient(old))
    held = jnp.clip(ratio, 0.8, 1.2)
    return -jnp.minimum(ratio * batch.advantages, held * batch.advantages), batch.mask, {"ratio": (ratio, batch.mask)}


def roll_out(variables: Any, prompts: Any, key: Any, **options: Any) -> list[rl.Rollout]:
    return rl.roll_out(POLICY, variables, prompts, key, samples=4, max_new_tokens=5, eos=EOS, **options)


def judge(rollouts: list[rl.Rollout]) -> Any:
    """The share of tokens that are what the prompt's record asks for."""
    return lambda: np.array([np.mean(rollout.tokens == rollout.record["wanted"]) for rollout in rollouts])


def credit(rollouts: list[rl.Rollout], scores: np.ndarray, read: Any) -> rl.Credit:
    each = scores.reshape(-1, 4)
    advantages = (each - each.mean(1, keepdims=True)) / (each.std(1, keepdims=True) + 1e-4)
    fields = {"values": read(rl.Reading("logprobs"))}
    return rl.Credit(list(advantages.ravel()), fields=fields, metrics={"reward": float(scores.mean())})


def prompts() -> rl.Prompts:
    return rl.Prompts([Prompt(np.arange(1 + n % 3), record={"wanted": 1 + n % 2}) for n in range(12)], seed=3)


def set_up(plan: rl.Plan, **options: Any) -> tuple[Any, Any, rl.Experience, list[Any]]:
    seen: list[Any] = []
    experience = rl.Experience(
        POLICY, prompts(), plan, roll_out=roll_out, judge=judge, join=np.concatenate, credit=credit,
        key=jax.random.key(1), report=lambda *what: seen.append(what), **options,
    )  # fmt: skip
    optimizer = optax.adam(2e-2)
    step = lm.training.make_step(POLICY, surrogate(), optimizer)
    state = lm.training.init_state(POLICY, optimizer, jax.random.key(0))
    experience.follow(state.variables, 0)
    return step, state, experience, seen


def take_steps(step: Any, state: Any, experience: rl.Experience, count: int) -> tuple[Any, list[dict[str, float]]]:
    run, found = rl.following(step, experience), []
    for _ in range(count):
        state, metrics = run(state, next(experience))
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


PLANS = {
    "on policy": rl.Plan(prompts=4, samples=4, max_new_tokens=5, max_prompt=3),
    "epochs": rl.Plan(prompts=4, samples=4, max_new_tokens=5, max_prompt=3, epochs=2, minibatches=2, chunks=2),
    "ahead": rl.Plan(prompts=4, samples=4, max_new_tokens=5, max_prompt=3, stale=2, minibatches=2, per_row=2),
}


@pytest.mark.parametrize("name", PLANS)
def test_it_learns_and_is_compiled_once(name):
    plan = PLANS[name]
    step, state, experience, seen = set_up(plan)
    _, metrics = take_steps(step, state, experience, 36 * plan.steps)
    assert np.mean([found["reward"] for found in metrics[-8:]]) > metrics[0]["reward"] + 0.3
    assert step.cache_size() == 1  # whatever the prompts' lengths
    assert metrics[0]["ratio"] == pytest.approx(1.0, abs=1e-5)  # law 7
    assert metrics[-1]["rollout/staleness"] == plan.stale * plan.steps
    assert [what[0] for what in seen] == list(range(36))
    rollouts, read = seen[3][1], seen[3][3].fields["values"]
    if plan.stale == 0:  # what was read are numbers of the policy that rolled out
        for rollout, found in zip(rollouts, read):
            np.testing.assert_allclose(found, rollout.logprobs, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_stopped_anywhere_and_gone_on_with_it_is_the_same_bit_for_bit(name):
    """Law 8: batches that wait, rollouts ahead, positions and keys."""
    plan = PLANS[name]
    step, state, experience, _ = set_up(plan)
    whole, _ = take_steps(step, state, experience, 9)
    step, state, experience, _ = set_up(plan)
    state, _ = take_steps(step, state, experience, 5)
    kept = json.loads(json.dumps(experience.get_state()()))
    take_steps(step, jax.tree.map(jnp.copy, state), experience, 2)  # what comes after does not change what was kept
    _, _, again, _ = set_up(plan)
    again.set_state(kept)
    again.follow(state.variables, 5)
    state, _ = take_steps(step, state, again, 4)
    jax.tree.map(np.testing.assert_array_equal, state.variables, whole.variables)


def test_groups_that_teach_nothing_are_drawn_anew():
    plan = rl.Plan(prompts=4, samples=4, max_new_tokens=5, max_prompt=3, redraws=3)
    asked: list[int] = []


    def teaches(rollouts: list[rl.Rollout], scores: np.ndarray) -> bool:
        assert len({rollout.group for rollout in rollouts}) == 1 and len(scores) == 4
        asked.append(rollouts[0].record["wanted"])
        return rollouts[0].record["wanted"] == 2

    _, _, experience, seen = set_up(plan, teaches=teaches)
    batch = next(experience)
    assert {rollout.record["wanted"] for rollout in seen[0][1]} == {2}
    assert len({rollout.group for rollout in seen[0][1]}) == 4 and len(asked) == experience.metrics["prompts_drawn"] > 4
    assert batch.tokens.shape[0] == 4
    _, _, experience, seen = set_up(plan, teaches=lambda rollouts, scores: False)
    next(experience)  # nothing teaches: as many as were asked for all the same
    assert len(seen[0][1]) == 16 and experience.metrics["prompts_drawn"] == 16


def test_what_is_kept_is_read_back():
    rollouts = roll_out(POLICY.init(jax.random.key(0)), prompts().prompts[:3], jax.random.key(2))
    again = saving.unpack_rollouts(json.loads(json.dumps(saving.pack_rollouts(rollouts))))
    for old, new in zip(rollouts, again, strict=True):
        assert np.array_equal(old.tokens, new.tokens) and old.record == new.record and old.finish == new.finish
        assert np.array_equal(old.logprobs, new.logprobs) and new.own.dtype == bool
    batch = rl.rollout_batch(rollouts, rl.lay_out(rollouts, per_row=2), temperature=0.5)
    back = saving.unpack_batch(json.loads(json.dumps(saving.pack_batch(batch))))
    assert jax.tree.structure(back) == jax.tree.structure(batch)
    jax.tree.map(np.testing.assert_array_equal, back, batch)
    with pytest.raises(UserError, match="JSON values"):
        saving.pack_rollouts([rl.Rollout(**vars(rollouts[0]) | {"record": {"wanted": object()}})])


def test_prompts_come_once_an_epoch_or_as_they_are_weighed():
    source = prompts()
    assert sorted(source.take(5) + source.take(7)) == list(range(12))
    first = source.take(12)
    source.set_state({"taken": 12})
    assert source.take(12) == first
    assert set(source.take(50, np.arange(12) % 3 == 1)) == {1, 4, 7, 10}
    assert len(set(source.take(4, np.arange(12) % 3 == 1))) == 4  # each once as long as there are enough


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"per_row": 3}, "rows of 3"),
        ({"chunks": 3}, "3 chunks"),
        ({"minibatches": 3}, "3 minibatches"),
        ({"temperature": 0.0}, "temperature"),
        ({"stale": -1}, "negative"),
    ],
)
def test_plans_that_cannot_be(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        rl.Plan(**{"prompts": 4, "samples": 4, "max_new_tokens": 5, "max_prompt": 3} | fields)
