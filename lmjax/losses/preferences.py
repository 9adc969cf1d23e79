"""Losses of a pair of answers, or of single answers that are liked or not. Arrays in, one loss each out, unreduced.

`chosen` and `rejected` are log-ratios `log pi(y|x) - log ref(y|x)` of the answers, summed over their tokens unless it
says otherwise, in nats; `gap` is the first less the second. Every function takes arrays of any one shape.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
_LARGEST_EXPONENT = 80.0


def divergence_score(log_ratio: jax.Array, divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> jax.Array:
    """What f-DPO puts in place of a log-ratio: f'(pi / ref) up to a constant (Wang et al., arXiv:2309.16240).

    "reverse_kl" r, "forward_kl" 1 - exp(-r), "js" log 2 + log sigmoid(r), "alpha" (exp((a - 1) r) - 1) / (a - 1).
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return -jnp.expm1(jnp.minimum(-log_ratio, _LARGEST_EXPONENT))
    if divergence == "js":
        return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)
    return jnp.expm1(jnp.minimum((alpha - 1) * log_ratio, _LARGEST_EXPONENT)) / (alpha - 1)


def logistic(gap: jax.Array, beta: float = 0.1, smoothing: float = 0.0) -> jax.Array:
    """DPO (Rafailov et al., arXiv:2305.18290): `-log sigmoid(beta gap)`; conservative where labels may be wrong.

    With smoothing e, cDPO: `-(1 - e) log sigmoid(beta gap) - e log sigmoid(-beta gap)`.

    >>> round(float(logistic(jnp.array(0.0))), 4)
    0.6931
    """
    x = beta * gap
    return -(1 - smoothing) * jax.nn.log_sigmoid(x) - smoothing * jax.nn.log_sigmoid(-x)


def robust(gap: jax.Array, beta: float = 0.1, smoothing: float = 0.1) -> jax.Array:
    """Unbiased under labels that are wrong with probability e < 1/2 (Chowdhury et al., arXiv:2403.00409)."""
    x = beta * gap
    right, wrong = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)


def hinge(gap: jax.Array, beta: float = 0.1) -> jax.Array:
    """SLiC's `max(0, 1 - beta gap)` (Zhao et al., arXiv:2305.10425)."""
    return jax.nn.relu(1 - beta * gap)


def ipo(gap: jax.Array, beta: float = 0.1) -> jax.Array:
    """`(gap - 1 / (2 beta))^2` (Azar et al., arXiv:2310.12036). The paper's gap is of sums, TRL's of means a token."""
    return jnp.square(gap - 1 / (2 * beta))


def exo(gap: jax.Array, beta: float = 0.1, smoothing: float = 1e-3) -> jax.Array:
    """EXO for pairs: reverse KL from the labels' distribution `(1 - e, e)` (Ji et al., arXiv:2402.00856), e > 0."""
    x = beta * gap
    right, wrong = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    towards = jax.nn.sigmoid(x) * (right - jnp.log1p(-smoothing))
    return towards + jax.nn.sigmoid(-x) * (wrong - jnp.log(smoothing))


def nca(chosen: jax.Array, rejected: jax.Array, beta: float = 0.1) -> jax.Array:
    """NCA for pairs: each answer against noise (Chen et al., arXiv:2402.05369)."""
    c, r = beta * chosen, beta * rejected
    return -jax.nn.log_sigmoid(c) - 0.5 * (jax.nn.log_sigmoid(-c) + jax.nn.log_sigmoid(-r))


def bco(chosen: jax.Array, rejected: jax.Array, beta: float = 0.1, shift: jax.Array | float = 0.0) -> jax.Array:
    """BCO for pairs: a classifier of rewards `beta ratio - shift` (Jung et al., arXiv:2404.04656).

    `shift` is the running mean of rewards; TRL's DPO trainer leaves it 0.
    """
    return -jax.nn.log_sigmoid(beta * chosen - shift) - jax.nn.log_sigmoid(-(beta * rejected - shift))


def sppo(chosen: jax.Array, rejected: jax.Array, beta: float = 0.1) -> jax.Array:
    """SPPO with hard labels: `(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2` (Wu et al., arXiv:2405.00675)."""
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def apo_zero(chosen: jax.Array, rejected: jax.Array, beta: float = 0.1) -> jax.Array:
    """APO for models worse than the chosen answers: up with those, down with the rejected (arXiv:2408.06266)."""
    return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(chosen: jax.Array, rejected: jax.Array, beta: float = 0.1) -> jax.Array:
    """APO for models better than the chosen answers: down with both, more with the rejected (arXiv:2408.06266)."""
    return jax.nn.sigmoid(beta * chosen) + 1 - jax.nn.sigmoid(beta * (chosen - rejected))


def discopop(gap: jax.Array, beta: float = 0.1, temperature: float = 0.05) -> jax.Array:
    """The log-ratio modulated loss that a search found (Lu et al., arXiv:2406.08414).

    With `x = beta gap`, `w = sigmoid(x / temperature)`: `-(1 - w) log sigmoid(x) + w exp(-x)`.
    """
    x = beta * gap
    modulated = jnp.exp(jax.nn.log_sigmoid(x / temperature) - x)
    return -jax.nn.sigmoid(-x / temperature) * jax.nn.log_sigmoid(x) + modulated


def aot(first: jax.Array, second: jax.Array, mask: jax.Array, beta: float = 0.1, smoothing: float = 0.0) -> jax.Array:
    """Alignment by optimal transport in one dimension (Melnyk et al., arXiv:2406.05882): quantiles against quantiles.

    Both sides are sorted over the whole batch before they are subtracted, so the batch must not be split.

    Args:
      first, second: paired form, the policy's and the reference's log-probability gaps of pairs; unpaired form, the
        log-ratios of chosen and of rejected answers.
      mask: 1 where there is a pair; the losses of the others are 0 and stand behind.
      beta, smoothing: as in `logistic`.

    Returns:
      A loss for each rank, in the shape of the arguments; as many have weight as the mask has ones.
    """
    order = lambda x: jnp.sort(jnp.where(mask > 0, x, jnp.inf).reshape(-1))
    there = jnp.arange(mask.size) < jnp.sum(mask > 0)
    gap = jnp.where(there, order(first), 0.0) - jnp.where(there, order(second), 0.0)
    return jnp.where(there, logistic(gap, beta, smoothing), 0.0).reshape(mask.shape)


def kto(log_ratio: jax.Array, desirable: jax.Array, kl: jax.Array | float, beta: float = 0.1) -> jax.Array:
    """KTO (Ethayarajh et al., arXiv:2402.01306): `1 - sigmoid(beta (r - kl))` of a liked answer, else of `kl - r`.

    Args:
      log_ratio: of each answer.
      desirable: 1 or 0.
      kl: the reference point, without a gradient; 0 gives APO's unpaired form (`apo_zero_unpaired`).
      beta: strength.
    """
    sign = 2 * desirable - 1
    return 1 - jax.nn.sigmoid(beta * sign * (log_ratio - jax.lax.stop_gradient(kl)))


def alpha_score(mean_logprobs: jax.Array, alpha: float) -> jax.Array:
    """AlphaPO's `(1 - p^-alpha) / alpha` of the mean log-probability (arXiv:2501.03884); alpha -> 0 gives log p."""
    if alpha == 0:
        return mean_logprobs
    return -jnp.expm1(jnp.minimum(-alpha * mean_logprobs, _LARGEST_EXPONENT)) / alpha


def log_odds_ratio(chosen_mean: jax.Array, rejected_mean: jax.Array) -> jax.Array:
    """ORPO's log odds ratio of two mean log-probabilities (Hong et al., arXiv:2403.07691), for `-log sigmoid`."""
    return (chosen_mean - rejected_mean) - (_log1mexp(chosen_mean) - _log1mexp(rejected_mean))


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler, "Accurately computing log(1 - exp(-|a|))")."""
    x = jnp.minimum(x, -1e-7)
    near = x > -0.6931472
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def unlikelihood(logprobs: jax.Array) -> jax.Array:
    """`-log(1 - p)` of a token that should not be said (Welleck et al., arXiv:1908.04319)."""
    return -_log1mexp(logprobs)


def bradley_terry(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0) -> jax.Array:
    """`-log sigmoid(chosen - rejected - margin)` of two scores."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def plackett_luce(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Minus the log-probability of a ranking, best first over the last axis: `sum_k logsumexp(s_k..s_K) - s_k`.

    Args:
      scores: [..., K].
      mask: 1 for the first answers of each ranking, 0 for places that hold none.
    """
    scores = jnp.where(mask > 0, scores, -jnp.inf)
    later = jax.lax.cumlogsumexp(scores, axis=scores.ndim - 1, reverse=True)
    return jnp.sum(jnp.where(mask > 0, later - jnp.where(mask > 0, scores, 0.0), 0.0), axis=-1)
