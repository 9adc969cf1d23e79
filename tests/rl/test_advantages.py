"""Advantages and returns: the libraries' own numbers, closed forms, and properties."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmjax import rl
from lmjax.errors import UserError
from lmjax.rl import returns
from lmjax.rl.advantages import ESTIMATORS, Estimator, advantages
from tests.rl.estimator_cases import CASES, FIXTURES, arrays, ours


@functools.cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(FIXTURES) as found:
        return dict(found)


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_libraries(name):
    for key, value in ours(name).items():
        np.testing.assert_allclose(value, _stored()[f"{name}/{key}"], rtol=1e-5, atol=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_the_libraries_themselves(name):
    library = name.split("_")[0]
    if importlib.util.find_spec(library) is None:  # OpenRLHF's are run without importing it
        pytest.skip(f"runs {library}'s own functions (pip install {library})")
    from tests.rl.make_estimator_fixtures import compute

    for case in (name, *(f"{name}/seed{n}" for n in range(5) if "/" not in name)):
        for key, value in compute(case).items():
            np.testing.assert_allclose(ours(case)[key], value, rtol=1e-5, atol=1e-5, err_msg=case)


def test_the_cases_are_stored_and_differ():
    assert {key.rpartition("/")[0] for key in _stored()} == set(CASES)
    given = arrays()
    found = {n: advantages(given["scores"], given["groups"], e, lengths=given["lengths"], given=given["given"])
             for n, e in ESTIMATORS.items()}  # fmt: skip
    same = {frozenset(b for b in found if np.allclose(found[a], found[b], rtol=1e-4)) for a in found}
    # Those that differ by how large eps is, or in what a single rollout means, or in what is done with them later.
    expected = (
        {"trl_grpo"}, {"trl_grpo_batch"}, {"trl_rloo_normalized"}, {"verl_opo"}, {"verl_gpg"}, {"verl_grpo_passk"},
        {"trl_rloo", "verl_rloo", "openrlhf_rloo"},
        {"verl_grpo", "openrlhf_group_norm", "tunix_grpo"},
        {"dr_grpo", "verl_dr_grpo", "verl_reinforce_plus_plus_baseline", "openrlhf_reinforce_baseline",
         "openrlhf_dr_grpo"},
        {"reinforce", "openrlhf_reinforce", "verl_reinforce_plus_plus"},
        {"reinforce_batch", "openrlhf_flash_reinforce"}, {"reinforce_given", "verl_remax"},
    )  # fmt: skip
    assert same == {frozenset(names) for names in expected}


groups = st.integers(2, 4).flatmap(lambda n: st.lists(st.integers(2, 5), min_size=n, max_size=n))
estimators = st.sampled_from([e for e in ESTIMATORS.values() if e.baseline not in ("given", "optimal")])


@hypothesis.given(groups, estimators, st.integers(0, 2**31), st.floats(0.01, 100))
@hypothesis.settings(deadline=None, max_examples=50)
def test_scores_in_another_unit(sizes, estimator, seed, unit):
    """What is divided by a deviation has none, but for eps; all else is in the unit of the scores."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    scores = np.random.default_rng(seed).normal(size=len(group))
    estimator = dataclasses.replace(estimator, eps=0.0)
    free = estimator.scale in ("group", "batch", "whiten")
    expected = advantages(scores, group, estimator) * (1 if free else unit)
    np.testing.assert_allclose(advantages(unit * scores, group, estimator), expected, rtol=1e-7, atol=1e-9)


@hypothesis.given(groups, estimators, st.integers(0, 2**31), st.floats(-5, 5), st.data())
@hypothesis.settings(deadline=None, max_examples=100)
def test_properties(sizes, estimator, seed, shift, data):
    random = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    scores = random.normal(size=len(group))
    found = advantages(scores, group, estimator)
    order = random.permutation(len(group))  # whoever sits where
    np.testing.assert_allclose(advantages(scores[order], group[order], estimator), found[order], atol=1e-9)
    if estimator.baseline != "none" and estimator.scale != "nonzero":  # a constant more changes nothing
        np.testing.assert_allclose(advantages(scores + shift, group, estimator), found, atol=1e-7)
    if estimator.baseline in ("group", "leave_one_out"):
        np.testing.assert_allclose([found[group == g].sum() for g in set(group.tolist())], 0, atol=1e-7)
    out = data.draw(st.integers(0, len(group) - 1))  # one that is left out is as if it were not there
    masked = np.where(np.arange(len(group)) == out, np.nan, scores)
    rest = np.delete(np.arange(len(group)), out)
    if min(np.bincount(group[rest])) > 1:
        expected = advantages(scores[rest], group[rest], estimator)
        np.testing.assert_allclose(advantages(masked, group, estimator)[rest], expected, atol=1e-9)
    assert advantages(masked, group, estimator)[out] == 0


def test_leave_one_out_by_brute_force():
    given = arrays()
    found = advantages(given["scores"], given["groups"], ESTIMATORS["trl_rloo"])
    for i, score in enumerate(given["scores"]):
        others = [s for j, s in enumerate(given["scores"]) if j != i and given["groups"][j] == given["groups"][i]]
        assert found[i] == pytest.approx(score - np.mean(others))


def test_groups_of_one():
    with pytest.raises(UserError, match="single rollout"):
        advantages([1.0, 2.0, 3.0], [0, 0, 1], ESTIMATORS["trl_grpo"])
    assert advantages([1.0, 2.0, 3.0], [0, 0, 1], ESTIMATORS["verl_grpo"])[2] == pytest.approx(3.0)
    # Where all others of a group were left out, there is nothing to compare with.
    assert advantages([1.0, np.nan, 3.0, 5.0], [0, 0, 1, 1], ESTIMATORS["trl_grpo"])[0] == 0.0
    assert advantages([np.nan, np.nan], [0, 0], ESTIMATORS["trl_grpo"]).tolist() == [0.0, 0.0]
    assert advantages([2.0, 2.0], [0, 0], ESTIMATORS["trl_grpo"]).tolist() == [0.0, 0.0]
    assert advantages([1.0], [0], ESTIMATORS["reinforce"]).tolist() == [1.0]


@pytest.mark.parametrize(("n", "k"), [(4, 2), (4, 3), (3, 3)])
def test_the_best_of_k_has_the_gradient_of_its_expectation(n, k):
    """All n-tuples of a policy over four actions: E[mean A grad log pi] against the gradient of E[max of k scores]."""
    logits, scores = np.array([0.3, -0.8, 0.5, 0.0]), np.array([0.0, 1.0, 0.4, 0.4])
    pi = np.exp(logits) / np.exp(logits).sum()

    def expected_best(pi):
        return sum(np.prod(pi[list(a)]) * scores[list(a)].max() for a in itertools.product(range(4), repeat=k))

    nudge = 1e-5 * np.eye(4)
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    exact = [(expected_best(softmax(logits + d)) - expected_best(softmax(logits - d))) / 2e-5 for d in nudge]
    estimate = np.zeros(4)
    for drawn in itertools.product(range(4), repeat=n):
        gains = rl.pass_at_k_advantages(scores[list(drawn)], np.zeros(n, int), k)
        estimate += np.prod(pi[list(drawn)]) * (gains @ (np.eye(4)[list(drawn)] - pi)) / n
    np.testing.assert_allclose(estimate, exact, rtol=1e-6, atol=1e-9)


def test_the_best_of_k_by_its_sum_over_sets():
    scores, k = np.array([0.2, 1.0, -0.3, 1.0, 0.6]), 3
    sets = list(itertools.combinations(range(5), k))
    sums = [
        sum(scores[list(s)].max() - scores[[j for j in s if j != i]].max() for s in sets if i in s) for i in range(5)
    ]
    found = rl.pass_at_k_advantages(scores, np.zeros(5, int), k)
    np.testing.assert_allclose(found, 5 / len(sets) * np.array(sums), atol=1e-12)
    # The best of all is verl's lead of the best, n times; those that are left out are as if they were not there.
    whole = rl.pass_at_k_advantages(scores[:3], np.zeros(3, int), 3)
    lead = Estimator("second", "none")
    np.testing.assert_allclose(whole, 3 * advantages(scores[:3], np.zeros(3, int), lead))
    gaps = np.array([0.2, np.nan, 1.0, -0.3])
    np.testing.assert_allclose(rl.pass_at_k_advantages(gaps, np.zeros(4, int), 3)[[0, 2, 3]], whole[[0, 1, 2]])
    assert advantages(gaps, np.zeros(4, int), lead).tolist() == [0.0, 0.0, 0.8, 0.0]
    assert not rl.pass_at_k_advantages([1.0, np.nan, 0.0], [0, 0, 0], 3).any()


def test_process_supervision_by_hand():
    steps = [[(0, 1.0), (2, 0.0)], [(1, 1.0)]]
    first, second = rl.process_advantages(steps, [0, 0], [3, 2], eps=0.0)
    z = (np.array([1.0, 0.0, 1.0]) - 2 / 3) / np.std([1.0, 0.0, 1.0], ddof=1)
    np.testing.assert_allclose(first, [z[0] + z[1], z[1], z[1]])
    np.testing.assert_allclose(second, [z[2], z[2]])


@hypothesis.given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
@hypothesis.settings(deadline=None, max_examples=60)
def test_gae_is_its_sum(seed, gamma, lam):
    """`sum_l (gamma lambda)^l delta_{t+l}` over the policy's own tokens, those of an environment taken out."""
    random = np.random.default_rng(seed)
    mask = (random.random((3, 7)) > 0.3) * 1.0
    rewards, values = random.normal(size=(2, 3, 7))
    found, wanted = returns.gae(rewards * mask, values, mask, gamma, lam)
    for n in range(3):
        own = np.flatnonzero(mask[n])
        r, v = rewards[n, own], np.append(values[n, own], 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(own))) for t in range(len(own))]
        np.testing.assert_allclose(found[n, own], expected, atol=1e-9)
        np.testing.assert_allclose(wanted[n, own], np.array(expected) + v[:-1], atol=1e-9)
    assert (found[mask == 0] == 0).all()
    full = returns.gae(rewards * mask, values, mask, gamma, 1.0)[0]
    np.testing.assert_allclose(full, (returns.rewards_to_go(rewards * mask, mask, gamma) - values) * mask, atol=1e-9)


def test_whitening():
    random = np.random.default_rng(0)
    values, mask = random.normal(3, 2, (4, 6)), random.random((4, 6)) > 0.3
    found = returns.whiten(values, mask)
    assert found[mask].mean() == pytest.approx(0, abs=1e-9) and found[mask].std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert (found[~mask] == 0).all()
    kept = returns.whiten(values, mask, keep_mean=True)
    assert kept[mask].mean() == pytest.approx(values[mask].mean())
    assert (returns.whiten(values, np.zeros((4, 6))) == 0).all()
    # A single token, or equal ones, have no spread: they are 0, or what they were.
    one = np.zeros((4, 6))
    one[1, 2] = 1
    assert not returns.whiten(values, one).any() and not returns.whiten(np.ones((4, 6)), mask, eps=0.0).any()
    np.testing.assert_allclose(returns.whiten(values, one, keep_mean=True), values * one)
    np.testing.assert_allclose(returns.whiten(np.full((4, 6), 2.0), mask, keep_mean=True, eps=0.0), 2.0 * mask)


def test_scores_are_placed():
    assert returns.place_scores([1.0, 2.0], [1, 3], 4).tolist() == [[1, 0, 0, 0], [0, 0, 2, 0]]
    assert returns.place_scores([1.0, 2.0], [1, 3], 3, "after_eos").tolist() == [[0, 1, 0], [0, 0, 2]]
    assert returns.place_scores([1.0, 2.0], [0, 2], 2).tolist() == [[0, 0], [0, 2]]  # nothing was said
    assert returns.place_scores([1.0, 2.0], [0, 2], 2, "after_eos").tolist() == [[0, 0], [0, 2]]
    with pytest.raises(UserError, match="'first'"):
        returns.place_scores([1.0], [1], 1, "first")


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_costs_are_the_losses_estimates(estimator):
    from lmjax.losses import kl_estimate

    own, other = np.random.default_rng(1).normal(size=(2, 3, 4))
    np.testing.assert_allclose(returns.kl_costs(own, other, estimator), kl_estimate(own, other, estimator), rtol=2e-5)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Estimator(baseline="mean"), "baseline is 'mean'"),
        (lambda: Estimator(ddof=2), "ddof 2"),
        (lambda: advantages([1.0, 2.0], [0, 0], ESTIMATORS["verl_opo"]), "reads lengths"),
        (lambda: advantages([1.0, 2.0], [0, 0], ESTIMATORS["verl_remax"]), "reads given"),
        (lambda: advantages([1.0, 2.0], [0], ESTIMATORS["reinforce"]), "one of each for every rollout"),
        (lambda: advantages([1.0], [0], ESTIMATORS["verl_grpo_passk"]), "single rollout"),
        (lambda: rl.pass_at_k_advantages([1.0, 2.0], [0, 0], 3), "at least 3"),
        (lambda: rl.pass_at_k_advantages([1.0, 2.0], [0, 0], 1), "k is 1"),
        (lambda: rl.decoupled_advantages([[1.0, 2.0]], [1.0, 1.0], [0, 0]), "one weight a row"),
        (lambda: rl.process_advantages([[(3, 1.0)]], [0], [3]), "steps end at"),
        (lambda: rl.process_advantages([[], []], [0, 0], [3]), "give as many"),
        (lambda: returns.gae([[1.0]], [[1.0]], [[1.0]], 1.1), "gamma is 1.1"),
        (lambda: returns.gae([[1.0]], [[1.0, 2.0]], [[1.0]]), r"values \(1, 2\)"),
        (lambda: returns.rewards_to_go([[1.0]], [[1.0]], 2.0), "gamma is 2"),
        (lambda: returns.whiten([1.0], [1.0]), "of one shape"),
        (lambda: returns.place_scores([1.0], [4], 3), "does not fit"),
        (lambda: returns.kl_costs([0.0], [0.0], "k4"), "'k4'"),
        (lambda: rl.AdaptiveKL(0.0), "positive"),
        (lambda: rl.AdaptiveEntropy(0.0), "positive"),
        (lambda: rl.RunningMean(1.0), "decay"),
        (lambda: rl.Curriculum(0), "curriculum"),
    ],
)
def test_what_cannot_be(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()


def test_controllers_move_as_published_and_go_on_from_their_state():
    kl = rl.AdaptiveKL(0.1, target=6.0, horizon=100)
    for value, expected in ((60.0, 0.1 * 1.1), (0.0, 0.1 * 1.1 * 0.9), (6.3, 0.1 * 1.1 * 0.9 * (1 + 0.05 * 0.5))):
        kl.update(value, 50)
        assert kl.coefficient == pytest.approx(expected)
    entropy = rl.AdaptiveEntropy(0.2, step=0.01)
    seen = []
    for value in (0.5, 0.1, 0.1, 0.3, 0.2):
        entropy.update(value)
        seen.append(round(entropy.coefficient, 4))
    assert seen == [0.0, 0.01, 0.02, 0.0, 0.02]
    mean = rl.RunningMean(0.5)
    mean.update(4.0)
    assert mean.mean == 4.0
    mean.update(1.0)
    assert mean.mean == pytest.approx((4.0 * 0.25 + 1.0 * 0.5) / 0.75)
    for controller, fresh in ((kl, rl.AdaptiveKL(1.0)), (entropy, rl.AdaptiveEntropy()), (mean, rl.RunningMean(0.5))):
        fresh.set_state(controller.get_state())
        assert fresh.get_state() == controller.get_state()
    curriculum = rl.Curriculum(2)
    curriculum.update([0, 0, 1], [1.0, 0.0, np.nan])
    curriculum.update([0], [1.0])
    assert curriculum.rates[0] == 0.75 and np.isnan(curriculum.rates[1])
    again = rl.Curriculum(2)
    again.set_state(curriculum.get_state())
    assert np.array_equal(again.weights(), curriculum.weights())
