"""Scores: every target once, every byte once, the same through any windows, batches and meshes."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax.evaluation import baselines, windows
from lmjax.evaluation.perplexity import Score, evaluate_batches
from lmjax.tokenizers.simple import ByteTokenizer, CharTokenizer

V = 50
CONFIG = lm.models.small(V, num_layers=2, embed_dim=32, num_heads=4, init_std=0.3)


@pytest.fixture(scope="module")
def model() -> tuple[lm.Policy, dict]:
    policy = lm.Policy(CONFIG)
    return policy, policy.init(jax.random.key(0))


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n) for n in (23, 1, 16, 2, 40)]


@functools.partial(jax.jit, static_argnums=0)
def _forward(policy: lm.Policy, variables: dict, batch: lm.Batch) -> jax.Array:
    return policy(variables, batch).logprobs


def _logprobs(model: tuple, ids: np.ndarray) -> np.ndarray:
    """Log-probability of each target of one document after all that stands before it."""
    padded, segments = np.zeros((1, 65), np.int32), np.zeros((1, 65), np.int32)
    padded[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    found = _forward(*model, lm.batch.next_token_batch(padded, segments))
    return np.asarray(found)[0, : len(ids) - 1].astype(np.float64)


def test_whole_documents(model: tuple, documents: list) -> None:
    batches = windows.document_batches(documents, batch_size=2)
    score = evaluate_batches(*model, batches)
    expected = -sum(_logprobs(model, ids).sum() for ids in documents if len(ids) > 1)
    assert score.tokens == batches.targets == sum(len(ids) - 1 for ids in documents)
    np.testing.assert_allclose(score.nats, expected, rtol=1e-5)
    np.testing.assert_allclose(score.perplexity, math.exp(expected / score.tokens), rtol=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (64, 5)])
def test_sliding_windows_score_each_target_after_what_its_window_holds(
    model: tuple, documents: list, window: int, stride: int
) -> None:
    batches = windows.sliding_batches(documents, window=window, stride=stride, batch_size=4)
    score = evaluate_batches(*model, batches)
    expected, count = 0.0, 0
    for ids in documents:
        done, start = 0, 0
        while done < len(ids) - 1:
            piece = ids[start : start + window + 1]
            expected -= _logprobs(model, piece)[done - start :].sum()
            count += start + len(piece) - 1 - done
            done, start = start + len(piece) - 1, start + stride
    assert count == score.tokens == batches.targets == sum(len(ids) - 1 for ids in documents)
    np.testing.assert_allclose(score.nats, expected, rtol=1e-5)


def test_each_target_of_a_document_is_in_exactly_one_mask(documents: list) -> None:
    batches = windows.sliding_batches(documents, window=7, stride=2, batch_size=3)
    scored = np.concatenate([batch.targets[batch.mask > 0] for batch in batches])
    expected = np.concatenate([ids[1:] for ids in documents])
    assert sorted(scored.tolist()) == sorted(expected.tolist())


def test_bytes_are_those_of_the_scored_tokens() -> None:
    text = "naïve café — ½"
    tokenizer = CharTokenizer.train([text], None, None, None)
    batches = windows.document_batches([tokenizer.encode(text)], batch_size=1, bytes_of=tokenizer.token_bytes())
    assert batches.bytes == len(text.encode()) - len(text[0].encode())
    marked = ByteTokenizer(eos="<|end|>")
    ids = np.concatenate([[marked.eos], marked.encode(text)])
    batches = windows.sliding_batches([ids], window=4, stride=2, batch_size=2, bytes_of=marked.token_bytes())
    assert batches.bytes == batches.targets == len(text.encode())


def test_a_mesh_changes_nothing(model: tuple, documents: list, mesh) -> None:
    from lmjax.training.state import variables_plan

    policy, variables = model
    config = lm.models.small(48, num_layers=1, embed_dim=32, num_heads=8, init_std=0.3)
    policy = lm.Policy(config)
    variables = policy.init(jax.random.key(1))
    batches = windows.sliding_batches([ids % 48 for ids in documents], window=16, stride=8, batch_size=8)
    alone = evaluate_batches(policy, variables, batches)
    plan = variables_plan(policy, variables, mesh)
    spread = evaluate_batches(policy, jax.device_put(variables, plan.shardings), batches, mesh=mesh)
    np.testing.assert_allclose(spread.nats, alone.nats, rtol=1e-5)
    assert (spread.tokens, spread.correct) == (alone.tokens, alone.correct)


def test_uniform_bytes_are_eight_bits() -> None:
    policy = lm.Policy(lm.models.bigram(vocab_size=256))
    ids = ByteTokenizer().encode("some text, to be sure")
    batches = windows.document_batches([ids], batch_size=2, bytes_of=ByteTokenizer().token_bytes())
    score = evaluate_batches(policy, policy.init(jax.random.key(0)), batches)
    assert score.bits_per_byte == pytest.approx(8.0, abs=1e-5)
    assert Score(1.0, 1.0, 0.0).bits_per_byte is None and "bits_per_byte" not in Score(1.0, 1.0, 0.0).metrics()


def test_bad_windows_are_one_sentence(documents: list) -> None:
    with pytest.raises(lm.UserError, match="a stride of 9 does not fit a window of 8"):
        windows.sliding_batches(documents, window=8, stride=9, batch_size=1)
    with pytest.raises(lm.UserError, match="a document of 40 tokens is longer than the 32"):
        windows.document_batches(documents, batch_size=1, max_length=32)
    with pytest.raises(lm.UserError, match="nothing to score"):
        windows.document_batches([np.array([3])], batch_size=1)


def test_bigram_counts_against_the_formula() -> None:
    rng = np.random.default_rng(1)
    train, held_out = rng.integers(0, 5, 60), rng.integers(0, 6, 20)
    score = baselines.bigram_score([train], windows.document_batches([held_out], batch_size=1), 6)
    nats = 0.0
    for a, b in itertools.pairwise(held_out):
        followers = [int(y) for x, y in itertools.pairwise(train) if x == a]
        p_b = (np.sum(train == b) + 1) / (len(train) + 6)
        kinds = max(len(set(followers)), 1)
        nats -= math.log((followers.count(b) + kinds * p_b) / (len(followers) + kinds))
    assert score.nats == pytest.approx(nats, rel=1e-9) and score.tokens == 19
    total = sum(
        math.exp(-baselines.bigram_score([train], windows.document_batches([[5, b]], batch_size=1), 6).nats)
        for b in range(6)
    )
    assert total == pytest.approx(1.0)  # a distribution, even after a token that was never seen
