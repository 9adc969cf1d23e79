"""Terms that keep entropy up by sparing the few tokens that cost the most of it (arXiv:2505.22617), as in verl.

Those are the tokens whose log-probability and advantage stand out together. Which they are depends on the whole batch,
so these terms couple its rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmjax.batch import RolloutBatch
from lmjax.errors import UserError
from lmjax.losses import policy_gradient as losses
from lmjax.objectives.algebra import Objective
from lmjax.objectives.importance import PLAIN, Clip, Ratios, Weighing, bounds_of
from lmjax.objectives.policy_gradient import surrogate_term
from lmjax.objectives.reducers import Reducer, token_mean

BAND = (1.0, 5.0)


def clip_cov(
    clip: Clip = 0.2,
    *,
    share: float = 2e-4,
    band: tuple[float, float] = BAND,
    weighing: Weighing = PLAIN,
    reducer: Reducer = token_mean,
) -> Objective:
    """Clip-Cov: PPO's clip, and a few tokens of high covariance get no gradient.

    They are drawn evenly from those that the clip leaves alone and whose covariance lies in `band`. The draw is a
    function of the batch and of what the policy says of it: the same step draws the same tokens.

    Args:
      clip: epsilon, or one below and one above.
      share: of the batch's tokens, one at the least.
      band: least and largest covariance, neither included.
      weighing, reducer: as in `ppo`.
    """
    _check(share)
    low, high = bounds_of(clip)
    if band[0] >= band[1]:
        raise UserError(f"the band of covariances is {band}; the first must be below the second.")

    def surrogate(found: Ratios, batch: RolloutBatch) -> jax.Array:
        values = losses.clipped(found.ratio, found.advantages, low, high)
        free = values <= -found.advantages * found.ratio
        size = losses.covariance(found.logprobs, found.advantages, found.mask)
        eligible = (found.mask > 0) & free & (size > band[0]) & (size < band[1])
        seed = jax.lax.bitcast_convert_type(jnp.sum(jnp.abs(size)), jnp.uint32)
        draw = jax.random.uniform(jax.random.key(seed), size.shape)
        return jnp.where(_largest(draw, eligible, _count(found.mask, share)), 0.0, values)

    clip_ratio = (1 - low, 1 + high)
    return surrogate_term(
        "clip_cov", surrogate, weighing=weighing, reducer=reducer, clip=clip_ratio, couples_rows=True
    )


def kl_cov(
    coefficient: float = 0.1,
    *,
    share: float = 2e-4,
    weighing: Weighing = PLAIN,
    reducer: Reducer = token_mean,
) -> Objective:
    """KL-Cov: `-ratio A`, and the tokens of highest covariance pay `coefficient |log ratio|` besides.

    Args:
      coefficient: of that (1 in the paper, 0.1 in verl's config).
      share: of the batch's tokens, one at the least.
      weighing, reducer: as in `ppo`.
    """
    _check(share)
    if coefficient < 0:
        raise UserError(f"the coefficient is {coefficient}; give a number that is not negative.")

    def surrogate(found: Ratios, batch: RolloutBatch) -> jax.Array:
        size = losses.covariance(found.logprobs, found.advantages, found.mask)
        chosen = _largest(size, found.mask > 0, _count(found.mask, share))
        pull = jnp.where(chosen, coefficient * jnp.abs(found.log_ratio), 0.0)
        return -found.advantages * found.ratio + pull

    return surrogate_term("kl_cov", surrogate, weighing=weighing, reducer=reducer, couples_rows=True)


def _check(share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(f"share is {share}; give one above 0 and up to 1.")


def _count(mask: jax.Array, share: float) -> jax.Array:
    # A share such as 0.3 of 10 tokens is 3 in float64 and 3.0000001 or 2.9999998 in float32.
    return jnp.maximum(jnp.floor(jnp.sum(mask > 0) * share * (1 + 1e-6)), 1)


def _largest(values: jax.Array, allowed: jax.Array, count: jax.Array) -> jax.Array:
    """bool, which entries are among the `count` largest of those allowed."""
    flat = jnp.where(allowed, values, -jnp.inf).reshape(-1)
    rank = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True).reshape(values.shape)
    return allowed & (rank < count)
