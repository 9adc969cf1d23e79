"""Advantages of whole rollouts as data: scores less a baseline, by a scale. NumPy, on the host.

A score that is NaN is that of a rollout which nothing is learned from: its advantage is 0, and it is in no mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lmjax.errors import UserError

Baseline = Literal["none", "batch", "group", "leave_one_out", "optimal", "given"]
Scale = Literal["none", "batch", "group", "nonzero"]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What advantages are.

    Attributes:
      baseline: what is taken off a score: "none"; the mean of the "batch" or of the "group"; "leave_one_out": the mean
        of the others of its group (RLOO, arXiv:2402.14740); "optimal": the mean of its group weighed by length (OPO,
        arXiv:2505.23585); "given": a number for each rollout, such as the score of the likeliest answer (ReMax,
        arXiv:2310.10505) or a running mean.
      scale: what the difference is divided by: the standard deviation of the scores of the "group" or of the "batch",
        plus eps; "nonzero": the share of scores that are not 0 (GPG, arXiv:2504.02546).
      eps: see scale.
      ddof: 1 for the unbiased standard deviation, 0 for the other.
      alone: what a group of one means where groups are compared: "error"; or "score": its score is its advantage, as
        verl has it.
    """

    baseline: Baseline = "group"
    scale: Scale = "group"
    eps: float = 1e-4
    ddof: int = 1
    alone: Literal["error", "score"] = "error"

    def __post_init__(self) -> None:
        for name, known in (
            ("baseline", ("none", "batch", "group", "leave_one_out", "optimal", "given")),
            ("scale", ("none", "batch", "group", "nonzero")),
            ("alone", ("error", "score")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose among {', '.join(known)}.")
        if self.eps < 0 or self.ddof not in (0, 1):
            raise UserError(f"eps is {self.eps} and ddof {self.ddof}; give 0 or more, and 0 or 1.")


ESTIMATORS: dict[str, Estimator] = {
    "trl_grpo": Estimator("group", "group", 1e-4, 1),
    "trl_grpo_batch": Estimator("group", "batch", 1e-4, 1),
    "trl_rloo": Estimator("leave_one_out", "none"),
    "dr_grpo": Estimator("group", "none"),
    "verl_grpo": Estimator("group", "group", 1e-6, 1, "score"),
    "verl_rloo": Estimator("leave_one_out", "none", alone="score"),
    "verl_remax": Estimator("given", "none"),
    "verl_opo": Estimator("optimal", "none", alone="score"),
    "verl_gpg": Estimator("group", "nonzero", 0.0, alone="score"),
    "openrlhf_group_norm": Estimator("group", "group", 1e-9, 1),
    "openrlhf_reinforce_baseline": Estimator("group", "none"),
    "tunix_grpo": Estimator("group", "group", 1e-6, 1),
    "reinforce": Estimator("none", "none"),
    "reinforce_batch": Estimator("batch", "none"),
    "reinforce_given": Estimator("given", "none"),
}
"""Known choices by name: TRL 1.16, verl 0.9, OpenRLHF 0.11, tunix 0.1.7."""


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
      UserError: a group of one where groups are compared, or something is missing that the estimator reads.

    >>> advantages([1.0, 0.0, 2.0, 0.0], [0, 0, 1, 1], ESTIMATORS["trl_rloo"]).tolist()
    [1.0, -1.0, 2.0, -2.0]
    """
    scores_N = np.asarray(scores, np.float64)
    groups_N = np.asarray(groups)
    there = np.isfinite(scores_N)
    found = np.zeros(len(scores_N))
    if not there.any():
        return found
    kept, number = scores_N[there], np.unique(groups_N[there], return_inverse=True)[1]
    count = np.bincount(number)
    compares = "group" in (estimator.baseline, estimator.scale) or estimator.baseline in ("leave_one_out", "optimal")
    _, sizes = np.unique(groups_N, return_counts=True)
    if compares and sizes.min() == 1 and estimator.alone == "error":
        raise UserError(
            "a prompt has a single rollout, which cannot be compared with others of its group; sample more of each, or "
            "choose another baseline and scale."
        )
    mean = np.bincount(number, kept) / count
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
        baseline = (np.bincount(number, weight * kept) / np.bincount(number, weight))[number]
    else:
        baseline = _needed("given", given, len(scores_N))[there]
    difference = kept - baseline
    if estimator.scale == "batch":
        difference = difference / (_std(kept, estimator.ddof) + estimator.eps)
    elif estimator.scale == "group":
        squares = np.bincount(number, np.square(kept - mean[number]))
        spread = np.sqrt(squares / np.maximum(count - estimator.ddof, 1))[number]
        difference = difference / np.where(count[number] == 1, 1.0, spread + estimator.eps)
    elif estimator.scale == "nonzero":
        difference = difference * len(kept) / max(int(np.count_nonzero(kept)), 1)
    if compares:  # where the rest of a group was left out, there is nothing to compare with
        difference = np.where(count[number] == 1, kept if estimator.alone == "score" else 0.0, difference)
    found[there] = difference
    return found


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
    """
    estimator = Estimator("group", "group", eps, 1)
    parts = [weight * advantages(own, groups, estimator) for own, weight in zip(np.asarray(values, float), weights)]
    total = np.sum(parts, axis=0)
    there = np.isfinite(np.asarray(values, float)).any(axis=0)
    kept = total[there]
    found = np.zeros(len(total))
    found[there] = (kept - kept.mean()) / (_std(kept, 1) + batch_eps)
    return found


def best_advantages(scores: Any, groups: Any, *, eps: float = 1e-6, scaled: bool = True) -> np.ndarray:
    """pass@k as verl has it (arXiv:2503.19595): only the best of a group learns, from its lead over the second.

    Args:
      scores: [N], no NaN in it.
      groups: int [N], at least two of each.
      eps, scaled: divided by the group's standard deviation plus eps, or not.
    """
    scores_N, groups_N = np.asarray(scores, np.float64), np.asarray(groups)
    found = np.zeros(len(scores_N))
    for group in np.unique(groups_N):
        index = np.flatnonzero(groups_N == group)
        if len(index) < 2:
            raise UserError("pass@k compares the best of a group with the second; sample at least 2 of each prompt.")
        own = scores_N[index]
        first, second = np.argsort(-own, kind="stable")[:2]
        found[index[first]] = (own[first] - own[second]) / (own.std(ddof=1) + eps if scaled else 1.0)
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
    """
    groups_N = np.asarray(groups)
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
