"""Losses over preferences against the values that TRL 1.16 gives for fixed arrays (or its definition, where named)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.losses import preferences as P

R, T = np.mgrid[:6, :5]
LENGTHS = np.array([5, 3, 4, 4, 5, 2])
INSIDE = np.arange(5) < LENGTHS[:, None]
POLICY = np.where(INSIDE, -0.2 - 0.15 * ((3 * R + 2 * T) % 7), 0.0)
REFERENCE = np.where(INSIDE, -0.25 - 0.12 * ((2 * R + 3 * T) % 7), 0.0)
BETA = 0.1


def _sums(policy=POLICY, reference=REFERENCE, weights=1.0):
    ratios = ((policy - reference) * weights).sum(1)
    return ratios[:3], ratios[3:]


CHOSEN, REJECTED = _sums()
GAP = CHOSEN - REJECTED
MEAN_GAP = CHOSEN / LENGTHS[:3] - REJECTED / LENGTHS[3:]
MEANS = POLICY.sum(1) / LENGTHS
POLICY_GAP, REFERENCE_GAP = (x.sum(1)[:3] - x.sum(1)[3:] for x in (POLICY, REFERENCE))
ONES = np.ones(3)


def _scored(divergence):
    return P.logistic(P.divergence_score(CHOSEN, divergence) - P.divergence_score(REJECTED, divergence))


def _length_desensitised(alpha):
    shared = np.tile(np.minimum(LENGTHS[:3], LENGTHS[3:]), 2)[:, None]
    chosen, rejected = _sums(weights=np.where(np.arange(5) < shared, 1.0, alpha))
    return P.logistic(chosen - rejected)


def _weighted_by_probability():
    """WPO with log sum p^2 = -1 everywhere."""
    means = ((POLICY + 1.0) * INSIDE).sum(1) / LENGTHS
    return P.logistic(GAP) * np.exp(means[:3] + means[3:])


CASES = {
    "sigmoid": (lambda: P.logistic(GAP), 0.697943),
    "hinge": (lambda: P.hinge(GAP), 1.008333),
    "ipo of means": (lambda: P.ipo(MEAN_GAP), 25.917591),
    "ipo of sums": (lambda: P.ipo(GAP), 26.336633),
    "cdpo": (lambda: P.logistic(GAP, smoothing=0.1), 0.697109),
    "robust": (lambda: P.robust(GAP), 0.698984),
    "exo": (lambda: P.exo(GAP), 2.776198),
    "nca": (lambda: P.nca(CHOSEN, REJECTED), 1.388714),
    "bco": (lambda: P.bco(CHOSEN, REJECTED), 1.390887),
    "sppo": (lambda: P.sppo(CHOSEN, REJECTED), 51.174100),
    "aot": (lambda: P.aot(POLICY_GAP, REFERENCE_GAP, ONES), 0.697943),
    "aot smoothed": (lambda: P.aot(POLICY_GAP, REFERENCE_GAP, ONES, smoothing=0.1), 0.697109),
    "aot unpaired": (lambda: P.aot(CHOSEN, REJECTED, ONES), 0.697375),
    "apo zero": (lambda: P.apo_zero(CHOSEN, REJECTED), 1.002083),
    "apo down": (lambda: P.apo_down(CHOSEN, REJECTED), 0.999077),
    "discopop": (lambda: P.discopop(GAP), 0.842944),
    "sigmoid of means": (lambda: P.logistic(MEAN_GAP), 0.697507),
    "forward kl": (lambda: _scored("forward_kl"), 0.694528),
    "js": (lambda: _scored("js"), 0.694516),
    "alpha": (lambda: _scored("alpha"), 0.696220),
    "ld-dpo": (lambda: _length_desensitised(0.5), 0.704506),
    "mpo": (
        lambda: 0.8 * P.logistic(GAP) + 0.2 * P.bco(CHOSEN, REJECTED) + -POLICY[:3].sum() / LENGTHS[:3].sum(),
        1.486531,
    ),
    "wpo": (_weighted_by_probability, 1.430585),
    "cpo": (lambda: P.logistic(POLICY_GAP), 0.704520),
    "cpo hinge": (lambda: P.hinge(POLICY_GAP), 1.016667),
    "cpo ipo": (lambda: P.ipo(MEANS[:3] - MEANS[3:]), 25.213504),
    "simpo": (lambda: P.logistic(MEANS[:3] - MEANS[3:] - 0.5 / 2.0, 2.0), 1.010582),
    "simpo, TRL's default": (lambda: P.logistic(MEANS[:3] - MEANS[3:] - 0.5 / 0.1), 0.975254),
    # The margin stays as in SimPO.
    "alphapo": (
        lambda: P.logistic(P.alpha_score(MEANS[:3], 0.25) - P.alpha_score(MEANS[3:], 0.25) - 0.5 / 2.0, 2.0),
        1.019080,
    ),
    "orpo": (lambda: BETA * jax.nn.log_sigmoid(P.log_odds_ratio(MEANS[:3], MEANS[3:])), -0.073213),
    "orpo's log odds": (lambda: P.log_odds_ratio(MEANS[:3], MEANS[3:]), -0.043606),
    "margin of rewards": (lambda: BETA * GAP, -0.008333),
    "bradley-terry": (lambda: P.bradley_terry(*SCORES), 0.508375),
    "bradley-terry with a margin": (lambda: P.bradley_terry(*SCORES, 0.5), 0.722203),
    "bradley-terry, centred": (lambda: P.bradley_terry(*SCORES) + 0.01 * (SCORES[0] + SCORES[1]) ** 2, 0.517341),
}
SCORES = np.array([1.2, -0.3, 0.5]), np.array([0.4, 0.1, -0.8])


@pytest.mark.parametrize("case", CASES)
def test_values_of_the_reference(case):
    compute, expected = CASES[case]
    np.testing.assert_allclose(np.mean(np.asarray(compute(), np.float64)), expected, rtol=3e-6, atol=6e-7)


@pytest.mark.parametrize(
    ("loss", "expected"), [("sigmoid", 0.694217), ("aot", 0.693862), ("aot_unpaired", 0.693406)]
)
def test_sorting_matters_once_rows_are_swapped(loss, expected):
    reference = np.where(INSIDE, -0.25 - 0.12 * ((2 * R + 3 * T) % 7)[[0, 1, 2, 4, 3, 5]], 0.0).sum(1)
    policy = POLICY.sum(1)
    ratio = policy - reference
    values = {
        "sigmoid": lambda: P.logistic(ratio[:3] - ratio[3:]),
        "aot": lambda: P.aot(policy[:3] - policy[3:], reference[:3] - reference[3:], ONES),
        "aot_unpaired": lambda: P.aot(ratio[:3], ratio[3:], ONES),
    }[loss]()
    np.testing.assert_allclose(np.mean(values), expected, rtol=2e-6)


def test_kto_and_its_unpaired_relative():
    kl_policy, kl_reference = np.array([-2.5, -2, -3, -2.2, -3, -1.5]), np.array([-2.6, -2.3, -2.9, -2.5, -3.2, -1.5])
    kl = max(0.0, float(np.mean(kl_policy - kl_reference)))
    assert kl == pytest.approx(0.133333, rel=3e-6)
    ratio, liked = np.concatenate([CHOSEN, REJECTED]), np.array([1, 1, 1, 0, 0, 0])
    weights = np.where(liked == 1, 1.0, 1.5)
    np.testing.assert_allclose(np.mean(weights * P.kto(ratio, liked, kl)), 0.624980, rtol=2e-6)
    np.testing.assert_allclose(np.mean(weights * P.kto(ratio, liked, 0.0)), 0.625812, rtol=2e-6)


def test_pairs_that_are_not_there_leave_aot_alone():
    first, second = np.array([[3.0, -1.0], [0.5, 9.0]]), np.array([[1.0, 2.0], [-2.0, 7.0]])
    mask = np.array([[1, 1], [1, 0]])
    there = P.aot(first[mask > 0], second[mask > 0], np.ones(3))
    np.testing.assert_allclose(np.sum(P.aot(first, second, mask)), np.sum(there), rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(P.aot(x, second, mask)))(first)
    assert np.isfinite(gradient).all() and gradient[1, 1] == 0 and (gradient[mask > 0] != 0).all()


def test_a_ranking_of_two_is_bradley_terry_and_probabilities_of_rankings_sum_to_one():
    import itertools

    pair = np.stack(SCORES, axis=-1)
    np.testing.assert_allclose(P.plackett_luce(pair, np.ones_like(pair)), P.bradley_terry(*SCORES), rtol=1e-6)
    scores = np.array([0.3, -1.2, 2.0])
    orders = np.array(list(itertools.permutations(range(3))))
    found = np.exp(-np.asarray(P.plackett_luce(scores[orders], np.ones((6, 3)))))
    assert found.sum() == pytest.approx(1, rel=1e-6)
    padded = P.plackett_luce(np.array([0.3, -1.2, 5.0]), np.array([1, 1, 0]))
    np.testing.assert_allclose(padded, P.plackett_luce(scores[:2], np.ones(2)), rtol=1e-6)


@pytest.mark.parametrize("logprob", [-1e-9, -1e-4, -0.3, -0.7, -5.0, -100.0])
def test_odds_and_unlikelihood_are_finite_with_their_gradients_at_both_ends(logprob):
    for function in (P.unlikelihood, lambda x: P.log_odds_ratio(x, jnp.float32(-1.0))):
        value, slope = jax.value_and_grad(function)(jnp.float32(logprob))
        assert np.isfinite(value) and np.isfinite(slope)
    expected = -np.log(-np.expm1(min(logprob, -1e-7)))
    np.testing.assert_allclose(P.unlikelihood(jnp.float32(logprob)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["logistic", "robust", "hinge", "ipo", "exo", "discopop"])
@pytest.mark.parametrize("gap", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_losses_of_a_gap_have_finite_gradients_far_out(name, gap):
    value, slope = jax.value_and_grad(getattr(P, name))(jnp.float32(gap))
    assert np.isfinite(value) and np.isfinite(slope)
