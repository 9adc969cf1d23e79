"""Credit: from the scores of rollouts to the advantages of their tokens, and what values should have been."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lmjax.rl import returns
from lmjax.rl.advantages import Estimator, advantages, decoupled_advantages, process_advantages
from lmjax.rl.controllers import AdaptiveEntropy, AdaptiveKL, RunningMean
from lmjax.rl.experience import Credit, Read, Reading
from lmjax.rl.rewards import Scores
from lmjax.rl.rollouts import Rollout

OWN_VALUES = Reading("values")
GiveCredit = Callable[[list[Rollout], Scores, Read], Credit]


@dataclasses.dataclass(frozen=True)
class KLReward:
    """A cost for going away from a reference, in the reward.

    Attributes:
      reference: how the reference's log-probabilities are read.
      coefficient: a number, or a controller that follows the KL.
      estimator: "k1", "abs", "k2" or "k3".
    """

    reference: Reading
    coefficient: float | AdaptiveKL = 0.05
    estimator: returns.Estimator = "k1"

    @property
    def now(self) -> float:
        """The coefficient as it is."""
        return self.coefficient.coefficient if isinstance(self.coefficient, AdaptiveKL) else self.coefficient


def outcome_credit(
    estimator: Estimator | Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    kl: KLReward | None = None,
    largest: float | None = None,
    learn_truncated: bool = True,
    decoupled: bool = False,
    gamma: float | None = None,
    whitened: bool | Mapping[str, Any] = False,
    running: RunningMean | None = None,
    entropy: AdaptiveEntropy | None = None,
) -> GiveCredit:
    """An advantage of each rollout for its tokens: REINFORCE, RLOO, GRPO and relatives.

    Args:
      estimator: of the advantages; the baseline "given" is the running mean, or without one the score of the likeliest
        answer (`with_likeliest`); a rollout whose likeliest answer could not be judged is left out. Or a function of
        scores and groups, such as `pass_at_k_advantages` with its k.
      kl: a cost in the reward, summed over the rollout, before the baseline (TRL's RLOO); with gamma each token's own.
      largest: scores are held within +-largest.
      learn_truncated: False leaves rollouts out that came to the limit of their length.
      decoupled: each reward is standardised for itself (`decoupled_advantages`).
      gamma: discount of a token. Its advantage is the sum of the rewards from it on: what the estimator gives, at the
        rollout's last token, less each token's KL (REINFORCE++, arXiv:2501.03262, of verl and OpenRLHF). None: all
        tokens have what the estimator gives.
      whitened: advantages are whitened over all tokens of the batch (REINFORCE++); or options of `returns.whiten` that
        this is done with (`WHITENED`).
      running: a running mean, for the baseline "given".
      entropy: sets the coefficient "entropy" of the batch, for `objectives.by_coefficient`.
    """

    def credit(rollouts: list[Rollout], scores: Scores, read: Read) -> Credit:
        total, metrics, fields = scores.total, scores.metrics(), {}
        costs: list[Any] = [[] for _ in rollouts]
        groups = np.array([rollout.group for rollout in rollouts])
        out = np.isnan(total) | np.array([not (learn_truncated or rollout.ended) for rollout in rollouts])
        given = scores.given if running is None else np.full(len(total), running.mean)
        if largest is not None:
            total = np.clip(total, -largest, largest)
            given = None if given is None else np.clip(given, -largest, largest)
        if isinstance(estimator, Estimator) and estimator.baseline == "given" and given is not None:
            out |= np.isnan(given)
            if (known := given[np.isfinite(given)]).size:
                metrics["baseline/mean"] = float(known.mean())
        if kl is not None:
            costs, fields["reference_logprobs"] = _kl_of(rollouts, kl, read, metrics)
            costs = [kl.now * cost for cost in costs]
            if gamma is None:
                total = total - np.array([cost.sum() for cost in costs])
            _follow(kl, metrics, len(rollouts))
        total = np.where(out, np.nan, total)
        lengths = np.array([rollout.own.sum() for rollout in rollouts], float)
        if decoupled:
            found = decoupled_advantages(np.where(out, np.nan, scores.values), scores.weights, groups)
        elif isinstance(estimator, Estimator):
            found = advantages(total, groups, estimator, lengths=lengths, given=given)
        else:
            found = estimator(total, groups)
        if running is not None and np.isfinite(total).any():
            running.update(float(np.nanmean(total)))
        tokens: list[Any] = [float(advantage) for advantage in found]
        if gamma is not None or whitened is not False:
            own = returns.padded([rollout.own * (not o) for rollout, o in zip(rollouts, out)])
            gains = own * found[:, None]
            if gamma is not None:
                rewards = returns.place_scores(found, [len(rollout.own) for rollout in rollouts], own.shape[1])
                gains = returns.rewards_to_go(rewards - returns.padded(costs, own.shape[1]), own, gamma)
            if whitened is not False:
                gains = returns.whiten(gains, own, **({} if whitened is True else whitened))
            tokens = [row[: len(rollout.own)] for row, rollout in zip(gains, rollouts)]
        metrics |= _about_groups(scores.total, groups, found, out)
        coefficients = {}
        if entropy is not None:
            coefficients["entropy"] = metrics["entropy_coef"] = entropy.coefficient
            entropy.update(_sampled_entropy(rollouts))
        return Credit(tokens, out.tolist(), fields, metrics, coefficients)

    return credit


def process_credit(*, eps: float = 1e-6, learn_truncated: bool = True) -> GiveCredit:
    """An advantage for each step of a rollout (`process_advantages`), from rewards of steps."""

    def credit(rollouts: list[Rollout], scores: Scores, read: Read) -> Credit:
        groups = np.array([rollout.group for rollout in rollouts])
        out = np.array([not (learn_truncated or rollout.ended) for rollout in rollouts]) | np.isnan(scores.total)
        steps = [() if o else own for own, o in zip(scores.steps, out)]
        found = process_advantages(steps, groups, [len(rollout.tokens) for rollout in rollouts], eps=eps)
        means = np.array([own.mean() if len(own) else 0.0 for own in found])
        metrics = scores.metrics() | _about_groups(scores.total, groups, means, out)
        return Credit(found, out.tolist(), {}, metrics)

    return credit


def critic_credit(
    values: Reading = OWN_VALUES,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl: KLReward | None = None,
    position: returns.Position = "last",
    largest: float | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    learn_truncated: bool = True,
) -> GiveCredit:
    """Advantages of tokens by GAE from a critic's values, and returns for it to learn: PPO.

    Args:
      values: how the critic is read: a second head of the policy, or another model.
      gamma, lam: see `returns.gae`.
      kl: a cost of each token in the reward.
      position: where a rollout's score is placed: at its last token, or one behind ("after_eos": N+; rows need
        `Plan.last_token`). Rewards of steps go where the steps end.
      largest: scores are held within +-largest.
      whiten_rewards, whiten_advantages: over all tokens of the batch; rewards keep their mean.
      learn_truncated: False leaves rollouts out that came to the limit of their length.
    """
    extra = int(position == "after_eos")

    def credit(rollouts: list[Rollout], scores: Scores, read: Read) -> Credit:
        metrics = scores.metrics()
        out = np.isnan(scores.total) | np.array([not (learn_truncated or rollout.ended) for rollout in rollouts])
        lengths = np.array([len(rollout.tokens) for rollout in rollouts])
        width = int(lengths.max()) + extra
        own = returns.padded([rollout.own for rollout in rollouts], width)
        slots = own.copy()  # where there is a value
        if extra:
            slots[np.arange(len(lengths)), np.minimum(lengths, width - 1)] = 1
        kept = own * ~out[:, None]
        total = np.nan_to_num(scores.total)
        if largest is not None:
            total = np.clip(total, -largest, largest)
        rewards = returns.place_scores(total, lengths, width, position)
        for i, steps in enumerate(scores.steps):
            if steps:
                rewards[i] = 0
                for end, number in steps:
                    rewards[i, end] += number
        fields: dict[str, Any] = {}
        if kl is not None:
            costs, fields["reference_logprobs"] = _kl_of(rollouts, kl, read, metrics)
            rewards = rewards - kl.now * returns.padded(costs, width)
            _follow(kl, metrics, len(rollouts))
        if whiten_rewards:
            rewards = returns.whiten(rewards, slots * ~out[:, None], keep_mean=True)
        expected = returns.padded([row[: n + extra] for row, n in zip(read(values), lengths)], width) * slots
        gains, wanted = returns.gae(rewards, expected, slots, gamma, lam)
        if whiten_advantages:
            gains = returns.whiten(gains, kept)
        rows = lambda array: [row[: n + extra] for row, n in zip(array, lengths)]
        fields |= {"values": rows(expected), "returns": rows(wanted), "value_mask": rows(slots * ~out[:, None])}
        if kept.any():
            error, there = wanted - expected, kept > 0
            spread = wanted[there].var()
            metrics["val/explained_variance"] = float(1 - error[there].var() / spread) if spread > 0 else 0.0
            metrics |= {"val/mean": float(expected[there].mean()), "val/return": float(wanted[there].mean())}
        groups = np.array([rollout.group for rollout in rollouts])
        metrics |= _about_groups(scores.total, groups, gains.sum(1), out)
        return Credit([row[:n] for row, n in zip(gains, lengths)], out.tolist(), fields, metrics)

    return credit


def _kl_of(rollouts: list[Rollout], kl: KLReward, read: Read, metrics: dict[str, float]) -> tuple[list[Any], list[Any]]:
    """The KL of each token, and the reference's log-probabilities."""
    reference = [row[: len(r.tokens)] for row, r in zip(read(kl.reference), rollouts)]
    estimates = [
        returns.kl_costs(r.logprobs, other, kl.estimator) * r.own for r, other in zip(rollouts, reference)
    ]
    exact = [((r.logprobs - other) * r.own).sum() for r, other in zip(rollouts, reference)]
    metrics["objective/kl"] = float(np.mean(exact))
    metrics["objective/kl_coefficient"] = kl.now
    metrics["objective/non_score_reward"] = -kl.now * float(np.mean([own.sum() for own in estimates]))
    return estimates, reference


def _follow(kl: KLReward, metrics: dict[str, float], rollouts: int) -> None:
    if isinstance(kl.coefficient, AdaptiveKL):
        kl.coefficient.update(metrics["objective/kl"], rollouts)


def _sampled_entropy(rollouts: list[Rollout]) -> float:
    """The mean of -log pi over the policy's own tokens, whose expectation is the entropy."""
    own = np.concatenate([rollout.logprobs[rollout.own] for rollout in rollouts])
    return float(-own.mean()) if len(own) else 0.0


def _about_groups(total: np.ndarray, groups: np.ndarray, found: np.ndarray, out: np.ndarray) -> dict[str, float]:
    same = []
    for group in np.unique(groups):
        own = total[groups == group]
        own = own[np.isfinite(own)]
        same.append(len(own) < 2 or np.ptp(own) == 0)
    return {
        "frac_reward_zero_std": float(np.mean(same)),
        "advantage/mean_abs": float(np.abs(found).mean()),
        "rollouts/left_out": float(np.mean(out)),
    }
