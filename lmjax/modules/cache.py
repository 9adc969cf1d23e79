"""Key/value caches: what attention writes its new tokens to, and reads all that a row has said from.

A row of a cache holds its tokens without padding, whichever side a batch was padded on: token number n of a row is
the n-th real one. A layer's cache decides where token n lies and in what precision; the decoder keeps what all layers
share (how many tokens each row holds, their segments and positions). Every leaf has the rows as its leading axis, so
rows are repeated, picked and replaced by indexing.

A new kind of cache, such as one that evicts, is a spec with `empty`, and a pytree with the four methods of
`LayerCache`.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.sharding.context import constrain

AXES = ("batch", "kv_heads", None, None)  # of keys and values, [B, G, S, K]


class LayerCache(Protocol):
    """Keys and values of one layer."""

    def extend(self, key: jax.Array, value: jax.Array, numbers: jax.Array, count: jax.Array) -> LayerCache:
        """Takes new tokens.

        Args:
          key, value: [B, G, T, K].
          numbers: int32 [B, T], which token of its row each is; -1 for padding, which is not kept.
          count: int32 [B], tokens of each row, the new ones included.
        """
        ...

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values, [B, G, S, K] each."""
        ...

    def slots(self, count: jax.Array) -> jax.Array:
        """int32 [B, S], the number of the token that each slot of `read` holds, -1 for none, when a row has `count`."""
        ...

    def holds(self, new: int) -> bool:
        """Whether `new` tokens, once written, can be read with all they may see, as exactly as they came."""
        ...


class CacheSpec(Protocol):
    """A kind of cache, hashable."""

    def empty(
        self, rows: int, heads: int, length: int, width: int, dtype: str, window: int | None, slack: int
    ) -> LayerCache:
        """A cache for `length` tokens a row, of which a query sees the last `window` (None: all).

        `slack` tokens may be taken back: as many older ones more than `window` are kept.
        """
        ...


def put(buffer: jax.Array, values: jax.Array, index: jax.Array, axis: int = 1) -> jax.Array:
    """Writes each row's T values at its own places [B, T] along `axis` (1 or 2); a negative place writes nothing."""
    index = jnp.where(index < 0, buffer.shape[axis], index)
    where = (slice(None),) * (axis - 1)
    write = lambda row, value, at: row.at[(*where, at)].set(value.astype(row.dtype), mode="drop")
    return jax.vmap(write)(buffer, values, index)


def ring_slots(numbers: jax.Array, count: jax.Array, capacity: int) -> jax.Array:
    """Where each token of a ring of `capacity` slots goes; -1 for padding and for what later tokens would overwrite."""
    kept = (numbers >= 0) & (numbers >= count[:, None] - capacity)
    return jnp.where(kept, numbers % capacity, -1)


def ring_numbers(count: jax.Array, capacity: int) -> jax.Array:
    """int32 [B, capacity]: the newest token number each slot of a ring can hold; negative where there is none yet."""
    slot = jnp.arange(capacity)
    return slot + capacity * ((count[:, None] - 1 - slot) // capacity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """As they came, in a ring: token n lies in slot n modulo the capacity.

    Attributes:
      key, value: [B, G, C, K].
      window: tokens a query sees where C does not hold all there will be, else None.
    """

    key: jax.Array
    value: jax.Array
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def extend(self, key: jax.Array, value: jax.Array, numbers: jax.Array, count: jax.Array) -> DenseCache:
        slots = ring_slots(numbers, count, self.key.shape[2])
        return DenseCache(put(self.key, key, slots, 2), put(self.value, value, slots, 2), self.window)

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        return self.key.astype(dtype), self.value.astype(dtype)

    def slots(self, count: jax.Array) -> jax.Array:
        return ring_numbers(count, self.key.shape[2])

    def holds(self, new: int) -> bool:
        return self.window is None or self.key.shape[2] >= self.window + new - 1


def ring_capacity(length: int, window: int | None, slack: int) -> tuple[int, int | None]:
    """How many slots a ring needs, and the window that `DenseCache` is to know of."""
    if window is None or window + slack >= length:
        return length, None
    return window + slack, window


@dataclasses.dataclass(frozen=True)
class Dense:
    """Keys and values in the type of the activations (or `dtype`); rings for layers with a sliding window."""

    dtype: str | None = None

    def empty(
        self, rows: int, heads: int, length: int, width: int, dtype: str, window: int | None, slack: int
    ) -> DenseCache:
        capacity, window = ring_capacity(length, window, slack)
        zeros = lambda: constrain(jnp.zeros((rows, heads, capacity, width), jnp.dtype(self.dtype or dtype)), AXES)
        return DenseCache(zeros(), zeros(), window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Cache:
    """Keys and values of each token and head as 8-bit integers times a scale: `round(x / s)`, `s = max |x| / 127`.

    Attributes:
      codes: int8, a ring.
      scales: float32 [B, G, C, 1], a ring.
    """

    codes: DenseCache
    scales: DenseCache

    def extend(self, key: jax.Array, value: jax.Array, numbers: jax.Array, count: jax.Array) -> Int8Cache:
        (key, key_scale), (value, value_scale) = _to_int8(key), _to_int8(value)
        return Int8Cache(
            self.codes.extend(key, value, numbers, count), self.scales.extend(key_scale, value_scale, numbers, count)
        )

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        codes, scales = self.codes.read(f32 := jnp.dtype("float32")), self.scales.read(f32)
        return (codes[0] * scales[0]).astype(dtype), (codes[1] * scales[1]).astype(dtype)

    def slots(self, count: jax.Array) -> jax.Array:
        return self.codes.slots(count)

    def holds(self, new: int) -> bool:
        # A prompt attends to itself as it is; a token that is decoded sees what the cache made of it.
        return new == 1


def _to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1)), scale


@dataclasses.dataclass(frozen=True)
class Int8:
    """8 bits a number and a float32 scale a token and head."""

    def empty(
        self, rows: int, heads: int, length: int, width: int, dtype: str, window: int | None, slack: int
    ) -> Int8Cache:
        make = lambda width, kind: Dense(kind).empty(rows, heads, length, width, dtype, window, slack)
        return Int8Cache(make(width, "int8"), make(1, "float32"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KiviCache:
    """2- or 4-bit keys by channel and values by token, the newest tokens as they came (KIVI, arXiv:2402.02750).

    Groups of `group` tokens are quantized when `residual` newer ones have come, each once and for good: minimum and
    step of a key's channel over the group's tokens, and of a value's token over each `group` channels.

    Attributes:
      recent: the newest tokens, a ring of `residual + group`.
      retired: int32 [B], how many of a row's tokens have been quantized.
      key_codes: uint8 [B, G, M, group * bits / 8, K], packed along the tokens of each of M groups.
      key_low, key_step: float32 [B, G, M, 1, K].
      value_codes: uint8 [B, G, M, group, K * bits / 8], packed along channels.
      value_low, value_step: float32 [B, G, M, group, K / group].
    """

    recent: DenseCache
    retired: jax.Array
    key_codes: jax.Array
    key_low: jax.Array
    key_step: jax.Array
    value_codes: jax.Array
    value_low: jax.Array
    value_step: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})

    def extend(self, key: jax.Array, value: jax.Array, numbers: jax.Array, count: jax.Array) -> KiviCache:
        B, G, T, K = key.shape
        capacity = self.recent.key.shape[2]
        full = jnp.maximum(count - (capacity - self.group), 0) // self.group  # groups that are due, [B]
        before = count - jnp.sum(numbers >= 0, axis=1)
        # Candidates: the groups that T tokens can complete. Their tokens lie in the ring or among the new ones.
        group = self.retired[:, None] // self.group + jnp.arange((T + self.group - 1) // self.group + 1)  # [B, J]
        due = group < full[:, None]
        wanted = group[:, :, None] * self.group + jnp.arange(self.group)  # token numbers, [B, J, group]
        wanted = wanted.reshape(B, -1)
        order = jnp.argsort(numbers < 0, axis=1, stable=True)  # real tokens first, padded on either side
        new = jnp.take_along_axis(order, jnp.clip(wanted - before[:, None], 0, T - 1), axis=1)
        is_new = (wanted >= before[:, None])[:, None, :, None]

        def gather(fresh: jax.Array, ring: jax.Array) -> jax.Array:
            along = lambda x, index: jnp.take_along_axis(x, index[:, None, :, None], axis=2)
            found = jnp.where(is_new, along(fresh.astype(jnp.float32), new), along(ring, wanted % capacity))
            return found.reshape(B, G, -1, self.group, K)

        at = jnp.where(due, group, -1)
        key_parts = _quantize(gather(key, self.recent.key), self.bits, axis=3)
        split = gather(value, self.recent.value).reshape(B, G, -1, self.group, K // self.group, self.group)
        value_parts = [part.reshape(*part.shape[:4], -1) for part in _quantize(split, self.bits, axis=5)]
        old = (self.key_codes, self.key_low, self.key_step, self.value_codes, self.value_low, self.value_step)
        stored = [put(buffer, part, at, 2) for buffer, part in zip(old, (*key_parts, *value_parts))]
        retired = jnp.maximum(self.retired, full * self.group)
        recent = self.recent.extend(key, value, numbers, count)
        names = ("key_codes", "key_low", "key_step", "value_codes", "value_low", "value_step")
        return dataclasses.replace(self, recent=recent, retired=retired, **dict(zip(names, stored)))

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        B, G, M, _, K = self.key_codes.shape
        key = _dequantize(self.key_codes, self.key_low, self.key_step, self.bits, axis=3)
        steps = K // self.group
        grouped = lambda x: x.reshape(B, G, M, self.group, steps, x.shape[-1] // steps)  # M may be 0
        value = _dequantize(
            grouped(self.value_codes), grouped(self.value_low), grouped(self.value_step), self.bits, axis=5
        )
        join = lambda x, ring: jnp.concatenate([x.reshape(B, G, M * self.group, K), ring], axis=2).astype(dtype)
        return join(key, self.recent.key), join(value, self.recent.value)

    def slots(self, count: jax.Array) -> jax.Array:
        old = jnp.arange(self.key_codes.shape[2] * self.group)
        ring = self.recent.slots(count)
        retired = self.retired[:, None]
        return jnp.concatenate([jnp.where(old < retired, old, -1), jnp.where(ring >= retired, ring, -1)], axis=1)

    def holds(self, new: int) -> bool:
        return new == 1


def _quantize(x: jax.Array, bits: int, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes (packed along `axis`), minimum and step: `x ~ low + step * code`."""
    levels = 2**bits - 1
    low = jnp.min(x, axis=axis, keepdims=True)
    step = (jnp.max(x, axis=axis, keepdims=True) - low) / levels
    codes = jnp.clip(jnp.round((x - low) / jnp.where(step > 0, step, 1)), 0, levels).astype(jnp.uint8)
    each = 8 // bits
    shape = (*codes.shape[:axis], codes.shape[axis] // each, each, *codes.shape[axis + 1 :])
    shifts = (jnp.arange(each, dtype=jnp.uint8) * bits).reshape(each, *(1,) * (codes.ndim - axis - 1))
    return jnp.sum(codes.reshape(shape) << shifts, axis=axis + 1, dtype=jnp.uint8), low, step


def _dequantize(packed: jax.Array, low: jax.Array, step: jax.Array, bits: int, axis: int) -> jax.Array:
    each = 8 // bits
    shifts = (jnp.arange(each, dtype=jnp.uint8) * bits).reshape(each, *(1,) * (packed.ndim - axis - 1))
    codes = (jnp.expand_dims(packed, axis + 1) >> shifts) & (2**bits - 1)
    codes = codes.reshape(*packed.shape[:axis], packed.shape[axis] * each, *packed.shape[axis + 1 :])
    return low + step * codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Kivi:
    """`bits` (2 or 4) a number in groups of `group`, the newest `residual` tokens as they came.

    Layers with a sliding window keep a dense ring: it is small already.
    """

    bits: int = 4
    group: int = 32
    residual: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise UserError(f"a Kivi cache has 2 or 4 bits, not {self.bits}; Int8 has 8.")
        if self.group < 1 or self.group % (8 // self.bits) or self.residual < 0:
            raise UserError(
                f"a Kivi cache needs a group that is a multiple of {8 // self.bits} and a residual of at least 0, "
                f"not {self.group} and {self.residual}."
            )

    def empty(
        self, rows: int, heads: int, length: int, width: int, dtype: str, window: int | None, slack: int
    ) -> LayerCache:
        if window is not None:
            return Dense().empty(rows, heads, length, width, dtype, window, slack)
        if width % self.group:
            raise UserError(
                f"a Kivi cache cannot cut the head width {width} into groups of {self.group}; choose a group that "
                "divides it."
            )
        kept = max(self.residual, slack) + self.group
        groups = max(length - max(self.residual, slack), 0) // self.group
        packed, shape = self.group * self.bits // 8, (rows, heads, groups)
        zeros = lambda kind, *rest: constrain(jnp.zeros((*shape, *rest), kind), (*AXES, None))
        steps = width // self.group
        return KiviCache(
            DenseCache(*(constrain(jnp.zeros((rows, heads, kept, width), jnp.float32), AXES) for _ in "kv")),
            jnp.zeros((rows,), jnp.int32),
            zeros(jnp.uint8, packed, width),
            zeros(jnp.float32, 1, width),
            zeros(jnp.float32, 1, width),
            zeros(jnp.uint8, self.group, width * self.bits // 8),
            zeros(jnp.float32, self.group, steps),
            zeros(jnp.float32, self.group, steps),
            bits=self.bits,
            group=self.group,
        )


def take_rows(cache: dict, rows: jax.Array) -> dict:
    """The cache of the rows named, in that order, each as often as it is named."""
    return jax.tree.map(lambda leaf: leaf[rows], cache)


def cache_bytes(cache: dict) -> int:
    """Bytes that a cache holds, from its arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
