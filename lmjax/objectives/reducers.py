"""How the values of tokens become one number: the coefficient of each value, and the denominator.

A reducer looks at masks only, so totals and weights can be added up over microbatches and devices before anything is
divided, and the result does not depend on how a batch was split or packed. A *sequence* is a segment of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lmjax.objectives.segments import segment_sums


@dataclasses.dataclass(frozen=True)
class Reducer:
    """A named reduction: `(mask [B, T], segments [B, T]) -> (coefficients [B, T], weight [])`.

    The reduced value is `sum(coefficients * values) / weight`.
    """

    name: str
    reduce: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

    def coefficients(self, mask: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Also takes the mask [B] of values that belong to whole rows, or [] of a single value, which are averaged."""
        mask = jnp.asarray(mask, jnp.float32)
        if mask.ndim == 2:
            return self.reduce(mask, segments_BT)
        return mask, (jnp.ones(()) if self.name == "token_sum" else jnp.sum(mask))


def _token_mean(mask: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mask, jnp.sum(mask)


def _sequence_mean(mask: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    own, sums = segment_sums(mask, segments)
    return jnp.where(own > 0, mask / jnp.where(own > 0, own, 1.0), 0.0), jnp.sum(sums > 0).astype(jnp.float32)


def _sequence_sum_mean(mask: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mask, jnp.sum(segment_sums(mask, segments)[1] > 0).astype(jnp.float32)


def _token_sum(mask: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mask, jnp.ones(())


token_mean = Reducer("token_mean", _token_mean)
"""Sum over all tokens by the number of tokens (DAPO; verl's token-mean with global normalisation)."""

sequence_mean = Reducer("sequence_mean", _sequence_mean)
"""Mean over each sequence's tokens, then over sequences that have any (the first GRPO)."""

sequence_sum_mean = Reducer("sequence_sum_mean", _sequence_sum_mean)
"""Sum over each sequence's tokens, then mean over sequences that have any."""

token_sum = Reducer("token_sum", _token_sum)
"""Plain sum. Over microbatches it stays the sum of all."""


def constant_horizon(horizon: int) -> Reducer:
    """Sum by (number of sequences x `horizon`), whatever their lengths (Dr. GRPO, arXiv:2503.20783).

    Counts every sequence of the batch, those whose mask is all zero too.
    """

    def reduce(mask: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        present = segment_sums((segments > 0).astype(jnp.float32), segments)[1] > 0
        return mask, jnp.sum(present).astype(jnp.float32) * horizon

    return Reducer("constant_horizon", reduce)
