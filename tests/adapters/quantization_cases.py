"""Weights to quantize, and what bitsandbytes makes of them: `python -m tests.adapters.quantization_cases` writes it.

Needs torch and bitsandbytes 0.50; the tests do not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from lmjax.modules.quantized import NF4_CODE

FIXTURES = Path(__file__).with_name("quantization_bits.npz")


def _ties(random: np.random.RandomState) -> np.ndarray:
    """Weights on, just above and just below the middle between two numbers of NF4, in blocks with scales of 2^n."""
    middle = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
    beside = [np.nextafter(middle, np.float32(side)) for side in (9, -9)]
    blocks = random.choice(np.concatenate([middle, *beside, NF4_CODE]), (192, 64)).astype(np.float32)
    blocks[:, 7] = random.choice([-1, 1], 192)
    return (blocks * 2.0 ** random.randint(-9, 4, (192, 1))).astype(np.float32).reshape(96, 128)


def weights() -> dict[str, np.ndarray]:
    """float32 [out, in] each. RandomState is frozen."""
    random = np.random.RandomState(0)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    return {
        "normal": np.float32(0.02) * normal(96, 256),
        "ties": _ties(random),
        "heavy tails": random.standard_t(2, (40, 192)).astype(np.float32),
        "scales far apart": normal(64, 128) * np.exp(3 * normal(64, 1)),
        "rows of zeros": normal(130, 128) * (random.rand(130, 1) > 0.5),
        "zeros": np.zeros((2, 64), np.float32),
        "all alike": np.full((33, 64), -0.3, np.float32),
        "one block": normal(1, 64),
        "seven blocks": normal(7, 64),
        "whole numbers": random.randint(-127, 128, (16, 64)).astype(np.float32),  # ties of int8 too
        "more blocks than one sum takes": np.float32(0.05) * normal(300, 4096),
    }


def library_bits(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of each kind as bitsandbytes has them, and the weight that it makes of them."""
    import bitsandbytes.functional as library
    import torch

    torch.set_num_threads(1)  # with more, the mean of many scales is summed otherwise
    tensor = torch.from_numpy(weight.copy())
    codes, state = library.quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=True)
    small, largest, _ = library.int8_vectorwise_quant(tensor.clone())
    parts = {
        "nf4/codes": codes,
        "nf4/scales": state.absmax,
        "nf4/scale_scales": state.state2.absmax,
        "nf4/offset": state.offset,
        "nf4/dense": library.dequantize_4bit(codes, state),
        "int8/codes": small,
        "int8/scales": largest,
        "int8/dense": library.int8_vectorwise_dequant(small, largest),
    }
    return {name: part.numpy().reshape(-1) for name, part in parts.items()}


def digest(array: np.ndarray) -> np.ndarray:
    """SHA-256 of the bits of an array, uint8 [32]."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest(), np.uint8)


def main() -> None:
    found = {name: library_bits(weight) for name, weight in weights().items()}
    stored = {f"{name}/{part}": digest(bits) for name, parts in found.items() for part, bits in parts.items()}
    np.savez_compressed(FIXTURES, **stored)
    print(f"{FIXTURES}: {FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
