"""Noise on the embeddings in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def neftune(key: jax.Array, x_BTD: jax.Array, segments_BT: jax.Array, alpha: float) -> jax.Array:
    """NEFTune (arXiv:2310.05914): embeddings plus uniform noise in ±alpha / sqrt(L D).

    L is the number of tokens of each token's own segment, so the noise of a conversation does not depend on what it is
    packed or padded with. (TRL takes the length of the padded row, so that a short text in a long batch gets less.)

    >>> x, segments = jnp.zeros((1, 4, 9)), jnp.array([[1, 1, 1, 1]])
    >>> noise = neftune(jax.random.key(0), x, segments, 3.0)  # 3 / sqrt(4 * 9) = 0.5
    >>> bool(0.4 < noise.max() < 0.5), bool(-0.5 < noise.min() < -0.4)
    (True, True)
    """
    length_BT = jnp.sum(segments_BT[:, :, None] == segments_BT[:, None, :], axis=-1)
    reach_BT = alpha / jnp.sqrt(length_BT * x_BTD.shape[-1])
    noise_BTD = jax.random.uniform(key, x_BTD.shape, jnp.float32, -1, 1)
    return x_BTD + (noise_BTD * reach_BT[:, :, None]).astype(x_BTD.dtype)
