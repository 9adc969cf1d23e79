"""Rewards and returns of single tokens: where scores are placed, KL as a cost, reward-to-go, GAE, whitening.

Arrays are float64 [N, L], one row a rollout, with a mask of the tokens that the policy said. What an environment said
is passed through: it takes no action, so nothing is discounted for it, and it is given 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lmjax.errors import UserError

Position = Literal["last", "after_eos"]
Estimator = Literal["k1", "abs", "k2", "k3"]


def padded(rows: Sequence[Any], length: int | None = None, fill: float = 0.0) -> np.ndarray:
    """Rows of different lengths as one array.

    >>> padded([[1, 2], [3]]).tolist()
    [[1.0, 2.0], [3.0, 0.0]]
    """
    longest = max((len(row) for row in rows), default=0) if length is None else length
    found = np.full((len(rows), longest), fill, np.float64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


def place_scores(scores: Any, lengths: Any, width: int, position: Position = "last") -> np.ndarray:
    """Each rollout's score at its last token; or one behind it where there is room (the N+ implementation of PPO).

    A rollout without tokens has no place for one.

    Raises:
      UserError: an unknown position, or a rollout longer than the width.

    >>> place_scores([5.0, 7.0], [2, 3], 3, "after_eos").tolist()
    [[0.0, 0.0, 5.0], [0.0, 0.0, 7.0]]
    """
    if position not in ("last", "after_eos"):
        raise UserError(f"scores are not placed at {position!r}; there are last and after_eos.")
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > width:
        raise UserError(f"a rollout of {lengths.max()} tokens does not fit into {width}; widen the rows.")
    found = np.zeros((len(lengths), width))
    at = np.minimum(lengths, width - 1) if position == "after_eos" else lengths - 1
    some = np.flatnonzero(lengths > 0)
    found[some, at[some]] = np.asarray(scores, np.float64)[some]
    return found


def kl_costs(
    logprobs: Any,
    reference: Any,
    estimator: Estimator = "k1",
    held: float | None = None,
    largest: float | None = None,
) -> np.ndarray:
    """An estimate of KL(policy || reference) at each token; see `losses.kl_estimate`.

    Args:
      logprobs, reference: of the tokens that the policy said, of one shape.
      estimator: with d = logprobs - reference: "k1" d, "abs" |d|, "k2" d^2/2, "k3" exp(-d) - 1 + d.
      held: d is held within +-held (verl's k3: 20).
      largest: estimates are held within +-largest (verl's k3, and all of OpenRLHF's: 10).

    Raises:
      UserError: an unknown estimator, or shapes that differ.

    >>> kl_costs([-1.0, -2.0], [-1.5, -1.0], "k2").tolist()
    [0.125, 0.5]
    """
    own, other = np.asarray(logprobs, np.float64), np.asarray(reference, np.float64)
    if own.shape != other.shape:
        raise UserError(f"log-probabilities have the shapes {own.shape} and {other.shape}; give one of each a token.")
    difference = own - other if held is None else np.clip(own - other, -held, held)
    if estimator == "k1":
        found = difference
    elif estimator == "abs":
        found = np.abs(difference)
    elif estimator == "k2":
        found = np.square(difference) / 2
    elif estimator == "k3":
        found = np.expm1(-difference) + difference
    else:
        raise UserError(f"no KL estimator is called {estimator!r}; there are k1, abs, k2 and k3.")
    return found if largest is None else np.clip(found, -largest, largest)


def rewards_to_go(rewards: Any, mask: Any, gamma: float = 1.0) -> np.ndarray:
    """The discounted sum of the rewards from each token on; those at masked tokens do not count.

    Args:
      rewards, mask: [N, L].
      gamma: discount of a token, 0 to 1.

    Raises:
      UserError: gamma is out of range, or the shapes differ.

    >>> rewards_to_go([[0.0, 0.0, 1.0]], [[1, 0, 1]], 0.5).tolist()
    [[0.5, 0.0, 1.0]]
    """
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma is {gamma}; give a number from 0 to 1.")
    rewards, mask = _alike(rewards=rewards, mask=mask)
    found, running = np.zeros(rewards.shape), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        here = rewards[:, t] + gamma * running
        running = mask[:, t] * here + (1 - mask[:, t]) * running
        found[:, t] = mask[:, t] * here
    return found


def gae(rewards: Any, values: Any, mask: Any, gamma: float = 1.0, lam: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (Schulman et al., arXiv:1506.02438): advantages and returns.

    Value and sum are carried over masked tokens, as verl does; the value behind the last token is 0.

    Args:
      rewards, values, mask: [N, L].
      gamma: discount of a token.
      lam: 1 for rewards-to-go less values, 0 for one step.

    Returns:
      `A_t = sum_l (gamma lam)^l delta_{t+l}`, with `delta_t = r_t + gamma V_{t+1} - V_t`, and `A_t + V_t`; both 0 where
      masked.

    Raises:
      UserError: gamma or lam is out of range, or the shapes differ.

    >>> gae([[0.0, 1.0]], [[0.5, 0.5]], [[1, 1]], 1.0, 1.0)[0].tolist()
    [[0.5, 0.5]]
    """
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise UserError(f"gamma is {gamma} and lambda {lam}; give numbers from 0 to 1.")
    rewards, values, mask = _alike(rewards=rewards, values=values, mask=mask)
    found = np.zeros(rewards.shape)
    following, running = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        here = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        following = np.where(mask[:, t] > 0, values[:, t], following)
        running = np.where(mask[:, t] > 0, here, running)
        found[:, t] = running
    return found * mask, (found + values) * mask


def whiten(
    values: Any, mask: Any, *, keep_mean: bool = False, ddof: int = 1, eps: float = 1e-8, least: float = 0.0
) -> np.ndarray:
    """Values less their mean, by the root of their variance plus eps, over what the mask keeps; 0 elsewhere.

    Args:
      values, mask: [N, L].
      keep_mean: add the mean again, as PPO whitens rewards.
      ddof: 1 for the unbiased variance (TRL, verl), 0 for the other (lm-human-preferences, OpenRLHF).
      eps: added to the variance.
      least: the variance is at least this (OpenRLHF: 1e-8, with eps 0).

    Raises:
      UserError: the shapes differ.

    >>> whiten([[1.0, 3.0, 9.0]], [[1, 1, 0]], ddof=0).round(6).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    values, mask = _alike(values=values, mask=mask)
    count = mask.sum()
    if not count:
        return np.zeros(values.shape)
    mean = (values * mask).sum() / count
    variance = max((np.square(values - mean) * mask).sum() / max(count - ddof, 1), least)
    if variance + eps == 0:  # all are equal
        return mask * (mean if keep_mean else 0.0)
    return ((values - mean) / np.sqrt(variance + eps) + (mean if keep_mean else 0.0)) * mask


def _alike(**arrays: Any) -> list[np.ndarray]:
    found = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    if len({array.shape for array in found.values()}) > 1 or next(iter(found.values())).ndim != 2:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in found.items())
        raise UserError(f"{shapes}: give arrays of one shape, [rollouts, tokens].")
    return list(found.values())
