"""Laws of speculative decoding on real models: the tokens and log-probabilities of the sampler, rows on their own."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax.batch import Batch
from lmjax.generation import sampler, speculative
from lmjax.generation.decoding import forward, prepare
from lmjax.generation.drafters import LookupProposer, draft_model, early_exit, prompt_lookup
from lmjax.generation.engine import FINISH
from lmjax.generation.processors import History, custom, top_k
from lmjax.generation.sampler import generate
from lmjax.generation.speculative import TakenBack, begun, chances, speculate
from lmjax.modules.cache import Dense, Int8
from tests.generation import make_speculative_fixtures as fixtures

V, N = 31, 11
SHAPE: dict[str, Any] = dict(num_layers=2, embed_dim=16, num_heads=2, max_length=32, init_std=0.4)
MODELS = {
    "rope": lm.models.small(V, layers="unrolled", **SHAPE),
    "scanned": lm.models.small(V, layers="scanned", **SHAPE),
    "learned": lm.models.gpt2(V, **SHAPE),
    "windowed": lm.models.gemma3(V, **(SHAPE | {"window": 4, "window_pattern": (True, False)})),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [1], [7, 7, 2, 7, 7]]


@functools.cache
def _model(name: str) -> tuple[lm.Policy, dict]:
    policy = lm.Policy(MODELS[name])
    return policy, policy.init(jax.random.key(0))


@functools.cache
def _drafter(name: str, target: str) -> Any:
    """A draft model is the target with noise on its weights, so that it is right now and then."""
    if name == "prompt_lookup":
        return prompt_lookup()
    if name == "early_exit":
        return early_exit(1)
    if name == "whole":
        return early_exit(SHAPE["num_layers"])
    policy, variables = _model(target)
    mix = jax.jit(lambda x, y: jax.tree.map(lambda x, y: x + 0.2 * y, x, y))
    return draft_model(policy, mix(variables, policy.init(jax.random.key(9))))


def _speculate(target: str, drafter: str, prompts: list = PROMPTS, **options: Any) -> speculative.Speculation:
    options = dict(max_new_tokens=N, block=3) | options
    return speculate(*_model(target), prompts, jax.random.key(1), drafter=_drafter(drafter, target), **options)


@functools.partial(jax.jit, static_argnums=0)
def _forward(policy: lm.Policy, variables: dict, batch: Batch) -> jax.Array:
    return policy(variables, batch).logits


def _trainer(name: str, prompts: list, tokens: Any) -> np.ndarray:
    """Logits [B, N, V] of the new tokens as a training step takes them: one full forward, no cache."""
    tokens = np.asarray(tokens)
    ids, segments = np.zeros((2, len(prompts), 33), np.int32)
    for b, prompt in enumerate(prompts):
        row = [*prompt, *tokens[b]]
        ids[b, : len(row)], segments[b, : len(row)] = row, 1
    logits = _forward(*_model(name), lm.batch.next_token_batch(ids, segments))
    at = np.array([len(prompt) - 1 for prompt in prompts])[:, None] + np.arange(tokens.shape[1])
    return np.take_along_axis(np.asarray(logits), at[..., None], 1)


def _of_tokens(z: np.ndarray, tokens: Any) -> np.ndarray:
    logp = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    return np.take_along_axis(logp, np.asarray(tokens)[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        pytest.param("rope", "whole", marks=pytest.mark.slow),
        ("rope", "prompt_lookup"),
        pytest.param("scanned", "early_exit", marks=pytest.mark.slow),
        pytest.param("learned", "draft_model", marks=pytest.mark.slow),
        ("windowed", "draft_model"),
    ],
)
def test_greedy_is_the_samplers(target: str, drafter: str) -> None:
    expected = generate(*_model(target), PROMPTS, jax.random.key(1), max_new_tokens=N, temperature=0.0)
    found = _speculate(target, drafter, temperature=0.0)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(found.sampling_logprobs, expected.sampling_logprobs, atol=1e-5)
    assert found.lengths.tolist() == [N] * 3 and found.finish.tolist() == expected.finish.tolist()
    np.testing.assert_array_equal(found.lengths, found.accepted + found.steps)
    if drafter == "whole":  # it is never wrong, and the blocks are 4, 4, 3 tokens
        assert found.acceptance_rate == 1 and found.steps.tolist() == [3] * 3
    if drafter == "draft_model":
        assert 0 < found.acceptance_rate < 1


@pytest.mark.parametrize(
    ("target", "drafter"), [
        pytest.param("rope", "draft_model", marks=pytest.mark.slow),
        pytest.param("learned", "prompt_lookup", marks=pytest.mark.slow),
        ("windowed", "early_exit"),
    ],
)
def test_logprobs_are_the_trainers(target: str, drafter: str) -> None:
    temperature = np.array([0.7, 1.3, 0.0])  # the last row takes the likeliest, and its log-probabilities are at 1
    found = _speculate(target, drafter, temperature=temperature, processors=[top_k(3)])
    z = _trainer(target, PROMPTS, found.tokens) / np.array([0.7, 1.3, 1.0])[:, None, None]
    np.testing.assert_allclose(found.logprobs, _of_tokens(z, found.tokens), atol=1e-5)
    np.testing.assert_array_equal(found.tokens[2], np.argmax(z[2], axis=-1))
    kept = np.where(z < np.sort(z, axis=-1)[..., -3:-2], -np.inf, z)
    kept[2] = z[2]  # truncation serves sampling only
    np.testing.assert_allclose(found.sampling_logprobs, _of_tokens(kept, found.tokens), atol=1e-5)
    assert found.lengths.tolist() == [N] * 3
    assert 0 < np.sum(found.accepted) < np.sum(found.judged) <= np.sum(found.drafted)
    np.testing.assert_array_equal(found.lengths, found.accepted + found.steps)


def _counting(vocab: int) -> tuple[lm.Policy, dict]:
    """After n comes n + 1, at once from the start again."""
    return lm.Policy(lm.models.bigram(vocab)), {"params": {"table": 50 * jnp.roll(jnp.eye(vocab), 1, axis=1)}}


def test_rows_end_at_every_place_of_a_block() -> None:
    model, block = _counting(16), 4
    prompts = [[*range(16), 0]] * 12
    for end in range(1, 13):  # the history repeats itself, so that all drafts are accepted: blocks of 5
        found = speculate(
            *model, prompts[:1], jax.random.key(0), drafter=prompt_lookup(), max_new_tokens=20, block=block, eos=end
        )
        assert found.tokens[0].tolist() == [*range(1, end + 1)] + [0] * (20 - end)
        assert int(found.lengths[0]) == end and FINISH[int(found.finish[0])] == "eos"
        assert not np.any(np.asarray(found.logprobs)[0, end:]) and not np.any(found.sampling_logprobs[0, end:])
        np.testing.assert_allclose(found.logprobs[0, :end], 0, atol=1e-5)
        steps = -(-end // (block + 1))
        # Of each block the last token is the target's own, but where a draft ends the row.
        assert int(found.steps[0]) == steps and int(found.judged[0]) == int(found.accepted[0]) == end - end // 5
    limits = list(range(1, 13))
    found = speculate(*model, prompts, jax.random.key(0), drafter=prompt_lookup(), max_new_tokens=limits, block=block)
    assert found.lengths.tolist() == limits and not np.any(found.finish)
    assert [row[:n].tolist() for row, n in zip(found.tokens, limits)] == [[*range(1, n + 1)] for n in limits]
    assert not np.any(np.asarray(found.tokens) * (np.arange(12) >= np.array(limits)[:, None]))


@pytest.mark.slow
def test_an_end_changes_nothing_before_it() -> None:
    free = _speculate("rope", "draft_model")
    for eos in {int(free.tokens[0, 1]), int(free.tokens[0, 6])}:
        found = _speculate("rope", "draft_model", eos=eos)
        for b in range(len(PROMPTS)):
            row = np.asarray(free.tokens[b])
            length = int(np.argmax(row == eos)) + 1 if eos in row else N
            assert int(found.lengths[b]) == length
            np.testing.assert_array_equal(found.tokens[b, :length], row[:length])
            np.testing.assert_allclose(found.logprobs[b, :length], free.logprobs[b, :length], atol=1e-5)
            assert not np.any(found.tokens[b, length:]) and not np.any(found.logprobs[b, length:])


def _up_to_four(z_BV: jax.Array, history: History) -> jax.Array:
    return jnp.where((history.generated >= 4)[:, None], -jnp.inf, z_BV)


@pytest.mark.slow
def test_a_row_with_nothing_left_to_say_ends() -> None:
    found = speculate(
        *_counting(16), [[0], [5]], jax.random.key(0), drafter=draft_model(*_counting(16)), max_new_tokens=9, block=3,
        processors=[custom(_up_to_four)], temperature=[0.0, 1.0],
    )  # fmt: skip
    assert found.tokens.tolist() == [[1, 2, 3, 4] + [0] * 5, [6, 7, 8, 9] + [0] * 5]
    assert found.lengths.tolist() == [4, 4] and {FINISH[i] for i in found.finish} == {"dead end"}
    np.testing.assert_allclose(found.logprobs, 0, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    found = _speculate("rope", "draft_model")
    changed = _speculate("rope", "draft_model", [PROMPTS[0], [7, 7, 7, 7], [11]], temperature=[1.0, 0.5, 2.0])
    for field in ("tokens", "accepted", "judged", "drafted", "steps"):
        np.testing.assert_array_equal(getattr(found, field)[0], getattr(changed, field)[0])
    np.testing.assert_allclose(found.logprobs[0], changed.logprobs[0], atol=1e-5)
    assert np.any(np.asarray(found.tokens[2]) != np.asarray(changed.tokens[2]))


def test_caches_after_rollback_are_those_of_a_fresh_prefill() -> None:
    target = "windowed"  # a ring and a full layer
    policy, variables = _model(target)
    options: Any = dict(max_new_tokens=N, cache=TakenBack(Dense(), 3))
    begin = functools.partial(sampler.begin, prompts=PROMPTS, key=jax.random.key(2), **options)
    model, rules, state, _ = begin(policy, variables)
    proposer, drafts = _drafter("draft_model", target).bind(model, lambda other: begin(other.policy, other)[2].cache)
    run, step = begun(state, drafts), jax.jit(speculative.step)
    lowered = 0
    for _ in range(3):
        before = run.state.history.length
        run, block = step(model, proposer, rules, run, chances(run.state, 3))
        lowered += int(np.sum(block.kept < 3))
        np.testing.assert_array_equal(run.state.history.length, before + block.kept + 1)
        np.testing.assert_array_equal(run.state.cache["count"], run.state.history.length - 1)
    assert lowered > 0 and len(set(np.asarray(run.state.history.generated).tolist())) > 1  # rows at their own pace

    history = run.state.history
    rows = [row[:n].tolist() for row, n in zip(np.asarray(history.tokens), np.asarray(history.length))]
    fresh = functools.partial(sampler.begin, prompts=rows, key=jax.random.key(2), **options)
    newest = jnp.array([row[-1:] for row in rows])
    read = jax.jit(lambda cache: forward(model, cache, newest, jnp.ones_like(newest), cache["count"][:, None]).hidden)
    np.testing.assert_allclose(read(run.state.cache), read(fresh(policy, variables)[2].cache), atol=1e-5)
    room, uniforms = jnp.full((3,), 3), chances(run.state, 3).drafts
    propose = jax.jit(lambda cache: proposer.propose(rules, history, cache, room, uniforms))
    proposed = [propose(cache) for cache in (run.drafts, fresh(proposer.model.policy, proposer.model)[2].cache)]
    np.testing.assert_array_equal(proposed[0].tokens, proposed[1].tokens)
    np.testing.assert_allclose(proposed[0].probs, proposed[1].probs, atol=1e-5)


@pytest.mark.slow
def test_a_quantized_cache_serves() -> None:
    found = _speculate("rope", "prompt_lookup", cache=Int8())
    z = _trainer("rope", PROMPTS, found.tokens)
    off = np.abs(np.asarray(found.logprobs) - _of_tokens(z, found.tokens))
    assert 1e-5 < off.max() < 0.2 and found.accepted.sum() > 0


def test_one_compilation_serves_a_bucket() -> None:
    before = speculative._run._cache_size()
    for length, temperature, eos in ((3, 1.0, None), (16, 0.5, 7), (9, [1.3, 2.0], 2)):
        prompts = [list(range(1, 1 + length))] * 2
        _speculate("rope", "prompt_lookup", prompts, temperature=temperature, eos=eos)
    assert speculative._run._cache_size() == before + 1


def test_an_early_exit_takes_no_parameters_of_its_own() -> None:
    policy, variables = _model("rope")
    model = prepare(policy, variables)
    proposer, _ = early_exit(1).bind(model, lambda other: {})
    own, shared = (list(map(id, jax.tree.leaves(each.variables))) for each in (proposer.model, model))
    assert own == shared and proposer.model.policy.config.num_layers == 1


@pytest.mark.slow
def test_rows_spread_over_a_mesh(make_test_mesh: Any) -> None:
    expected = _speculate("rope", "draft_model")
    found = _speculate("rope", "draft_model", mesh=make_test_mesh((2, 1, 1)))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def _lookup(history: list[int], ngram: int, count: int) -> list[int]:
    """Prompt lookup by its definition."""
    for size in range(min(ngram, len(history) - 1), 0, -1):
        for start in range(len(history) - size):
            if history[start : start + size] == history[-size:]:
                return history[start + size :][:count]
    return []


def _proposed() -> list[list[int]]:
    cases = fixtures.histories()
    found = []
    for ngram in (1, 2, 3):
        histories = [history for history, size, _ in cases if size == ngram]
        lengths = np.array([len(history) for history in histories], np.int32)
        tokens = np.full((len(histories), 20), histories[0][-1], np.int32)  # what is behind the end must not match
        for row, history in zip(tokens, histories):
            row[: len(history)] = history
        room = np.array([count for _, size, count in cases if size == ngram], np.int32)
        propose = jax.jit(functools.partial(LookupProposer(ngram, 8).propose, None))
        got = propose(History(tokens, lengths, lengths), None, room, jnp.zeros((len(histories), 4, 2)))
        got = jax.device_get(got)
        for b, n in enumerate(np.asarray(got.count)):
            np.testing.assert_array_equal(got.probs[:n, b], np.eye(8)[got.tokens[b, :n]])
        found.append([row[:n].tolist() for row, n in zip(got.tokens, got.count)])
    return [found[size - 1][[s for _, s, _ in cases[:i]].count(size)] for i, (_, size, _) in enumerate(cases)]


def test_prompt_lookup_is_that_of_transformers() -> None:
    expected = json.loads(fixtures.FIXTURES.read_text())
    assert expected == [_lookup(*case) for case in fixtures.histories()]
    assert _proposed() == expected


@pytest.mark.reference
def test_prompt_lookup_fixtures_are_current() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert fixtures.proposals() == json.loads(fixtures.FIXTURES.read_text())


@pytest.mark.parametrize(
    ("drafter", "options", "sentence"),
    [
        (draft_model(*_counting(V + 1)), {}, f"vocabulary of {V + 1} and the target one of {V}"),
        (early_exit(3), {}, "a model of 2 layers cannot exit after 3; give a number from 1 to 2"),
        (early_exit(0), {}, "cannot exit after 0"),
        (prompt_lookup(0), {}, "match 0 tokens; give at least 1"),
        (prompt_lookup(), {"block": 0}, "block is 0; draft at least 1"),
        (lm.Policy(lm.models.bigram(V)), {}, "is no drafter; give draft_model"),
        (prompt_lookup(), {"max_new_tokens": 32}, "32 learned positions"),
        (prompt_lookup(), {"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_bad_input_is_one_sentence(drafter: Any, options: dict, sentence: str) -> None:
    with pytest.raises(lm.UserError, match=sentence):
        speculate(*_model("learned"), [[1]], jax.random.key(0), drafter=drafter, **({"max_new_tokens": 4} | options))


def test_a_table_has_no_layers_to_exit_from() -> None:
    with pytest.raises(lm.UserError, match="0 layers cannot exit after 1; choose another drafter"):
        speculate(*_counting(V), [[1]], jax.random.key(0), drafter=early_exit(1), max_new_tokens=2)
