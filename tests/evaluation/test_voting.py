"""Votes, best of n, pass@k and maj@k, against exhaustive enumeration and closed forms."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.stats

from lmjax.errors import UserError
from lmjax.evaluation.voting import best_of_n, interval, maj_at_k, majority_vote, pass_at_k, wilson


def test_the_majority_is_taken_and_ties_go_by_rule() -> None:
    assert majority_vote(["a", "b", "b"]) == "b"
    assert majority_vote(["a", None, None, None]) == "a"
    assert majority_vote(["c", "b", "a", "a", "b"]) == "b"  # of a and b, b was given first
    assert majority_vote(["c", "b", "a", "a", "b"], tie="abstain") is None
    assert majority_vote(["c", "b", "b"], tie="abstain") == "b"
    assert majority_vote([None, None]) is None and majority_vote([]) is None
    assert majority_vote([0, 0, 1]) == 0  # an answer that is false is still an answer


@pytest.mark.parametrize("answer", ["x", 3, (1, 2), None])
def test_a_vote_of_one_is_the_sample(answer: Any) -> None:
    assert majority_vote([answer]) == answer


def test_best_of_n_takes_the_highest_score_and_the_first_of_equals() -> None:
    assert best_of_n([["a", "b", "c"], ["d", "e"]], [[1, 3, 3], [-math.inf, -5.0]]) == ["b", "e"]
    assert best_of_n([["a"]], np.array([[0.0]])) == ["a"]


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            expected = sum(any(i < c for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_stable_where_binomials_are_large() -> None:
    for n, c, k in ((10_000, 1, 1), (10_000, 3, 100), (100_000, 1, 7), (5000, 2500, 2), (2000, 5, 1990)):
        expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(expected), rel=1e-12)
    np.testing.assert_array_equal(pass_at_k(5, [0, 5, 3], 3), [0.0, 1.0, 1.0])
    assert pass_at_k([[3, 4]], [[1], [2]], 1).shape == (2, 2)


def test_pass_at_k_is_unbiased() -> None:
    p, n, k = 0.3, 6, 4
    expected = sum(scipy.stats.binom.pmf(c, n, p) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def enumerated(answers: list, reference: Any, k: int, tie: str) -> float:
    draws = list(itertools.permutations(answers, k))
    return sum(majority_vote(draw, tie) == reference for draw in draws) / len(draws)


@pytest.mark.parametrize("tie", ["first", "abstain"])
def test_maj_at_k_is_the_share_of_draws_with_a_right_majority(tie: str) -> None:
    rng = random.Random(0)
    problems = [rng.choices(["r", "a", "b", "c", None], [3, 2, 2, 1, 1], k=rng.randint(1, 7)) for _ in range(60)]
    problems += [["r", "a"], ["a", "a"], [None, None], ["r", "a", "b"] * 2, ["r", "r", "a", "a", "b", "b"], ["r"] * 7]
    checked = 0
    for answers in problems:
        for k in range(1, len(answers) + 1):
            expected = enumerated(answers, "r", k, tie)
            assert maj_at_k([answers], ["r"], k, tie)[0] == pytest.approx(expected, abs=1e-11), (answers, k)
            checked += 0 < expected < 1
    assert checked > 100


def test_maj_at_1_is_the_mean_accuracy_and_maj_at_n_the_vote() -> None:
    answers = [["r", "a", "r", "b"], ["a", "a", "r", None], [None] * 4, ["r", "a", "b", "c"]]
    np.testing.assert_allclose(maj_at_k(answers, ["r"] * 4, 1), [0.5, 0.25, 0, 0.25], rtol=1e-12)
    np.testing.assert_allclose(maj_at_k(answers, ["r"] * 4, 4), [1, 0, 0, 0.25], rtol=1e-12)
    np.testing.assert_allclose(maj_at_k(answers, ["r"] * 4, 4, tie="abstain"), [1, 0, 0, 0], rtol=1e-12)


def test_what_is_certain_is_exactly_so() -> None:
    for n, k in ((7, 3), (64, 17), (1000, 333)):
        assert maj_at_k([["r"] * n, ["a"] * n, ["r"] * (n - 1) + [None]], ["r"] * 3, k).tolist() == [1.0, 0.0, 1.0]


def test_maj_at_k_of_two_answers_has_a_closed_form() -> None:
    """Right, or one wrong answer: a hypergeometric count above k / 2, and half of the ties."""
    for n, right, k in ((256, 140, 33), (1000, 480, 64), (3000, 1501, 501), (400, 100, 400)):
        votes = scipy.stats.hypergeom(n, right, k)
        expected = votes.sf(k // 2) + (0.5 * votes.pmf(k // 2) if k % 2 == 0 else 0.0)
        found = maj_at_k([["r"] * right + ["a"] * (n - right)], ["r"], k)[0]
        assert found == pytest.approx(expected, abs=1e-10)


def test_maj_at_k_of_many_answers_agrees_with_draws() -> None:
    counts = {"r": 20, "a": 17, "b": 12, "c": 3, None: 9, **{f"w{i}": 1 for i in range(30)}}
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    rng = random.Random(1)
    for tie in ("first", "abstain"):
        draws = [majority_vote(rng.sample(answers, 16), tie) == "r" for _ in range(20_000)]
        found = maj_at_k([answers], ["r"], 16, tie)[0]
        assert abs(np.mean(draws) - found) < 4 * math.sqrt(found * (1 - found) / len(draws))


def test_maj_at_k_is_unbiased() -> None:
    """Its mean over samples of n is the chance of a majority of k fresh samples."""
    p = {"r": 0.4, "a": 0.35, "b": 0.25}

    def mean(n: int, value: Any) -> float:
        return sum(math.prod(p[x] for x in xs) * value(list(xs)) for xs in itertools.product(p, repeat=n))

    fresh = mean(3, lambda xs: float(majority_vote(xs) == "r"))
    assert mean(5, lambda xs: maj_at_k([xs], ["r"], 3)[0]) == pytest.approx(fresh, abs=1e-11)


def test_wilson_solves_its_equation_and_matches_scipy() -> None:
    for successes, trials, confidence in ((0, 7, 0.95), (3, 7, 0.9), (7, 7, 0.99), (500, 1234, 0.95)):
        found = wilson(successes, trials, confidence)
        theirs = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
        assert found == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_intervals() -> None:
    ones = interval([1.0] * 20)
    assert ones.mean == 1.0 and (ones.low, ones.high) == wilson(20, 20)
    values = np.random.default_rng(0).beta(2, 3, size=200)
    found = interval(values, 0.9)
    half = scipy.stats.norm.ppf(0.95) * values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert found == interval(values, 0.9) and found != interval(values, 0.9, seed=1)
    wide = interval(values, 0.99)
    assert wide.low < found.low and wide.high > found.high


def test_bootstrap_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    found = [interval(rng.beta(1, 2, size=60), 0.9, resamples=400) for _ in range(300)]
    held = np.mean([low <= 1 / 3 <= high for _, low, high in found])
    assert 0.84 < held < 0.95


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pass_at_k([5, 3], [1, 1], 4), "k is 4, but problem 1 has only 3 samples; draw more or lower k"),
        (lambda: pass_at_k(5, 1, 0), "k is 0; give at least 1"),
        (lambda: pass_at_k(5, 6, 1), "6 of 5 samples cannot be right"),
        (lambda: pass_at_k(5, -1, 1), "-1 of 5 samples cannot be right"),
        (lambda: pass_at_k(5, 0.5, 1), "n and c are counts"),
        (lambda: maj_at_k([["a", "b"], ["a"]], ["a", "a"], 2), "problem 1 has only 1 samples"),
        (lambda: maj_at_k([["a"]], ["a", "b"], 1), "answers to 1 problems and 2 references"),
        (lambda: maj_at_k([["a"]], [None], 1), "the reference of problem 0 is None"),
        (lambda: maj_at_k([[["a"]]], ["a"], 1), "must be hashable"),
        (lambda: maj_at_k([["a"]], ["a"], 1, "random"), "tie is 'random'; give one of first, abstain"),
        (lambda: majority_vote(["a"], "last"), "tie is 'last'"),
        (lambda: best_of_n([["a"]], []), "samples of 1 prompts and scores of 0"),
        (lambda: best_of_n([["a"], []], [[1], []]), "prompt 1 has 0 samples and 0 scores"),
        (lambda: best_of_n([["a"]], [[1, 2]]), "prompt 0 has 1 samples and 2 scores"),
        (lambda: best_of_n([["a", "b"]], [[1, math.nan]]), "score 1 of prompt 0 is not a number"),
        (lambda: interval([]), "needs at least one value"),
        (lambda: interval([0.1, math.nan]), "all of them finite"),
        (lambda: interval([0.1], confidence=95), "confidence is 95"),
        (lambda: interval([0.1], resamples=0), "resamples is 0"),
        (lambda: wilson(3, 2), "3 successes of 2 trials cannot be"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
