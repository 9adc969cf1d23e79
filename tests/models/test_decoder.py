"""The decoder's dropout, refusals, axes and sizes."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.models import Decoder, preset, stack_layers
from lmjax.modules.config import DecoderConfig
from tests.models.small import FAMILIES, forward, random_tokens, scanned, variables_of

TOKENS = random_tokens(2, 11)
ONES, STEPS = np.ones_like(TOKENS), np.tile(np.arange(11, dtype=np.int32), (2, 1))
# A final norm with a huge epsilon is linear, so that expectations pass through it.
DROPPING = DecoderConfig(19, 1, 16, 2, mlp_dim=24, dropout=0.25, norm_eps=1e8, layers="unrolled")


@functools.partial(jax.jit, static_argnums=(0, 3))
def hidden_of(config, variables, rngs, train):
    """[R, B, T, D] in units of the final norm."""
    run = lambda rng: Decoder(config).apply(variables, TOKENS, ONES, STEPS, rng=rng, train=train).hidden
    return 1e4 * jax.vmap(run)(rngs)


def test_dropout_is_a_function_of_its_key_and_off_outside_training():
    variables = variables_of(DROPPING)
    keys = jax.random.split(jax.random.key(0), 3)
    train = np.asarray(hidden_of(DROPPING, variables, keys[np.array([0, 0, 1])], True))
    np.testing.assert_array_equal(train[0], train[1])
    assert np.abs(train[0] - train[2]).max() > 0.01
    none = dataclasses.replace(DROPPING, dropout=0.0)
    np.testing.assert_array_equal(forward(DROPPING, variables, TOKENS), forward(none, variables, TOKENS))


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_dropout_keeps_expectations_and_layers_drop_apart(layers):
    """Sublayers add nothing here, but for the biases of their last projections: a constant dropped on its own."""
    config = dataclasses.replace(DROPPING, num_layers=2, layers=layers, output_bias=True, mlp_bias=True)
    unrolled = dataclasses.replace(config, layers="unrolled")

    def silence(path, leaf):
        name = f"{path[-2].key}/{path[-1].key}"
        if name in ("output/bias", "down/bias"):
            return np.ones_like(leaf)
        return np.zeros_like(leaf) if name in ("output/kernel", "down/kernel") else leaf

    variables = jax.tree_util.tree_map_with_path(silence, variables_of(unrolled))
    variables = stack_layers(variables) if config.scanned else variables
    scale = variables["params"]["final_norm"]["scale"]
    keys = jax.random.split(jax.random.key(1), 2000)
    found = np.asarray(hidden_of(config, variables, keys, True)) / scale
    embedded = np.asarray(variables["params"]["embed"]["embedding"])[TOKENS]
    np.testing.assert_allclose(found.mean(0), embedded + 4, atol=5 * 1.5 / math.sqrt(2000))
    # Variances add only if the embedding and the four sublayers are dropped independently.
    expected = (np.square(embedded) + 4) * 0.25 / 0.75
    np.testing.assert_allclose(found.var(0).mean(), expected.mean(), rtol=0.02)


def test_refusals_come_before_any_work():
    with pytest.raises(UserError, match="training needs an rng"):
        Decoder(DROPPING).apply({}, TOKENS, ONES, STEPS, train=True)
    learned = dataclasses.replace(FAMILIES["gpt2"], max_length=10)
    with pytest.raises(UserError, match="11 tokens does not fit 10 learned positions"):
        Decoder(learned).apply({}, TOKENS, ONES, STEPS)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(embed_dim=10, num_heads=4), "embed_dim 10 .* num_heads 4"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads 3"),
        (dict(head_dim=5), "head_dim"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(window=0), "window is 0"),
        (dict(window_pattern=()), "window_pattern is empty"),
    ],
)
def test_impossible_configs_are_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        DecoderConfig(**{"vocab_size": 8} | fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_axis_of_every_leaf_has_a_name(name):
    for config in (FAMILIES[name], scanned(FAMILIES[name])):
        model = Decoder(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        axes = model.logical_axes(shapes)
        jax.tree.map(lambda leaf, names: None if leaf.ndim == len(names) else pytest.fail(str(names)), shapes, axes)
        flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        assert all(("layers" in names) <= config.scanned for names in flat)


# Numbers of parameters as published with the weights.
SIZES = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_number_of_parameters(name):
    shapes = jax.eval_shape(Decoder(preset(name)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == SIZES[name]


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'llama3\.1-8b'"):
        preset("llama31-8b")
