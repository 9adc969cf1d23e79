"""How far the insides of one model are from another's: hidden states and attention, a number for each token."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp


def mean_squared_difference(own: jax.Array, other: jax.Array) -> jax.Array:
    """Mean over the last axis of `(own - other)^2`, float32.

    >>> float(mean_squared_difference(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])))
    2.0
    """
    return jnp.mean(jnp.square(own.astype(jnp.float32) - other.astype(jnp.float32)), axis=-1)


def cosine_distance(own: jax.Array, other: jax.Array) -> jax.Array:
    """`1 - cos(own, other)` over the last axis, float32: what torch's `CosineEmbeddingLoss` is for a target of 1.

    >>> [round(float(cosine_distance(jnp.array([1.0, 0.0]), jnp.array(x))), 6) for x in ([3.0, 0.0], [0.0, 2.0])]
    [0.0, 1.0]
    """
    own, other = own.astype(jnp.float32), other.astype(jnp.float32)
    square = lambda x: jnp.sum(x * x, axis=-1) + 1e-12
    return 1 - jnp.sum(own * other, axis=-1) / jnp.sqrt(square(own) * square(other))


def attention_difference(own: jax.Array, other: jax.Array, of: Literal["scores", "probabilities"]) -> jax.Array:
    """Mean squared difference of what each query makes of the keys it sees: [..., H, T, S] scores -> [..., T].

    The mean is over heads and over the keys that are seen, so that padding, packing and later tokens change nothing;
    where every query sees every key, it is TinyBERT's.

    Args:
      own, other: scores before the softmax, -inf where a key is not seen.
      of: compare scores on the keys that both see, or their softmax on those that either sees.
    """
    sees_own, sees_other = own > -jnp.inf, other > -jnp.inf
    if of == "scores":
        counted = sees_own & sees_other
        own, other = jnp.where(counted, own, 0.0), jnp.where(counted, other, 0.0)
    else:
        counted = sees_own | sees_other
        own, other = jax.nn.softmax(own, axis=-1), jax.nn.softmax(other, axis=-1)
    total = jnp.sum(jnp.where(counted, jnp.square(own - other), 0.0), axis=-1)
    return jnp.mean(total / jnp.maximum(jnp.sum(counted, axis=-1), 1), axis=-2)
