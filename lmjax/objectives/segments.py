"""Sums over sequences that lie side by side, or behind each other, in the rows of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_sums(values_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the values over each token's own sequence, [B, T], and per possible sequence, [B * (T + 1)]."""
    B, T = values_BT.shape
    ids = (jnp.arange(B)[:, None] * (T + 1) + jnp.clip(segments_BT, 0, T)).reshape(-1)
    sums = jax.ops.segment_sum(values_BT.reshape(-1), ids, B * (T + 1))
    return sums[ids].reshape(B, T), sums
