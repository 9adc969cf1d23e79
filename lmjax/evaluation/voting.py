"""Several samples of one prompt, made one answer or one number: votes, best of n, pass@k and maj@k.

Self-consistency (Wang et al. 2022, arXiv 2203.11171) draws several chains of thought and takes the answer that most of
them end in. pass@k and maj@k say how that would go with k samples, from n >= k samples of each problem: they are
averages over every draw of k of the n without replacement, so they are unbiased, and less noisy than drawing once.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from lmjax.errors import UserError

TIES = ("first", "abstain")


def majority_vote(answers: Sequence[Hashable | None], tie: str = "first") -> Any:
    """The answer that most samples gave.

    Args:
      answers: one of each sample; None: it gave no answer, and has no vote.
      tie: what is taken where several answers have the most votes: "first", the one of them that was given first, or
        "abstain", None.

    Returns:
      An answer, or None where nobody has a vote.

    >>> majority_vote(["7", "8", None, "8", None, None])
    '8'
    >>> majority_vote(["9", "8", "7", "7", "8"]), majority_vote(["8", "7"], tie="abstain")
    ('8', None)
    """
    _check_tie(tie)
    votes = _count(answers)
    most = [answer for answer, count in votes.items() if count == max(votes.values())]
    return most[0] if most and (len(most) == 1 or tie == "first") else None


def best_of_n(samples: Sequence[Sequence[Any]], scores: Sequence[Sequence[float]]) -> list[Any]:
    """The sample of each prompt that scores highest; the first of them where several do.

    Args:
      samples: of P prompts, any number each, at least one.
      scores: as many numbers; higher is better.

    >>> best_of_n([["a", "b"], ["c"]], [[0.5, 2.0], [-1.0]])
    ['b', 'c']
    """
    if len(samples) != len(scores):
        raise UserError(f"there are samples of {len(samples)} prompts and scores of {len(scores)}; give one of each")
    best = []
    for p, (some, of_them) in enumerate(zip(samples, scores)):
        if len(some) == 0 or len(some) != len(of_them):
            raise UserError(
                f"prompt {p} has {len(some)} samples and {len(of_them)} scores; give one of each, at least one"
            )
        values = np.asarray(of_them, np.float64)
        if np.isnan(values).any():
            raise UserError(f"score {int(np.argmax(np.isnan(values)))} of prompt {p} is not a number; mend the scorer")
        best.append(some[int(np.argmax(values))])
    return best


def pass_at_k(n: Any, c: Any, k: int) -> np.ndarray:
    """The chance that at least one of k samples is right, of each problem.

    1 - C(n - c, k) / C(n, k), unbiased for 1 - (1 - p)^k (Chen et al. 2021, arXiv 2107.03374), as a product of ratios
    so that no binomial coefficient overflows. Its mean over problems has an interval by `interval`.

    Args:
      n: int [P] or one int, samples of each problem.
      c: int [P] or one int, how many of them are right.
      k: samples that a user would draw, at most n.

    Returns:
      float64, of the shape that n and c broadcast to.

    >>> pass_at_k(n=[4, 4, 4], c=[0, 1, 3], k=2).tolist()
    [0.0, 0.5, 1.0]
    """
    n_P, c_P = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    _check_k(k, n_P)
    if n_P.dtype.kind not in "iu" or c_P.dtype.kind not in "iu":
        raise UserError(f"n and c are counts, not {n_P.dtype} and {c_P.dtype}; give whole numbers")
    wrong = (c_P < 0) | (c_P > n_P)
    if wrong.any():
        raise UserError(f"{c_P[wrong][0]} of {n_P[wrong][0]} samples cannot be right; give 0 <= c <= n")
    values = [_pass_at_k(int(one), int(right), k) for one, right in zip(n_P.flat, c_P.flat)]
    return np.array(values, np.float64).reshape(n_P.shape)


@functools.lru_cache(maxsize=4096)
def _pass_at_k(n: int, c: int, k: int) -> float:
    if c == 0 or n - c < k:
        return float(c > 0)
    # C(n - c, k) / C(n, k) is the product over the right ones i = n - c + 1 ... n of 1 - k / i.
    return -math.expm1(sum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def maj_at_k(
    answers: Sequence[Sequence[Hashable | None]], references: Sequence[Hashable], k: int, tie: str = "first"
) -> np.ndarray:
    """The chance that the majority of k samples is right, of each problem.

    The average of `majority_vote(draw, tie) == reference` over every draw of k of the n samples, in every order: in a
    random order each of t tied answers comes first equally often, so a tie gives the right one 1 / t under "first".
    Computed exactly: how often each answer is drawn is multivariate hypergeometric, that is, independent binomials
    given that they sum to k, and only the answers that can match the right one's votes need be told apart.

    Args:
      answers: of P problems, n >= k each; None: no answer, no vote.
      references: the P right answers, compared by `==`.
      k: samples in a vote; 1 gives the mean accuracy of a sample.
      tie: as of `majority_vote`.

    Returns:
      float64 [P]; its mean has an interval by `interval`.

    >>> maj_at_k([["7", "7", "8"]], ["7"], k=2).tolist()  # 7 7 once in three draws, and half of the two ties
    [0.66666666667]
    """
    _check_tie(tie)
    if len(answers) != len(references):
        raise UserError(
            f"there are answers to {len(answers)} problems and {len(references)} references; give one of each"
        )
    _check_k(k, np.array([len(some) for some in answers], np.int64))
    values = []
    for p, (some, reference) in enumerate(zip(answers, references)):
        if reference is None:
            raise UserError(f"the reference of problem {p} is None, which stands for no answer; give the right answer")
        votes = _count(some)
        right = votes.pop(reference, 0)
        values.append(_maj_at_k(len(some), right, tuple(sorted(votes.values())), k, tie))
    return np.array(values, np.float64)


@functools.lru_cache(maxsize=4096)
def _maj_at_k(n: int, right: int, others: tuple[int, ...], k: int, tie: str) -> float:
    """Of n samples, `right` are right, `others` counts each wrong answer, and the rest have no vote."""
    total = 0.0
    for j in range(1, min(right, k) + 1):  # the right answer has j votes
        rivals = [count for count in others if count >= j]
        # Votes of the rivals (rows) and how many of them have j too (columns): none may have more.
        most = min(len(rivals), k // j)
        ways = np.zeros((k - j + 1, most + 1))
        ways[0, 0] = 1.0
        for count in rivals:
            chance = _binomial(count, k / n)[: j + 1]
            grown = np.zeros_like(ways)
            for x in range(min(j, k - j + 1)):
                grown[x:] += chance[x] * ways[: len(ways) - x]
            grown[j:, 1:] += chance[j] * ways[: max(len(ways) - j, 0), :-1]
            ways = grown
        # The rest of the k are answers too rare to matter, or none.
        rest = _binomial(n - right - sum(rivals), k / n)
        rest = np.pad(rest, (0, max(0, k - j + 1 - len(rest))))[: k - j + 1]
        credit = 1.0 / np.arange(1, most + 2) if tie == "first" else np.arange(most + 1) == 0
        total += _binomial(right, k / n)[j] * float(rest[::-1] @ ways @ credit)
    # To the digits that log-gammas of thousands leave, so that what is certain is 1.
    return round(total / float(_binomial(n, k / n)[k]), 11)


@functools.lru_cache(maxsize=4096)
def _binomial(n: int, p: float) -> np.ndarray:
    """float64 [n + 1]: the chance of each count."""
    x = np.arange(n + 1)
    if p >= 1.0:
        return (x == n).astype(np.float64)
    log_choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(n + 1)]
    return np.exp(np.array(log_choose) + x * math.log(p) + (n - x) * math.log1p(-p))


class Interval(NamedTuple):
    """A mean over problems, and where the mean over all such problems may lie."""

    mean: float
    low: float
    high: float


def interval(values: Any, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """A confidence interval of the mean over problems, taken as drawn independently from all such problems.

    Where each value is 0 or 1 (one sample a problem, or k = n), Wilson's interval, which keeps its width at 0 % and
    100 %. Elsewhere the percentile bootstrap over problems (Efron 1979): never over samples, which share a problem.

    Args:
      values: [P], of `pass_at_k`, `maj_at_k` or any score a problem.
      confidence: the share of such intervals that hold the true mean.
      resamples, seed: of the bootstrap.

    >>> mean, low, high = interval([1, 1, 1, 1])
    >>> mean, round(low, 4), high
    (1.0, 0.5101, 1.0)
    """
    values_P = np.asarray(values, np.float64).reshape(-1)
    P = len(values_P)
    if P == 0 or not np.isfinite(values_P).all():
        raise UserError("an interval needs at least one value, all of them finite; mend what scores the problems")
    if resamples < 1:
        raise UserError(f"resamples is {resamples}; give at least 1, better thousands")
    _check_confidence(confidence)
    mean = float(values_P.mean())
    if np.isin(values_P, (0.0, 1.0)).all():
        return Interval(mean, *wilson(int(values_P.sum()), P, confidence))
    rng = np.random.default_rng(seed)
    at_once = max(1, 1_000_000 // P)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    means = np.concatenate([values_P[rng.integers(P, size=(size, P))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high))


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927).

    The p at which (successes / trials - p)^2 = z^2 p (1 - p) / trials.

    >>> low, high = wilson(8, 10)
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    """
    if not 0 <= successes <= trials or trials < 1:
        raise UserError(
            f"{successes} successes of {trials} trials cannot be; give 0 <= successes <= trials, trials >= 1"
        )
    _check_confidence(confidence)
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = successes / trials
    centre = share + z2 / (2 * trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2)))
    low, high = ((centre + side * half) / (1 + z2 / trials) for side in (-1, 1))
    # Exact at the ends, where rounding would leave a trace.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def _count(answers: Sequence[Hashable | None]) -> dict[Any, int]:
    """Votes by answer, in the order in which the answers were first given."""
    try:
        return dict(collections.Counter(answer for answer in answers if answer is not None))
    except TypeError:
        raise UserError("answers are counted by equality and must be hashable; give strings or numbers") from None


def _check_tie(tie: str) -> None:
    if tie not in TIES:
        raise UserError(f"tie is {tie!r}; give one of {', '.join(TIES)}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.95")


def _check_k(k: int, n_P: np.ndarray) -> None:
    if k < 1:
        raise UserError(f"k is {k}; give at least 1")
    if (n_P < k).any():
        p = int(np.argmax(n_P < k))
        raise UserError(f"k is {k}, but problem {p} has only {n_P.flat[p]} samples; draw more or lower k")
