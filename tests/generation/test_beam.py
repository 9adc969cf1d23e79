"""Beam search against transformers, against all sequences there are, and against its own definitions."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import lmjax as lm
from lmjax.generation import beam
from lmjax.generation.beam import Beams, beam_search
from lmjax.generation.processors import custom, repetition_penalty, suppress
from lmjax.generation.sampler import generate
from tests.generation.search_cases import (
    ENDS,
    NEW,
    PROMPTS,
    STOPPING,
    found_there,
    load,
    reference_model,
    reference_search,
    rows,
)

V = 61
SHAPE = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, max_length=128, init_std=0.3)
MODELS = {
    "scanned": lm.models.small(V, layers="scanned", **SHAPE),
    "windowed": lm.models.gemma3(V, **(SHAPE | {"window": 5, "window_pattern": (True, False)})),
    "bigram": lm.models.bigram(V, init_std=1.0),
}


def _model(name: str) -> tuple[lm.Policy, dict]:
    policy = lm.Policy(MODELS[name])
    return policy, policy.init(jax.random.key(0))


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' generate as ours."""
    penalty = options.get("repetition_penalty")
    return dict(
        beams=options["num_beams"],
        groups=options.get("num_beam_groups", 1),
        diversity=options.get("diversity_penalty", 0.0),
        returned=options.get("num_return_sequences", 1),
        length_penalty=options["length_penalty"],
        early_stopping=options["early_stopping"],
        processors=(repetition_penalty(penalty),) if penalty else (),
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(policy: lm.Policy, variables: dict, batch: Any) -> jax.Array:
    return policy(variables, batch).logprobs


def _logprobs(policy: lm.Policy, variables: dict, prompts: list, found: Beams) -> np.ndarray:
    """Log-probabilities [B, R, N] of the new tokens as a training step takes them: no cache, 0 behind an end."""
    tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
    B, R, N = tokens.shape
    expected = np.zeros((B, R, N))
    width = max(map(len, prompts)) + N
    ids, segments = np.zeros((2, B, R, width), np.int32)
    for b, r in itertools.product(range(B), range(R)):
        row = [*prompts[b], *tokens[b, r, : lengths[b, r]]]
        ids[b, r, : len(row)], segments[b, r, : len(row)] = row, 1
    batch = lm.batch.next_token_batch(ids.reshape(B * R, width), segments.reshape(B * R, width))
    logprobs = np.asarray(_forward(policy, variables, batch)).reshape(B, R, -1)
    for b, r in itertools.product(range(B), range(R)):
        first = len(prompts[b]) - 1
        expected[b, r, : lengths[b, r]] = logprobs[b, r, first : first + lengths[b, r]]
    return expected


@pytest.mark.parametrize("kind", ["beam", "diverse"])
@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_equals_transformers(model: str, kind: str) -> None:
    policy, variables = load(model)
    for case in found_there(model, kind):
        options = _arguments(case["options"])
        found = beam_search(policy, variables, PROMPTS, max_new_tokens=NEW, eos=case["eos"] or None, **options)
        assert rows(found.tokens, found.lengths) == case["tokens"], case["options"]
        np.testing.assert_allclose(np.ravel(found.scores), case["scores"], atol=1e-4)


@pytest.mark.reference
def test_equals_the_transformers_that_is_installed() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    policy, variables = load("llama")
    model = reference_model("llama")
    random = np.random.default_rng(0)
    for stopping in STOPPING:
        prompts = [random.integers(0, 31, length).tolist() for length in random.integers(1, 12, 4)]
        options = dict(num_beams=3, num_return_sequences=2, length_penalty=stopping["length_penalty"] * 1.7)
        options["early_stopping"] = stopping["early_stopping"]
        eos = [int(random.choice(ENDS["llama"]))]
        expected = reference_search(model, prompts, eos, **options)
        found = beam_search(policy, variables, prompts, max_new_tokens=NEW, eos=eos, **_arguments(options))
        assert rows(found.tokens, found.lengths) == expected["tokens"], options
        np.testing.assert_allclose(np.ravel(found.scores), expected["scores"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("eos", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_as_many_beams_as_prefixes_find_the_best_of_all_sequences(eos: int | None) -> None:
    T = 4
    policy = lm.Policy(lm.models.small(5, **SHAPE))
    variables = policy.init(jax.random.key(2))
    everything = np.array(list(itertools.product(range(5), repeat=T)))
    prompt = [1, 4, 0]
    batch = lm.batch.next_token_batch(np.concatenate([np.tile(prompt, (len(everything), 1)), everything], axis=1))
    logprobs = np.asarray(_forward(policy, variables, batch))[:, len(prompt) - 1 :]
    totals = {}
    for sequence, each in zip(everything.tolist(), logprobs):
        length = sequence.index(eos) + 1 if eos in sequence else T
        totals[tuple(sequence[:length])] = float(each[:length].sum())
    best = sorted(totals, key=totals.__getitem__, reverse=True)[:5]
    found = beam_search(policy, variables, [prompt], beams=5 ** (T - 1), returned=5, max_new_tokens=T, eos=eos)
    assert [tuple(row) for row in rows(found.tokens, found.lengths)] == best
    np.testing.assert_allclose(found.scores[0], [totals[sequence] for sequence in best], atol=1e-4)


@pytest.mark.parametrize("name", [pytest.param("windowed", marks=pytest.mark.slow), "bigram"])
def test_one_beam_is_greedy_search(name: str) -> None:
    policy, variables = _model(name)
    free = generate(policy, variables, PROMPTS, jax.random.key(0), max_new_tokens=9, temperature=0.0)
    eos = int(free.tokens[0, 3])
    greedy = generate(policy, variables, PROMPTS, jax.random.key(0), max_new_tokens=9, temperature=0.0, eos=eos)
    found = beam_search(policy, variables, PROMPTS, beams=1, max_new_tokens=9, eos=eos)
    np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(found.lengths[:, 0], greedy.lengths)
    np.testing.assert_allclose(found.logprobs[:, 0], greedy.logprobs, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("scanned", marks=pytest.mark.slow), "windowed"])
def test_scores_are_those_of_a_fresh_forward(name: str) -> None:
    policy, variables = _model(name)
    eos, penalty = 7, 0.6
    options: dict[str, Any] = dict(beams=4, returned=4, max_new_tokens=9, eos=eos, early_stopping=False)
    found = beam_search(policy, variables, PROMPTS, length_penalty=penalty, **options)
    expected = _logprobs(policy, variables, PROMPTS, found)
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)
    np.testing.assert_allclose(found.scores, expected.sum(-1) / np.asarray(found.lengths) ** penalty, atol=1e-4)
    assert np.all(np.diff(found.scores, axis=1) <= 0)
    for row in rows(found.tokens, found.lengths):
        assert eos not in row[:-1] and (row[-1] == eos or len(row) == 9)


@pytest.mark.slow
def test_diversity_is_taken_off_scores_and_not_off_logprobs() -> None:
    policy, variables = _model("bigram")
    prompts, options = [[3], [8]], dict(beams=2, groups=2, returned=2, max_new_tokens=1)
    plain = beam_search(policy, variables, prompts, **options)
    diverse = beam_search(policy, variables, prompts, diversity=0.25, **options)
    np.testing.assert_array_equal(plain.tokens[:, 0], plain.tokens[:, 1])  # nothing tells the groups apart
    np.testing.assert_allclose(diverse.logprobs, _logprobs(policy, variables, prompts, diverse), atol=1e-5)
    for b in range(2):
        first, second = (int(diverse.tokens[b, r, 0]) for r in (0, 1))
        logits = np.log(scipy.special.softmax(variables["params"]["table"][prompts[b][0]]))
        assert first == np.argmax(logits)
        logits[first] -= 0.25
        assert second == np.argmax(logits)
        np.testing.assert_allclose(diverse.scores[b], [logits[first] + 0.25, logits[second]], atol=1e-5)


def test_a_row_does_not_depend_on_its_place_or_its_neighbours() -> None:
    policy, variables = load("llama")
    options: dict[str, Any] = dict(beams=4, groups=2, diversity=0.8, returned=4, max_new_tokens=NEW, eos=19)
    found = beam_search(policy, variables, PROMPTS, **options)
    order = [2, 0, 3, 1]
    moved = beam_search(policy, variables, [PROMPTS[b] for b in order], **options)
    np.testing.assert_array_equal(moved.tokens, found.tokens[jnp.array(order)])
    np.testing.assert_allclose(moved.scores, found.scores[jnp.array(order)], atol=1e-5)
    others = [PROMPTS[0], [4] * 20, [30], [7, 7]]  # another bucket besides
    changed = beam_search(policy, variables, others, **options)
    np.testing.assert_array_equal(changed.tokens[0], found.tokens[0])
    assert np.any(changed.tokens[1] != found.tokens[1])


def test_one_compilation_serves_a_bucket_of_lengths_and_all_settings() -> None:
    policy, variables = load("gpt2")
    before = beam._search._cache_size()
    for i, stopping in enumerate(STOPPING):
        prompts = [list(range(1 + i)), [5] * 16]
        options: dict[str, Any] = dict(beams=2, max_new_tokens=4, eos=i or None, returned=1 + i % 2, **stopping)
        beam_search(policy, variables, prompts, processors=(repetition_penalty(1 + i / 10),), **options)
    assert beam._search._cache_size() == before + 1


@pytest.mark.slow
def test_the_loop_ends_with_the_last_row() -> None:
    policy = lm.Policy(lm.models.bigram(vocab_size=4))
    variables = {"params": {"table": 50 * jnp.roll(jnp.eye(4), 1, axis=1)}}  # after n comes n + 1
    steps = []

    def count(z_BV: jax.Array, history: Any) -> jax.Array:
        jax.debug.callback(steps.append, history.length[0])
        return z_BV

    options: dict[str, Any] = dict(beams=2, max_new_tokens=64, eos=3, early_stopping=True)
    found = beam_search(policy, variables, [[0], [1]], processors=(custom(count),), **options)
    jax.effects_barrier()
    assert rows(found.tokens, found.lengths) == [[1, 2, 3], [2, 3]]
    assert 3 <= len(steps) < 16


def test_processors_see_each_beams_own_history() -> None:
    policy, variables = _model("bigram")
    banned = [int(token) for token in np.argsort(np.asarray(variables["params"]["table"][0]))[-3:]]

    def no_repeats(z_BV: jax.Array, history: Any) -> jax.Array:
        there_BS = jnp.arange(history.tokens.shape[1]) < history.length[:, None]
        said_BV = jnp.zeros(z_BV.shape).at[jnp.arange(len(z_BV))[:, None], history.tokens].max(there_BS)
        return jnp.where(said_BV > 0, -jnp.inf, z_BV)

    found = beam_search(
        policy, variables, PROMPTS, beams=4, returned=4, max_new_tokens=20,
        processors=(suppress(banned), custom(no_repeats)),
    )  # fmt: skip
    for r, row in enumerate(rows(found.tokens, found.lengths)):
        whole = PROMPTS[r // 4] + row
        assert len(set(row)) == 20 and not set(row) & set(PROMPTS[r // 4]) and not set(row) & set(banned), whole
    assert len({tuple(row) for row in rows(found.tokens, found.lengths)}) == 16


@pytest.mark.slow
def test_fewer_sequences_than_asked_for() -> None:
    policy = lm.Policy(lm.models.bigram(vocab_size=2))
    found = beam_search(policy, policy.init(jax.random.key(0)), [[0]], beams=4, returned=4, max_new_tokens=1)
    assert found.lengths.tolist() == [[1, 1, 0, 0]]
    np.testing.assert_allclose(found.scores, [[-np.log(2), -np.log(2), -np.inf, -np.inf]])


def test_one_sampled_beam_is_sampling() -> None:
    policy = lm.Policy(lm.models.bigram(vocab_size=4))
    p = np.array([0.1, 0.2, 0.3, 0.4])
    variables = {"params": {"table": jnp.log(jnp.tile(p, (4, 1)))}}
    options: dict[str, Any] = dict(beams=1, max_new_tokens=8, temperature=2.0)
    found = beam_search(policy, variables, [[0]] * 500, jax.random.key(6), **options)
    counts = np.bincount(np.ravel(found.tokens), minlength=4)
    assert scipy.stats.chisquare(counts, 4000 * np.sqrt(p) / np.sqrt(p).sum()).pvalue > 1e-3
    np.testing.assert_allclose(found.logprobs, np.log(p)[np.asarray(found.tokens)], atol=1e-5)
    np.testing.assert_allclose(found.scores, np.sum(found.logprobs, axis=-1) / 2, atol=1e-4)


@pytest.mark.slow
def test_sampled_beams_are_drawn_without_replacement() -> None:
    """Two beams draw four of five tokens and keep the better two: all hangs on the one that is left out."""
    policy = lm.Policy(lm.models.bigram(vocab_size=5))
    p = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
    variables = {"params": {"table": jnp.log(jnp.tile(p, (5, 1)))}}
    found = beam_search(policy, variables, [[0]] * 2000, jax.random.key(1), beams=2, returned=2, max_new_tokens=1)
    expected = dict.fromkeys([(1, 3), (1, 4), (3, 4)], 0.0)
    for drawn in itertools.permutations(range(5), 4):
        chance = np.prod([p[token] / (1 - sum(p[list(drawn[:i])])) for i, token in enumerate(drawn)])
        expected[tuple(sorted(sorted(drawn, key=lambda token: -p[token])[:2]))] += chance
    pairs = [tuple(sorted(pair)) for pair in np.asarray(found.tokens)[..., 0].tolist()]
    counts = [pairs.count(pair) for pair in expected]
    assert sum(counts) == 2000
    assert scipy.stats.chisquare(counts, 2000 * np.array(list(expected.values()))).pvalue > 1e-3


@pytest.mark.reference
def test_sampled_beams_are_distributed_as_in_transformers() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    policy, variables = load("llama")
    model, count = reference_model("llama"), 2000
    torch.manual_seed(0)
    options: dict[str, Any] = dict(num_beams=2, do_sample=True, temperature=1.5, top_k=0, max_new_tokens=2)
    there = reference_search(model, [PROMPTS[2]] * count, [19], early_stopping=True, **options)["tokens"]
    ours = beam_search(
        policy, variables, [PROMPTS[2]] * count, jax.random.key(3), beams=2, temperature=1.5, max_new_tokens=2, eos=19,
        length_penalty=1.0, early_stopping=True,
    )  # fmt: skip
    here = rows(ours.tokens, ours.lengths)
    common = [row for row in sorted({tuple(row) for row in there}) if there.count(list(row)) >= 20]
    table = [[found.count(list(row)) for row in common] for found in (here, there)]
    table = [[*counts, count - sum(counts)] for counts in table]
    assert len(common) > 5
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.slow
def test_sampled_beams_follow_their_key_and_not_their_neighbours() -> None:
    policy, variables = _model("bigram")
    options: dict[str, Any] = dict(beams=3, returned=3, max_new_tokens=6)
    found, again = (beam_search(policy, variables, PROMPTS, jax.random.key(0), **options) for _ in range(2))
    other = beam_search(policy, variables, PROMPTS, jax.random.key(1), **options)
    changed = beam_search(policy, variables, [PROMPTS[0], [3], [3], [3]], jax.random.key(0), **options)
    np.testing.assert_array_equal(found.tokens, again.tokens)
    assert np.any(found.tokens != other.tokens)
    np.testing.assert_array_equal(found.tokens[0], changed.tokens[0])
    np.testing.assert_allclose(found.logprobs, _logprobs(policy, variables, PROMPTS, found), atol=1e-5)


@pytest.mark.slow
def test_prompts_in_chunks_and_variables_on_a_mesh(make_test_mesh: Any) -> None:
    from lmjax.training.state import variables_plan

    policy, variables = load("llama")
    expected = beam_search(policy, variables, PROMPTS, beams=3, max_new_tokens=NEW, eos=19)
    plan = variables_plan(policy, variables, make_test_mesh((2, 2, 1)))
    sharded = jax.device_put(variables, plan.shardings)
    for found in (
        beam_search(policy, variables, PROMPTS, beams=3, max_new_tokens=NEW, eos=19, chunk=4),
        beam_search(policy, sharded, PROMPTS, beams=3, max_new_tokens=NEW, eos=19),
    ):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"groups": 3}, "4 beams do not divide into 3 groups"),
        ({"returned": 5}, "returned is 5"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"diversity": 1.0}, "diversity is 1.0 for 1 groups"),
        ({"groups": 2, "diversity": -1.0}, "diversity is -1.0"),
        ({"temperature": 0.5}, "temperature is 0.5"),
        ({"temperature": 0.0, "key": jax.random.key(0)}, "temperature is 0.0"),
        ({"groups": 2, "key": jax.random.key(0)}, "groups are searched, not drawn"),
        ({"eos": 61}, "eos is 61"),
        ({"eos": []}, "eos is"),
        ({"chunk": 3}, "chunk is 3"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_input_is_one_sentence(options: dict, sentence: str) -> None:
    policy, variables = _model("bigram")
    with pytest.raises(lm.UserError, match=sentence):
        beam_search(policy, variables, [[1]], **({"beams": 4, "max_new_tokens": 4} | options))
