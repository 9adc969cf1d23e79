"""Advantages of whole rollouts as data: scores less a baseline, by a scale. NumPy, on the host.

A score that is NaN is that of a rollout which nothing is learned from: its advantage is 0, and it is in no mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lmjax.errors import UserError

Baseline = Literal["none", "batch", "group", "leave_one_out", "optimal", "second", "given"]
Scale = Literal["none", "batch", "group", "whiten", "nonzero"]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What advantages are.

    Attributes:
      baseline: what is taken off a score: "none"; the mean of the "batch" or of the "group"; "leave_one_out": the mean
        of the others of its group (RLOO, arXiv:2402.14740); "optimal": the mean of its group weighed by length (OPO,
        arXiv:2505.23585); "second": for the best of its group the second best, for others their own, so that only the
        best learns, from its lead (pass@k as verl has it, arXiv:2503.19595); "given": a number for each rollout, such
        as the score of the likeliest answer (ReMax, arXiv:2310.10505) or a running mean.
      scale: what the difference is divided by: the standard deviation of the scores of the "group" or of the "batch",
        plus eps; "whiten": less the mean of all differences, by their standard deviation plus eps; "nonzero": the share
        of scores that are not 0 (GPG, arXiv:2504.02546).
      eps: see scale.
      ddof: 1 for the unbiased standard deviation, 0 for the other.
      alone: what a group of one means where groups are compared: "error"; or "score": its mean counts as 0 and its
        standard deviation as 1, as verl has it.
    """

    baseline: Baseline = "group"
    scale: Scale = "group"
    eps: float = 1e-4
    ddof: int = 1
    alone: Literal["error", "score"] = "error"

    def __post_init__(self) -> None:
        for name, known in (
            ("baseline", ("none", "batch", "group", "leave_one_out", "optimal", "second", "given")),
            ("scale", ("none", "batch", "group", "whiten", "nonzero")),
            ("alone", ("error", "score")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose among {', '.join(known)}.")
        if self.eps < 0 or self.ddof not in (0, 1):
            raise UserError(f"eps is {self.eps} and ddof {self.ddof}; give 0 or more, and 0 or 1.")


ESTIMATORS: dict[str, Estimator] = {
    # TRL 1.16: GRPOTrainer with scale_rewards "group", "batch" and "none"; RLOOTrainer, with normalize_advantages too.
    "trl_grpo": Estimator("group", "group", 1e-4, 1),
    "trl_grpo_batch": Estimator("group", "batch", 1e-4, 1),
    "trl_rloo": Estimator("leave_one_out", "none"),
    "trl_rloo_normalized": Estimator("leave_one_out", "whiten", 1e-4, 1),
    # Liu et al., arXiv:2503.20783: neither the group's deviation nor the length divides.
    "dr_grpo": Estimator("group", "none"),
    # verl 0.9, verl/trainer/ppo/core_algos.py.
    "verl_grpo": Estimator("group", "group", 1e-6, 1, "score"),
    "verl_dr_grpo": Estimator("group", "none", alone="score"),
    "verl_rloo": Estimator("leave_one_out", "none", alone="score"),
    "verl_remax": Estimator("given", "none"),
    "verl_opo": Estimator("optimal", "none", alone="score"),
    "verl_gpg": Estimator("group", "nonzero", 0.0, alone="score"),
    "verl_grpo_passk": Estimator("second", "group", 1e-6, 1),
    "verl_reinforce_plus_plus": Estimator("none", "none"),
    "verl_reinforce_plus_plus_baseline": Estimator("group", "none", alone="score"),
    # OpenRLHF 0.11.2, openrlhf/trainer/ppo_utils/experience_maker.py.
    "openrlhf_reinforce": Estimator("none", "none"),
    "openrlhf_reinforce_baseline": Estimator("group", "none"),
    "openrlhf_dr_grpo": Estimator("group", "none"),
    "openrlhf_rloo": Estimator("leave_one_out", "none"),
    "openrlhf_flash_reinforce": Estimator("batch", "none"),
    "openrlhf_group_norm": Estimator("group", "group", 1e-9, 1),
    # tunix 0.1.7.
    "tunix_grpo": Estimator("group", "group", 1e-6, 1),
    # Williams 1992, without a baseline, with the batch's mean, and with one that is given.
    "reinforce": Estimator("none", "none"),
    "reinforce_batch": Estimator("batch", "none"),
    "reinforce_given": Estimator("given", "none"),
}
"""Known choices by name."""

_BIASED = {"ddof": 0, "eps": 0.0, "least": 1e-8}
WHITENED: dict[str, dict[str, Any]] = {
    "verl_reinforce_plus_plus": {},
    "verl_reinforce_plus_plus_baseline": {},
    "openrlhf_reinforce": _BIASED,
    "openrlhf_reinforce_baseline": _BIASED,
}
"""Those of them that their libraries whiten over the tokens of the batch afterwards, and the options of
`returns.whiten` that they do it with."""


def advantages(
    scores: Any,
    groups: Any,
    estimator: Estimator,
    *,
    lengths: Any = None,
    given: Any = None,
) -> np.ndarray:
    """How much better than expected each rollout is, float64 [N].

    Args:
      scores: [N]; NaN for rollouts that are left out.
      groups: int [N], the number of each one's prompt.
      estimator: how.
      lengths: [N], tokens of each, for the baseline "optimal".
      given: [N], for the baseline "given".

    Raises:
      UserError: a group of one where groups are compared, something is missing that the estimator reads, or the arrays
        are not of one length.

    >>> advantages([1.0, 0.0, 2.0, 0.0], [0, 0, 1, 1], ESTIMATORS["trl_rloo"]).tolist()
    [1.0, -1.0, 2.0, -2.0]
    """
    scores_N, groups_N = _scored(scores, groups)
    there = np.isfinite(scores_N)
    found = np.zeros(len(scores_N))
    if not there.any():
        return found
    kept, number = scores_N[there], np.unique(groups_N[there], return_inverse=True)[1]
    count = np.bincount(number)
    compared = ("group", "leave_one_out", "optimal", "second")
    compares = estimator.baseline in compared or estimator.scale == "group"
    _, sizes = np.unique(groups_N, return_counts=True)
    if compares and sizes.min() == 1 and estimator.alone == "error":
        raise UserError(
            "a prompt has a single rollout, which cannot be compared with others of its group; sample more of each, or "
            "choose another baseline and scale."
        )
    single = count[number] == 1
    mean = np.bincount(number, kept) / count
    if estimator.alone == "score":
        mean = np.where(count == 1, 0.0, mean)
    if estimator.baseline == "none":
        baseline = np.zeros(len(kept))
    elif estimator.baseline == "batch":
        baseline = np.full(len(kept), kept.mean())
    elif estimator.baseline == "group":
        baseline = mean[number]
    elif estimator.baseline == "leave_one_out":
        baseline = (np.bincount(number, kept)[number] - kept) / np.maximum(count[number] - 1, 1)
    elif estimator.baseline == "optimal":
        weight = _needed("lengths", lengths, len(scores_N))[there]
        weighed = np.bincount(number, weight * kept) / np.maximum(np.bincount(number, weight), 1e-12)
        baseline = np.where(single & (estimator.alone == "score"), 0.0, weighed[number])
    elif estimator.baseline == "second":
        baseline = kept.copy()
        for own in (np.flatnonzero(number == n) for n in np.flatnonzero(count > 1)):
            first, second = own[np.argsort(-kept[own], kind="stable")[:2]]
            baseline[first] = kept[second]
    else:
        baseline = _needed("given", given, len(scores_N))[there]
    difference = kept - baseline
    if estimator.scale == "batch":
        difference = difference / (_std(kept, estimator.ddof) + estimator.eps)
    elif estimator.scale == "group":
        squares = np.bincount(number, np.square(kept - mean[number]))
        spread = np.sqrt(squares / np.maximum(count - estimator.ddof, 1))[number]
        difference = difference / (np.where(single, 1.0, spread) + estimator.eps)
    elif estimator.scale == "nonzero":
        difference = difference * len(kept) / max(int(np.count_nonzero(kept)), 1)
    nothing = single & (compares and estimator.alone == "error")  # the rest of the group was left out
    if estimator.scale == "whiten" and not nothing.all():
        others = difference[~nothing]
        difference = (difference - others.mean()) / (_std(others, estimator.ddof) + estimator.eps)
    found[there] = np.where(nothing, 0.0, difference)
    return found


def _scored(scores: Any, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    scores_N, groups_N = np.asarray(scores, np.float64), np.asarray(groups)
    if scores_N.ndim != 1 or scores_N.shape != groups_N.shape:
        raise UserError(
            f"scores have the shape {scores_N.shape} and groups {groups_N.shape}; give one of each for every rollout."
        )
    return scores_N, groups_N


def _needed(name: str, values: Any, count: int) -> np.ndarray:
    if values is None or np.shape(values) != (count,):
        raise UserError(f"this estimator reads {name}: give one number for each of the {count} rollouts.")
    return np.asarray(values, np.float64)


def _std(values: np.ndarray, ddof: int) -> float:
    return float(values.std(ddof=ddof)) if len(values) > ddof else 0.0


def decoupled_advantages(
    values: Any, weights: Sequence[float], groups: Any, *, eps: float = 1e-4, batch_eps: float = 1e-4
) -> np.ndarray:
    """GDPO of NVIDIA (arXiv:2601.05242): each reward standardised in its group, summed, standardised in the batch.

    Args:
      values: [K, N], the rewards; NaN where one does not apply.
      weights: of the K rewards.
      groups: int [N].
      eps, batch_eps: added to the standard deviations.

    Raises:
      UserError: not as many weights as rewards, no reward, or a group of one.
    """
    values_KN = np.asarray(values, np.float64)
    if values_KN.ndim != 2 or not len(values_KN) or len(values_KN) != len(weights):
        raise UserError(f"rewards have the shape {values_KN.shape} and {len(weights)} weights; give one weight a row.")
    estimator = Estimator("group", "group", eps, 1)
    total = np.sum([weight * advantages(own, groups, estimator) for own, weight in zip(values_KN, weights)], axis=0)
    there = np.isfinite(values_KN).any(axis=0)
    if not there.any():
        return np.zeros(len(total))
    kept = total[there]
    found = np.zeros(len(total))
    found[there] = (kept - kept.mean()) / (_std(kept, 1) + batch_eps)
    return found


def pass_at_k_advantages(scores: Any, groups: Any, k: int) -> np.ndarray:
    """Advantages that make the best of k as good as can be (PKPO, Walder and Karkhanis, arXiv:2505.15201), float64 [N].

    `A_i = n / C(n, k) sum_I (max_I r - max_{I without i} r)` over the sets I of k rollouts of its group of n with i in
    them: what i adds to sets of which it is the best. The mean of `A_i grad log pi(i)` over the group is an unbiased
    estimate of the gradient of the expected maximum of k scores; with scores of 0 and 1, of pass@k.

    Args:
      scores: [N]; NaN for rollouts that are left out. A group with fewer than k others has advantages of 0.
      groups: int [N], at least k of each.
      k: 2 or more; for 1 take any other estimator.

    Raises:
      UserError: k is below 2, or a group is smaller than k.

    >>> pass_at_k_advantages([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], 2).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    if k < 2:
        raise UserError(f"k is {k}; the best of k needs 2 or more.")
    scores_N, groups_N = _scored(scores, groups)
    found = np.zeros(len(scores_N))
    for index in _large_groups(groups_N, k):
        index = index[np.isfinite(scores_N[index])]
        n = len(index)
        if n < k:
            continue
        index = index[np.argsort(scores_N[index], kind="stable")]
        own = scores_N[index]
        # Of the k - 1 others, all below i, m is the best: the remaining k - 2 are below m.
        ways = np.array([math.comb(m, k - 2) / math.comb(n, k) for m in range(n)])
        lead = np.tril(own[:, None] - own[None], -1)
        found[index] = n * (lead @ ways)
    return found


def _large_groups(groups: np.ndarray, least: int) -> list[np.ndarray]:
    found = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    if found and (smallest := min(map(len, found))) < least:
        raise UserError(f"the best of {least} is wanted and a prompt has {smallest} rollouts; sample at least {least}.")
    return found


def process_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], groups: Any, lengths: Sequence[int], *, eps: float = 1e-6
) -> list[np.ndarray]:
    """GRPO with process supervision (DeepSeekMath, arXiv:2402.03300, 4.1.3), float64, one number a token.

    Rewards of all steps of all rollouts of a group are standardised together; a token's advantage is the sum of those
    of the steps that end with it or later.

    Args:
      steps: of each rollout, (index of the last token, reward), in order.
      groups: int [N].
      lengths: tokens of each rollout.
      eps: added to the standard deviation.

    Raises:
      UserError: a step ends behind its rollout, or the arguments are not of one length.
    """
    groups_N = np.asarray(groups)
    if not len(steps) == len(groups_N) == len(lengths):
        raise UserError(f"{len(steps)} lists of steps, {len(groups_N)} groups, {len(lengths)} lengths; give as many.")
    for own, length in zip(steps, lengths):
        if any(not 0 <= end < length for end, _ in own):
            raise UserError(f"steps end at {[end for end, _ in own]} in a rollout of {length} tokens.")
    found = [np.zeros(length) for length in lengths]
    for group in np.unique(groups_N):
        index = np.flatnonzero(groups_N == group).tolist()
        rewards = np.array([reward for i in index for _, reward in steps[i]])
        if not len(rewards):
            continue
        mean, spread = rewards.mean(), _std(rewards, 1) + eps
        for i in index:
            for end, reward in steps[i]:
                found[i][: end + 1] += (reward - mean) / spread
    return found
