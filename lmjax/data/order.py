"""The order of examples as pure functions of a seed and a position: nothing to store, nothing to replay."""

from __future__ import annotations

import fractions
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_ROUNDS = 6
_FINEST = 1 << 16  # longest period of a mixture


def mix64(x: Any) -> np.ndarray:
    """SplitMix64's finalizer: uint64 to uint64, a bijection (Steele et al. 2014)."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash64(seed: int, *words: np.ndarray | int) -> np.ndarray:
    """A well-mixed uint64 of a seed and integer words (broadcast)."""
    state = mix64(np.uint64(seed % (1 << 64)))
    with np.errstate(over="ignore"):
        for word in words:
            state = mix64(state * np.uint64(0x9E3779B97F4A7C15) + np.asarray(word).astype(np.uint64) + np.uint64(1))
    return state


def permute(index: np.ndarray, length: int, seed: int, epoch: np.ndarray | int = 0) -> np.ndarray:
    """Where a seeded permutation of range(length) sends `index`, for each epoch another one.

    A Feistel network over Z_a x Z_b with a*b just above `length`, walked until it falls inside (Black &
    Rogaway 2002): O(1) memory, any element on its own.

    Args:
      index: int [n], each in [0, length).
      length: size of the set.
      seed: names the family of permutations.
      epoch: int, or int [n].

    Returns:
      int64 [n].
    """
    if length <= 1:
        return np.zeros(np.shape(index), np.int64)
    a = math.isqrt(length - 1) + 1
    sizes = (a, -(-length // a))  # left, right
    base = np.broadcast_to(hash64(seed, epoch), np.shape(index))
    out = np.array(index, np.int64)
    todo, key, inner = np.arange(out.size), base, out
    while True:
        halves = list(np.divmod(inner, sizes[1]))
        for r in range(_ROUNDS):
            size = sizes[r % 2]
            half = halves[r % 2] + _below(key, halves[1 - r % 2], r, size)
            halves[r % 2] = half - size * (half >= size)
        out[todo] = halves[0] * sizes[1] + halves[1]
        todo = np.flatnonzero(out >= length)
        if not todo.size:
            return out
        key, inner = base[todo], out[todo]


def _below(key: np.ndarray, half: np.ndarray, r: int, size: int) -> np.ndarray:
    """A hash of (key, half, round) in [0, size), size < 2^32: int64."""
    with np.errstate(over="ignore"):
        x = (half.astype(np.uint64) + key) * np.uint64(0x9E3779B97F4A7C15) + np.uint64((r * 0xD1B54A32D192ED03) % 2**64)
        x = (x ^ (x >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        return (((x >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32)).astype(np.int64)


def mixing_rates(
    sizes: Sequence[int], temperature: float = 1.0, limit: int = 0, weights: Sequence[float] | None = None
) -> list[float]:
    """How often a mixture draws from each of its tasks: p_i ∝ w_i min(n_i, K)^(1/T).

    Temperature-scaled, examples-proportional mixing (T5, arXiv:1910.10683, section 3.5.2): at T = 1 in proportion to
    the sizes, at large T all alike; the limit K keeps a huge task from drowning the others (FLAN, arXiv:2109.01652,
    takes 3000).

    Args:
      sizes: n_i, examples of each task.
      temperature: T.
      limit: K; 0 for none.
      weights: w_i.

    Returns:
      Shares that add up to 1.

    >>> mixing_rates([100, 900]), mixing_rates([100, 900], temperature=2), mixing_rates([100, 900], limit=300)
    ([0.1, 0.9], [0.25, 0.75], [0.25, 0.75])
    """
    counted = [min(size, limit or size) for size in sizes]
    raw = [w * n ** (1 / temperature) for n, w in zip(counted, weights or [1.0] * len(sizes))]
    return [rate / sum(raw) for rate in raw]


def mixture_schedule(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """One period of a mixture: which source each example comes from, as evenly spread as can be.

    The weights are taken as the decimals they are written as. If their common denominator makes a period of
    at most 65,536 examples, the proportions are exact over each period; else they are rounded to 1/65,536.

    Returns:
      (source [P], counts [S]): the source of each example of the period, and examples of each source in it.

    >>> source, counts = mixture_schedule([0.75, 0.25])
    >>> source.tolist(), counts.tolist()
    ([0, 0, 1, 0], [3, 1])
    """
    exact = [fractions.Fraction(repr(float(w))) for w in weights]
    shares = [w / sum(exact) for w in exact]
    period = math.lcm(*(s.denominator for s in shares))
    if period > _FINEST:
        period = _FINEST
        shares = [fractions.Fraction(max(1, round(s * period)), period) for s in shares]
        largest = max(range(len(shares)), key=lambda i: shares[i])
        shares[largest] += 1 - sum(shares)
    counts = np.array([int(s * period) for s in shares], np.int64)
    when = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
    which = np.repeat(np.arange(len(counts)), counts)
    return which[np.lexsort((which, when))].astype(np.int64), counts
