"""Norms at large means, and rotary positions in all their scalings."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.modules.config import RopeScaling
from lmjax.modules.norms import Norm, layer_norm, rms_norm
from lmjax.modules.positions import apply_rope, rope_frequencies, rope_table

RANDOM = np.random.RandomState(0)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_layer_norm_is_accurate_at_any_mean(mean):
    x = (mean + RANDOM.standard_normal((5, 64))).astype(np.float32)
    scale, bias = (RANDOM.standard_normal(64).astype(np.float32) for _ in range(2))
    exact = x.astype(np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    exact = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(layer_norm(x, scale, bias, 1e-5), exact, atol=3e-4 if mean else 2e-6)
    np.testing.assert_allclose(layer_norm(x, scale, None, 1e-5), exact - bias, atol=3e-4 if mean else 2e-6)


def test_rms_norm_is_the_formula_and_keeps_its_statistics_in_float32():
    x = RANDOM.standard_normal((5, 64)) * 100
    scale = RANDOM.standard_normal(64).astype(np.float32)
    exact = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(x.astype(np.float32), scale, 1e-5), exact, rtol=2e-6, atol=1e-6)
    half = rms_norm(jnp.asarray(x, jnp.bfloat16), scale, 1e-5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), exact, rtol=0.02, atol=1e-3)


def test_unit_offset_scales_by_one_more():
    x, scale = RANDOM.standard_normal((2, 8)).astype(np.float32), RANDOM.standard_normal(8).astype(np.float32)
    found = Norm(unit_offset=True).apply({"params": {"scale": scale}}, x)
    np.testing.assert_array_equal(found, Norm().apply({"params": {"scale": 1 + scale}}, x))


def rotated(x, position, theta=100.0, scaling=None):
    table = rope_table(jnp.asarray([[position]]), x.shape[-1], theta, scaling)
    return np.asarray(apply_rope(jnp.asarray(x)[None, None, None], table))[0, 0, 0]


def test_rotations_keep_lengths_and_make_products_depend_on_distance_alone():
    query, key = RANDOM.standard_normal((2, 16)).astype(np.float32)
    products = [rotated(query, i + 7) @ rotated(key, i) for i in (0, 1, 50)]
    np.testing.assert_allclose(products, products[0], rtol=2e-5)
    assert abs(rotated(query, 8) @ rotated(key, 0) - products[0]) > 0.01
    assert np.linalg.norm(rotated(query, 9)) == pytest.approx(np.linalg.norm(query), rel=1e-6)


def test_pairs_are_the_halves_of_a_head():
    """The layout of the published checkpoints; the interleaved one would give fluent nonsense."""
    x = np.zeros(8, np.float32)
    x[0] = 1
    expected = np.zeros(8, np.float32)
    expected[0], expected[4] = math.cos(3), math.sin(3)  # the fastest pair turns by 1 a position
    np.testing.assert_allclose(rotated(x, 3), expected, atol=1e-6)


def test_linear_scaling_divides_positions():
    x = RANDOM.standard_normal(16).astype(np.float32)
    np.testing.assert_allclose(rotated(x, 12, scaling=RopeScaling("linear", 4.0)), rotated(x, 3), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_of_one_is_the_identity(kind):
    plain, _ = rope_frequencies(64, 1e4)
    found, factor = rope_frequencies(64, 1e4, RopeScaling(kind, 1.0, 1024))
    np.testing.assert_allclose(found, plain, rtol=2e-7)
    assert factor == 1.0


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_fast_pairs_stay_slow_ones_stretch_and_the_rest_lies_between(kind):
    plain, _ = rope_frequencies(128, 5e5)
    found, _ = rope_frequencies(128, 5e5, RopeScaling(kind, 8.0, 8192))
    ratio = found / plain
    assert ratio[0] == 1 and ratio[-1] == 1 / 8
    assert (np.diff(ratio) < 1e-6).all() and ((ratio > 0.2) & (ratio < 0.9)).any()


def test_yarn_attention_factor():
    factor = lambda **fields: rope_frequencies(16, 1e4, RopeScaling("yarn", 4.0, 1024, **fields))[1]
    assert factor() == pytest.approx(1.1386, abs=1e-4)
    assert factor(attention_factor=1.5, mscale=1.0, mscale_all_dim=0.5) == 1.5
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor(mscale=1.0) == factor()
    x = RANDOM.standard_normal(16).astype(np.float32)
    scaling = RopeScaling("yarn", 4.0, 1024)
    unscaled = dataclasses.replace(scaling, attention_factor=1.0)
    np.testing.assert_allclose(
        rotated(x, 5, scaling=scaling), factor() * rotated(x, 5, scaling=unscaled), rtol=1e-5, atol=1e-6
    )
