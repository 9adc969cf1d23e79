"""Speculative decoding draws from the target, to the last digit: every way that its own step can go, enumerated."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax.generation import drafters, sampler, speculative
from lmjax.generation.drafters import draft_model, early_exit, prompt_lookup
from lmjax.generation.engine import Generation
from lmjax.generation.processors import History, apply, check, repetition_penalty, top_k, top_p
from lmjax.generation.speculative import Chances, TakenBack, acceptance, begun, residual, speculate
from lmjax.losses.logits import Head
from lmjax.models.decoder import ModelOutputs
from lmjax.modules.cache import Dense

V, K, N = 8, 2, 3  # vocabulary, drafts in a block, new tokens
EOS = 5
PROMPT = [1, 2, 3, 1, 2]  # repeats itself, for prompt lookup
CHAINS: dict[str, dict[str, Any]] = {
    "plain": {},
    "processed": dict(processors=[top_k(6), top_p(0.95), repetition_penalty(1.3)], temperature=0.8),
    "greedy": dict(temperature=0.0),
}


@dataclasses.dataclass(frozen=True)
class LayeredConfig:
    """A Markov model whose logits are sums of tables, one a layer: it can exit early, and every number is exact."""

    vocab_size: int
    num_layers: int
    layers: str = "unrolled"


class Layered:
    def __init__(self, config: LayeredConfig):
        self.config = config

    def init_cache(self, batch_size: int, length: int, spec: Any = None, slack: int = 0) -> dict:
        return {"count": jnp.zeros((batch_size,), jnp.int32)}

    def apply(self, variables: dict, tokens: Any, segments: Any, positions: Any, **options: Any) -> ModelOutputs:
        hidden = sum(variables["params"][f"layer_{i}"][tokens] for i in range(self.config.num_layers))
        count = variables["cache"]["count"] + jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
        return ModelOutputs(hidden, {}, {"count": count})

    def head(self, variables: dict) -> Head:
        return Head(None)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch):
    """64 bits all along: the models here hand out their logits as hidden states, in float64."""
    monkeypatch.setitem(lm.policy._BUILDERS, LayeredConfig, Layered)
    for module in (speculative, drafters):
        monkeypatch.setattr(module, "next_logits", lambda model, hidden_BD: hidden_BD)
    with jax.enable_x64(True):
        yield


def _target() -> tuple[lm.Policy, dict]:
    tables = 0.9 * np.random.default_rng(0).normal(size=(2, V, V))
    return lm.Policy(LayeredConfig(V, 2)), {"params": {f"layer_{i}": jnp.asarray(t) for i, t in enumerate(tables)}}


def _drafter(name: str) -> Any:
    table = jnp.asarray(0.9 * np.random.default_rng(1).normal(size=(1, V, V)))
    other = draft_model(lm.Policy(LayeredConfig(V, 1)), {"params": {"layer_0": table[0]}})
    return {"draft_model": other, "early_exit": early_exit(1), "prompt_lookup": prompt_lookup()}[name]


def _exact(options: dict) -> dict[tuple[int, ...], float]:
    """Probability of every output under the target, from the chain rule."""
    _, variables = _target()
    table_VV = np.sum([np.asarray(table) for table in variables["params"].values()], axis=0)
    chain = check(options.get("processors", ()), V, N)
    temperature = options.get("temperature", 1.0)
    mass, done = {(): 1.0}, {}
    for _ in range(N):
        prefixes = list(mass)
        rows = np.array([[*PROMPT, *prefix] for prefix in prefixes])
        lengths = np.full(len(rows), rows.shape[1])
        z_MV = np.asarray(
            apply(
                jnp.asarray(table_VV[rows[:, -1]]),
                History(jnp.asarray(rows), jnp.asarray(lengths), jnp.full(len(rows), len(PROMPT))),
                chain,
                jnp.full(len(rows), np.float32(temperature)),
            )
        )
        p_MV = np.exp(z_MV - z_MV.max(axis=-1, keepdims=True))
        p_MV = p_MV / p_MV.sum(axis=-1, keepdims=True) if temperature else np.eye(V)[z_MV.argmax(axis=-1)]
        grown = {(*prefix, v): mass[prefix] * p for prefix, row in zip(prefixes, p_MV) for v, p in enumerate(row)}
        done |= {said: p for said, p in grown.items() if said[-1] == EOS or len(said) == N}
        mass = {said: p for said, p in grown.items() if said[-1] != EOS and len(said) < N}
    return done


def _middle(p_RV: np.ndarray, token_R: np.ndarray) -> np.ndarray:
    """[R, 2], uniform numbers that draw these tokens: the middle of each one's share."""
    below_RV = np.cumsum(p_RV, axis=1)
    at = lambda x: np.take_along_axis(x, token_R[:, None], axis=1)[:, 0]
    middle = (at(below_RV) - at(p_RV) / 2) / np.maximum(below_RV[:, -1], 1e-300)
    return np.stack([np.full_like(middle, 0.5), middle], axis=1)


_STEP = jax.jit(speculative.step)


def _branches(drafter: Any, prefixes: list[tuple[int, ...]], options: dict) -> dict[tuple[int, ...], np.ndarray]:
    """What one block makes of rows that have said these prefixes, all of one length: {said: [M] probabilities}.

    Every draft, verdict and last token is forced in turn through the uniform numbers that the step takes, and weighed
    by the distributions that the step reports.
    """
    M, said = len(prefixes), len(prefixes[0])
    policy, variables = _target()
    rows = [[*PROMPT, *prefix] for prefix in prefixes * V * V][: V * V]  # one shape for all, so that it compiles once
    settings = options | dict(max_new_tokens=N, eos=EOS, cache=TakenBack(Dense(), K))
    begin = functools.partial(sampler.begin, prompts=rows, key=jax.random.key(0), **settings)
    model, rules, state, _ = begin(policy, variables)
    proposer, drafts = drafter.bind(model, lambda other: begin(other.policy, other)[2].cache)
    history = dataclasses.replace(state.history, prompt_length=jnp.full((len(rows),), len(PROMPT), jnp.int32))
    run = begun(dataclasses.replace(state, history=history), drafts)

    most = min(K, N - said - 1)
    ways = [range(M), *[range(V)] * most, *[range(1)] * (K - most), range(most + 1), range(V)]
    path_RW = np.array(list(itertools.product(*ways)))
    R = len(path_RW)
    path_RW = path_RW[np.minimum(np.arange(1536), R - 1)]
    row_R, draft_RK, kept_R, last_R = path_RW[:, 0], path_RW[:, 1 : 1 + K], path_RW[:, -2], path_RW[:, -1]
    run, rules = jax.tree.map(lambda leaf: jnp.asarray(leaf)[row_R], (run, rules))

    drafts, last = np.full((len(row_R), K, 2), 0.5), np.full((len(row_R), 2), 0.5)
    accept = np.where(np.arange(K) < kept_R[:, None], 0.0, 1.0)
    step = lambda: _STEP(model, proposer, rules, run, Chances(*map(jnp.asarray, (drafts, accept, last))))
    for k in range(K):
        drafts[:, k] = _middle(np.asarray(step()[1].q[k]), draft_RK[:, k])
    block = step()[1]
    last[:] = _middle(np.asarray(block.last), last_R)
    after, block = step()

    count_R = np.asarray(after.drafted - run.drafted)
    weight_R = np.where(np.arange(len(row_R)) < R, 1.0, 0.0)
    at = lambda x, token: np.take_along_axis(np.asarray(x), np.asarray(token)[:, None], axis=1)[:, 0]
    for k in range(K):
        drafted_R, p, q, token_R = k < count_R, block.p[k], block.q[k], draft_RK[:, k]
        weight_R *= np.where(drafted_R, at(q, token_R), token_R == 0)
        chance_R = np.asarray(acceptance(p, q, jnp.asarray(token_R)))
        weight_R *= np.where(k < kept_R, np.where(drafted_R, chance_R, 0), 1)
        weight_R *= np.where((k == kept_R) & drafted_R, 1 - chance_R, 1)
    place = np.asarray(kept_R)[None, :, None]
    p, q = (np.take_along_axis(np.asarray(x), place, axis=0)[0] for x in (block.p, block.q))
    weight_R *= at(residual(jnp.asarray(p), jnp.asarray(q)), last_R)

    # The step went the ways it was sent, where they can be gone at all.
    real_R = weight_R > 0
    assert np.array_equal(np.asarray(block.kept)[real_R], kept_R[real_R])
    drafted_RK = (np.arange(K) < count_R[:, None]) & real_R[:, None]
    assert np.array_equal(np.asarray(block.drafts)[drafted_RK], draft_RK[drafted_RK])
    found: dict[tuple[int, ...], np.ndarray] = {}
    state = jax.device_get(dataclasses.replace(after.state, keys=None))
    tokens, length, done, finish = state.history.tokens, state.history.length, state.done, state.finish
    for r in np.flatnonzero(real_R):
        said_now = tuple(tokens[r, len(PROMPT) : length[r]].tolist())
        assert said_now[:said] == prefixes[row_R[r]] and len(said_now) > said
        assert EOS not in said_now[:-1] and len(said_now) <= N
        assert done[r] == (said_now[-1] == EOS or len(said_now) == N)
        assert finish[r] == (said_now[-1] == EOS)
        found.setdefault(said_now, np.zeros(M))[row_R[r]] += weight_R[r]
    np.testing.assert_allclose(sum(found.values()), 1, atol=1e-12)
    return found


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        pytest.param(name, chain, marks=() if chain == "processed" or name == "draft_model" else pytest.mark.slow)
        for name in ("draft_model", "early_exit", "prompt_lookup")
        for chain in CHAINS
    ],
)
def test_every_output_has_the_targets_probability(name: str, chain: str, double: None) -> None:
    options = CHAINS[chain]
    mass: dict[tuple[int, ...], float] = {(): 1.0}
    for length in range(N):
        prefixes = [said for said in mass if len(said) == length and (not said or said[-1] != EOS)]
        if not prefixes:
            continue
        for said, shares in _branches(_drafter(name), prefixes, options).items():
            mass[said] = mass.get(said, 0.0) + sum(mass[p] * share for p, share in zip(prefixes, shares))
        for prefix in prefixes:
            del mass[prefix]
    expected = _exact(options)
    distance = sum(abs(mass.get(said, 0.0) - expected.get(said, 0.0)) for said in mass.keys() | expected.keys()) / 2
    assert distance < 1e-12
    assert len(expected) > 300 and (chain != "plain" or len(mass) == len(expected))


def test_acceptance_and_residual_by_hand() -> None:
    p, q = jnp.array([0.5, 0.3, 0.2, 0.0]), jnp.array([0.2, 0.6, 0.1, 0.1])
    chances = [float(acceptance(p, q, jnp.array(token))) for token in range(4)]
    np.testing.assert_allclose(chances, [1.0, 0.5, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(residual(p, q), [0.75, 0.0, 0.25, 0.0], atol=1e-6)
    np.testing.assert_array_equal(residual(p, jnp.zeros(4)), p)
    np.testing.assert_array_equal(residual(p, p), p)
    assert float(acceptance(p, jnp.zeros(4), jnp.array(0))) == 0


def _tables(seed: int, same_rows: bool = False) -> np.ndarray:
    table = 1.2 * np.random.default_rng(seed).normal(size=(V, V))
    return np.repeat(table[:1], V, axis=0) if same_rows else table


def _sample(target: np.ndarray, draft: np.ndarray, **options: Any) -> speculative.Speculation:
    policy = lm.Policy(lm.models.bigram(V))
    variables = lambda table: {"params": {"table": jnp.asarray(table, jnp.float32)}}
    return speculate(
        policy, variables(target), [PROMPT] * 2, jax.random.key(0), drafter=draft_model(policy, variables(draft)),
        max_new_tokens=N, samples=8192, **options,
    )  # fmt: skip


@pytest.mark.parametrize("chain", [pytest.param("plain", marks=pytest.mark.slow), "processed"])
def test_the_loop_draws_from_the_target(chain: str) -> None:
    target = sum(np.asarray(table) for table in _target()[1]["params"].values())
    found = _sample(target, _tables(1), eos=EOS, block=K, **CHAINS[chain])
    rows = [tuple(row[:n].tolist()) for row, n in zip(np.asarray(found.tokens), np.asarray(found.lengths))]
    expected = _exact(CHAINS[chain])
    assert set(rows) <= {said for said, p in expected.items() if p > 0}
    counts = {said: 0 for said in expected}
    for row in rows:
        counts[row] += 1
    # Pearson's statistic over the outputs that are expected at least five times, and the rest together.
    total = len(rows)
    often = [said for said, p in expected.items() if p * total >= 5]
    seen = np.array([counts[said] for said in often] + [total - sum(counts[said] for said in often)])
    hoped = np.array([expected[said] for said in often] + [1 - sum(expected[said] for said in often)]) * total
    statistic, freedom = np.sum((seen - hoped) ** 2 / hoped), len(hoped) - 1
    assert freedom > 40 and abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    distance = np.abs(seen - hoped).sum() / 2 / total
    assert distance < np.sqrt(len(hoped) / total)


@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_acceptance_rate_is_the_overlap(block: int) -> None:
    softmax = lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    target, draft = _tables(2, same_rows=True), _tables(3, same_rows=True)
    overlap = float(np.minimum(softmax(target), softmax(draft))[0].sum())
    found = _sample(target, draft, block=block)
    judged = int(np.sum(found.judged))
    assert judged > 10_000
    assert abs(found.acceptance_rate - overlap) < 4 * np.sqrt(overlap * (1 - overlap) / judged)
    assert np.all(found.accepted <= found.judged) and np.all(found.judged <= found.drafted)
    # Every forward gives what was accepted and one more.
    np.testing.assert_array_equal(np.asarray(found.lengths), np.asarray(found.accepted + found.steps))


def test_generation_is_what_it_starts_with() -> None:
    assert speculative.Speculation._fields[: len(Generation._fields)] == Generation._fields
