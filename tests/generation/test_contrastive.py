"""Contrastive search against transformers and against its definition."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax.generation import contrastive
from lmjax.generation.contrastive import contrastive_search
from lmjax.generation.processors import custom, repetition_penalty, suppress
from lmjax.generation.sampler import generate
from tests.generation.search_cases import NEW, PROMPTS, found_there, load, rows


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_equals_transformers(model: str) -> None:
    policy, variables = load(model)
    for case in found_there(model, "contrastive"):
        options: dict[str, Any] = dict(alpha=case["options"]["penalty_alpha"], k=case["options"]["top_k"])
        found = contrastive_search(policy, variables, PROMPTS, max_new_tokens=NEW, eos=case["eos"] or None, **options)
        assert rows(found.tokens, found.lengths) == case["tokens"], case["options"]


@functools.partial(jax.jit, static_argnums=0)
def _forward(policy: lm.Policy, variables: dict, batch: Any) -> tuple[jax.Array, jax.Array]:
    outputs = policy(variables, batch)
    return jax.nn.log_softmax(outputs.logits, axis=-1), outputs.hidden


def _read(policy: lm.Policy, variables: dict, row: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [T, V] and final hidden states [T, D] of a row as a training step takes them: no cache."""
    ids, segments = np.zeros((2, 1, 33), np.int32)
    ids[0, : len(row)], segments[0, : len(row)] = row, 1
    logp, hidden = _forward(policy, variables, lm.batch.next_token_batch(ids, segments))
    return np.asarray(logp[0, : len(row)], np.float64), np.asarray(hidden[0, : len(row)], np.float64)


@pytest.mark.slow
def test_every_token_is_the_best_by_definition() -> None:
    policy = lm.Policy(lm.models.gemma3(31, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, max_length=64,
                                        init_std=0.5, window=5, window_pattern=(True, False)))  # fmt: skip
    variables = policy.init(jax.random.key(1))
    alpha, k = 0.7, 3
    found = contrastive_search(policy, variables, PROMPTS, alpha=alpha, k=k, max_new_tokens=8)
    greedy = generate(policy, variables, PROMPTS, jax.random.key(0), max_new_tokens=8, temperature=0.0)
    assert np.any(found.tokens != greedy.tokens)
    for b, row in enumerate(map(list, PROMPTS)):
        for n, token in enumerate(found.tokens[b].tolist()):
            logp, before = _read(policy, variables, row)
            scores = {}
            for candidate in np.argsort(-logp[-1])[:k].tolist():
                after = _read(policy, variables, [*row, candidate])[1][-1]
                cosines = before @ after / np.linalg.norm(before, axis=1) / np.linalg.norm(after)
                scores[candidate] = (1 - alpha) * np.exp(logp[-1, candidate]) - alpha * cosines.max()
            assert token == max(scores, key=scores.__getitem__)
            np.testing.assert_allclose(found.scores[b, n], scores[token], atol=1e-5)
            np.testing.assert_allclose(found.logprobs[b, n], logp[-1, token], atol=1e-5)
            row.append(token)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, pytest.param({"k": 1}, marks=pytest.mark.slow)])
def test_without_contrast_it_is_greedy_search(options: dict) -> None:
    policy, variables = load("gpt2")
    options = options | {"max_new_tokens": NEW, "eos": 5}
    greedy = generate(policy, variables, PROMPTS, jax.random.key(0), temperature=0.0, max_new_tokens=NEW, eos=5)
    found = contrastive_search(policy, variables, PROMPTS, **options)
    np.testing.assert_array_equal(found.tokens, greedy.tokens)
    np.testing.assert_array_equal(found.lengths, greedy.lengths)
    np.testing.assert_allclose(found.logprobs, greedy.logprobs, atol=1e-5)


def test_a_row_does_not_depend_on_its_place_or_its_neighbours() -> None:
    policy, variables = load("llama")
    found = contrastive_search(policy, variables, PROMPTS, max_new_tokens=NEW, eos=19)
    order = jnp.array([2, 0, 3, 1])
    moved = contrastive_search(policy, variables, [PROMPTS[b] for b in order], max_new_tokens=NEW, eos=19)
    np.testing.assert_array_equal(moved.tokens, found.tokens[order])
    np.testing.assert_allclose(moved.scores, found.scores[order], atol=1e-5)
    others = [PROMPTS[0], [4] * 20, [30], [7, 7]]  # another bucket besides
    changed = contrastive_search(policy, variables, others, max_new_tokens=NEW, eos=19)
    np.testing.assert_array_equal(changed.tokens[0], found.tokens[0])
    assert np.any(changed.tokens[1] != found.tokens[1])


@pytest.mark.slow
def test_one_compilation_serves_a_bucket_of_lengths_and_all_settings() -> None:
    policy, variables = load("gpt2")
    before = contrastive._search._cache_size()
    for length, alpha, eos in ((3, 0.6, None), (16, 0.2, 7), (9, 1.0, 2)):
        processors = (repetition_penalty(1 + alpha),)
        options: dict[str, Any] = dict(alpha=alpha, eos=eos, max_new_tokens=3, processors=processors)
        contrastive_search(policy, variables, [list(range(length))] * 2, **options)
    assert contrastive._search._cache_size() == before + 1


@pytest.mark.slow
def test_processors_see_the_history_and_forbid() -> None:
    """With fewer tokens allowed than there are candidates, only those are taken, and a row without any ends."""
    policy = lm.Policy(lm.models.bigram(vocab_size=6, init_std=1.0))
    variables = policy.init(jax.random.key(0))

    def no_repeats(z_BV: jax.Array, history: Any) -> jax.Array:
        there_BS = jnp.arange(history.tokens.shape[1]) < history.length[:, None]
        said_BV = jnp.zeros(z_BV.shape).at[jnp.arange(len(z_BV))[:, None], history.tokens].max(there_BS)
        return jnp.where(said_BV > 0, -jnp.inf, z_BV)

    prompts = [[0], [1, 2, 3]]
    found = contrastive_search(
        policy, variables, prompts, k=4, max_new_tokens=8, processors=(suppress([5]), custom(no_repeats))
    )
    new = rows(found.tokens, found.lengths)
    assert sorted(new[0]) == [1, 2, 3, 4] and sorted(new[1]) == [0, 4]
    assert not np.any(found.tokens[1, 2:]) and not np.any(found.logprobs[1, 2:]) and not np.any(found.scores[1, 2:])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"k": 0}, "k is 0"),
        ({"k": 32}, "k is 32"),
        ({"eos": 31}, "eos 31 is outside"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 64}, "64 learned positions"),
    ],
)
def test_bad_input_is_one_sentence(options: dict, sentence: str) -> None:
    policy, variables = load("gpt2")
    with pytest.raises(lm.UserError, match=sentence):
        contrastive_search(policy, variables, [[1]], **({"max_new_tokens": 4} | options))
