"""Scanned or unrolled, recomputed or kept: the same numbers."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lmjax.models import Decoder, stack_layers, unstack_layers
from tests.models.small import (
    FAMILIES,
    assert_close,
    forward,
    loss_and_gradients,
    random_tokens,
    scanned,
    variables_of,
)


def test_scanned_layers_start_as_unrolled_ones():
    config, key = FAMILIES["gemma3"], jax.random.key(3)
    initial = jax.jit(Decoder(config).init)(key)
    assert_close(unstack_layers(jax.jit(Decoder(scanned(config)).init)(key)), initial, atol=0)
    kernels = [leaf for leaf in jax.tree.leaves(initial) if leaf.ndim == 2]
    assert len({float(leaf.sum()) for leaf in kernels}) == len(kernels)  # no two layers start alike


@pytest.mark.parametrize("name", FAMILIES)
def test_scanned_layers_compute_as_unrolled_ones(name):
    config, tokens = FAMILIES[name], random_tokens(2, 11)
    expected = forward(config, variables_of(config), tokens)
    assert_close(forward(scanned(config), variables_of(scanned(config)), tokens), expected)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "post-norm"])
def test_scanned_layers_learn_as_unrolled_ones(name):
    config, tokens = FAMILIES[name], random_tokens(2, 8)
    variables = variables_of(config)
    loss, gradients = loss_and_gradients(config, variables, tokens)
    stacked_loss, stacked_gradients = loss_and_gradients(scanned(config), stack_layers(variables), tokens)
    assert_close(stacked_loss, loss)
    assert_close(unstack_layers(stacked_gradients), gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_stacking_is_the_inverse_of_unstacking_on_arrays_and_shapes():
    variables = variables_of(FAMILIES["gemma3"])
    assert_close(unstack_layers(stack_layers(variables)), variables, atol=0)
    shapes = jax.eval_shape(lambda: variables)
    assert unstack_layers(stack_layers(shapes)) == shapes


@pytest.mark.parametrize(
    "remat, layers", [("attention", "unrolled"), ("dots", "scanned"), ("full", "unrolled"), ("full", "scanned")]
)
def test_every_remat_policy_gives_the_same_gradients(remat, layers):
    config = dataclasses.replace(FAMILIES["gemma3"], layers=layers)
    tokens, variables = random_tokens(2, 8), variables_of(config)
    plain = loss_and_gradients(config, variables, tokens)
    again = dataclasses.replace(config, remat=remat)
    assert_close(loss_and_gradients(again, variables, tokens), plain)
    jaxpr = str(jax.make_jaxpr(lambda v: loss_and_gradients(again, v, tokens))(variables))
    assert "remat" in jaxpr or "checkpoint" in jaxpr


def test_auto_scans_deep_models_only():
    config = dataclasses.replace(FAMILIES["llama"], layers="auto", num_layers=12)
    assert not config.scanned and dataclasses.replace(config, num_layers=13).scanned


def test_bfloat16_computes_in_it_and_keeps_parameters_in_float32():
    config, tokens = FAMILIES["qwen3"], random_tokens(2, 11)
    half = dataclasses.replace(config, dtype="bfloat16")
    variables = variables_of(config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(Decoder(half).init, jax.random.key(0)))} == {
        "float32"
    }
    hidden = jax.eval_shape(Decoder(half).apply, variables, tokens, tokens, tokens).hidden
    assert hidden.dtype.name == "bfloat16"
    difference = np.abs(forward(half, variables, tokens) - forward(config, variables, tokens)).max()
    assert 1e-4 < difference < 0.3
