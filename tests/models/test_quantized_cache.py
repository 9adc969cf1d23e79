"""Quantized caches: what they store is close, is stored once, and takes the bytes that it claims."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.models import Decoder
from lmjax.modules.cache import Dense, Int8, Kivi, cache_bytes
from tests.models.small import FAMILIES, variables_of
from tests.models.test_cache import extend

B, G, K, LENGTH = 2, 2, 8, 40
KINDS = {
    "int8": Int8(),
    "kivi4": Kivi(bits=4, group=4, residual=4),
    "kivi2": Kivi(bits=2, group=8, residual=3),
}


def tokens_of(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((2, B, G, count, K)).astype(np.float32))


@jax.jit
def write(cache, key, value, numbers, count):
    return cache.extend(key, value, numbers, count)


def fill(spec, key, value, parts):
    """A layer's cache after writes of so many tokens each, and the number of tokens."""
    cache, start = spec.empty(B, G, LENGTH, K, "float32", None, 0), 0
    for size in parts:
        numbers = np.broadcast_to(np.arange(start, start + size), (B, size))
        now = slice(start, start + size)
        cache = write(cache, key[:, :, now], value[:, :, now], numbers, np.full(B, start + size))
        start += size
    return cache, start


def read(cache, count):
    """Keys and values by token number, [B, G, count, K]: every token is in exactly one slot."""
    slots = np.asarray(cache.slots(jnp.full((B,), count)))
    assert [sorted(row[row >= 0].tolist()) for row in slots] == [list(range(count))] * B
    order = np.argsort(np.where(slots < 0, LENGTH + 1, slots), axis=1, kind="stable")[:, :count]
    return [np.take_along_axis(np.asarray(x), order[:, None, :, None], axis=2) for x in cache.read(jnp.float32)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_half_a_step_and_new_tokens_are_exact(kind):
    spec, count = KINDS[kind], 23
    key, value = tokens_of(count)
    found = read(fill(spec, key, value, (9, 1, 13))[0], count)
    if kind == "int8":
        for x, y in zip(found, (key, value)):
            assert np.all(np.abs(x - y) <= np.abs(y).max(-1, keepdims=True) / 127 / 2 + 1e-6)
        return
    old = (count - spec.residual) // spec.group * spec.group
    assert 0 < old < count
    levels = 2**spec.bits - 1
    for x, y, axis in ((found[0], key, 3), (found[1], value, 5)):
        np.testing.assert_array_equal(x[:, :, old:], y[:, :, old:])
        shape = (B, G, old // spec.group, spec.group, K // spec.group, spec.group)
        x, y = (z[:, :, :old].reshape(shape) for z in (x, y))
        step = (y.max(axis, keepdims=True) - y.min(axis, keepdims=True)) / levels
        assert np.all(np.abs(x - y) <= step / 2 + 1e-6)
        assert np.abs(x - y).max() > 0.01


@pytest.mark.parametrize("kind", ["kivi4", "kivi2"])
def test_values_on_the_grid_are_stored_exactly(kind):
    spec, count = KINDS[kind], 32
    grid = np.random.default_rng(0).integers(0, 2**spec.bits, (2, B, G, count, K)).astype(np.float32)
    grid[0, :, :, :: spec.group], grid[0, :, :, 1 :: spec.group] = 0, 2**spec.bits - 1  # ends of a key's channel
    grid[1, ..., :: spec.group], grid[1, ..., 1 :: spec.group] = 0, 2**spec.bits - 1  # ends of a value's token
    key, value = grid * 0.25 - 1
    found = read(fill(spec, key, value, (count,))[0], count)
    np.testing.assert_allclose(found, (key, value), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_at_once_or_one_by_one_stores_the_same(kind):
    key, value = tokens_of(LENGTH)
    one = read(fill(KINDS[kind], key, value, (1,) * LENGTH)[0], LENGTH)
    for parts in ((LENGTH,), (17, 1, 1, 21)):
        np.testing.assert_allclose(read(fill(KINDS[kind], key, value, parts)[0], LENGTH), one, atol=1e-6)


@pytest.mark.parametrize("kind", ["kivi4", "kivi2"])
def test_what_is_quantized_never_changes(kind):
    key, value = tokens_of(LENGTH)
    spec = KINDS[kind]
    cache, _ = fill(spec, key, value, (20,))
    before = jax.device_get((cache.key_codes, cache.key_low, cache.value_codes, cache.value_low))
    groups = int(cache.retired[0]) // spec.group
    assert groups >= 1
    for n in range(20, LENGTH):
        numbers = np.full((B, 1), n)
        cache = write(cache, key[:, :, n : n + 1], value[:, :, n : n + 1], numbers, np.full(B, n + 1))
    after = jax.device_get((cache.key_codes, cache.key_low, cache.value_codes, cache.value_low))
    for a, b in zip(before, after):
        np.testing.assert_array_equal(a[:, :, :groups], b[:, :, :groups])
    assert int(cache.retired[0]) // spec.group > groups


@pytest.mark.parametrize("kind", ["kivi4", "kivi2"])
def test_rows_retire_each_at_its_own_time_and_padding_is_left_out(kind):
    spec, (key, value) = KINDS[kind], tokens_of(24)
    cache = spec.empty(B, G, LENGTH, K, "float32", None, 0)
    numbers = np.stack([np.arange(24), np.r_[np.full(5, -1), np.arange(19)]])  # the second row padded on the left
    cache = write(cache, key, value, numbers, np.array([24, 19]))
    alone = np.stack([key[1][:, 5:], value[1][:, 5:]])
    expected = fill(spec, np.stack([alone[0]] * B), np.stack([alone[1]] * B), (19,))[0]
    due = lambda count: (count - spec.residual) // spec.group * spec.group
    assert cache.retired.tolist() == [due(24), due(19)]
    slots, wanted = np.asarray(cache.slots(jnp.array([24, 19]))[1]), np.asarray(expected.slots(jnp.full(B, 19))[0])
    for x, y in zip(cache.read(jnp.float32), expected.read(jnp.float32)):
        order = lambda s: np.argsort(np.where(s < 0, 99, s), kind="stable")[:19]
        np.testing.assert_allclose(x[1][:, order(slots)], y[0][:, order(wanted)], atol=1e-6)


def test_tokens_taken_back_do_not_disturb_what_was_quantized():
    spec = Kivi(bits=4, group=4, residual=4)
    key, value = tokens_of(LENGTH)
    other_key, other_value = tokens_of(LENGTH, seed=1)
    expected = read(fill(spec, key, value, (1,) * 30)[0], 30)
    cache, count = spec.empty(B, G, LENGTH, K, "float32", None, 4), 0
    while count < 30:  # two wrong tokens after every right one, taken back
        for start, (k, v), size in ((count, (key, value), 1), (count + 1, (other_key, other_value), 2)):
            numbers = np.broadcast_to(np.arange(start, start + size), (B, size))
            now = slice(start, start + size)
            cache = write(cache, k[:, :, now], v[:, :, now], numbers, np.full(B, start + size))
        count += 1
    # Groups retire as soon as enough newer tokens have been seen, the wrong ones included, never among the last 4.
    np.testing.assert_allclose(read(cache, 30)[0][:, :, :20], expected[0][:, :, :20], atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_bytes_are_those_claimed(kind):
    spec = Dense() if kind == "dense" else KINDS[kind]
    cache = spec.empty(B, G, LENGTH, K, "float32", None, 0)
    heads = 2 * B * G  # keys and values
    if kind == "dense":
        claimed = heads * LENGTH * K * 4
    elif kind == "int8":
        claimed = heads * LENGTH * (K + 4)
    else:
        kept = (LENGTH - spec.residual) // spec.group * spec.group
        codes = heads * kept * K * spec.bits // 8
        ends = 2 * 4 * heads * kept * K // spec.group
        claimed = codes + ends + heads * (spec.residual + spec.group) * K * 4 + 4 * B
    assert cache_bytes({"layer_0": cache}) == claimed


def test_a_cache_too_short_to_quantize_anything_keeps_all_as_it_is():
    spec, (key, value) = Kivi(bits=4, group=4, residual=8), tokens_of(LENGTH)
    cache = spec.empty(B, G, 8, K, "float32", None, 0)
    assert cache.key_codes.shape[2] == 0
    cache = write(cache, key[:, :, :8], value[:, :, :8], np.broadcast_to(np.arange(8), (B, 8)), np.full(B, 8))
    np.testing.assert_array_equal(read(cache, 8), (key[:, :, :8], value[:, :, :8]))


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
def test_logits_stay_close_to_those_of_a_dense_cache(kind):
    """A prompt attends to itself as it is; of what is decoded, 8 bits change the logits by 1 % of their spread."""
    config = FAMILIES["qwen3"]
    spec = Dense("bfloat16") if kind == "bfloat16" else KINDS[kind]
    tokens = np.random.default_rng(0).integers(0, 19, (B, 24)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (B, 24))
    found = {}
    for name, each in (("dense", Dense()), ("quantized", spec)):
        cache = Decoder(config).init_cache(B, 24, each)
        steps = []
        for start, stop in ((0, 16), *((t, t + 1) for t in range(16, 24))):
            now = (slice(None), slice(start, stop))
            logits, cache = extend(
                config, variables_of(config), cache, tokens[now], np.ones((B, stop - start), np.int32), positions[now]
            )
            steps.append(logits)
        found[name] = jnp.concatenate(steps, axis=1)
    off = np.abs(found["dense"] - found["quantized"])
    scale = float(np.std(found["dense"]))
    assert off[:, :16].max() <= (5e-2 if kind == "bfloat16" else 1e-5) * scale
    root_mean_square = float(np.sqrt(np.mean(np.square(off[:, 16:]))))
    assert 0 < root_mean_square < {"int8": 1e-2, "bfloat16": 1e-2, "kivi4": 0.1, "kivi2": 0.5}[kind] * scale


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(bits=3), "2 or 4 bits, not 3"),
        (dict(group=0), "a multiple of 2"),
        (dict(residual=-1), "residual of at least 0"),
        (dict(bits=2, group=6), "a multiple of 4"),
    ],
)
def test_bad_kinds_are_one_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        Kivi(**fields)


def test_a_group_must_divide_the_head_width():
    with pytest.raises(UserError, match="head width 8 into groups of 32"):
        Kivi(bits=4, group=32).empty(B, G, LENGTH, 8, "float32", None, 0)
