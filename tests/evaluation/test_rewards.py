"""Scores of reward models and their ensembles, calibration, and KL from samples."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax import UserError
from lmjax.evaluation import calibration, ensemble_scores, reward_judge, sequence_log_ratios, sequence_scores
from lmjax.generation import answers_batch, generate
from lmjax.policy import add_value_head
from tests.models.small import FAMILIES, variables_of

CONFIG = FAMILIES["gpt2"]
POLICY, VARIABLES = lm.Policy(CONFIG), variables_of(CONFIG)
MEMBERS = [add_value_head(VARIABLES, jax.random.key(i), std=0.5) for i in range(3)]
SEQUENCES = [np.arange(1, 1 + n) for n in (3, 7, 1, 5, 2)]


def test_the_score_is_the_value_of_the_last_token_however_rows_are_filled():
    whole = sequence_scores(POLICY, MEMBERS[0], SEQUENCES)
    np.testing.assert_allclose(sequence_scores(POLICY, MEMBERS[0], SEQUENCES, batch_size=2), whole, rtol=1e-5)
    for sequence, score in zip(SEQUENCES, whole):
        row = lm.batch.next_token_batch(np.append(sequence, 0)[None])
        np.testing.assert_allclose(POLICY(MEMBERS[0], row).values[0, -1], score, rtol=1e-5)
    assert np.std(whole) > 1e-3 and sequence_scores(POLICY, MEMBERS[0], []).shape == (0,)


def test_the_ensemble_does_not_mind_where_each_has_its_zero():
    found = ensemble_scores(POLICY, MEMBERS, SEQUENCES)
    apart = np.stack([sequence_scores(POLICY, member, SEQUENCES) for member in MEMBERS])
    np.testing.assert_allclose(found.mean, apart.mean(axis=0), rtol=1e-6)
    shifted = MEMBERS[0] | {"value": MEMBERS[0]["value"] | {"bias": MEMBERS[0]["value"]["bias"] + 5.0}}
    again = ensemble_scores(POLICY, [shifted, *MEMBERS[1:]], SEQUENCES)
    np.testing.assert_allclose(again.spread, found.spread, atol=1e-5)
    np.testing.assert_allclose(again.mean, found.mean + 5 / 3, atol=1e-5)
    assert found.spread.min() > 0 and not ensemble_scores(POLICY, MEMBERS[:1], SEQUENCES).spread.any()


def test_a_cautious_judge_trusts_less_what_members_do_not_agree_on():
    prompts, answers = [s[:1] for s in SEQUENCES], [s[1:] for s in SEQUENCES]
    found = ensemble_scores(POLICY, MEMBERS, SEQUENCES)
    np.testing.assert_allclose(reward_judge(POLICY, MEMBERS)(prompts, answers), found.mean, rtol=1e-6)
    cautious = reward_judge(POLICY, MEMBERS, caution=2.0)(prompts, answers)
    np.testing.assert_allclose(cautious, found.mean - 2 * found.spread, rtol=1e-5)


def test_probabilities_that_are_right_are_calibrated():
    random = np.random.default_rng(0)
    p = random.random(20000)
    right = calibration(p, random.random(20000) < p)
    assert right.error < 0.02 and right.counts.sum() == 20000
    sure = calibration(np.where(p > 0.5, 0.99, 0.01), random.random(20000) < p)
    assert sure.error == pytest.approx(0.24, abs=0.02)
    assert np.isnan(sure.predicted[4]) and sure.counts[4] == 0
    assert calibration(np.array([1.0]), np.array([1])).error == 0


def test_log_ratios_of_own_samples_estimate_the_divergence():
    """A bigram's KL over answers of two tokens, by the sum over all of them and from samples."""
    policy = lm.Policy(lm.models.bigram(vocab_size=4))
    own, other = (
        {"params": {"table": np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)}} for seed in (1, 2)
    )
    logp, logq = (np.asarray(jax.nn.log_softmax(v["params"]["table"])) for v in (own, other))
    pairs = [(a, b) for a in range(4) for b in range(4)]
    exact = sum(
        np.exp(logp[0, a] + logp[a, b]) * (logp[0, a] + logp[a, b] - logq[0, a] - logq[a, b]) for a, b in pairs
    )
    prompts = [np.array([0])] * 4000
    said = generate(policy, own, prompts, jax.random.key(0), max_new_tokens=2)
    batch = answers_batch(prompts, list(said.tokens), 3)
    ratios = sequence_log_ratios(policy, own, other, [batch])
    assert ratios.shape == (4000,)
    assert abs(ratios.mean() - exact) < 4 * ratios.std() / np.sqrt(4000) < 0.2 * exact
    none = dataclasses.replace(batch, mask=np.zeros_like(batch.mask))
    assert not sequence_log_ratios(policy, own, other, [none]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_scores(POLICY, MEMBERS[0], [np.array([1]), np.array([])]), "sequence 1 is empty"),
        (lambda: sequence_scores(POLICY, VARIABLES, SEQUENCES), "no value head"),
        (lambda: ensemble_scores(POLICY, [], SEQUENCES), "no member"),
        (lambda: calibration(np.array([0.5, 1.5]), np.array([0, 1])), "must lie in"),
        (lambda: calibration(np.array([]), np.array([])), "0 probabilities"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
