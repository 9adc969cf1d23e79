"""Terms that train a reward model: a policy's trunk with a value head (`lmjax.policy.add_value_head`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmjax.batch import Batch, PairBatch
from lmjax.losses import preferences
from lmjax.objectives.algebra import term
from lmjax.objectives.pairs import last_tokens, over_pairs
from lmjax.policy import Outputs


@term
def bradley_terry(outputs: Outputs, batch: PairBatch, center: float = 0.0) -> Any:
    """`-log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2`, mean over pairs.

    Scores are read at the last token of each sequence, by its segment, whatever ids stand for padding. A margin is
    taken where the batch has one; `center` keeps scores near zero (0.01 is usual, Eisenstein et al., arXiv:2312.09244).
    """
    scores, _ = last_tokens(outputs.values, batch)
    chosen, rejected = scores[..., 0], scores[..., 1]
    values = preferences.bradley_terry(chosen, rejected, 0.0 if batch.margins is None else batch.margins)
    if center:
        values = values + center * jnp.square(chosen + rejected)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
    }
    found = {name: over_pairs(jax.lax.stop_gradient(value), batch.pairs) for name, value in metrics.items()}
    return *over_pairs(values, batch.pairs), found


@term
def plackett_luce(outputs: Outputs, batch: PairBatch) -> Any:
    """Minus the log-probability of each group's ranking (`losses.preferences.plackett_luce`), mean over groups.

    `batch.answers` is the most answers of a group, best first; a group may have fewer.
    """
    scores, there = last_tokens(outputs.values, batch)
    values = preferences.plackett_luce(scores, there)
    best = (jnp.argmax(jnp.where(there > 0, scores, -jnp.inf), axis=-1) == 0).astype(jnp.float32)
    return *over_pairs(values, batch.pairs), {"rewards/best_first": over_pairs(best, batch.pairs)}


@term
def process_reward(outputs: Outputs, batch: Batch) -> Any:
    """Binary cross-entropy of each step's score (Lightman et al., arXiv:2305.20050), mean over steps.

    `batch.mask` marks the last token of each step, and `batch.targets` says there whether the step is right (1 or 0).
    """
    logits, right = outputs.values, batch.targets.astype(jnp.float32)
    values = -right * jax.nn.log_sigmoid(logits) - (1 - right) * jax.nn.log_sigmoid(-logits)
    hit = ((logits > 0) == (right > 0)).astype(jnp.float32)
    return values, batch.mask, {"rewards/step_accuracy": (jax.lax.stop_gradient(hit), batch.mask)}
