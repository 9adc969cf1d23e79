"""DoLa against transformers and against its definition."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats

import lmjax as lm
from lmjax.generation import dola as module
from lmjax.generation.dola import contrast, dola_search, early_layers
from lmjax.generation.processors import repetition_penalty, suppress
from tests.generation.search_cases import NEW, PROMPTS, contrasted_logits, found_there, load, rows, stored

SHAPE = dict(num_layers=4, embed_dim=32, num_heads=4, num_kv_heads=2, max_length=64, init_std=0.5)


@pytest.mark.parametrize("model", ["llama_deep", pytest.param("gpt2_deep", marks=pytest.mark.slow)])
def test_equals_transformers(model: str) -> None:
    policy, variables = load(model)
    for case in found_there(model, "dola"):
        layers = case["options"]["dola_layers"]
        found = dola_search(policy, variables, PROMPTS, max_new_tokens=NEW, layers=layers, eos=case["eos"] or None)
        assert rows(found.tokens, found.lengths) == case["tokens"], case["options"]


def _chosen(divergence: Any) -> np.ndarray:
    """The layer [B] that each row of the random logits is contrasted with."""
    final_BV, early_CBV = contrasted_logits()
    found = contrast(final_BV, early_CBV, divergence=divergence)
    alone = [contrast(final_BV, early_BV[None]) for early_BV in early_CBV]
    return np.argmax([np.all(np.isclose(each, found, atol=1e-5), axis=-1) for each in alone], axis=0)


def test_the_published_form_takes_the_layers_and_gives_the_contrasts_of_transformers() -> None:
    assert _chosen("published").tolist() == stored()["contrasts"]["layers"]
    expected = np.array(stored()["contrasts"]["contrast"], float)  # None becomes nan
    found = contrast(*contrasted_logits())[: len(expected)]
    np.testing.assert_allclose(found, np.where(np.isnan(expected), -np.inf, expected), atol=1e-5)


def test_the_true_form_takes_the_layer_of_the_largest_js_divergence() -> None:
    final_BV, early_CBV = (scipy.special.softmax(logits.astype(np.float64), axis=-1) for logits in contrasted_logits())
    distance_CB = [scipy.spatial.distance.jensenshannon(final_BV, early_BV, axis=-1) for early_BV in early_CBV]
    chosen = _chosen("js")
    np.testing.assert_array_equal(chosen, np.argmax(distance_CB, axis=0))
    assert 0.05 < np.mean(chosen != stored()["contrasts"]["layers"]) < 0.95


@pytest.mark.parametrize("divergence", ["published", "js"])
def test_impossible_tokens_are_neither_taken_nor_make_nan(divergence: Any) -> None:
    final_BV, early_CBV = contrasted_logits()
    final_BV, early_CBV = np.array(final_BV), np.array(early_CBV)
    final_BV[:, :5], early_CBV[:, :, 3:8] = -np.inf, -np.inf
    found = np.asarray(contrast(final_BV, early_CBV, divergence=divergence, relative_top=1e-30))
    assert not np.any(np.isnan(found)) and np.all(found[:, :5] == -np.inf) and np.all(found[:, 8:] > -np.inf)


def test_layers_of_the_buckets() -> None:
    wide = lambda layers: lm.models.llama(16, num_layers=layers, embed_dim=8, num_heads=2)
    tied = lambda layers: lm.models.gpt2(16, num_layers=layers, embed_dim=8, num_heads=2)
    assert early_layers(wide(32), "low") == tuple(range(0, 16, 2))
    assert early_layers(wide(32), "high") == tuple(range(16, 32, 2))
    assert early_layers(wide(48), "low") == tuple(range(0, 20, 2))
    assert early_layers(wide(48), "high") == tuple(range(28, 48, 2))
    assert early_layers(wide(1), "low") == early_layers(wide(1), "high") == (0,)
    assert early_layers(tied(12), "low") == (2, 4)
    assert early_layers(tied(48), "low") == tuple(range(2, 20, 2))
    assert [early_layers(tied(layers), "low") for layers in (1, 2, 4)] == [(0,), (1,), (2,)]
    assert early_layers(tied(4), np.array([3, 1])) == (3, 1)


def _definition(
    policy: lm.Policy, variables: dict, rows: list[list[int]], layers: tuple[int, ...], divergence: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and contrasts [B, V] of the next token, from a forward without a cache."""
    ids, segments = np.zeros((2, len(rows), 32), np.int32)
    for b, row in enumerate(rows):
        ids[b, : len(row)], segments[b, : len(row)] = row, 1
    batch = lm.batch.next_token_batch(np.pad(ids, ((0, 0), (0, 1))), np.pad(segments, ((0, 0), (0, 1))))

    def forward(variables: dict, batch: Any) -> tuple[jax.Array, jax.Array]:
        read = policy.model.apply(variables, batch.tokens, batch.segments, batch.positions, collect=layers)
        at = jnp.array([len(row) - 1 for row in rows])
        head = variables["params"]["head"]["embedding"].T
        last = lambda hidden: hidden[jnp.arange(len(rows)), at] @ head
        return last(read.hidden), jnp.stack([last(read.layers[layer]) for layer in layers])

    final_BV, early_CBV = jax.jit(forward)(variables, batch)
    return np.asarray(final_BV), np.asarray(contrast(final_BV, early_CBV, divergence=divergence))


@pytest.mark.parametrize("divergence", [pytest.param("published", marks=pytest.mark.slow), "js"])
def test_logprobs_are_the_trainers_and_tokens_the_largest_contrasts(divergence: Any) -> None:
    policy = lm.Policy(lm.models.llama(31, **SHAPE))
    variables = policy.init(jax.random.key(0))
    found = dola_search(policy, variables, PROMPTS, max_new_tokens=6, layers=[0, 1, 2, 3], divergence=divergence)
    for n in range(6):
        before = [[*prompt, *row[:n]] for prompt, row in zip(PROMPTS, found.tokens.tolist())]
        z_BV, contrast_BV = _definition(policy, variables, before, (0, 1, 2, 3), divergence)
        np.testing.assert_array_equal(found.tokens[:, n], np.argmax(contrast_BV, axis=-1))
        at = lambda x_BV, n=n: np.take_along_axis(x_BV, np.asarray(found.tokens[:, n : n + 1]), axis=1)[:, 0]
        np.testing.assert_allclose(found.logprobs[:, n], at(scipy.special.log_softmax(z_BV, axis=-1)), atol=1e-5)
        expected = at(scipy.special.log_softmax(contrast_BV, axis=-1))
        np.testing.assert_allclose(found.sampling_logprobs[:, n], expected, atol=3e-5)


@pytest.mark.slow
def test_samples_follow_the_contrast_at_the_temperature() -> None:
    policy = lm.Policy(lm.models.llama(31, **SHAPE, layers="scanned"))
    variables = policy.init(jax.random.key(0))
    options: dict[str, Any] = dict(layers=[1, 2], temperature=3.0, max_new_tokens=1, processors=(suppress([2]),))
    found = dola_search(policy, variables, [PROMPTS[0]], jax.random.key(1), samples=2000, relative_top=1e-3, **options)
    unrolled = lm.Policy(lm.models.llama(31, **SHAPE))
    z_BV, _ = _definition(unrolled, lm.models.layout.unstack_layers(variables), [PROMPTS[0]], (1, 2), "published")
    drawn = np.ravel(found.tokens)
    counts = np.bincount(drawn, minlength=31)
    own = scipy.special.log_softmax(z_BV[0] / 3)
    np.testing.assert_allclose(found.logprobs[:, 0], own[drawn], atol=1e-5)
    p = np.zeros(31)
    p[drawn] = np.exp(found.sampling_logprobs[:, 0])
    assert p[2] == 0 and abs(p.sum() - 1) < 0.02  # what was never drawn is rare
    often = 2000 * p >= 5
    rest = [counts[~often].sum()], [2000 * (1 - p[often].sum())]
    counts, expected = (np.concatenate(pair) for pair in zip((counts[often], 2000 * p[often]), rest))
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_place_or_its_neighbours() -> None:
    policy, variables = load("gpt2_deep")
    options: dict[str, Any] = dict(layers=[0, 1, 3], max_new_tokens=NEW, eos=[5, 12])
    found = dola_search(policy, variables, PROMPTS, **options)
    order = jnp.array([2, 0, 3, 1])
    moved = dola_search(policy, variables, [PROMPTS[b] for b in order], **options)
    np.testing.assert_array_equal(moved.tokens, found.tokens[order])
    others = [PROMPTS[0], [4] * 20, [30], [7, 7]]  # another bucket besides
    changed = dola_search(policy, variables, others, **options)
    np.testing.assert_array_equal(changed.tokens[0], found.tokens[0])
    assert np.any(changed.tokens[1] != found.tokens[1])


def test_one_compilation_serves_a_bucket_of_lengths_and_all_settings() -> None:
    policy, variables = load("gpt2_deep")
    before = module._run._cache_size()
    for length, top, eos in ((3, 0.1, None), (16, 0.2, 7), (9, 0.5, 2)):
        options: dict[str, Any] = dict(relative_top=top, eos=eos, processors=(repetition_penalty(1 + top),))
        dola_search(policy, variables, [list(range(length))] * 2, max_new_tokens=3, **options)
    assert module._run._cache_size() == before + 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": "middle"}, "layers is 'middle'"),
        ({"layers": [5]}, "name some from 0 to 4"),
        ({"layers": [-1]}, "name some from 0 to 4"),
        ({"layers": []}, "name some from 0 to 4"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"relative_top": 0.0}, "relative_top is 0.0"),
        ({"temperature": 1.0}, "temperature is 1.0 without a key"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"eos": 31}, "outside the model's vocabulary"),
    ],
)
def test_bad_input_is_one_sentence(options: dict, sentence: str) -> None:
    policy, variables = load("gpt2_deep")
    with pytest.raises(lm.UserError, match=sentence):
        dola_search(policy, variables, [[1]], **({"max_new_tokens": 4} | options))


def test_models_without_early_layers_are_refused() -> None:
    policy = lm.Policy(lm.models.bigram(vocab_size=4))
    with pytest.raises(lm.UserError, match="no layers to contrast"):
        dola_search(policy, {}, [[1]], max_new_tokens=4)
    three = lm.Policy(lm.models.gpt2(31, num_layers=3, embed_dim=8, num_heads=2))  # the low half is the embeddings
    with pytest.raises(lm.UserError, match="layers 'low' of a model of 3 are"):
        dola_search(three, {}, [[1]], max_new_tokens=4)
