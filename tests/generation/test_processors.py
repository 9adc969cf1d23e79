"""Laws of the logits processors: transformers' results one by one, in pairs and in a chain; rows that share a batch."""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax.generation import processors as p
from lmjax.generation import truncation
from lmjax.generation.processor_base import parameters
from tests.generation import make_processor_fixtures as cases
from tests.generation.make_processor_fixtures import CASES, CHAINS, FIXTURES, PAIRS, SINGLES, SIZES, THEIR_NAMES

V = 37
B = 10


@functools.lru_cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(FIXTURES) as file:
        return dict(file)


def _history(V: int) -> p.History:
    return p.History(*map(jnp.asarray, cases.history(V)))


@jax.jit
def _apply(chain: tuple[p.Processor, ...], z_BV: jax.Array, history: p.History, temperature_B: Any = None) -> jax.Array:
    return p.apply(z_BV, history, chain, temperature_B)


def _ours(chain: Any, V: int, z: Any = None) -> np.ndarray:
    return np.asarray(_apply(tuple(chain), jnp.asarray(cases.logits(V) if z is None else z), _history(V)))


def _one_by_one(chain: Any, V: int) -> np.ndarray:
    """The same, compiled a processor at a time, which pairs share."""
    z = cases.logits(V)
    for processor in p.arrange(chain):
        z = _ours((processor,), V, z)
    return z


def _made(kind: str, V: int = V, i: int = 0) -> p.Processor:
    return CASES[kind][i].ours(V)


def _assert_equal(found: Any, expected: Any) -> None:
    """Nothing ruled out on one side alone; the rest to float32's precision."""
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


# --- transformers ---------------------------------------------------------------------------------------------------


# Of the sizes of vocabularies, the one in the middle shows what the others do not only once in a while.
SHOWN = [pytest.param(size, marks=pytest.mark.slow) if size == 17 else size for size in SIZES]


@pytest.mark.parametrize("size", SHOWN)
@pytest.mark.parametrize(("kind", "i"), SINGLES)
def test_each_equals_transformers(kind: str, i: int, size: int) -> None:
    expected = _stored()[f"single/{size}"][SINGLES.index((kind, i))]
    _assert_equal(_ours([_made(kind, size, i)], size), expected)


@pytest.mark.parametrize("kind", CASES)
def test_pairs_equal_transformers(kind: str) -> None:
    for pair, expected in zip(PAIRS, _stored()["pair/37"], strict=True):
        if pair[0] == kind:
            _assert_equal(_one_by_one(reversed([_made(name) for name in pair]), V), expected)


@pytest.mark.parametrize("size", SHOWN)
@pytest.mark.parametrize("i", range(len(CHAINS)))
def test_the_whole_chain_equals_transformers(size: int, i: int) -> None:
    chain = p.arrange(reversed([_made(kind, size) for kind in CHAINS[i]])) if size > 1 else None
    chain = chain or tuple(_made(kind, size) for kind in CHAINS[i])  # of one token, forced and suppressed
    _assert_equal(_ours(chain, size), _stored()[f"chain/{size}"][i])


def test_every_case_bites() -> None:
    """A case that changes nothing, or a pair that is not told from its members, would show nothing."""
    found = dict(zip(SINGLES, _stored()["single/37"], strict=True))
    z = cases.logits(V)
    for (kind, i), changed in found.items():
        if (kind, i) in [("top_k", 3), ("no_repeat_ngram", 3)]:  # more than there are tokens; longer than all but one
            continue
        assert np.any(changed != z), (kind, i)
    told = [
        not np.array_equal(both, found[one, 0]) and not np.array_equal(both, found[other, 0])
        for (one, other), both in zip(PAIRS, _stored()["pair/37"], strict=True)
    ]
    assert np.mean(told) > 0.9


def test_guidance_equals_transformers() -> None:
    conditional, unconditional, expected = _stored()["guide/17"]
    found = jax.jit(p.guide)(conditional, unconditional, jnp.full(len(expected), 1.5))
    known = ~np.isnan(expected)  # transformers gives NaN where both are impossible
    np.testing.assert_array_equal(np.isneginf(found)[known], np.isneginf(expected)[known])
    np.testing.assert_allclose(np.asarray(found)[known], expected[known], rtol=1e-6, atol=1e-6)
    assert np.all(np.isneginf(found[np.isneginf(conditional)]))
    mixed = jax.jit(p.guide)(conditional, unconditional, jnp.where(jnp.arange(len(expected)) < 4, 1.0, 1.5))
    np.testing.assert_array_equal(mixed[:4], conditional[:4])
    np.testing.assert_array_equal(mixed[4:], found[4:])


@pytest.mark.reference
def test_transformers_still_gives_what_is_stored() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for size in SIZES:
        for (kind, i), expected in zip(SINGLES, _stored()[f"single/{size}"], strict=True):
            np.testing.assert_allclose(cases.oracle([CASES[kind][i]], size), expected, rtol=1e-6, err_msg=kind)
        for chain, expected in zip(CHAINS, _stored()[f"chain/{size}"], strict=True):
            np.testing.assert_allclose(cases.oracle([CASES[kind][0] for kind in chain], size), expected, rtol=1e-6)
    for pair, expected in zip(PAIRS, _stored()["pair/37"], strict=True):
        np.testing.assert_allclose(cases.oracle([CASES[kind][0] for kind in pair], V), expected, rtol=1e-6)
    np.testing.assert_allclose(cases.guidance(1.5, 17), _stored()["guide/17"], rtol=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize(("kind", "i"), SINGLES)
def test_each_equals_transformers_untouched(kind: str, i: int) -> None:
    """Without the stable sort too, but for which of some tied tokens top-p keeps."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found, expected = _ours([_made(kind, V, i)], V), cases.oracle([CASES[kind][i]], V, stable=kind == "eta")
    if kind == "top_p":
        found, expected = np.sort(found, axis=-1), np.sort(expected, axis=-1)
    _assert_equal(found, expected)


@pytest.mark.reference
def test_the_order_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    class Custom(transformers.LogitsProcessor):
        pass

    class Model(transformers.GenerationMixin):
        config = types.SimpleNamespace(is_encoder_decoder=False)

    config = transformers.GenerationConfig(
        sequence_bias=[[[1], 2.0]], repetition_penalty=1.2, no_repeat_ngram_size=2, bad_words_ids=[[4]], min_length=3,
        min_new_tokens=2, forced_eos_token_id=2, remove_invalid_values=True, exponential_decay_length_penalty=(2, 1.1),
        suppress_tokens=[3], begin_suppress_tokens=[3], do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1,
        typical_p=0.9, epsilon_cutoff=0.1, eta_cutoff=0.1, max_length=20,
    )  # fmt: skip
    config._eos_token_tensor = torch.tensor([2])
    theirs = Model()._get_logits_processor(config, 4, logits_processor=transformers.LogitsProcessorList([Custom()]))
    ours = [_made(kind) for kind in CASES if kind in THEIR_NAMES] + [p.custom(lambda z, history: z)]
    names = [THEIR_NAMES[processor.name] for processor in p.arrange(reversed(ours))]
    assert names == [type(processor).__name__ for processor in theirs]


# --- definitions ----------------------------------------------------------------------------------------------------


def test_presence_and_frequency_count_new_tokens_only() -> None:
    z, (tokens, length, prompt) = cases.logits(V), cases.history(V)
    presence, frequency = np.linspace(-1, 2, B, dtype=np.float32), np.linspace(1.5, -0.5, B, dtype=np.float32)
    expected = z.copy()
    for b in range(B):
        new = tokens[b, prompt[b] : length[b]].tolist()
        for token in set(new):
            expected[b, token] = z[b, token] - frequency[b] * new.count(token) - presence[b]
    found = _ours(p.arrange([p.presence_penalty(presence), p.frequency_penalty(frequency)]), V)
    _assert_equal(found, expected)
    assert np.any(length - prompt >= 3) and np.any(length == prompt)
    _assert_equal(_ours([p.presence_penalty(0.5)], V)[8:], z[8:])  # rows without new tokens


def test_candidates_and_the_full_sort_agree() -> None:
    """On rows that ten candidates settle and rows that they do not, with ties at the edge."""
    z = np.asarray(jax.random.normal(jax.random.key(0), (64, 200))) * np.linspace(8, 0.1, 64)[:, None]
    z = np.where(np.arange(64)[:, None] % 2, np.round(z * 4) / 4, z).astype(np.float32)
    history = p.History(jnp.zeros((64, 1), jnp.int32), jnp.ones(64, jnp.int32), jnp.ones(64, jnp.int32))
    for make in (p.top_p, p.typical):
        share = np.linspace(0.05, 0.97, 64)
        few, all_ = (_apply((make(share, candidates=size),), z, history) for size in (10, 200))
        np.testing.assert_array_equal(few, all_)
        kept = np.sum(np.isfinite(all_), axis=-1)
        assert np.sum(kept > 10) > 5 and np.sum(kept < 10) > 5


def test_the_vocabulary_is_sorted_only_when_the_candidates_do_not_settle_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_: list[bool] = []

    def spy(settled_B1: jax.Array, few: Any, by_sorting: Any) -> Any:
        sorted_.append(not np.all(settled_B1))
        return by_sorting() if sorted_[-1] else few

    monkeypatch.setattr(truncation, "_settled_or_sorted", spy)
    history = p.History(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32), jnp.ones(2, jnp.int32))
    sharp = jnp.stack([5 * jnp.arange(40.0), -5 * jnp.arange(40.0)])
    few_left = jnp.where(jnp.arange(40) < 3, 1.0, -jnp.inf) * jnp.ones((2, 1))
    flat = jnp.tile(jnp.linspace(0, 0.1, 40), (2, 1))
    for make in (p.top_p, p.typical):
        for z, share, expected in ((sharp, 0.9, False), (few_left, 0.999, False), (flat, 0.9, True), (flat, 1, False)):
            make(share, candidates=4)(z, history)
            assert sorted_.pop() == expected
        greedy = p.apply(flat, history, (make(0.9, candidates=4),), jnp.zeros(2))
        assert not sorted_.pop()
        np.testing.assert_array_equal(greedy, flat)
    assert not sorted_


@pytest.mark.parametrize("processor", [p.top_k(50), p.top_p(0.9), p.typical(0.9)], ids=lambda processor: processor.name)
def test_candidates_are_found_without_a_sort(processor: p.Processor) -> None:
    """XLA has a top-k of its own, a hundred times as fast as a sort, which it misses where the result is sliced."""
    if jax.default_backend() != "cpu":
        pytest.skip("how XLA names its top-k is looked at on CPU")
    arguments = (processor,), jnp.zeros((B, 1000)), _history(1000)
    text = _apply.lower(*arguments).compile().as_text()
    outside = text[text.index("ENTRY") :]
    assert '"TopK"' in outside and " sort(" not in outside


def test_temperature_divides_at_its_place_and_spares_greedy_rows() -> None:
    chain = p.arrange([p.typical(0.2), p.repetition_penalty(1.3), p.top_k(3)])
    temperature = np.where(np.arange(B) % 3 == 0, 0.0, np.linspace(0.5, 2, B)).astype(np.float32)
    z, history = jnp.asarray(cases.logits(V)), _history(V)
    found = _apply(chain, z, history, jnp.asarray(temperature))
    divided = np.where(temperature == 0, 1, temperature)
    expected = _ours(p.arrange([*chain, p.temperature(divided)]), V)
    np.testing.assert_array_equal(found[1::3], expected[1::3])
    np.testing.assert_array_equal(found[::3], _ours([p.repetition_penalty(1.3)], V)[::3])
    with pytest.raises(lm.UserError, match="temperature is given twice"):
        p.apply(z, history, (p.temperature(0.5),), jnp.asarray(temperature))


def test_custom_functions_come_before_temperature() -> None:
    shift = lambda z_BV, history: z_BV + history.generated[:, None]
    chain = p.arrange([p.temperature(0.5), p.custom(shift, active=np.arange(B) % 2 == 0), p.suppress([3])])
    assert [processor.name for processor in chain] == ["suppress", "custom", "temperature"]
    new = np.where(np.arange(B) % 2 == 0, np.asarray(_history(V).generated), 0)[:, None]
    expected = np.where(np.arange(V) == 3, -np.inf, (cases.logits(V) + new) / 0.5)
    _assert_equal(_ours(chain, V), expected)


# --- rows of a batch ------------------------------------------------------------------------------------------------


def _mixed() -> list[list[p.Processor]]:
    """A chain for each row: every case somewhere, rows with many kinds and rows with few."""
    rows: list[list[p.Processor]] = [[] for _ in range(B)]
    for k, (kind, i) in enumerate(SINGLES):
        for b in (k % 8, 3 * k % 8):
            if kind != "forced" and kind not in [processor.name for processor in rows[b]]:
                rows[b].append(_made(kind, V, i))
    rows[8] = [_made("forced", V, 1)]
    return rows


def test_rows_with_chains_of_their_own_share_a_batch() -> None:
    z, history = cases.logits(V), _history(V)
    chain = p.stack(_mixed())
    assert {processor.name for processor in chain} == set(CASES)
    found = _ours(chain, V)
    for b, alone in enumerate(_mixed()):
        expected = z[b : b + 1]
        one = jax.tree.map(lambda x, b=b: x[b : b + 1], history)
        for processor in p.arrange(alone):
            expected = _apply((processor,), expected, one)
        np.testing.assert_allclose(found[b], expected[0], rtol=1e-6, atol=1e-6)
    assert found[9].tobytes() == z[9].tobytes()  # a row of neutral values


@pytest.mark.parametrize("kind", CASES)
def test_neutral_rows_are_untouched_bit_for_bit(kind: str) -> None:
    z = cases.logits(V)
    z[::2] = np.where(np.arange(V) % 5 == 0, -0.0, z[::2])
    found = _ours(p.stack([[_made(kind)] if b % 2 else [] for b in range(B)]), V, z)
    assert found[::2].tobytes() == z[::2].tobytes()
    np.testing.assert_array_equal(found[1::2], _ours([_made(kind)], V, z)[1::2])


def test_per_row_picks_rows() -> None:
    chain = p.per_row(p.arrange([_made(kind) for kind in CASES]), B)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(chain))
    found, rows = _ours(chain, V), jnp.array([4, 0, 0, 9])
    z, history = jnp.asarray(cases.logits(V)), _history(V)
    picked = _apply(*jax.tree.map(lambda x: x[rows], (chain, z, history)))
    np.testing.assert_array_equal(picked, found[np.asarray(rows)])


@pytest.mark.parametrize("kind", CASES)
def test_vmap_changes_nothing(kind: str) -> None:
    chain = p.per_row([_made(kind, V, len(CASES[kind]) - 1)], B)
    alone = lambda chain, z, history: p.apply(*jax.tree.map(lambda x: x[None], (z, history)), chain)[0]
    found = jax.jit(jax.vmap(alone))(chain, jnp.asarray(cases.logits(V)), _history(V))
    np.testing.assert_allclose(found, _ours(chain, V), rtol=1e-6, atol=1e-6)


def test_other_values_compile_nothing_anew() -> None:
    @jax.jit
    def run(chain: Any, z_BV: jax.Array, history: p.History) -> jax.Array:
        return p.apply(z_BV, history, chain)

    for k, share, n in ((33, 0.9, 2), (64, 1, 0), (50, 0.123, 5)):
        chain = p.arrange([
            p.top_k(k), p.top_p(share), p.typical(share), p.no_repeat_ngram(n), p.repetition_penalty(n + 1),
            p.min_new_tokens(n, eos=n), p.forced({n + 1: 2 * n}), p.logit_bias({n: share}), p.suppress([n + 9, k - 1]),
            p.eta(share / 2),
        ])  # fmt: skip
        run(chain, jnp.zeros((B, 65)), _history(65))
    assert run._cache_size() == 1


def test_traced_parameters() -> None:
    """A processor may be made inside a compiled function."""
    run = jax.jit(lambda z, history, k, x: p.apply(z, history, (p.top_k(k, bound=8), p.top_p(x))))
    found = run(jnp.asarray(cases.logits(V)), _history(V), 4, 0.77)
    np.testing.assert_array_equal(found, _ours([p.top_k(4), p.top_p(0.77)], V))
    with pytest.raises(lm.UserError, match="give the largest it may be"):
        jax.jit(p.top_k)(4)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: p.temperature(0.0), "temperature is 0.0; give a number above 0"),
        (lambda: p.top_k(-1), "top_k is -1; give a whole number"),
        (lambda: p.top_k(2.5), "top_k is 2.5; give a whole number"),
        (lambda: p.top_k([3, 40], bound=32), "top_k is 40, above its bound of 32"),
        (lambda: p.top_k([[3, 4]]), r"top_k has shape \(1, 2\)"),
        (lambda: p.top_p(0), "top_p is 0.0; give a number above 0, up to 1"),
        (lambda: p.top_p([0.5, 1.5]), "top_p is 1.5; give a number above 0, up to 1"),
        (lambda: p.top_p(float("nan")), "top_p is nan"),
        (lambda: p.top_p("0.5"), "top_p is '0.5'"),
        (lambda: p.top_p(jnp.float32(2)), "top_p is 2.0"),
        (lambda: p.top_p(0.5, candidates=0), "top_p looks at 0 candidates"),
        (lambda: p.min_p(1.1), "min_p is 1.1"),
        (lambda: p.typical(1.1), "typical is 1.1"),
        (lambda: p.epsilon(1.0), "epsilon is 1.0"),
        (lambda: p.eta(-0.1), "eta is -0.1"),
        (lambda: p.repetition_penalty(0.0), "repetition_penalty is 0.0; give a number above 0"),
        (lambda: p.presence_penalty(float("inf")), "presence_penalty is inf"),
        (lambda: p.no_repeat_ngram(-2), "no_repeat_ngram is -2"),
        (lambda: p.bad_words([]), "bad_words is empty"),
        (lambda: p.bad_words([[1], []]), r"bad_words holds \[\]"),
        (lambda: p.sequence_bias({(3, -1): 1.0}), r"sequence_bias holds \[3, -1\]"),
        (lambda: p.logit_bias({3: float("nan")}), "logit_bias's bias is nan"),
        (lambda: p.min_length(3, eos=None), "min_length's eos is missing; give the id that ends a row"),
        (lambda: p.min_new_tokens(3, eos=[]), r"min_new_tokens's eos has shape \(0,\); give the id that ends a row"),
        (lambda: p.min_new_tokens(3, eos=-7), "min_new_tokens's eos is -7"),
        (lambda: p.forced({0: -1}), "give an id of at least 0 for each place"),
        (lambda: p.exponential_length_penalty(-1, 1.1, eos=2), "exponential_length_penalty is -1"),
        (lambda: p.exponential_length_penalty(1, -1.1, eos=2), "exponential_length_penalty's factor is -1.1"),
        (lambda: p.suppress([[1], [1, 2]]), "suppress is"),
        (lambda: p.arrange([lambda z, history: z]), r"is no processor; wrap a function .* in custom"),
        (lambda: p.arrange([p.top_k(3), p.top_p(0.9), p.top_k(4)]), "top_k is given twice"),
        (lambda: p.arrange([p.top_k([3, 4]), p.min_p([0.1] * 3)]), "top_k for 2 and min_p for 3"),
        (lambda: p.arrange([p.suppress([3, 4]), p.forced({0: 4})]), "token 4 is both forced and ruled out by suppress"),
        (
            lambda: p.arrange([p.forced({0: 5, 1: 7}), p.suppress_at_start([7], start=1)]),
            "token 7 is both forced and ruled out by suppress_at_start",
        ),
        (
            lambda: p.arrange([p.forced({3: 2}), p.min_new_tokens([0, 5], eos=2)]),
            "token 2 is both forced and ruled out by min_new_tokens",
        ),
        (lambda: p.arrange([p.bad_words([[1, 2], [9]]), p.forced({8: 9})]), "token 9 is both forced and ruled out"),
        (lambda: p.check([p.suppress([V])], V, 8), f"suppress names the id {V}, outside the model's vocabulary of {V}"),
        (lambda: p.check([p.bad_words([[1, V + 2]])], V, 8), f"bad_words names the id {V + 2}"),
        (lambda: p.check([p.logit_bias(np.zeros(V - 1))], V, 8), f"logit_bias has {V - 1} numbers for a vocabulary"),
        (lambda: p.check([p.min_new_tokens(9, eos=2)], V, 8), "min_new_tokens is 9, above max_new_tokens, 8"),
        (lambda: p.check([p.forced({8: 1})], V, 8), "forced has the place 8 of 8 new tokens"),
        (lambda: p.check([p.forced({-9: 1})], V, 8), "forced has the place -9 of 8 new tokens"),
        (lambda: p.check([p.forced({0: 1, -1: 2})], V, 1), "forced has the place 0 from the start and from the end"),
        (lambda: p.check([p.forced({-1: 2}), p.min_new_tokens(8, eos=2)], V, 8), "token 2 is both forced and"),
        (lambda: p.check([p.suppress(range(5))], 5, 8), "leave no token of 5 that may be drawn as the first"),
        (lambda: p.check([p.suppress([0, 1, 2]), p.suppress_at_start([3, 4])], 5, 8), "drawn as the first new token"),
        (lambda: p.check([p.suppress([[0, 1], [0, 2]]), p.bad_words([[1]])], 3, 8), None),
        (lambda: p.check([p.suppress([[0, 1], [0, 2]]), p.bad_words([[1], [0, 2]])], 3, 8), "leave no token of 3"),
        (lambda: p.per_row([p.top_k([1, 2])], 3), "top_k has 2 values of k for 3 rows"),
        (lambda: p.stack([[p.top_k([1, 2])]]), "top_k has k by row in the chain of a single row"),
    ],
)
def test_bad_input_is_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(lm.UserError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_places_from_the_end() -> None:
    chain = p.arrange([p.forced({0: 5, -1: [2, 3]})])
    history = lambda generated: p.History(jnp.zeros((1, 9), jnp.int32), jnp.array([2 + generated]), jnp.array([2]))
    with pytest.raises(lm.UserError, match="forced counts a place from the end; call check"):
        p.apply(jnp.zeros((1, 7)), history(0), chain)
    for most, last in ((6, 5), (np.array([4]), 3)):
        chain = p.check(chain, 7, most)
        for generated in range(7):
            allowed = np.flatnonzero(np.isfinite(p.apply(jnp.zeros((1, 7)), history(generated), chain)[0]))
            expected = {0: [5], last: [2, 3]}.get(generated, list(range(7)))
            assert allowed.tolist() == expected
        chain = p.arrange([p.forced({0: 5, -1: [2, 3]})])


def test_every_kind_is_tried() -> None:
    """A kind without a case would be compared with nothing."""
    from lmjax.generation import bans, penalties

    kinds = {
        kind.name
        for module in (bans, penalties, truncation)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, p.Processor) and kind is not p.Processor
    }
    assert kinds == set(CASES) | {"frequency_penalty", "presence_penalty"}
    for module in (bans, penalties, truncation):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, p.Processor) and kind is not p.Processor:
                assert kind.name in p.__all__ and list(parameters(kind))
