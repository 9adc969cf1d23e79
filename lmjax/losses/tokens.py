"""Losses of a token from its statistics."""

from __future__ import annotations

import jax


def smoothed_cross_entropy(
    logprobs: jax.Array, mean_logits: jax.Array, logsumexp: jax.Array, smoothing: float
) -> jax.Array:
    """Cross-entropy to `(1 - s) onehot + s / V` (arXiv:1512.00567), elementwise over any shape, in nats.

    Equals `-(1 - s) log p(target) - s (mean logit - logsumexp)`, so it needs no row of logits.
    """
    return -(1.0 - smoothing) * logprobs - smoothing * (mean_logits - logsumexp)
