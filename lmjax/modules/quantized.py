"""Weights in 4 and 8 bits, as the linear layers multiply with them.

A quantized layer has a collection `nf4` or `int8` in place of its kernel. Its matrices lie as [out, in], the layout of
the files they come from. Nothing here trains: the gradient goes through to the input only. `lmjax.modules.quantizers`
makes them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale

# The quantiles of a normal distribution (QLoRA, arXiv:2305.14314, appendix E).
NF4_CODE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@functools.cache
def dynamic_code() -> np.ndarray:
    """The 256 numbers of the signed dynamic 8-bit type, float32, sorted (Dettmers et al., arXiv:2110.02861).

    To the bit those of bitsandbytes, whose edges are rounded once, from a fused multiply and add.

    >>> code = dynamic_code()
    >>> len(code), float(code.min()) > -1, float(code.max())
    (256, True, 1.0)
    """
    first, last = np.float32(0.1), np.float32(1)
    numbers = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        count = 2**exponent
        step, place = float((last - first) / np.float32(count)), np.arange(count + 1)
        upward, downward = float(first) + step * place, float(last) - step * place[::-1]
        edges = np.where(place < (count + 1) // 2, upward, downward).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        numbers += [*means, *-means]
    code = np.sort(np.array(numbers, np.float32))
    code.flags.writeable = False
    return code


class NF4(NamedTuple):
    """Four bits a weight: `code[index] * scale of its block`, the scales in 8 bits themselves (double quantization).

    Attributes:
      codes: uint8 [out, in / 2], two indices each, the first in the high bits.
      scales: uint8 [out, in / 64], indices into `dynamic_code`.
      scale_scales: float32 [out * in / 64 / 256, rounded up], of each 256 scales in a row.
      offset: float32 [], added to every scale.
    """

    codes: jax.Array
    scales: jax.Array
    scale_scales: jax.Array
    offset: jax.Array

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The weight, [out, in]."""
        out, blocks = self.scales.shape
        scale = jnp.repeat(self.scale_scales, SCALE_BLOCK)[: out * blocks].reshape(out, blocks)
        scale = jnp.take(jnp.asarray(dynamic_code()), self.scales) * scale
        # The maximum changes no number, but keeps compilers from a fused multiply and add, whose bits are others.
        scale = jnp.maximum(scale, jnp.finfo(jnp.float32).min) + self.offset
        indices = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1).reshape(out, blocks, BLOCK)
        weight = jnp.take(jnp.asarray(NF4_CODE), indices) * scale[:, :, None]
        return weight.reshape(out, blocks * BLOCK).astype(dtype)


class Int8(NamedTuple):
    """Eight bits a weight: `code * max |w| / 127` of its output.

    Attributes:
      codes: int8 [out, in].
      scales: float32 [out], the largest magnitude of each row.
    """

    codes: jax.Array
    scales: jax.Array

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The weight, [out, in]."""
        return (self.codes.astype(jnp.float32) * self.scales[:, None] * np.float32(1 / 127)).astype(dtype)


Quantized = NF4 | Int8
KINDS: dict[str, type[NF4] | type[Int8]] = {"nf4": NF4, "int8": Int8}


def weight(layer: nn.Module) -> Quantized | None:
    """The quantized weight of a linear layer, or None if it has a kernel."""
    for kind, make in KINDS.items():
        if layer.has_variable(kind, "codes"):
            return make(**{name: layer.get_variable(kind, name) for name in make._fields})
    return None


def multiply(x_ND: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """`x W`, [N, in] -> [N, out]. A quantized weight is unpacked here, and again in the backward pass, never kept."""
    return _product(x_ND, weight) if isinstance(weight, NF4 | Int8) else x_ND @ weight


@jax.custom_vjp
def _product(x_ND: jax.Array, weight: Quantized) -> jax.Array:
    unpacked = _after(weight, x_ND).dense(x_ND.dtype)
    return jax.lax.dot_general(x_ND, unpacked, (((1,), (1,)), ((), ())))


def _forward(x_ND: jax.Array, weight: Quantized) -> tuple[jax.Array, Quantized]:
    return _product(x_ND, weight), weight


def _backward(weight: Quantized, gradient_ND: jax.Array) -> tuple[jax.Array, None]:
    return gradient_ND @ _after(weight, gradient_ND).dense(gradient_ND.dtype), None


_product.defvjp(_forward, _backward)


def _after(weight: Quantized, x_ND: jax.Array) -> Quantized:
    """The same weight, which no compiler can unpack before x is there, nor once for two uses.

    So one is unpacked at a time. On CPU, XLA drops barriers before it merges what is computed twice, but does not
    know that nothing is more than infinite. Without this, a training step of unrolled layers would hold all of their
    weights in full.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier((weight, x_ND))[0]
    never = (x_ND[0, 0] > jnp.inf).astype(weight.codes.dtype)
    return weight._replace(codes=weight.codes ^ never)
