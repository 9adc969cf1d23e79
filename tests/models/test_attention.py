"""Attention: grouped heads, caps, windows, kernels."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.modules.attention import implementation
from lmjax.modules.config import DecoderConfig
from tests.models.small import FAMILIES, VOCAB, assert_close, forward, random_tokens, variables_of

TOKENS = random_tokens(2, 11)
GROUPED = DecoderConfig(VOCAB, 2, 16, 4, num_kv_heads=2, qkv_bias=True, max_length=32, layers="unrolled")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_are_full_heads_with_repeated_weights(kv_heads, softcap):
    config = dataclasses.replace(GROUPED, num_kv_heads=kv_heads, attention_softcap=softcap)
    variables = variables_of(config)

    def repeat(path, leaf):
        if path[-2].key not in ("key", "value"):
            return leaf
        heads = leaf.reshape(*leaf.shape[:-1], kv_heads, config.head_width)
        return np.repeat(heads, config.num_heads // kv_heads, axis=-2).reshape(*leaf.shape[:-1], -1)

    repeated = jax.tree_util.tree_map_with_path(repeat, variables)
    full = dataclasses.replace(config, num_kv_heads=None)
    assert_close(forward(full, repeated, TOKENS), forward(config, variables, TOKENS))


def test_a_cap_out_of_reach_and_a_window_as_long_as_the_text_change_nothing():
    """The capped path is our own code, the plain one is jax.nn.dot_product_attention."""
    plain = forward(GROUPED, variables_of(GROUPED), TOKENS)
    for changes in (dict(attention_softcap=1e4), dict(window=TOKENS.shape[1])):
        other = dataclasses.replace(GROUPED, **changes)
        assert_close(forward(other, variables_of(GROUPED), TOKENS), plain)


def test_attention_is_far_from_uniform_in_these_models():
    """Otherwise the tests of masks and positions could not fail."""
    config = FAMILIES["llama"]
    flat = dataclasses.replace(config, query_scale=0.0)
    difference = forward(flat, variables_of(config), TOKENS) - forward(config, variables_of(config), TOKENS)
    assert np.abs(difference).max() > 0.1


GPU = DecoderConfig(VOCAB, 2, 128, 2, dtype="bfloat16")


@pytest.mark.parametrize(
    "changes, backend, reason",
    [
        ({}, "cpu", "backend is cpu"),
        (dict(dtype="float32"), "gpu", "dtype is float32"),
        (dict(head_dim=12), "gpu", "head width 12"),
        (dict(head_dim=264), "gpu", "head width 264"),
        (dict(attention_softcap=50.0), "gpu", "softcap"),
    ],
)
def test_the_kernel_is_chosen_with_its_reason_and_never_in_silence(changes, backend, reason):
    config = dataclasses.replace(GPU, **changes)
    kernel, why = implementation(config, backend)
    assert kernel == "xla" and reason in why
    with pytest.raises(UserError, match=reason):
        implementation(dataclasses.replace(config, attention="cudnn"), backend)


def test_cudnn_serves_what_it_can():
    assert implementation(GPU, "gpu")[0] == "cudnn"
    assert implementation(dataclasses.replace(GPU, attention="xla"), "gpu")[0] == "xla"
