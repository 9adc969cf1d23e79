"""Rollouts in batches: forked rows are the same sequences one by one, and the sampler's numbers are the trainer's."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import rl
from lmjax.batch import Batch
from lmjax.data import Prompt
from lmjax.errors import UserError
from lmjax.evaluation import token_logprobs
from lmjax.objectives import constant_horizon, cross_entropy, divergence, entropy, evaluate, sequence_mean
from tests.laws.counting import vocabulary_products

V, EOS = 19, 3
TINY = dict(num_layers=2, embed_dim=32, num_heads=4, max_length=64, init_std=0.3)
MODELS = {
    "llama": lambda: lm.models.llama(V, **TINY, num_kv_heads=2),
    "learned positions": lambda: lm.models.gpt2(V, **TINY),
    "window": lambda: lm.models.mistral(V, **TINY, window=3),
    "scanned": lambda: lm.models.llama(V, **TINY, layers="scanned"),
    "no layers": lambda: lm.models.bigram(V, init_std=1.0),
}


@functools.cache
def setting(name: str = "llama", chunk_elements: int = 2**24) -> tuple[lm.Policy, Any]:
    policy = lm.Policy(MODELS[name](), chunk_elements)
    return policy, policy.init(jax.random.key(0))


def invented(seed: int = 0, groups: int = 4, samples: int = 3) -> list[rl.Rollout]:
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, V, random.integers(1, 7)) for _ in range(groups)]
    found = []
    for group, prompt in enumerate(prompts):
        for _ in range(samples):
            n = int(random.integers(1, 6))
            logprobs = random.normal(size=n).astype(np.float32)
            ids = random.integers(0, V, n).astype(np.int32)
            own = random.random(n) > 0.2
            found.append(rl.Rollout(prompt, ids, group, logprobs, logprobs, "eos", own))
    return found


def batch_of(rollouts: list[rl.Rollout], per_row: int, **options: Any) -> Batch:
    return rl.rollout_batch(rollouts, rl.lay_out(rollouts, per_row=per_row, **options), temperature=0.7)


OBJECTIVE = (
    cross_entropy(reducer=sequence_mean)
    + 0.3 * entropy()
    + 0.1 * cross_entropy(reducer=constant_horizon(9)).named("horizon")
)


@pytest.mark.parametrize(("name", "general"), [*((name, False) for name in MODELS), ("llama", True)])
def test_a_forked_row_is_its_rollouts_one_by_one(name, general):
    policy, variables = setting(name, 4 * V * 3)
    roles = {"reference": policy.init(jax.random.key(5))}
    objective = OBJECTIVE + 0.2 * divergence("reference") if general else OBJECTIVE
    rollouts = invented()

    def gradient(batch: Batch) -> Any:
        loss = lambda variables: evaluate(objective, policy, variables, batch, roles=roles).loss
        return jax.jit(jax.value_and_grad(loss))(variables)

    flat = dataclasses.replace(batch_of(rollouts, per_row=1, prompt=6, branch=5), fork=None)
    flat = dataclasses.replace(flat, segments=(flat.segments > 0).astype(np.int32))
    alone, expected = gradient(flat)
    for batch in (batch_of(rollouts, per_row=3), batch_of(rollouts, per_row=2, rows=9))[: 2 if name == "llama" else 1]:
        loss, found = gradient(batch)
        np.testing.assert_allclose(loss, alone, rtol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), found, expected)


def test_rows_may_be_longer_than_the_models_positions():
    """Only a prompt and one rollout of it are a sequence; with more than there are positions, it is refused."""
    policy, variables = setting("learned positions")
    rollouts = invented(groups=2, samples=12)
    batch = batch_of(rollouts, per_row=12)
    assert batch.tokens.shape[1] > TINY["max_length"]
    (found,) = token_logprobs(policy, variables, [batch])
    (alone,) = token_logprobs(policy, variables, [batch_of(rollouts, per_row=1)])
    pick = lambda per_row, values: np.concatenate(rl.lay_out(rollouts, per_row=per_row).pick(values))
    np.testing.assert_allclose(pick(12, found), pick(1, alone), atol=2e-5)
    with pytest.raises(UserError, match="learned positions"):
        list(token_logprobs(policy, variables, [batch_of(rollouts, per_row=1, branch=64)]))


def test_adapters_that_stand_before_a_prompt_are_seen_by_all_branches():
    policy, base = setting()
    for method in (lm.adapters.prefix(policy, 3), lm.adapters.prompt(policy, 2)):
        variables = method.init(jax.random.key(1), base)
        noise = lambda x: x + 0.2 * jax.random.normal(jax.random.key(2), x.shape) if x.dtype == jnp.float32 else x
        variables = {k: v if k == "params" else jax.tree.map(noise, v) for k, v in variables.items()}
        rollouts = invented()
        layouts = [rl.lay_out(rollouts, per_row=n) for n in (1, 3)]
        batches = [rl.rollout_batch(rollouts, layout) for layout in layouts]
        alone, forked = (
            np.concatenate(layout.pick(found))
            for layout, found in zip(layouts, token_logprobs(policy, variables, batches))
        )
        np.testing.assert_allclose(forked, alone, atol=2e-5)


def test_no_branch_sees_another_and_none_is_seen_by_the_prompt():
    policy, variables = setting()
    rollouts = invented(samples=3)
    layout = rl.lay_out(rollouts, per_row=3)
    batch = rl.rollout_batch(rollouts, layout)
    (before,) = token_logprobs(policy, variables, [batch])
    P, C = layout.fork
    changed = batch.tokens.copy()
    changed[:, P + C : P + 2 * C] = (changed[:, P + C : P + 2 * C] + 1) % V
    (after,) = token_logprobs(policy, variables, [dataclasses.replace(batch, tokens=changed)])
    elsewhere = np.ones(batch.tokens.shape, bool)
    elsewhere[:, P + C : P + 2 * C] = False
    assert np.array_equal(before[elsewhere], after[elsewhere])
    assert not np.array_equal(before[~elsewhere], after[~elsewhere])


def test_the_head_reads_no_prompt():
    """The vocabulary's products have as many rows as there are columns of rollouts."""
    policy, variables = setting()
    rollouts = invented()
    batch = batch_of(rollouts, per_row=3)
    (B, T), P = batch.tokens.shape, batch.fork.prompt
    loss = lambda variables: evaluate(cross_entropy(), policy, variables, batch).loss
    jaxpr = jax.make_jaxpr(jax.grad(loss))(variables)
    assert vocabulary_products(jaxpr, V) == 3
    assert f"f32[{B * (T - P)},{V}]" in str(jaxpr) and f"f32[{B * T},{V}]" not in str(jaxpr)


@pytest.mark.parametrize("slots", [None, 3])
def test_log_probabilities_of_rollouts_are_the_trainers(slots):
    """Law 7: the importance ratio is 1 before any update."""
    policy, variables = setting()
    prompts = [Prompt(np.arange(1, n + 2), str(n), {"answer": n}) for n in range(4)]
    rollouts = rl.roll_out(
        policy, variables, prompts, jax.random.key(3), samples=3, max_new_tokens=9, eos=EOS, temperature=0.7,
        tokenizer=lm.tokenizers.ByteTokenizer(), slots=slots, first_group=10,
    )  # fmt: skip
    assert [rollout.group for rollout in rollouts] == [10, 10, 10, 11, 11, 11, 12, 12, 12, 13, 13, 13]
    assert {rollout.finish for rollout in rollouts} == {"eos", "length"}
    assert all(rollout.record["answer"] == rollout.group - 10 for rollout in rollouts)
    assert all((rollout.tokens[-1] == EOS) == rollout.ended for rollout in rollouts)
    assert all(len(rollout.text.encode()) >= len(rollout.tokens) - rollout.ended for rollout in rollouts)
    layout = rl.lay_out(rollouts, per_row=3)
    batch = rl.rollout_batch(rollouts, layout, temperature=0.7)
    (found,) = token_logprobs(policy, variables, [batch])
    np.testing.assert_allclose(found * batch.mask, batch.old_logprobs, atol=2e-5)
    for rollout, picked in zip(rollouts, layout.pick(found)):
        np.testing.assert_allclose(picked, rollout.logprobs, atol=2e-5)


def test_rollouts_are_the_same_however_they_are_decoded():
    policy, variables = setting()
    prompts = [Prompt(np.arange(1, n + 2)) for n in range(3)]
    options = dict(samples=2, max_new_tokens=6, eos=EOS)
    apart, together = (
        rl.roll_out(policy, variables, prompts, jax.random.key(4), slots=slots, **options) for slots in (2, None)
    )
    assert [a.tokens.tolist() for a in apart] == [b.tokens.tolist() for b in together]


def test_what_is_left_out_weighs_nothing():
    policy, variables = setting()
    rollouts = invented()
    layout = rl.lay_out(rollouts, per_row=3)
    left_out = [i % 3 == 1 for i in range(len(rollouts))]
    some = rl.rollout_batch(rollouts, layout, left_out=left_out)
    kept = [rollout for rollout, out in zip(rollouts, left_out) if not out]
    fewer = rl.rollout_batch(kept, rl.lay_out(kept, per_row=2))
    objective = cross_entropy() + cross_entropy(reducer=sequence_mean).named("sequences")
    loss = jax.jit(lambda batch: evaluate(objective, policy, variables, batch).loss)
    losses = [loss(batch) for batch in (some, fewer)]
    np.testing.assert_allclose(*losses, rtol=2e-6)


def test_places_and_picks():
    rollouts = invented()
    layout = rl.lay_out(rollouts, per_row=2)
    numbers = [np.arange(len(rollout.tokens)) + 10.0 * i for i, rollout in enumerate(rollouts)]
    for expected, found in zip(numbers, layout.pick(layout.place(numbers))):
        assert np.array_equal(expected, found)
    batch = rl.rollout_batch(rollouts, layout, advantages=list(range(len(rollouts))))
    assert layout.pick(batch.advantages)[5].tolist() == [5.0] * len(rollouts[5].tokens)
    taken = rl.take_rows(batch, np.array([2, 0]))
    assert np.array_equal(taken.tokens, batch.tokens[[2, 0]]) and taken.fork == batch.fork


def test_rows_without_room():
    rollouts = invented()
    with pytest.raises(UserError, match="rows have room for 1 and 8"):
        rl.lay_out(rollouts, per_row=1, prompt=0, branch=8)
    with pytest.raises(UserError, match="need 12 rows, and there are 3"):
        rl.lay_out(rollouts, per_row=1, rows=3)
    with pytest.raises(UserError, match="no rollouts"):
        rl.lay_out([], per_row=1)
