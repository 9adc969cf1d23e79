"""From logits to a token: drawn or the likeliest, cheaply over a large vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 256  # of the two levels of the inverse distribution function


class Draw(NamedTuple):
    """A token of each row: int32 [B], and its log-probability, float32 [B]."""

    token: jax.Array
    logprob: jax.Array


def row_uniforms(keys_B: jax.Array, step_B: jax.Array, count: int) -> jax.Array:
    """Float32 [B, count] in [0, 1). They depend on a row's key and step alone, not on its place or its neighbours."""
    draw = lambda key, step: jax.random.uniform(jax.random.fold_in(key, step), (count,))
    return jax.vmap(draw)(keys_B, step_B)


def draw(z_BV: jax.Array, uniforms_B2: jax.Array, temperature_B: jax.Array | None = None) -> Draw:
    """Draws from softmax(z / temperature): a block of 256 tokens by one uniform number, a token in it by another.

    Inverting the distribution function takes one exponential a token; the Gumbel form takes a random number and two
    logarithms. Two levels leave two short cumulative sums, and a resolution of 2^-23 within a block, not within all.
    Tokens of logit -inf are never drawn. The vocabulary is read three times: for its maximum, its exponentials and
    their sums.
    """
    B, V = z_BV.shape
    top_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    shifted_BV = z_BV - top_B1 if temperature_B is None else (z_BV - top_B1) / temperature_B[:, None]
    blocks = -(-V // BLOCK)
    p_BNK = jnp.pad(jnp.exp(shifted_BV), ((0, 0), (0, blocks * BLOCK - V))).reshape(B, blocks, BLOCK)
    block_B, total_B = invert(jnp.sum(p_BNK, axis=-1), uniforms_B2[:, 0])
    inside_BK = jnp.take_along_axis(p_BNK, block_B[:, None, None], axis=1)[:, 0]
    token_B = (block_B * BLOCK + invert(inside_BK, uniforms_B2[:, 1])[0]).astype(jnp.int32)
    return Draw(token_B, _at(shifted_BV, token_B) - jnp.log(total_B))


def invert(weights_BN: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index [B] of the weight that a uniform number falls on, never one of weight 0; and the sum of the weights [B]."""
    below_BN = jnp.cumsum(weights_BN, axis=-1)
    total_B = below_BN[:, -1]
    possible_BN = weights_BN > 0
    hit_BN = (below_BN > (uniform_B * total_B)[:, None]) & possible_BN
    index_N = jnp.arange(weights_BN.shape[-1])
    first_B = jnp.min(jnp.where(hit_BN, index_N, weights_BN.shape[-1]), axis=-1)
    last_B = jnp.max(jnp.where(possible_BN, index_N, 0), axis=-1)  # where rounding left the sum below the number
    return jnp.minimum(first_B, last_B), total_B


def likeliest(z_BV: jax.Array) -> jax.Array:
    """The first of the largest logits, int32 [B]. Two plain passes: XLA's argmax on CPU takes twenty times as long."""
    V = z_BV.shape[-1]
    top_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    first_B = jnp.min(jnp.where(z_BV == top_B1, jnp.arange(V, dtype=jnp.int32), V), axis=-1)
    return jnp.minimum(first_B, V - 1)


def logprob(z_BV: jax.Array, token_B: jax.Array, temperature_B: jax.Array | None = None) -> jax.Array:
    """log softmax(z / temperature) of each row's token, float32 [B]."""
    z_BV = z_BV if temperature_B is None else z_BV / temperature_B[:, None]
    return _at(z_BV, token_B) - jax.nn.logsumexp(z_BV, axis=-1)


def _at(z_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(z_BV, token_B[:, None], axis=-1)[:, 0]
