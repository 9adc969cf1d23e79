"""What the sampler offers beside plain sampling: shared prefills, guidance, prefixes, grammars, streams, meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax.generation import constraints, decoding, engine, sampler, sampling
from lmjax.generation.engine import FINISH
from lmjax.generation.processors import (
    History,
    apply,
    check,
    custom,
    forced,
    min_new_tokens,
    per_row,
    repetition_penalty,
    suppress,
    top_k,
    top_p,
)
from lmjax.generation.sampler import generate, stream
from lmjax.modules.cache import Dense, Int8, Kivi, cache_bytes
from tests.generation.test_sampler import PROMPTS, SHAPE, V, _model, _trainer

KEY = jax.random.key(1)
N = 9


def same(found, expected, rows=slice(None), atol=1e-5):
    np.testing.assert_array_equal(found.tokens, np.asarray(expected.tokens)[rows])
    np.testing.assert_allclose(found.logprobs, np.asarray(expected.logprobs)[rows], atol=atol)
    np.testing.assert_allclose(found.sampling_logprobs, np.asarray(expected.sampling_logprobs)[rows], atol=atol)


def test_sampling_logprobs_are_those_of_the_distribution_drawn_from() -> None:
    policy, variables = _model("unrolled")
    chain = (repetition_penalty(1.4), top_k(7), top_p(0.8), suppress([5]))
    temperature = np.array([0.7, 1.3, 0.0], np.float32)
    found = generate(
        policy, variables, PROMPTS, KEY, max_new_tokens=N, temperature=temperature, processors=chain
    )
    arranged = per_row(check(chain, V, N), 3)
    shape = jax.jit(lambda z, history, temperature: apply(z, history, arranged, temperature))
    tokens = np.asarray(found.tokens)
    _, logits = _trainer(policy, variables, PROMPTS, found)
    for b, prompt in enumerate(PROMPTS):
        for n in range(N):
            said = np.zeros((3, 32), np.int32)
            said[:, : len(prompt) + n] = [*prompt, *tokens[b, :n]]
            history = History(said, np.full(3, len(prompt) + n), np.full(3, len(prompt)))
            z = shape(jnp.array([logits[b, n]] * 3), history, jnp.full(3, temperature[b]))
            expected = jax.nn.log_softmax(z[0])[tokens[b, n]]
            np.testing.assert_allclose(found.sampling_logprobs[b, n], expected, atol=2e-5)
    warm = np.where(temperature > 0, temperature, 1.0)
    for b in range(3):
        expected, _ = _trainer(policy, variables, PROMPTS, found, float(warm[b]))
        np.testing.assert_allclose(found.logprobs[b], expected[b], atol=1e-5)


def test_samples_share_a_prefill_and_are_those_of_repeated_prompts() -> None:
    policy, variables = _model("windowed")
    shared = generate(policy, variables, PROMPTS, KEY, max_new_tokens=N, samples=2)
    apart = generate(policy, variables, [p for p in PROMPTS for _ in "ab"], KEY, max_new_tokens=N)
    same(shared, apart)
    assert np.any(np.asarray(shared.tokens[0]) != np.asarray(shared.tokens[1]))


@pytest.mark.parametrize("name", ["unrolled", "scanned", "learned"])
def test_long_prompts_are_kept_once_for_their_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, variables = _model(name)
    kept = []
    inner = sampler.start

    def start(*arguments, **options):
        state, read = inner(*arguments, **options)
        kept.append((read is not None, cache_bytes(state.cache)))
        return state, read

    monkeypatch.setattr(sampler, "start", start)
    shared = generate(policy, variables, PROMPTS, KEY, max_new_tokens=N, samples=3, grow=4)
    apart = generate(policy, variables, [p for p in PROMPTS for _ in range(3)], KEY, max_new_tokens=N)
    same(shared, apart)
    expected, _ = _trainer(policy, variables, [p for p in PROMPTS for _ in range(3)], shared)
    np.testing.assert_allclose(shared.logprobs, expected, atol=1e-5)
    (once, few), (repeated, all_) = kept
    assert once and not repeated and few < all_ / 4


@pytest.mark.parametrize("cache", [Dense(), Int8(), Kivi(4, 8, 4)], ids=["dense", "int8", "kivi"])
@pytest.mark.parametrize("name", ["unrolled", "windowed"])
def test_a_cache_that_grows_holds_the_same(name: str, cache) -> None:
    policy, variables = _model(name)
    options = dict(max_new_tokens=[N, 3, N], cache=cache)
    same(
        generate(policy, variables, PROMPTS, KEY, grow=2, **options),
        generate(policy, variables, PROMPTS, KEY, **options),
    )


def test_a_cache_stops_growing_when_all_rows_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, variables = _model("unrolled")
    sizes = []
    inner = sampler.widen

    def widen(*arguments, **options):
        found = inner(*arguments, **options)
        sizes.append(found.cache["segments"].shape[1])
        return found

    monkeypatch.setattr(sampler, "widen", widen)
    generate(policy, variables, PROMPTS, KEY, max_new_tokens=[2, 3, 3], room=9, grow=2)
    assert sizes == [36]  # 32 for the prompts and 2, and once 2 more, of 9


@pytest.mark.parametrize("name", [pytest.param("learned", marks=pytest.mark.slow), "windowed"])
def test_prompts_read_in_chunks_give_the_same(name: str) -> None:
    policy, variables = _model(name)
    whole = generate(policy, variables, PROMPTS, KEY, max_new_tokens=N)
    same(generate(policy, variables, PROMPTS, KEY, max_new_tokens=N, chunk=8), whole)


def test_a_prepared_model_is_used_as_it_is() -> None:
    policy, variables = _model("scanned")
    model = decoding.prepare(policy, variables)
    same(
        generate(policy, model, PROMPTS, KEY, max_new_tokens=N),
        generate(policy, variables, PROMPTS, KEY, max_new_tokens=N),
    )


def test_a_single_row_through_the_transposed_head() -> None:
    policy, variables = _model("windowed")
    assert "decode" in decoding.prepare(policy, variables, rows=1).variables
    alone = generate(policy, variables, PROMPTS[:1], KEY, max_new_tokens=N)
    same(alone, generate(policy, variables, PROMPTS, KEY, max_new_tokens=N), slice(1))


def test_guidance_leans_away_from_the_negative_prompt() -> None:
    policy, variables = _model("unrolled")
    negative = [[7, 7], [8], [9, 1, 1]]
    scale = np.array([1.0, 2.5, 1.5])
    options = dict(max_new_tokens=N, temperature=0.0)
    found = generate(policy, variables, PROMPTS, KEY, guidance=scale, negative_prompts=negative, **options)
    plain = generate(policy, variables, PROMPTS, KEY, **options)
    np.testing.assert_array_equal(found.tokens[0], plain.tokens[0])  # scale 1
    _, with_prompt = _trainer(policy, variables, PROMPTS, found)
    _, without = _trainer(policy, variables, negative, found)
    c, u = (np.asarray(jax.nn.log_softmax(z)) for z in (with_prompt, without))
    guided = u + scale[:, None, None] * (c - u)
    np.testing.assert_array_equal(found.tokens, np.argmax(guided, axis=-1))
    assert np.any(np.asarray(found.tokens)[1:] != np.argmax(c, axis=-1)[1:])
    last = [[prompt[-1]] for prompt in PROMPTS]
    same(
        generate(policy, variables, PROMPTS, KEY, guidance=1.5, **options),
        generate(policy, variables, PROMPTS, KEY, guidance=1.5, negative_prompts=last, **options),
    )


def test_a_prefix_of_real_tokens_is_as_if_they_had_been_fed() -> None:
    policy, variables = _model("unrolled")
    system = [4, 8, 15, 16, 23]
    cache = policy.init_cache(1, len(system))
    ones = np.ones((1, len(system)), np.int32)
    model = decoding.prepare(policy, variables)
    read = decoding.forward(model, cache, np.array([system]), ones, ones.cumsum(1) - 1)
    prefix = {f"layer_{i}": tuple(x[0] for x in read.cache[f"layer_{i}"].read(jnp.float32)) for i in range(2)}
    found = generate(policy, variables, PROMPTS, KEY, max_new_tokens=N, prefix=prefix)
    same(found, generate(policy, variables, [system + p for p in PROMPTS], KEY, max_new_tokens=N))


def test_rows_say_only_what_their_constraints_allow() -> None:
    policy, variables = _model("unrolled")
    rules = [
        constraints.from_callable(lambda said: [10 + len(said)], V),
        constraints.from_callable(lambda said: [3] if len(said) == 2 else range(20, 30), V, eos=3),
        constraints.from_callable(lambda said: np.ones(V, bool), V),
    ]
    found = generate(
        policy, variables, PROMPTS, KEY, max_new_tokens=5, eos=3, constraints=[rule.fresh() for rule in rules]
    )
    free = generate(policy, variables, PROMPTS, KEY, max_new_tokens=5, eos=3)
    assert found.tokens[0].tolist() == [10, 11, 12, 13, 14]
    assert np.all((np.asarray(found.tokens[1, :2]) >= 20) & (np.asarray(found.tokens[1, :2]) < 30))
    assert found.lengths.tolist()[1] == 3 and FINISH[int(found.finish[1])] == "eos"
    np.testing.assert_array_equal(found.tokens[2], free.tokens[2])
    np.testing.assert_allclose(found.sampling_logprobs[0], 0.0, atol=1e-6)
    expected, _ = _trainer(policy, variables, PROMPTS, found)
    np.testing.assert_allclose(found.logprobs[0], expected[0], atol=1e-5)
    with pytest.raises(lm.UserError, match="1 constraints for 3 rows"):
        generate(policy, variables, PROMPTS, KEY, max_new_tokens=5, constraints=[rules[0].fresh()])


def test_a_row_with_nothing_to_say_ends_there() -> None:
    policy, variables = _model("unrolled")
    nothing = custom(lambda z, history: jnp.where((history.generated == 2)[:, None], -jnp.inf, z))
    found = generate(policy, variables, PROMPTS, KEY, max_new_tokens=5, processors=[nothing])
    assert found.lengths.tolist() == [2, 2, 2]
    assert [FINISH[int(i)] for i in found.finish] == ["dead end"] * 3
    assert np.all(np.isfinite(found.logprobs)) and np.all(np.isfinite(found.sampling_logprobs))


def test_a_stream_shows_what_generate_gives_and_ends_rows_on_demand() -> None:
    policy, variables = _model("unrolled")
    whole = generate(policy, variables, PROMPTS, KEY, max_new_tokens=N)
    looks = list(stream(policy, variables, PROMPTS, KEY, every=4, max_new_tokens=N))
    assert [look.lengths.tolist() for look in looks] == [[4] * 3, [8] * 3, [9] * 3]
    same(looks[-1], whole)
    rows = stream(policy, variables, PROMPTS, KEY, every=4, max_new_tokens=N)
    next(rows)
    found = rows.send(np.array([True, False, False]))
    assert found.lengths.tolist() == [4, 8, 8]
    assert [FINISH[int(i)] for i in found.finish] == ["stop", "length", "length"]
    rows.close()


def test_each_row_has_its_own_length_and_any_of_several_eos() -> None:
    policy, variables = _model("unrolled")
    free = np.asarray(generate(policy, variables, PROMPTS, KEY, max_new_tokens=N).tokens)
    found = generate(policy, variables, PROMPTS, KEY, max_new_tokens=[3, N, 5])
    assert found.lengths.tolist() == [3, N, 5]
    wide = generate(policy, variables, PROMPTS, KEY, max_new_tokens=[3, N, 5], room=12)
    np.testing.assert_array_equal(wide.tokens[:, :N], found.tokens)
    np.testing.assert_array_equal(found.tokens[1], free[1])
    ends = [int(free[0, 3]), int(free[1, 6])]
    found = generate(policy, variables, PROMPTS, KEY, max_new_tokens=N, eos=ends)
    for b in range(3):
        first = next((n + 1 for n, token in enumerate(free[b]) if token in ends), N)
        assert int(found.lengths[b]) == first
        assert FINISH[int(found.finish[b])] == ("eos" if first < N or free[b, -1] in ends else "length")


@pytest.mark.parametrize(
    "spec",
    [
        Kivi(bits=4, group=8, residual=4),
        pytest.param(Int8(), marks=pytest.mark.slow),
        pytest.param(Dense("bfloat16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_generates_through_other_caches(spec) -> None:
    policy, variables = _model("unrolled")
    found = generate(policy, variables, PROMPTS, KEY, max_new_tokens=N, cache=spec)
    dense = generate(policy, variables, PROMPTS, KEY, max_new_tokens=N)
    agree = np.mean(np.asarray(found.tokens) == np.asarray(dense.tokens))
    assert agree > 0.5
    expected, _ = _trainer(policy, variables, PROMPTS, found)
    assert np.abs(np.asarray(found.logprobs) - expected).max() < 0.5


@pytest.mark.parametrize("shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_rows_spread_over_devices_are_the_same(shape, make_test_mesh) -> None:
    from lmjax.training.state import variables_plan

    policy = lm.Policy(lm.models.gemma3(64, **(SHAPE | {"window": 5, "window_pattern": (True, False)})))
    variables = policy.init(jax.random.key(0))
    mesh = make_test_mesh(shape)
    plan = variables_plan(policy, variables, mesh)
    sharded = jax.device_put(variables, plan.shardings)
    prompts = PROMPTS * 3  # nine rows: not a multiple of the devices
    options = dict(max_new_tokens=N, temperature=0.7, eos=5)
    found = generate(policy, sharded, prompts, KEY, mesh=mesh, **options)
    same(found, generate(policy, variables, prompts, KEY, **options))
    expected, _ = _trainer(policy, sharded, prompts, found, 0.7)
    inside = np.arange(N) < np.asarray(found.lengths)[:, None]
    np.testing.assert_allclose(np.asarray(found.logprobs)[inside], expected[inside], atol=1e-5)


def test_the_state_is_donated_and_nothing_compiles_anew_within_a_bucket() -> None:
    policy, variables = _model("unrolled")
    options = dict(max_new_tokens=N, eos=3)

    def run(prompts, k, p, temperature):
        chain = (top_k(k, bound=16), top_p(p))
        generate(policy, variables, prompts, KEY, temperature=temperature, processors=chain, **options)

    run([[1, 2], [3]], 5, 0.9, 0.5)
    before = engine._advance._cache_size(), engine.start._cache_size()
    run([list(range(1, 14)), [4, 4, 4]], 9, 0.5, 1.5)
    assert (engine._advance._cache_size(), engine.start._cache_size()) == before
    model, rules, state, _ = lm.generation.sampler.begin(policy, variables, [[1, 2], [3]], KEY, **options)
    cache = state.cache["layer_0"].key
    engine.advance(model, rules, state)
    assert cache.is_deleted()


def test_draws_follow_the_distribution_over_several_blocks() -> None:
    z_V = np.random.default_rng(0).normal(0, 2, 700).astype(np.float32)
    z_V[:300:3] = -np.inf
    rows, p_V = 40000, np.asarray(jax.nn.softmax(jnp.array(z_V)))
    uniforms = sampling.row_uniforms(jax.random.split(KEY, rows), jnp.zeros(rows, jnp.int32), 2)
    found = jax.jit(sampling.draw)(jnp.broadcast_to(z_V, (rows, 700)), uniforms)
    counts = np.bincount(found.token, minlength=700)
    assert np.all(counts[p_V == 0] == 0)
    likely = p_V * rows > 5
    chi2 = np.sum((counts - rows * p_V)[likely] ** 2 / (rows * p_V[likely]))
    assert chi2 < likely.sum() + 4 * np.sqrt(2 * likely.sum())
    np.testing.assert_allclose(found.logprob, np.log(p_V[found.token]), atol=1e-5)


def test_draws_at_the_ends_of_the_unit_interval_are_possible_tokens() -> None:
    z_BV = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf]] * 2)
    almost_one = np.float32(1 - 2**-24)
    uniforms = jnp.array([[0.0, 0.0], [almost_one, almost_one]])
    assert sampling.draw(z_BV, uniforms).token.tolist() == [1, 3]
    assert sampling.likeliest(z_BV).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(temperature=[1.0, 2.0]), r"temperature has shape \[2\] for 3 prompts"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(eos=V), f"eos {V} is outside"),
        (dict(samples=0), "samples is 0"),
        (dict(grow=0), "grow by 0 tokens"),
        (dict(chunk=12), "chunk is 12; take a power of two"),
        (dict(negative_prompts=[[1]] * 3), "without guidance"),
        (dict(guidance=2.0, negative_prompts=[[1]]), "1 negative prompts for 3 prompts"),
        (dict(processors=[top_k(3), top_k(4)]), "top_k is given twice"),
        (dict(processors=[forced({0: 5}), suppress([5])]), "5"),
        (dict(processors=[min_new_tokens(50, eos=3)]), "min_new_tokens"),
        (dict(max_new_tokens=[1, 2]), r"max_new_tokens has shape \[2\] for 3 prompts"),
        (dict(max_new_tokens=[1, 0, 2]), "max_new_tokens is 0"),
        (dict(room=3), "room is 3 but max_new_tokens 4"),
    ],
)
def test_bad_input_is_one_sentence(options: dict, sentence: str) -> None:
    policy, variables = _model("unrolled")
    with pytest.raises(lm.UserError, match=sentence):
        generate(policy, variables, PROMPTS, KEY, **({"max_new_tokens": 4} | options))
