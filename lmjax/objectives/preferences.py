"""Terms over pairs of answers: DPO and its relatives, by the losses of `lmjax.losses.preferences`.

All take a `PairBatch`. A term's value is the mean over pairs by their weights, so batches may be packed and split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.batch import Batch, PairBatch
from lmjax.errors import UserError
from lmjax.losses import preferences
from lmjax.objectives.algebra import Objective, Term, term
from lmjax.objectives.pairs import TO_REFERENCE, LogRatio, Ratios, log_ratios, over_all, over_pairs, pair_term
from lmjax.objectives.reducers import Reducer, token_mean
from lmjax.objectives.terms import cross_entropy
from lmjax.policy import Outputs


def _of_gap(
    loss: Callable[..., jax.Array], name: str, ratio: LogRatio, beta: float, reducer: Reducer, **options: Any
) -> Objective:
    return pair_term(
        name,
        lambda found, batch: loss(found.score.chosen - found.score.rejected, beta, **options),
        ratio,
        beta=beta,
        reducer=reducer,
    )


def _of_both(
    loss: Callable[..., jax.Array], name: str, ratio: LogRatio, beta: float, reducer: Reducer, **options: Any
) -> Objective:
    return pair_term(
        name, lambda found, batch: loss(*found.score, beta, **options), ratio, beta=beta, reducer=reducer
    )


def _smoothing_below_half(smoothing: float, least: float = 0.0) -> None:
    if not least <= smoothing < 0.5 or (least and smoothing == 0):
        raise UserError(f"label_smoothing is {smoothing}; give a share of wrong labels below one half.")


def dpo(
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    ratio: LogRatio = TO_REFERENCE,
    reducer: Reducer = token_mean,
) -> Objective:
    """Direct preference optimization (`losses.preferences.logistic`), cDPO with label smoothing.

    Args:
      beta: strength of the tie to the reference.
      label_smoothing: share of pairs the wrong way round.
      ratio: how log-ratios are taken, for the variants: `LogRatio(mean=True)` is Tulu 3's dpo_norm and TRL's
        sigmoid_norm, `divergence=` f-DPO, `excess=` LD-DPO, `weighted=True` WPO, `reference=None` reference-free.
      reducer: see `Term`.
    """
    _smoothing_below_half(label_smoothing)
    return _of_gap(preferences.logistic, "dpo", ratio, beta, reducer, smoothing=label_smoothing)


def robust_dpo(
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.1,
    ratio: LogRatio = TO_REFERENCE,
    reducer: Reducer = token_mean,
) -> Objective:
    """DPO that is unbiased under a known share of wrong labels (`losses.preferences.robust`)."""
    _smoothing_below_half(label_smoothing)
    return _of_gap(preferences.robust, "robust_dpo", ratio, beta, reducer, smoothing=label_smoothing)


def hinge(beta: float = 0.1, *, ratio: LogRatio = TO_REFERENCE, reducer: Reducer = token_mean) -> Objective:
    """SLiC's hinge over log-ratios (`losses.preferences.hinge`)."""
    return _of_gap(preferences.hinge, "hinge", ratio, beta, reducer)


def ipo(beta: float = 0.1, *, ratio: LogRatio = TO_REFERENCE, reducer: Reducer = token_mean) -> Objective:
    """IPO (`losses.preferences.ipo`) over sums, as the paper and OpenRLHF; TRL's form is `LogRatio(mean=True)`."""
    return _of_gap(preferences.ipo, "ipo", ratio, beta, reducer)


def exo(
    beta: float = 0.1,
    *,
    label_smoothing: float = 1e-3,
    ratio: LogRatio = TO_REFERENCE,
    reducer: Reducer = token_mean,
) -> Objective:
    """EXO for pairs (`losses.preferences.exo`); the smoothing must be positive."""
    if not 0 < label_smoothing < 0.5:
        raise UserError(f"label_smoothing is {label_smoothing}; EXO needs a share between 0 and one half.")
    return _of_gap(preferences.exo, "exo", ratio, beta, reducer, smoothing=label_smoothing)


def discopop(
    beta: float = 0.1,
    *,
    temperature: float = 0.05,
    ratio: LogRatio = TO_REFERENCE,
    reducer: Reducer = token_mean,
) -> Objective:
    """The log-ratio modulated loss (`losses.preferences.discopop`)."""
    return _of_gap(preferences.discopop, "discopop", ratio, beta, reducer, temperature=temperature)


def nca(beta: float = 0.1, *, ratio: LogRatio = TO_REFERENCE, reducer: Reducer = token_mean) -> Objective:
    """NCA for pairs (`losses.preferences.nca`)."""
    return _of_both(preferences.nca, "nca", ratio, beta, reducer)


def bco(
    beta: float = 0.1, *, shift: float = 0.0, ratio: LogRatio = TO_REFERENCE, reducer: Reducer = token_mean
) -> Objective:
    """BCO for pairs (`losses.preferences.bco`)."""
    return _of_both(preferences.bco, "bco", ratio, beta, reducer, shift=shift)


def sppo(beta: float = 0.1, *, ratio: LogRatio = TO_REFERENCE, reducer: Reducer = token_mean) -> Objective:
    """SPPO with hard labels (`losses.preferences.sppo`)."""
    return _of_both(preferences.sppo, "sppo", ratio, beta, reducer)


def apo_zero(beta: float = 0.1, *, ratio: LogRatio = TO_REFERENCE, reducer: Reducer = token_mean) -> Objective:
    """APO for models worse than the chosen answers (`losses.preferences.apo_zero`)."""
    return _of_both(preferences.apo_zero, "apo_zero", ratio, beta, reducer)


def apo_down(beta: float = 0.1, *, ratio: LogRatio = TO_REFERENCE, reducer: Reducer = token_mean) -> Objective:
    """APO for models better than the chosen answers (`losses.preferences.apo_down`)."""
    return _of_both(preferences.apo_down, "apo_down", ratio, beta, reducer)


def aot(
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    unpaired: bool = False,
    ratio: LogRatio = TO_REFERENCE,
    reducer: Reducer = token_mean,
) -> Objective:
    """Optimal-transport alignment (`losses.preferences.aot`). Sorts over the batch, which must not be split."""
    _smoothing_below_half(label_smoothing)

    def loss(found: Ratios, batch: PairBatch) -> jax.Array:
        mask = (batch.pairs > 0).astype(jnp.float32)
        if unpaired:
            return preferences.aot(*found.score, mask, beta, label_smoothing)
        gap = lambda answers: answers.chosen - answers.rejected
        return preferences.aot(gap(found.policy), gap(found.reference), mask, beta, label_smoothing)

    name = "aot_unpaired" if unpaired else "aot"
    return pair_term(name, loss, ratio, beta=beta, reducer=reducer, couples_rows=True)


def simpo(beta: float = 2.0, *, gamma: float = 1.0, reducer: Reducer = token_mean) -> Objective:
    """SimPO (Meng et al., arXiv:2405.14734): `-log sigmoid(beta gap of means - gamma)`, no reference.

    The paper's gamma is 0.3 to 0.5 of beta; TRL's default (beta 0.1, gamma 0.5) is not its setting.
    """
    how = LogRatio(reference=None, mean=True)
    loss = lambda found, batch: preferences.logistic(found.score.chosen - found.score.rejected - gamma / beta, beta)
    return pair_term("simpo", loss, how, beta=beta, reducer=reducer)


def alphapo(
    beta: float = 2.0, *, gamma: float = 1.0, alpha: float = 0.25, reducer: Reducer = token_mean
) -> Objective:
    """AlphaPO (arXiv:2501.03884): SimPO with `losses.preferences.alpha_score` of the means."""

    def loss(found: Ratios, batch: PairBatch) -> jax.Array:
        chosen, rejected = (preferences.alpha_score(score, alpha) for score in found.score)
        return preferences.logistic(chosen - rejected - gamma / beta, beta)

    return pair_term("alphapo", loss, LogRatio(reference=None, mean=True), beta=beta, reducer=reducer)


def cpo(
    beta: float = 0.1, *, alpha: float = 1.0, label_smoothing: float = 0.0, reducer: Reducer = token_mean
) -> Objective:
    """CPO (Xu et al., arXiv:2401.08417): DPO without a reference, and `alpha` times the chosen answers' NLL."""
    preference = dpo(beta, label_smoothing=label_smoothing, ratio=LogRatio(reference=None), reducer=reducer)
    return preference.named("cpo") + alpha * chosen_nll(reducer=reducer)


def orpo(beta: float = 0.1, *, reducer: Reducer = token_mean) -> Objective:
    """ORPO (Hong et al., arXiv:2403.07691): NLL of prompt and chosen answer, and `beta` times the odds ratio's loss."""

    def loss(found: Ratios, batch: PairBatch) -> jax.Array:
        return preferences.logistic(preferences.log_odds_ratio(*found.score), 1.0)

    odds = pair_term("odds_ratio", loss, LogRatio(reference=None, mean=True), beta=beta, reducer=reducer)
    return chosen_nll(prompt=True, reducer=reducer) + beta * odds


def tpo(
    beta: float = 0.01,
    *,
    gamma: float = 0.5,
    alpha: float = 1.0,
    mean: bool = True,
    gold: str = "gold",
    reducer: Reducer = token_mean,
) -> Objective:
    """TPO (Saeidi et al., arXiv:2405.16681): a pair's loss without a reference, and `alpha` times a gold answer's NLL.

    Args:
      beta, gamma: of the pair, as in `simpo`; without `mean` sums are compared and there is no gamma (TPO; with means
        it is TPO-L).
      alpha: weight of the gold answers.
      mean: compare mean log-probabilities.
      gold: the stream of batches that holds the gold answers.
      reducer: see `Term`.
    """
    if mean:
        pair = simpo(beta, gamma=gamma, reducer=reducer)
    else:
        pair = dpo(beta, ratio=LogRatio(reference=None), reducer=reducer)
    return pair.named("tpo") + alpha * cross_entropy().on(gold)


@term
def chosen_nll(outputs: Outputs, batch: PairBatch, prompt: bool = False) -> Any:
    """Negative log-likelihood of the chosen answers, and of their prompts if asked, mean over their tokens."""
    if prompt and batch.scored is not None:
        raise UserError("prompts are to be learned, and these batches score answers only; set data.score_prompts.")
    chosen = (batch.segments % 2 == 1).astype(jnp.float32)
    return -outputs.logprobs, chosen * (_has_target(batch) if prompt else batch.mask)


@term
def unlikelihood(outputs: Outputs, batch: PairBatch) -> Any:
    """`-log(1 - p)` of the tokens of rejected answers (`losses.preferences.unlikelihood`), mean over them."""
    rejected = ((batch.segments > 0) & (batch.segments % 2 == 0)).astype(jnp.float32)
    return preferences.unlikelihood(outputs.logprobs), rejected * batch.mask


def _has_target(batch: Batch) -> jax.Array:
    """float32 [B, T], 1 where the next token of the same sequence follows, as it does everywhere in a shared prompt."""
    following = jnp.concatenate([batch.segments[:, 1:], jnp.zeros_like(batch.segments[:, :1])], axis=1)
    prompt = batch.segments != batch.sequences
    return ((batch.segments > 0) & (prompt | (batch.segments == following))).astype(jnp.float32)


def kto(
    beta: float = 0.1,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_point: bool = True,
    ratio: LogRatio = TO_REFERENCE,
    reducer: Reducer = token_mean,
) -> Objective:
    """KTO (`losses.preferences.kto`) on answers that are liked or not, `batch.desirable`.

    The reference point is the mean log-ratio of answers to other prompts, at least 0, over the whole batch, which
    must not be split. Without it, this is TRL's apo_zero_unpaired.
    """

    def function(outputs: Outputs, batch: PairBatch, *others: Outputs) -> Any:
        found = log_ratios(outputs, batch, others[0] if others else None, ratio)
        if batch.desirable is None:
            raise UserError("KTO needs answers marked as liked or not; give data whose records have a label.")
        answers, mismatched = found.score
        liked, there = batch.desirable, batch.pairs
        kl: jax.Array | float = 0.0
        if reference_point:
            kl = jnp.maximum(over_all(mismatched, there), 0.0)
        weights = jnp.where(liked > 0, desirable_weight, undesirable_weight)
        values = weights * preferences.kto(answers, liked, kl, beta)
        reward = beta * jax.lax.stop_gradient(answers)
        metrics = {
            "rewards/chosen": over_pairs(reward, there * liked),
            "rewards/rejected": over_pairs(reward, there * (1 - liked)),
            "logps/chosen": over_pairs(found.policy.chosen, there * liked),
            "logps/rejected": over_pairs(found.policy.chosen, there * (1 - liked)),
        }
        if reference_point:
            metrics["kl"] = (jax.lax.stop_gradient(jnp.asarray(kl)), jnp.ones(()))
        if not reference_point:
            return *over_pairs(values, there), metrics
        return over_all(values, there), (jnp.sum(there) > 0).astype(jnp.float32), metrics

    name = "kto" if reference_point else "apo_zero_unpaired"
    return Objective(((1.0, Term(name, function, reducer, ratio.roles, couples_rows=reference_point)),))
