"""Pluralistic GDPO: learn how beliefs are distributed, and preferences behind each (Yao et al., 2024).

A sequence is prompt, belief, answer. The belief is generated like any text, in proportion to those who hold it, and
what is preferred depends on it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmjax.batch import BeliefBatch
from lmjax.errors import UserError
from lmjax.objectives.algebra import Objective, term
from lmjax.objectives.pairs import LogRatio
from lmjax.objectives.preferences import dpo
from lmjax.policy import Outputs


@term
def belief_kl(outputs: Outputs, batch: BeliefBatch, options: tuple[int, ...] = ()) -> Any:
    """`KL(q || p)` of the beliefs' shares q and the probabilities p of the tokens that state them, mean over sequences.

    p is of the whole vocabulary, as in the published code, so other tokens than the options cost something too.
    Reports the Jensen-Shannon distance (base 2, from 0 to 1) of q and p among the options.

    Args:
      outputs, batch: as ever.
      options: the token of each belief, K in the order of `batch.beliefs`.
    """
    if not isinstance(batch, BeliefBatch) or batch.beliefs.shape[-1] != len(options):
        raise UserError(f"belief_kl has {len(options)} options; give a BeliefBatch with as many beliefs.")

    def of(token: int) -> Any:
        return lambda z: z[:, token] - jax.nn.logsumexp(z, axis=-1)

    logp = jnp.stack([outputs.map_logits(of(token)) for token in options], axis=-1)
    q = batch.beliefs
    weight = (jnp.sum(q, axis=-1) > 0).astype(jnp.float32)
    values = jnp.sum(jnp.where(q > 0, q * (jnp.log(jnp.where(q > 0, q, 1.0)) - logp), 0.0), axis=-1)
    among = jax.nn.softmax(jax.lax.stop_gradient(logp), axis=-1)
    return values, weight, {"beliefs/js_distance": (_distance(q, among), weight)}


def _distance(q: jax.Array, p: jax.Array) -> jax.Array:
    m = (q + p) / 2
    entropy = lambda x: -jnp.sum(jnp.where(x > 0, x * jnp.log2(jnp.where(x > 0, x, 1.0)), 0.0), axis=-1)
    return jnp.sqrt(jnp.maximum(entropy(m) - (entropy(q) + entropy(p)) / 2, 0.0))


@term
def belief_nll(outputs: Outputs, batch: BeliefBatch) -> Any:
    """Negative log-likelihood of the tokens that state the belief, mean over them."""
    return -outputs.logprobs, batch.belief_mask


def gdpo(
    options: tuple[int, ...], beta: float = 0.1, *, preference: float = 1.0, ratio: LogRatio | None = None
) -> Objective:
    """`belief_kl + preference * dpo + belief_nll`. The published code weighs all three alike; 0 leaves DPO out."""
    found = belief_kl(options=options) + belief_nll()
    return found + preference * dpo(beta, ratio=ratio or LogRatio()) if preference else found
