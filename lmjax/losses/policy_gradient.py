"""Losses of a token, or of a sequence, under an advantage: what policy-gradient methods make of an importance ratio.

`ratio` is pi(token) / pi_old(token), `log_ratio` its logarithm, `logprobs` log pi(token), and `advantages` how much
better than expected the token was. Every function takes arrays of any one shape and gives one loss each, unreduced.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def reinforce(logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """`-A log pi` (Williams, 1992)."""
    return -advantages * logprobs


def clipped(
    ratio: jax.Array,
    advantages: jax.Array,
    low: float = 0.2,
    high: float = 0.2,
    cap: float | None = None,
    dual: float | None = None,
) -> jax.Array:
    """PPO's `-min(ratio A, clip(ratio, 1 - low, 1 + high) A)` (Schulman et al., arXiv:1707.06347).

    Args:
      ratio, advantages: of any one shape.
      low, high: the bounds; DAPO's "clip higher" has 0.2 and 0.28 (arXiv:2503.14476).
      cap: bounds the ratio that is not clipped from above (two-sided clipping of INTELLECT-2, arXiv:2505.07291).
      dual: where A < 0, the loss is `-c A` at the most (dual clip, arXiv:1912.09729); above 1.

    >>> clipped(jnp.array([0.5, 2.0, 4.0]), jnp.array([1.0, 1.0, -1.0]), high=0.25, dual=3.0).tolist()
    [-0.5, -1.25, 3.0]
    """
    free = ratio if cap is None else jnp.minimum(ratio, cap)
    losses = jnp.maximum(-advantages * free, -advantages * jnp.clip(ratio, 1 - low, 1 + high))
    if dual is None:
        return losses
    return jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual), losses)


def weighted_likelihood(weight: jax.Array, logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    """`-sg(w) A log pi`: REINFORCE whose tokens weigh as an importance ratio says, without a gradient through it."""
    return -jax.lax.stop_gradient(weight) * advantages * logprobs


def soft_gate(ratio: jax.Array, advantages: jax.Array, positive: float = 1.0, negative: float = 1.05) -> jax.Array:
    """SAPO (arXiv:2511.20347): `-A (4 / t) sigmoid(t (ratio - 1))`, t by the sign of A: a gate in place of a clip."""
    t = jnp.where(advantages > 0, positive, negative)
    return -jax.nn.sigmoid(t * (ratio - 1)) * 4 / t * advantages


def clamped_log_ratio(log_ratio: jax.Array, advantages: jax.Array, low: float, high: float) -> jax.Array:
    """A log-ratio held within [-low, high] on the side to which A pushes it (GMPO, arXiv:2507.20673)."""
    sign = jnp.sign(advantages)
    return sign * jnp.minimum(sign * log_ratio, sign * jnp.clip(log_ratio, -low, high))


def gamma_weight(
    log_weight: jax.Array,
    advantages: jax.Array,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> jax.Array:
    """VESPO's `exp(l + k log w - l w)` of a sequence's importance weight w, 1 at w = 1; (k, l) by the sign of A.

    As in TRL: log w is held within log 1e-8 and 20, and what is not finite is 0.
    """
    log_weight = jnp.clip(log_weight, jnp.log(1e-8), 20.0)
    k = jnp.where(advantages >= 0, positive[0], negative[0])
    rate = jnp.where(advantages >= 0, positive[1], negative[1])
    found = jnp.exp(rate + k * log_weight - rate * jnp.exp(log_weight))
    return jnp.where(jnp.isfinite(found), found, 0.0)


def dro(logprobs: jax.Array, log_ratio: jax.Array, advantages: jax.Array, beta: float) -> jax.Array:
    """Direct reward optimisation (arXiv:2405.19107) as verl has it: `-(A log pi - beta / 2 log_ratio^2)`."""
    return -(logprobs * advantages - 0.5 * beta * jnp.square(log_ratio))


def within_variation(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, low: float = 0.2, high: float = 0.2
) -> jax.Array:
    """1 where `pi - pi_old` has not gone further than `low` or `high` to the side A pushes to, else 0 (DPPO, TV)."""
    change = jnp.exp(logprobs) - jnp.exp(old_logprobs)
    return jnp.where(advantages > 0, change <= high, change >= -low).astype(jnp.float32)


def within_divergence(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, low: float = 0.2, high: float = 0.2
) -> jax.Array:
    """As `within_variation`, measured by KL(old || new) of taking the token or any other (DPPO, KL)."""
    p, q = jnp.exp(logprobs), jnp.exp(old_logprobs)
    kl = q * (old_logprobs - logprobs) + (1 - q) * jnp.log((1 - q + 1e-8) / (1 - p + 1e-8))
    good, bad = (kl <= high) | (p <= q), (kl <= low) | (p >= q)
    return jnp.where(advantages > 0, good, bad).astype(jnp.float32)


def covariance(logprobs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """`(A - mean A) (log pi - mean log pi)` of each token, means over the mask: what drives entropy down where it is
    large (Cui et al., arXiv:2505.22617). Without gradient; unlike the others here, it looks at all tokens at once.

    >>> covariance(jnp.array([-1.0, -3.0, 9.0]), jnp.array([1.0, -1.0, 9.0]), jnp.array([1.0, 1.0, 0.0])).tolist()
    [1.0, 1.0, 0.0]
    """
    inside = mask != 0
    count = jnp.maximum(jnp.sum(mask), 1.0)
    centred = lambda x: jnp.where(inside, x, 0.0) - jnp.sum(jnp.where(inside, x, 0.0) * mask) / count
    return jax.lax.stop_gradient(jnp.where(inside, centred(advantages) * centred(logprobs), 0.0))


def correction(
    weight: jax.Array, mode: Correction, low: float | None = None, high: float | None = 3.0
) -> jax.Array:
    """An importance weight of trainer over sampler, held within its bounds, or 0 beyond them. Without gradient.

    Args:
      weight: of tokens, or of whole sequences where the mode says so.
      mode: "..._truncate" clips, "..._mask" gives 0 outside.
      low, high: the bounds; None for none.
    """
    if mode.endswith("truncate"):
        return jax.lax.stop_gradient(jnp.clip(weight, low, high))
    outside = (weight > (jnp.inf if high is None else high)) | (weight < (0.0 if low is None else low))
    return jax.lax.stop_gradient(jnp.where(outside, 0.0, weight))


def value_error(
    values: jax.Array, returns: jax.Array, old: jax.Array | float = 0.0, clip: float | None = None
) -> jax.Array:
    """`(V - R)^2 / 2`; with `clip`, the larger of that and of V held within `clip` of what it was (PPO).

    >>> value_error(jnp.array([2.0]), jnp.array([0.0]), jnp.array([1.0]), 0.2).tolist()
    [2.0]
    """
    errors = jnp.square(values - returns)
    if clip is not None:
        errors = jnp.maximum(errors, jnp.square(jnp.clip(values, old - clip, old + clip) - returns))
    return 0.5 * errors
