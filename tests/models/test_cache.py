"""Law 4: prefill and decode in chunks of any size, through a cache, give the logits of the full forward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models import Decoder
from tests.models.small import (
    FAMILIES,
    assert_close,
    forward,
    logits_from,
    random_tokens,
    scanned,
    variables_of,
)

B, T, ROOM = 2, 11, 12


@functools.partial(jax.jit, static_argnums=0)
def extend(config, variables, cache, tokens, segments, positions):
    outputs = Decoder(config).apply(variables | {"cache": cache}, tokens, segments, positions)
    return logits_from(config, variables, outputs.hidden), outputs.cache


def decode(config, tokens, segments, positions, chunks):
    cache = Decoder(config).init_cache(B, ROOM)
    found, start = [], 0
    for size in chunks:
        now = (slice(None), slice(start, start + size))
        logits, cache = extend(config, variables_of(config), cache, tokens[now], segments[now], positions[now])
        found.append(logits)
        start += size
    assert cache["count"].tolist() == np.sum(segments > 0, axis=1).tolist()
    return jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("chunks", [(5, 1, 5), (1,) * T], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_give_the_logits_of_the_full_forward(name, chunks):
    config, tokens = FAMILIES[name], random_tokens(B, T)
    steps = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    found = decode(config, tokens, np.ones_like(tokens), steps, chunks)
    assert_close(found, forward(config, variables_of(config), tokens))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3"])
def test_rows_padded_on_either_side_through_scanned_layers(name, side):
    config, tokens, pad = scanned(FAMILIES[name]), random_tokens(B, T), 3
    segments = np.ones((B, T), np.int32)
    segments[0, slice(None, pad) if side == "left" else slice(T - pad, None)] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    found = decode(config, tokens, segments, positions, (5, 1, 5))
    alone = np.stack([np.roll(tokens[0], -pad if side == "left" else 0), tokens[1]])  # its padding on the right
    expected = forward(FAMILIES[name], variables_of(FAMILIES[name]), alone)
    assert_close(found[0][segments[0] > 0], expected[0, : T - pad])
    assert_close(found[1], expected[1])
