"""Laws of the sampler: its log-probabilities are the trainer's, and a row depends on nothing but itself."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax.batch import Batch
from lmjax.generation import engine
from lmjax.generation.engine import Generation
from lmjax.generation.processors import top_k
from lmjax.generation.sampler import generate

V = 61
SHAPE = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, max_length=128, init_std=0.3)
MODELS = {
    "unrolled": lm.models.small(V, **SHAPE),
    "scanned": lm.models.small(V, layers="scanned", **SHAPE),
    "learned": lm.models.gpt2(V, **(SHAPE | {"num_kv_heads": None})),
    "windowed": lm.models.gemma3(V, **(SHAPE | {"window": 5, "window_pattern": (True, False)})),
    "bigram": lm.models.bigram(V, init_std=1.0),
}
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]]


def _model(name: str) -> tuple[lm.Policy, dict]:
    policy = lm.Policy(MODELS[name])
    return policy, policy.init(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def _forward(policy: lm.Policy, variables: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
    outputs = policy(variables, batch)
    return outputs.logprobs, outputs.logits


def _trainer(policy: lm.Policy, variables: dict, prompts: list, found: Generation, temperature: float = 1.0):
    """Log-probabilities [B, N] and logits [B, N, V] of the new tokens as a training step takes them: one full
    forward of rows padded on the right, no cache."""
    new = np.asarray(found.tokens)
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, new, strict=True)]
    ids = np.zeros((len(rows), 64), np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    segments = np.array([[1] * len(row) + [0] * (64 - len(row)) for row in rows])
    batch = lm.batch.next_token_batch(ids, segments)
    temperatures = jnp.full((len(rows),), temperature, jnp.float32)
    logprobs, logits = _forward(policy, variables, dataclasses.replace(batch, temperature=temperatures))
    at = np.array([len(prompt) - 1 for prompt in prompts])[:, None] + np.arange(new.shape[1])
    return np.take_along_axis(np.asarray(logprobs), at, 1), np.take_along_axis(
        np.asarray(logits), at[..., None], 1
    )


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_the_trainers(name: str) -> None:
    policy, variables = _model(name)
    for temperature in (1.0, 0.7):
        found = generate(
            policy, variables, PROMPTS, jax.random.key(1), max_new_tokens=9, temperature=temperature
        )
        expected, _ = _trainer(policy, variables, PROMPTS, found, temperature)
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)
        assert found.lengths.tolist() == [9, 9, 9]


def test_top_k_keeps_the_full_logprobs_and_the_best_tokens() -> None:
    policy, variables = _model("unrolled")
    found = generate(policy, variables, PROMPTS, jax.random.key(1), max_new_tokens=9, processors=[top_k(3)])
    expected, logits = _trainer(policy, variables, PROMPTS, found)
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)
    best = np.argsort(-logits, axis=-1)[..., :3]
    assert np.all(np.any(best == np.asarray(found.tokens)[..., None], axis=-1))
    assert np.any(best[..., 0] != np.asarray(found.tokens))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_takes_the_likeliest_token(name: str) -> None:
    policy, variables = _model(name)
    found = generate(policy, variables, PROMPTS, jax.random.key(1), max_new_tokens=9, temperature=0.0)
    expected, logits = _trainer(policy, variables, PROMPTS, found)
    np.testing.assert_array_equal(found.tokens, np.argmax(logits, axis=-1))
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)


def test_scanned_and_unrolled_sample_the_same() -> None:
    first, second = (_model(name) for name in ("unrolled", "scanned"))
    a, b = (generate(*model, PROMPTS, jax.random.key(3), max_new_tokens=9) for model in (first, second))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    policy, variables = _model("unrolled")
    key = jax.random.key(4)
    found = generate(policy, variables, PROMPTS, key, max_new_tokens=9)
    others = [PROMPTS[0], [7, 7, 7, 7], [11]]  # another bucket besides: the longest prompt is gone
    changed = generate(policy, variables, others, key, max_new_tokens=9)
    np.testing.assert_array_equal(found.tokens[0], changed.tokens[0])
    np.testing.assert_allclose(found.logprobs[0], changed.logprobs[0], atol=1e-5)
    assert np.any(np.asarray(found.tokens[1]) != np.asarray(changed.tokens[1]))


def test_rows_end_at_eos() -> None:
    policy, variables = _model("unrolled")
    free = generate(policy, variables, PROMPTS, jax.random.key(5), max_new_tokens=30)
    eos = int(free.tokens[0, 4])
    found = generate(policy, variables, PROMPTS, jax.random.key(5), max_new_tokens=30, eos=eos)
    for b in range(len(PROMPTS)):
        row = np.asarray(free.tokens[b])
        length = int(np.argmax(row == eos)) + 1 if eos in row else 30
        assert int(found.lengths[b]) == length
        np.testing.assert_array_equal(found.tokens[b, :length], row[:length])
        np.testing.assert_allclose(found.logprobs[b, :length], free.logprobs[b, :length], atol=1e-5)
        assert not np.any(found.tokens[b, length:]) and not np.any(found.logprobs[b, length:])


def test_samples_follow_the_policy() -> None:
    policy = lm.Policy(lm.models.bigram(vocab_size=4))
    table = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]] * 4))
    for temperature in (1.0, 2.0):
        found = generate(
            policy,
            {"params": {"table": table}},
            [[0]] * 64,
            jax.random.key(6),
            max_new_tokens=128,
            temperature=temperature,
        )
        share = np.bincount(np.asarray(found.tokens).ravel(), minlength=4) / found.tokens.size
        expected = np.array([0.1, 0.2, 0.3, 0.4]) ** (1 / temperature)
        np.testing.assert_allclose(share, expected / expected.sum(), atol=0.02)


def test_one_compilation_serves_a_bucket_of_lengths_and_all_temperatures() -> None:
    policy, variables = _model("unrolled")
    before = engine._advance._cache_size()
    for length, temperature, eos in ((3, 1.0, None), (16, 0.5, 7), (9, 1.3, 2)):
        prompts = [list(range(1, 1 + length))] * 2
        generate(
            policy, variables, prompts, jax.random.key(0), max_new_tokens=9, temperature=temperature, eos=eos
        )
    assert engine._advance._cache_size() == before + 1


def test_samples_from_sharded_variables(make_test_mesh) -> None:
    from lmjax.training.state import variables_plan

    policy, variables = _model("unrolled")
    plan = variables_plan(policy, variables, make_test_mesh((2, 2, 1)))
    expected = generate(policy, variables, PROMPTS, jax.random.key(7), max_new_tokens=9)
    found = generate(
        policy, jax.device_put(variables, plan.shardings), PROMPTS, jax.random.key(7), max_new_tokens=9
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([], {}, "prompt 0 has no tokens"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[V]], {}, f"prompt 0 holds the id {V}"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1] * 100], {"max_new_tokens": 29}, "128 learned positions"),
    ],
)
def test_bad_input_is_one_sentence(prompts: list, options: dict, sentence: str) -> None:
    policy, variables = _model("learned")
    with pytest.raises(lm.UserError, match=sentence):
        generate(policy, variables, prompts, jax.random.key(0), **({"max_new_tokens": 4} | options))


def test_prompts_are_not_padded_beyond_learned_positions():
    policy = lm.Policy(lm.models.gpt2(16, num_layers=1, embed_dim=16, num_heads=2, max_length=12))
    found = generate(policy, policy.init(jax.random.key(0)), [np.arange(5)], jax.random.key(1), max_new_tokens=7)
    assert found.tokens.shape == (1, 7)
