"""Rotary positions (arXiv:2104.09864) in the half-split layout, and the ways to stretch them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.modules.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """Rotation per position of each pair of dimensions, and the factor on cos and sin.

    Returns:
      float32 [K/2] radians a position, from fast to slow, and the attention factor (1 except under YaRN).

    >>> rope_frequencies(4, 10000.0)[0].tolist()
    [1.0, 0.009999999776482582]
    """
    # Rounded to float32 at each step, as in the programs that trained the published models: exact frequencies differ
    # from theirs by some 3e-7, which 100,000 positions turn into 0.03 radians.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = (theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / periods
    attention_factor = 1.0
    if scaling is None:
        return frequencies, attention_factor
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor), attention_factor
    if scaling.kind == "llama3":
        rotations = scaling.original_length / (np.float32(2 * math.pi) / frequencies)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = np.clip((rotations - low) / (high - low), 0, 1)
        slowed = frequencies / np.float32(scaling.factor)
    else:
        keep = _yarn_ramp(head_dim, theta, scaling)
        slowed = np.float32(1) / (np.float32(scaling.factor) * periods)
        attention_factor = _yarn_attention_factor(scaling)
    frequencies = keep * frequencies + (1 - keep) * slowed
    return frequencies.astype(np.float32), attention_factor


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Share of each frequency that is kept: 1 above `beta_fast` rotations, 0 below `beta_slow`, linear between."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
    return (1.0 - np.clip(ramp, 0.0, 1.0)).astype(np.float32)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def rope_table(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, float32 [B, T, 1, K/2]: computed once a forward and shared by its layers."""
    frequencies, factor = rope_frequencies(head_dim, theta, scaling)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x_BTHK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (k, k + K/2) of every head. Float32 inside, x's type outside."""
    cos, sin = table
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHK.dtype)
