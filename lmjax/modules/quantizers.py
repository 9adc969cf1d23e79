"""One weight into 4 or 8 bits, in NumPy on the host: the arrays that `lmjax.modules.quantized` multiplies with.

NF4 with double quantization equals bitsandbytes 0.50 on CPU bit for bit (`quantize_4bit(weight, quant_type="nf4",
compress_statistics=True, blocksize=64)`), and int8 its `int8_vectorwise_quant`. qwix has the same NF4 numbers, but no
double quantization and no packed form outside XLA (its 4-bit arrays take a byte each on the host), so that a weight
would take 4.5 bits, and 8 while it is loaded.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from lmjax.modules.quantized import BLOCK, KINDS, NF4, NF4_CODE, SCALE_BLOCK, Int8, Quantized, dynamic_code

_SMALLEST = np.float32(1e-38)  # a block of zeros is divided by it
_GRID = 65536  # the points from -1 to 1 at which bitsandbytes looks up the 8-bit code on CPU
_CHUNK = 2**16  # weights that are worked on together, so that what they need besides stays small


def quantize_weight(weight: np.ndarray, kind: str) -> Quantized:
    """A weight [out, in] in 4 bits ("nf4") or 8 ("int8"). `nf4` needs in to be a multiple of 64.

    Source: QLoRA (arXiv:2305.14314, section 3), LLM.int8() (arXiv:2208.07339, row-wise absolute maximum).

    >>> weight = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    >>> quantized = quantize_weight(weight, "nf4")
    >>> quantized.codes.shape, quantized.scales.shape
    ((2, 32), (2, 1))
    >>> bool(abs(quantized.dense(np.float32) - weight).max() < 0.16)
    True
    """
    return _nf4(weight) if kind == "nf4" else _int8(weight)


def quantized_shapes(out: int, into: int, kind: str) -> Quantized:
    """The shapes of what `quantize_weight` makes of a weight [out, in]."""
    leaf = jax.ShapeDtypeStruct
    if kind == "int8":
        return Int8(leaf((out, into), np.int8), leaf((out,), np.float32))  # type: ignore[arg-type]
    blocks = out * into // BLOCK
    return NF4(
        leaf((out, into // 2), np.uint8),  # type: ignore[arg-type]
        leaf((out, into // BLOCK), np.uint8),  # type: ignore[arg-type]
        leaf((-(-blocks // SCALE_BLOCK),), np.float32),  # type: ignore[arg-type]
        leaf((), np.float32),  # type: ignore[arg-type]
    )


def weights_in(collection: str, name: str, size: int) -> int:
    """How many of a model's weights an array of `size` elements stands for: 2 a byte of NF4, none of its scales.

    >>> weights_in("nf4", "codes", 32), weights_in("nf4", "scales", 1), weights_in("params", "kernel", 64)
    (64, 0, 64)
    """
    if collection not in KINDS:
        return size
    return (size * 2 if collection == "nf4" else size) if name == "codes" else 0


def _rows(weight: np.ndarray) -> Any:
    """Slices of rows, of `_CHUNK` weights or one row each."""
    step = max(1, _CHUNK // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))


def _nf4(weight: np.ndarray) -> NF4:
    out, into = weight.shape
    bounds = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
    codes = np.empty((out, into // 2), np.uint8)
    largest = np.empty((out, into // BLOCK), np.float32)
    for rows in _rows(weight):
        blocks = np.asarray(weight[rows], np.float32).reshape(-1, BLOCK)
        absmax = np.abs(blocks).max(axis=1)
        # bitsandbytes multiplies with the reciprocal; a quotient would round otherwise.
        scaled = np.clip(blocks * (np.float32(1) / np.maximum(absmax, _SMALLEST))[:, None], -1, 1)
        indices = np.zeros(scaled.shape, np.uint8)
        for bound in bounds:  # a tie goes to the lower number
            indices += scaled > bound
        codes[rows] = (indices[:, ::2] << 4 | indices[:, 1::2]).reshape(-1, into // 2)
        largest[rows] = absmax.reshape(-1, into // BLOCK)
    offset = _mean(largest.reshape(-1))
    scales, scale_scales = _dynamic((largest - offset).reshape(-1))
    return NF4(codes, scales.reshape(largest.shape), scale_scales, offset)  # type: ignore[arg-type]


def _dynamic(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in the dynamic 8-bit type: an index of each, and the largest magnitude of each 256."""
    padded = np.zeros(-(-len(values) // SCALE_BLOCK) * SCALE_BLOCK, np.float32)
    padded[: len(values)] = values
    blocks = padded.reshape(-1, SCALE_BLOCK)
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = np.clip(blocks * (np.float32(1) / largest)[:, None], -1, 1)
    half = ((scaled + np.float32(1)) * np.float32(0.5)).astype(np.float64)
    # Exact in float64, then rounded once: the fused multiply and add of the original.
    place = (half * (_GRID - 1) + 0.5).astype(np.float32)
    place = np.where(np.isnan(place), 0, place).astype(np.int32)  # a block of nothing but zeros
    return _dynamic_table()[place].reshape(-1)[: len(values)], largest


@functools.cache
def _dynamic_table() -> np.ndarray:
    """The index of the nearest number of the dynamic 8-bit type at each point of the grid."""
    code = dynamic_code()
    grid = np.float32(-1) + np.float32(2) * np.arange(_GRID, dtype=np.float32) / np.float32(_GRID - 1)
    return np.searchsorted((code[:-1] + code[1:]) / np.float32(2), grid).astype(np.uint8)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean, float32 [], summed in the order of PyTorch on one thread, so that its last bit is the same.

    That is a cascade: 32 columns side by side, down which sums of 16 rows are summed by 16, and those again.
    """
    lanes = 8 if len(values) >= 8 else 1
    whole = len(values) // lanes
    vectors, rest = values[: whole * lanes].reshape(whole, lanes), values[whole * lanes :]
    count = whole // 4
    rows = vectors[: count * 4].reshape(count, 4 * lanes)
    step = 2 ** max(4, max(count - 1, 0).bit_length() // 4)
    levels = []
    for _ in range(3):
        full = len(rows) // step * step
        levels.append(_in_order(rows[full:]))
        groups = rows[:full].reshape(-1, step, 4 * lanes)
        rows = _in_order(groups.transpose(1, 0, 2)) if full else groups[:, 0]
    total = _in_order(np.stack([*levels, _in_order(rows)])).reshape(4, lanes)
    first = _in_order(np.concatenate([total[:1], vectors[count * 4 :]]))
    columns = _in_order(np.concatenate([first[None], total[1:]]))
    ends = _in_order(np.concatenate([np.zeros(1, np.float32), rest, columns]))
    return np.asarray(ends / np.float32(len(values)), np.float32)


def _in_order(rows: np.ndarray) -> np.ndarray:
    """The sum over the first axis, one row after the other; 0 without any."""
    if not len(rows):
        return np.zeros(rows.shape[1:], np.float32)
    return np.asarray(np.add.accumulate(rows, axis=0)[-1], np.float32)


def _int8(weight: np.ndarray) -> Int8:
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty(len(weight), np.float32)
    for rows in _rows(weight):
        block = np.asarray(weight[rows], np.float32)
        largest = np.abs(block).max(axis=1)
        factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > _SMALLEST * 100)
        codes[rows] = np.rint(block * factor[:, None])
        scales[rows] = largest
    return Int8(codes, scales)  # type: ignore[arg-type]
