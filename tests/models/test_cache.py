"""Law 4: prefill and decode in chunks of any size, through a cache, give the logits of the full forward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models import Decoder, small
from lmjax.modules.cache import Dense
from tests.laws.registry import MODELS
from tests.models import small as models
from tests.models.small import VOCAB, assert_close, forward, logits_from, random_tokens, scanned, variables_of

SMALL = small(VOCAB, num_layers=2, embed_dim=16, num_heads=4, max_length=32, layers="unrolled", init_std=0.3)
FAMILIES = models.FAMILIES | {"small": SMALL}

B, T, ROOM, PAD = 2, 11, 12, 3


@functools.partial(jax.jit, static_argnums=0)
def extend(config, variables, cache, tokens, segments, positions):
    outputs = Decoder(config).apply(variables | {"cache": cache}, tokens, segments, positions)
    return logits_from(config, variables, outputs.hidden), outputs.cache


def decode(config, tokens, segments, positions, chunks, cache=None):
    cache = Decoder(config).init_cache(B, ROOM) if cache is None else cache
    found, start = [], 0
    for size in chunks:
        now = (slice(None), slice(start, start + size))
        logits, cache = extend(config, variables_of(config), cache, tokens[now], segments[now], positions[now])
        found.append(logits)
        start += size
    assert cache["count"].tolist() == np.sum(segments > 0, axis=1).tolist()
    return jnp.concatenate(found, axis=1)


def padded(side):
    """Tokens of two rows, the first of which has padding: (tokens, segments, positions)."""
    tokens, segments = random_tokens(B, T), np.ones((B, T), np.int32)
    if side != "none":
        segments[0, slice(None, PAD) if side == "left" else slice(T - PAD, None)] = 0
    return tokens, segments, np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)


def full_forward(name, tokens, segments, side):
    """The logits of each real token from a forward without cache, by row."""
    alone = np.stack([np.roll(tokens[0], -PAD if side == "left" else 0), tokens[1]])  # its padding on the right
    expected = forward(FAMILIES[name], variables_of(FAMILIES[name]), alone)
    return [expected[b, : segments[b].sum()] for b in range(B)]


def test_every_family_is_here():
    """But for the bigram table, whose cache is a count; the sampler's tests have it."""
    assert {*MODELS} - {"bigram", "scanned"} <= {*FAMILIES}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_give_the_logits_of_the_full_forward_padded_either_side(name, side):
    tokens, segments, positions = padded(side)
    for chunks in ((5, 1, 5), (1,) * T):
        found = decode(FAMILIES[name], tokens, segments, positions, chunks)
        for b, expected in enumerate(full_forward(name, tokens, segments, side)):
            assert_close(found[b][segments[b] > 0], expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3"])
def test_scanned_layers_do_the_same(name, side):
    tokens, segments, positions = padded(side)
    found = decode(scanned(FAMILIES[name]), tokens, segments, positions, (5, 1, 5))
    for b, expected in enumerate(full_forward(name, tokens, segments, side)):
        assert_close(found[b][segments[b] > 0], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_rows_change_nothing(name):
    tokens, segments, positions = padded("left")
    found = decode(FAMILIES[name], tokens, segments, positions, (5, 1, 5))
    mates = tokens.copy()
    mates[1] = (mates[1] + 7) % 19
    changed = decode(FAMILIES[name], mates, segments, positions, (5, 1, 5))
    np.testing.assert_array_equal(found[0], changed[0])
    assert np.abs(found[1] - changed[1]).max() > 0.1


def test_layers_with_a_window_keep_a_ring_and_the_others_all():
    cache = Decoder(FAMILIES["gemma3"]).init_cache(B, ROOM)  # window 3 in every other layer
    assert [cache[f"layer_{i}"].key.shape[2] for i in range(2)] == [3, ROOM]
    with_slack = Decoder(FAMILIES["gemma3"]).init_cache(B, ROOM, Dense(), slack=4)
    assert with_slack["layer_0"].key.shape[2] == 7
    whole = Decoder(FAMILIES["gemma3"]).init_cache(B, ROOM, Dense(), slack=ROOM)
    assert whole["layer_0"].key.shape[2] == ROOM


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_taking_tokens_back_is_as_if_they_had_not_been(name):
    config, (tokens, segments, positions) = FAMILIES[name], padded("left")
    cache = Decoder(config).init_cache(B, ROOM + 4, slack=4)
    _, cache = extend(config, variables_of(config), cache, tokens[:, :5], segments[:, :5], positions[:, :5])
    kept = cache["count"]
    wrong = np.zeros((B, 4), np.int32)
    _, cache = extend(config, variables_of(config), cache, wrong, wrong + 1, kept[:, None] + np.arange(4))
    cache = cache | {"count": kept}
    found = []
    for t in range(5, T):
        now = (slice(None), slice(t, t + 1))
        logits, cache = extend(config, variables_of(config), cache, tokens[now], segments[now], positions[now])
        found.append(logits)
    found = jnp.concatenate(found, axis=1)
    for b, expected in enumerate(full_forward(name, tokens, segments, "left")):
        assert_close(found[b], expected[-(T - 5) :])
