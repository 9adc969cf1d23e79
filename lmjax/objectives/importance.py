"""Importance ratios of rollouts, and what terms over them weigh tokens by."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.batch import Batch, RolloutBatch
from lmjax.errors import UserError
from lmjax.losses import policy_gradient
from lmjax.losses.policy_gradient import Correction
from lmjax.objectives.segments import segment_sums

Clip = float | tuple[float, float]
Level = Literal["token", "sequence", "sequence_token", "sequence_sum"]
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclasses.dataclass(frozen=True)
class Weighing:
    """How rollouts that are not quite the policy's own are made to count as if they were.

    Attributes:
      level: of the importance ratio: "token"; "sequence" (GSPO, arXiv:2507.18071): exp of the mean of a sequence's
        log-ratios, one for all of its tokens; "sequence_token" (GSPO-token): that as a value, with the gradient of each
        token; "sequence_sum" (RLOO): exp of their sum.
      held: log-ratios are held within so many nats before anything else; None for no bound (verl: 20).
      off_policy: leave out sequences with A < 0 that have drifted: mean of log pi_sampled - log pi above this
        (DeepSeek-V3.2, arXiv:2512.02556); None for all.
      top_entropy: learn from this share of the batch's tokens only, those where the policy is the least certain
        (arXiv:2506.01939). Below 1 it couples the rows of a batch.
      correct: weigh by pi_old over what tokens were drawn from in fact (`sampling_logprobs`), as `losses.correction`
        bounds it; None: not.
      low, high: bounds of that; None for none.
    """

    level: Level = "token"
    held: float | None = None
    off_policy: float | None = None
    top_entropy: float = 1.0
    correct: Correction | None = None
    low: float | None = None
    high: float | None = 3.0

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UserError(f"no importance ratio is taken by {self.level!r}; there are {', '.join(LEVELS)}.")
        if not 0.0 < self.top_entropy <= 1.0:
            raise UserError(f"top_entropy is {self.top_entropy}; give a share above 0 and up to 1.")
        if self.correct is not None and self.correct not in CORRECTIONS:
            raise UserError(f"no correction is called {self.correct!r}; there are {', '.join(CORRECTIONS)}.")
        if self.held is not None and self.held <= 0:
            raise UserError(f"held is {self.held}; give a positive number of nats.")


PLAIN = Weighing()


def bounds_of(clip: Clip) -> tuple[float, float]:
    """How far below and above, of one number for both or of two.

    Raises:
      UserError: a negative one.

    >>> bounds_of(0.2), bounds_of((0.2, 0.28))
    ((0.2, 0.2), (0.2, 0.28))
    """
    low, high = (clip, clip) if isinstance(clip, int | float) else clip
    if low < 0 or high < 0:
        raise UserError(f"clip is {clip}; give numbers that are not negative.")
    return low, high


class Ratios(NamedTuple):
    """What a surrogate reads, each [B, T].

    Attributes:
      logprobs: of the policy.
      old: of the policy that said the tokens, without gradient.
      log_ratio: their difference, or that of whole sequences.
      ratio: its exponential.
      advantages: of the batch.
      mask: of the batch.
    """

    logprobs: jax.Array
    old: jax.Array
    log_ratio: jax.Array
    ratio: jax.Array
    advantages: jax.Array
    mask: jax.Array


def ratios(outputs: Any, batch: Batch, how: Weighing) -> Ratios:
    """The importance ratios of a batch of rollouts.

    Raises:
      UserError: the batch is of another kind.
    """
    if not isinstance(batch, RolloutBatch):
        raise UserError("terms over rollouts need a batch of them; make it with lmjax.rl.rollout_batch.")
    own = outputs.logprobs
    old = jax.lax.stop_gradient(own) if batch.old_logprobs is None else batch.old_logprobs
    mask = batch.mask.astype(jnp.float32)
    log_ratio = own - old
    if how.held is not None:
        log_ratio = jnp.clip(log_ratio, -how.held, how.held)
    if how.level != "token":
        total = sequence_totals(log_ratio, batch)
        if how.level != "sequence_sum":
            total = total / jnp.maximum(sequence_lengths(batch), 1.0)
        if how.level == "sequence_token":
            total = jax.lax.stop_gradient(total) + own - jax.lax.stop_gradient(own)
        log_ratio = total
    return Ratios(own, old, log_ratio, jnp.exp(log_ratio), batch.advantages, mask)


def sequence_totals(values_BT: jax.Array, batch: RolloutBatch) -> jax.Array:
    """The sum over each token's sequence of what the mask keeps, at every token: [B, T]."""
    mask = batch.mask.astype(jnp.float32)
    return segment_sums(jnp.where(mask != 0, values_BT, 0.0) * mask, batch.sequences)[0]


def sequence_lengths(batch: RolloutBatch) -> jax.Array:
    """How many tokens of each token's sequence the mask keeps, [B, T]."""
    return segment_sums(batch.mask.astype(jnp.float32), batch.sequences)[0]


def sampler_weights(batch: RolloutBatch, how: Weighing, old: jax.Array) -> jax.Array:
    """pi_old over what the tokens were drawn from, bounded, [B, T]; 1 where the sampler's number is missing (NaN).

    Raises:
      UserError: the batch does not say what they were drawn from.
    """
    if batch.sampling_logprobs is None:
        raise UserError("the batch has no sampling_logprobs to correct by; make it with rollout_batch(sampling=True).")
    assert how.correct is not None
    gap = jax.lax.stop_gradient(old) - batch.sampling_logprobs
    gap = jnp.where(jnp.isfinite(gap), gap, 0.0)
    if how.correct.startswith("sequence"):
        gap = sequence_totals(gap, batch)
    return policy_gradient.correction(jnp.exp(gap), how.correct, how.low, how.high)


def token_weights(outputs: Any, batch: RolloutBatch, how: Weighing, found: Ratios, corrected: bool = True) -> Any:
    """What each token's loss is multiplied by, in TRL's order: off-policy mask, entropy mask, correction; or None."""
    weights: list[jax.Array] = []
    if how.off_policy is not None:
        drawn = found.old if batch.sampling_logprobs is None else batch.sampling_logprobs
        drift = jax.lax.stop_gradient(drawn - found.logprobs)
        drift = jnp.where(jnp.isnan(drift), 0.0, drift)
        mean = sequence_totals(drift, batch) / jnp.maximum(sequence_lengths(batch), 1.0)
        weights.append(((batch.advantages >= 0) | (mean <= how.off_policy)).astype(jnp.float32))
    if how.top_entropy < 1.0:
        weights.append(least_certain(outputs.entropy, batch, how.top_entropy))
    if how.correct is not None and corrected:
        weights.append(sampler_weights(batch, how, found.old))
    product = None
    for weight in weights:
        product = weight if product is None else product * weight
    return product


def least_certain(entropy_BT: jax.Array, batch: Batch, share: float) -> jax.Array:
    """1 at the tokens of the batch whose entropy is at or above its quantile 1 - share, else 0. [B, T]."""
    entropy = jax.lax.stop_gradient(entropy_BT)
    inside = batch.mask > 0
    threshold = jnp.nanquantile(jnp.where(inside, entropy, jnp.nan), 1 - share)
    return (inside & (entropy >= threshold)).astype(jnp.float32)
