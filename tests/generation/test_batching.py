"""Laws of continuous batching: a request gets what `generate` gives it, and the rows are kept busy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax.generation import batching, engine, slots
from lmjax.generation.batching import Progress, Request, Result, generate_many, serve
from lmjax.generation.processors import min_new_tokens, repetition_penalty, suppress, top_k
from lmjax.generation.sampler import FINISH, Generation, generate

V = 61
SHAPE = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, max_length=128, init_std=0.3)
MODELS = {
    "learned": lm.models.gpt2(V, **(SHAPE | {"num_kv_heads": None})),
    "windowed": lm.models.gemma3(V, **(SHAPE | {"window": 5, "window_pattern": (True, False)})),
    "bigram": lm.models.bigram(V, init_std=1.0),
}
KEY = jax.random.key(1)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, length) for length in (3, 1, 18, 5, 30, 2, 7, 16, 17, 4, 9)]
LIMITS = [7, 12, 1, 9, 4, 11, 2, 12, 6, 3, 10]
TEMPERATURES = [1.0, 0.0, 0.7, 1.3, 1.0, 0.0, 1.0, 0.7, 0.0, 1.0, 1.0]
EOS = (4, 8, 15, 16, 23, 42)
REQUESTS = [Request(*parts) for parts in zip(PROMPTS, LIMITS, TEMPERATURES)]


@functools.cache
def _model(name: str) -> tuple[lm.Policy, dict]:
    policy = lm.Policy(MODELS[name])
    return policy, policy.init(jax.random.key(0))


def _check(found: Generation, expected: Any) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.finish, expected.finish)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(found.sampling_logprobs, expected.sampling_logprobs, atol=1e-5)


def _check_row(row: Result, expected: Any, limit: int) -> None:
    """A result against row 0 of what `generate` gave."""
    n = min(int(expected.lengths[0]), limit)
    np.testing.assert_array_equal(row.tokens, expected.tokens[0, :n])
    np.testing.assert_allclose(row.logprobs, expected.logprobs[0, :n], atol=1e-5)
    np.testing.assert_allclose(row.sampling_logprobs, expected.sampling_logprobs[0, :n], atol=1e-5)


def _expected(policy: lm.Policy, variables: dict) -> Generation:
    """What `generate` gives for REQUESTS."""
    temperatures = np.array(TEMPERATURES)
    return generate(policy, variables, PROMPTS, KEY, max_new_tokens=LIMITS, temperature=temperatures, eos=EOS)


@pytest.mark.parametrize(("name", "counts"), [("windowed", [3]), ("bigram", [1, 16])])
def test_gives_what_generate_gives_whatever_the_number_of_slots(name: str, counts: list[int]) -> None:
    policy, variables = _model(name)
    expected = _expected(policy, variables)
    assert {FINISH[i] for i in np.asarray(expected.finish)} == {"length", "eos"}
    for count in counts:
        _check(generate_many(policy, variables, REQUESTS, KEY, slots=count, eos=EOS), expected)


def test_gives_what_generate_gives_a_prompt_alone() -> None:
    policy, variables = _model("learned")
    order = np.random.default_rng(1).permutation(len(REQUESTS))
    asked = (Request(PROMPTS[i], LIMITS[i], seed=0) for i in order)
    model = lm.generation.prepare(policy, variables)
    found = serve(policy, model, asked, KEY, slots=3, max_prompt=30, max_new_tokens=12, eos=EOS)
    rows = {int(order[row.number]): row for row in found}
    assert sorted(rows) == list(range(len(REQUESTS)))
    for i, prompt in enumerate(PROMPTS):
        alone = generate(policy, model, [prompt], KEY, max_new_tokens=12, eos=EOS)
        _check_row(rows[i], alone, LIMITS[i])


def test_each_request_has_processors_of_its_own() -> None:
    policy, variables = _model("bigram")
    chains: list[list] = [
        [],
        [repetition_penalty(5.0), top_k(9)],
        [suppress([1, 2, 3, 4, 5, 6, 7]), min_new_tokens(8, EOS)],
    ]
    asked = [Request([i], 12, processors=chain, eos=EOS, seed=0) for i, chain in enumerate(chains * 2)]
    rows = {row.number: row for row in serve(policy, variables, asked, KEY, slots=2)}
    for i, request in enumerate(asked):
        alone = generate(
            policy, variables, [request.prompt], KEY, max_new_tokens=12, processors=request.processors, eos=EOS
        )
        _check_row(rows[i], alone, 12)


def test_samples_are_those_of_generate_and_share_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, variables = _model("bigram")
    reads: list[int] = []

    def start(model: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        reads.append(int(np.sum(prompts.lengths > 1)))  # the prompts below are longer, what fills a group is not
        return engine_start(model, prompts, *rest, **options)

    engine_start = engine.start
    expected = generate(policy, variables, PROMPTS[2:6], KEY, max_new_tokens=12, samples=5, eos=EOS)
    monkeypatch.setattr(engine, "start", start)
    found = generate_many(policy, variables, PROMPTS[2:6], KEY, slots=3, samples=5, max_new_tokens=12, eos=EOS)
    _check(found, expected)
    assert sum(reads) == 4


@pytest.mark.slow
def test_spread_over_a_mesh(make_test_mesh) -> None:
    policy, variables = _model("windowed")
    found = generate_many(policy, variables, REQUESTS, KEY, slots=4, eos=EOS, mesh=make_test_mesh((2, 1, 2)))
    _check(found, _expected(policy, variables))


@pytest.mark.slow
def test_a_prefix_stands_before_every_prompt() -> None:
    policy, variables = _model("learned")
    rng = np.random.default_rng(2)
    prefix = {f"layer_{i}": tuple(rng.normal(size=(2, 4, 3, 8)).astype(np.float32)) for i in range(2)}
    options = dict(max_new_tokens=12, prefix=prefix)
    prompts = [PROMPTS[0], PROMPTS[6]]
    found = generate_many(policy, variables, prompts, KEY, slots=1, **options)
    _check(found, generate(policy, variables, prompts, KEY, **options))


JITTED = (engine.start, engine.collect, slots._empty, slots._insert, slots._run)


def _compilations() -> np.ndarray:
    return np.array([function._cache_size() for function in JITTED])


def test_one_compilation_serves_every_workload_of_the_same_bounds() -> None:
    policy, variables = _model("bigram")

    def workload(seed: int, count: int) -> list[Request]:
        rng = np.random.default_rng(seed)
        return [
            Request(
                rng.integers(0, V, rng.integers(1, 33)),
                int(rng.integers(1, 14)),
                float(rng.uniform(0.1, 2)),
                [top_k(int(rng.integers(1, 9)), bound=16)] if rng.integers(2) else [],
                [int(rng.integers(V))] if rng.integers(2) else (),
            )
            for _ in range(count)
        ]

    before = _compilations()
    for seed, count in ((0, 20), (1, 20), (2, 4)):
        list(serve(policy, variables, workload(seed, count), KEY, slots=3, max_prompt=32, max_new_tokens=13))
        start, *others = _compilations() - before
        assert start <= 2 * 2  # prompts up to 16 and up to 32, read four or one at a time
        assert others == [1, 1, 2, 1]


@pytest.mark.slow
def test_a_lazy_request_of_a_new_kind_compiles_once_more_unless_it_was_foretold() -> None:
    policy, variables = _model("bigram")
    asked = [Request([1], 3, processors=chain) for chain in ([], [], [top_k(3)], [], [top_k(4)])]
    options = dict(slots=2, max_prompt=1, max_new_tokens=3)
    before = slots._run._cache_size()
    surprised = list(serve(policy, variables, iter(asked), KEY, **options))
    assert slots._run._cache_size() == before + 2
    foretold = list(serve(policy, variables, iter(asked), KEY, processors=[top_k(3)], **options))
    assert slots._run._cache_size() == before + 2  # the second of the two
    for one, other in zip(surprised, foretold, strict=True):
        assert one.number == other.number
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_the_rows_are_kept_busy() -> None:
    policy, variables = _model("bigram")
    limits = np.random.default_rng(3).integers(4, 65, 64)
    asked = [Request([1], int(limit)) for limit in limits]
    looks: list[Progress] = []
    found = generate_many(policy, variables, asked, KEY, slots=8, report=looks.append)
    last = looks[-1]
    assert found.lengths.tolist() == limits.tolist()
    assert (last.finished, last.running, last.used) == (64, 0, limits.sum())
    assert last.steps <= limits.sum() / 8 * 1.1 and last.occupancy > 0.9  # the longest go first: a short tail
    assert [look.finished for look in looks] == sorted(look.finished for look in looks)

    looks.clear()
    list(serve(policy, variables, asked, KEY, slots=8, report=looks.append))
    assert looks[-1].steps <= limits.sum() / 8 * 1.2 + limits.max()
    static = sum(max(limits[i : i + 8]) for i in range(0, 64, 8))
    assert looks[-1].steps < 0.75 * static


def test_results_come_as_they_finish_and_requests_are_asked_for_as_rows_come_free() -> None:
    policy, variables = _model("bigram")
    asked = 0

    def endless() -> Iterator[Request]:
        nonlocal asked
        for asked in itertools.count(1):
            yield Request([asked % V], 40 if asked == 1 else 2)

    server = serve(policy, variables, endless(), KEY, slots=2, max_prompt=1, max_new_tokens=40)
    first = next(server)
    assert first.number == 1 and asked == 2
    numbers = [first.number, *(row.number for row in itertools.islice(server, 24))]
    assert sorted(numbers) == list(range(25)) and 15 < numbers.index(0) < 24
    before = asked
    server.close()
    assert asked == before and next(server, None) is None


def test_requests_are_ended_from_outside() -> None:
    policy, variables = _model("bigram")
    expected = generate(policy, variables, PROMPTS, KEY, max_new_tokens=LIMITS, temperature=np.array(TEMPERATURES))
    ended: dict[int, int] = {}

    def until(number: int, tokens: np.ndarray) -> bool:
        np.testing.assert_array_equal(tokens, expected.tokens[number, : len(tokens)])
        if len(tokens) >= 3 and number % 2:
            ended[number] = len(tokens)
        return number in ended

    steps: dict[bool, int] = {}
    for asks in (True, False):
        report = lambda progress, asks=asks: steps.update({asks: progress.steps})
        options = {"slots": 2, "every": 2, "report": report, "until": until if asks else None}
        found = list(serve(policy, variables, REQUESTS, KEY, **options))
        assert len(found) == len(REQUESTS)
        for row in found:
            n = ended.get(row.number, LIMITS[row.number]) if asks else LIMITS[row.number]
            np.testing.assert_array_equal(row.tokens, expected.tokens[row.number, :n])
            assert FINISH[row.finish] == ("stop" if asks and row.number in ended else "length")
    assert len(ended) >= 3 and steps[True] < steps[False]


def test_an_error_of_lazy_requests_comes_after_what_had_begun() -> None:
    policy, variables = _model("bigram")

    def failing() -> Iterator[Sequence[int]]:
        yield from ([1], [2], [3])
        raise OSError("the file is gone")

    server = serve(policy, variables, failing(), KEY, slots=2, max_prompt=1, max_new_tokens=5)
    assert sorted(row.number for row in itertools.islice(server, 3)) == [0, 1, 2]
    with pytest.raises(OSError, match="the file is gone"):
        next(server)

    server = serve(policy, variables, iter([[1], [2, 3]]), KEY, slots=2, max_prompt=1, max_new_tokens=5)
    assert next(server).number == 0
    with pytest.raises(lm.UserError, match="request 1: it takes 2 tokens where max_prompt is 1"):
        next(server)


def test_no_requests() -> None:
    policy, variables = _model("bigram")
    assert list(serve(policy, variables, [], KEY, slots=2)) == []
    with pytest.raises(lm.UserError, match="there are no requests"):
        generate_many(policy, variables, [], KEY, slots=2)


@pytest.mark.parametrize(
    ("requests", "options", "sentence"),
    [
        ([[1]], {"slots": 0}, "slots is 0"),
        ([[1]], {"every": 0}, "every is 0"),
        ([[1]], {"refill": 3}, "refill is 3"),
        ([[1]], {"chunk": 3}, "chunk is 3"),
        ([[1]], {"max_prompt": 0}, "max_prompt is 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": None}, "request 0: max_new_tokens is None"),
        ([[1], []], {}, "request 1: its prompt has no tokens"),
        ([[1], [V]], {}, f"request 1: its prompt holds the id {V}"),
        ([[1], Request([1], 5)], {}, "request 1: it takes 5 tokens where max_new_tokens is 4"),
        ([[1, 2]], {"max_prompt": 1}, "request 0: it takes 2 tokens where max_prompt is 1"),
        ([[1], Request([1], temperature=-1.0)], {}, "request 1: temperature is -1.0"),
        ([[1], Request([1], eos=V)], {}, "request 1: eos 61 is outside"),
        ([[1], Request([1], seed=-1)], {}, "request 1: seed is -1"),
        ([[1], Request([1], processors=[top_k(2), top_k(3)])], {}, "request 1: top_k is given twice"),
        ([[1], Request([1], processors=[top_k([2, 3])])], {}, "request 1: top_k has k by row"),
        ([[1] * 125], {}, "request 0: a prompt of 125 tokens and 4 new ones do not fit 128"),
        (iter([[1]]), {}, "max_prompt is missing"),
        (iter([[1]]), {"max_prompt": 1, "max_new_tokens": None}, "max_new_tokens is missing"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(requests: Any, options: dict, sentence: str) -> None:
    policy, variables = _model("learned")
    with pytest.raises(lm.UserError, match=sentence):
        batching.serve(policy, variables, requests, KEY, **({"slots": 2, "max_new_tokens": 4} | options))
