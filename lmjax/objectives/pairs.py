"""What terms over pairs of answers are made of: sums over answers, log-ratios, means over pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.batch import PairBatch
from lmjax.errors import UserError
from lmjax.losses import preferences
from lmjax.losses.preferences import Divergence
from lmjax.objectives.algebra import Objective, Term
from lmjax.objectives.reducers import Reducer, token_mean
from lmjax.policy import Outputs


@dataclasses.dataclass(frozen=True)
class LogRatio:
    """How `log pi(y|x) - log ref(y|x)` is taken of an answer.

    Attributes:
      reference: the role of the reference; None leaves it out. See `with_cached_reference` for one that need not run.
      mean: divide by the answer's number of tokens (SimPO, Tulu 3's normalised DPO).
      divergence, alpha: what it is put through (`losses.preferences.divergence_score`).
      excess: weight of the tokens behind the length of the pair's shorter answer (LD-DPO, arXiv:2409.06411).
      weighted: weigh each pair by how likely the policy is to say it (WPO, arXiv:2406.11827).
    """

    reference: str | None = "reference"
    mean: bool = False
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    excess: float = 1.0
    weighted: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        return () if self.reference is None else (self.reference,)


TO_REFERENCE = LogRatio()


class Answers(NamedTuple):
    """One number for each answer of each pair.

    Attributes:
      chosen, rejected: [B, P].
    """

    chosen: jax.Array
    rejected: jax.Array


def sequence_sums(values_BT: jax.Array, batch: PairBatch) -> jax.Array:
    """Sums over the tokens of each sequence, [B, P, K]."""
    sums = jnp.einsum("bts,bt->bs", _inside(batch).astype(jnp.float32), values_BT, precision="highest")
    return sums.reshape(*batch.pairs.shape, batch.answers)


def last_tokens(values_BT: jax.Array, batch: PairBatch) -> tuple[jax.Array, jax.Array]:
    """The value at the last token of each sequence [B, P, K], and whether there is such a sequence, float32."""
    inside = _inside(batch)
    at = jnp.max(jnp.where(inside, jnp.arange(values_BT.shape[1])[:, None], 0), axis=1)
    shape = (*batch.pairs.shape, batch.answers)
    there = jnp.any(inside, axis=1).astype(jnp.float32)
    return jnp.take_along_axis(values_BT, at, axis=1).reshape(shape), there.reshape(shape)


def _inside(batch: PairBatch) -> jax.Array:
    """bool [B, T, P K], which sequence each token is of."""
    return batch.segments[:, :, None] == jnp.arange(1, batch.answers * batch.pairs.shape[1] + 1)


def per_answer(values_BT: jax.Array, batch: PairBatch) -> Answers:
    """Sums over the tokens of each answer of a pair."""
    sums = sequence_sums(values_BT, batch)
    return Answers(sums[..., 0], sums[..., 1])


def over_pairs(values_BP: jax.Array, weights_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's weighted mean over its pairs [B] and the sum of their weights [B]: what a term returns."""
    weight_B = jnp.sum(weights_BP, axis=1)
    total_B = jnp.sum(jnp.where(weights_BP != 0, values_BP, 0.0) * weights_BP, axis=1)
    return total_B / jnp.where(weight_B == 0, 1.0, weight_B), weight_B


class Ratios(NamedTuple):
    """Attributes:
    policy, reference: summed log-probabilities.
    score: log-ratios as a `LogRatio` says.
    lengths: numbers of tokens.
    """

    policy: Answers
    reference: Answers
    score: Answers
    lengths: Answers


def log_ratios(outputs: Outputs, batch: PairBatch, reference: Outputs | None, how: LogRatio) -> Ratios:
    """The log-probabilities of the answers under policy and reference, and their log-ratios.

    Raises:
      UserError: the batch has no pairs.
    """
    if not isinstance(batch, PairBatch):
        raise UserError("terms over preferences need pairs; make their batches with lmjax.data.pair_batch.")
    if batch.answers != 2:
        raise UserError(f"terms over pairs take two answers, this batch has {batch.answers}; use plackett_luce.")
    mask = batch.mask.astype(jnp.float32)
    lengths = per_answer(mask, batch)
    if how.excess != 1.0:
        mask = mask * jnp.where(_beyond_shorter(batch, lengths), how.excess, 1.0)
    other = jnp.zeros_like(outputs.logprobs) if reference is None else reference.logprobs
    policy, base = (per_answer(jnp.where(mask != 0, x, 0.0) * mask, batch) for x in (outputs.logprobs, other))

    def score(pi: jax.Array, ref: jax.Array, length: jax.Array) -> jax.Array:
        found = preferences.divergence_score(pi - ref, how.divergence, how.alpha)
        return found / jnp.maximum(length, 1.0) if how.mean else found

    return Ratios(policy, base, Answers(*map(score, policy, base, lengths)), lengths)


def _beyond_shorter(batch: PairBatch, lengths: Answers) -> jax.Array:
    """bool [B, T], whether a token stands behind as many of its answer as the pair's shorter answer has."""
    own = jnp.stack(lengths, axis=-1).reshape(lengths.chosen.shape[0], -1)  # of each segment, in order
    shorter = jnp.repeat(jnp.minimum(*lengths), 2, axis=1)
    place = jnp.clip(batch.segments - 1, 0, own.shape[1] - 1)
    before = jnp.take_along_axis(jnp.cumsum(own, axis=1) - own, place, axis=1)
    rank = jnp.cumsum(batch.mask, axis=1) - before
    return rank > jnp.take_along_axis(shorter, place, axis=1)


def _pair_weight(outputs: Outputs, batch: PairBatch, how: LogRatio, lengths: Answers) -> jax.Array:
    """[B, P], without gradient; 1 unless `how.weighted`."""
    if not how.weighted:
        return jnp.ones_like(lengths.chosen)
    relative = jnp.where(batch.mask > 0, outputs.logprobs - jnp.log(outputs.sum_p2), 0.0) * batch.mask
    chosen, rejected = per_answer(relative, batch)
    mean = chosen / jnp.maximum(lengths.chosen, 1.0) + rejected / jnp.maximum(lengths.rejected, 1.0)
    return jax.lax.stop_gradient(jnp.exp(mean))


def _metrics(found: Ratios, batch: PairBatch, beta: float, reference: bool) -> dict[str, Any]:
    rewards = Answers(*(beta * (pi - ref) for pi, ref in zip(found.policy, found.reference, strict=True)))
    if not reference:
        rewards = Answers(*(beta * score for score in found.score))
    values = {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/margins": rewards.chosen - rewards.rejected,
        "rewards/accuracies": (rewards.chosen > rewards.rejected).astype(jnp.float32),
        "logps/chosen": found.policy.chosen,
        "logps/rejected": found.policy.rejected,
    }
    if reference:
        values |= {"logps/ref_chosen": found.reference.chosen, "logps/ref_rejected": found.reference.rejected}
    return {name: over_pairs(value, batch.pairs) for name, value in values.items()}


def over_all(values_BP: jax.Array, weights_BP: jax.Array) -> jax.Array:
    """The weighted mean over the batch, []."""
    total = jnp.sum(jnp.where(weights_BP != 0, values_BP, 0.0) * weights_BP)
    return total / jnp.maximum(jnp.sum(weights_BP), 1e-12)


def pair_term(
    name: str,
    loss: Callable[[Ratios, PairBatch], jax.Array],
    how: LogRatio,
    *,
    beta: float,
    reducer: Reducer = token_mean,
    couples_rows: bool = False,
) -> Objective:
    """A term from a loss of each pair.

    Args:
      name: of the term.
      loss: (log-ratios, batch) -> [B, P].
      how: how log-ratios are taken.
      beta: the strength, for the rewards that are reported.
      reducer: see `Term`; over rows, by the weights of their pairs.
      couples_rows: the loss is not a sum over pairs.
    """

    def function(outputs: Outputs, batch: PairBatch, *others: Outputs) -> Any:
        found = log_ratios(outputs, batch, others[0] if others else None, how)
        values = loss(found, batch) * _pair_weight(outputs, batch, how, found.lengths)
        metrics = _metrics(jax.lax.stop_gradient(found), batch, beta, how.reference is not None)
        if couples_rows:
            count = jnp.sum(batch.pairs > 0)
            return jnp.sum(values) / jnp.maximum(count, 1), (count > 0).astype(jnp.float32), metrics
        return *over_pairs(values, batch.pairs), metrics

    return Objective(((1.0, Term(name, function, reducer, how.roles, couples_rows=couples_rows)),))


class _Cached(NamedTuple):
    logprobs: jax.Array


def with_cached_reference(objective: Objective, role: str = "reference") -> Objective:
    """The objective with a role's log-probabilities read from the batch (`reference_logprobs`): it need not run.

    The terms must read nothing else of that role.
    """

    def cached(own: Term) -> Term:
        if role not in own.roles:
            return own

        def function(outputs: Outputs, batch: PairBatch, *others: Outputs) -> Any:
            if getattr(batch, "reference_logprobs", None) is None:
                raise UserError("the batch holds no reference log-probabilities; compute them first, or name a role.")
            rest = iter(others)
            given = [_Cached(batch.reference_logprobs) if name == role else next(rest) for name in own.roles]
            return own.function(outputs, batch, *given)

        return dataclasses.replace(own, function=function, roles=tuple(name for name in own.roles if name != role))

    return Objective(tuple((coefficient, cached(own)) for coefficient, own in objective.terms))
