"""Judged samples as batches: who is better, what is left out, and that the tokens are those that were sampled."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax import UserError
from lmjax.data.preferences import Pair
from lmjax.generation import (
    JudgedSamples,
    answers_batch,
    best_and_worst,
    best_of_n_batch,
    generate,
    judged_samples,
    online_pairs,
)
from lmjax.objectives import evaluate
from tests.models.small import FAMILIES, variables_of

CONFIG = FAMILIES["gpt2"]
POLICY, VARIABLES = lm.Policy(CONFIG), variables_of(CONFIG)
PROMPTS = [np.array([3, 5, 4]), np.array([6, 8]), np.array([9, 2, 1, 4])]
END = 7


def _sum(prompts, answers):
    assert len(prompts) == len(answers)
    return [float(answer.sum() - 100 * prompt[0]) for prompt, answer in zip(prompts, answers)]


def _found(samples=4, penalty=50.0, judge=_sum):
    options = dict(samples=samples, max_new_tokens=5, eos=END, missing_eos_penalty=penalty, temperature=3.0)
    return judged_samples(POLICY, VARIABLES, PROMPTS, jax.random.key(4), judge, **options)


FOUND = _found()


def test_answers_are_what_was_sampled_and_each_is_judged_behind_its_own_prompt():
    said = generate(
        POLICY, VARIABLES, PROMPTS, jax.random.key(4), max_new_tokens=5, eos=END, samples=4, temperature=3.0
    )
    for p, prompt in enumerate(PROMPTS):
        for n in range(4):
            row = 4 * p + n
            answer = FOUND.answers[p][n]
            np.testing.assert_array_equal(answer, said.tokens[row, : said.lengths[row]])
            ended = bool(answer[-1] == END)
            assert FOUND.ended[p, n] == ended
            assert FOUND.scores[p, n] == answer.sum() - 100 * prompt[0] - (0 if ended else 50)
    assert 0 < FOUND.ended.sum() < FOUND.ended.size, "both kinds are there, or the test says nothing"


def test_the_best_stands_against_the_worst():
    pairs = best_and_worst(FOUND)
    batch = online_pairs(FOUND, 20)
    assert batch.tokens.shape == (3, 20) and batch.pairs.tolist() == [[1.0]] * 3 and batch.margins is None
    for p, pair in enumerate(pairs):
        assert isinstance(pair, Pair) and pair.margin == FOUND.scores[p].max() - FOUND.scores[p].min()
        best, worst = (FOUND.answers[p][f(FOUND.scores[p])] for f in (np.argmax, np.argmin))
        np.testing.assert_array_equal(pair.first.ids, np.concatenate([PROMPTS[p], best]))
        np.testing.assert_array_equal(pair.second.ids[pair.second.learned], worst)
        for number, answer in ((1, best), (2, worst)):
            own = (batch.segments[p] == number) & (batch.mask[p] > 0)
            np.testing.assert_array_equal(batch.targets[p][own], answer)


def test_ties_teach_nothing():
    flat = _found(samples=2, penalty=0.0, judge=lambda prompts, answers: np.zeros(len(answers)))
    assert best_and_worst(flat) == []
    one = flat._replace(scores=np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 3.0]]))
    batch = online_pairs(one, 18)
    assert batch.tokens.shape == (3, 18) and batch.pairs.sum() == 1
    loss = lambda batch: evaluate(lm.objectives.simpo(), POLICY, VARIABLES, batch).loss
    alone = online_pairs(
        JudgedSamples(one.prompts[1:2], one.answers[1:2], one.scores[1:2], one.ended[1:2]), 18
    )
    np.testing.assert_allclose(loss(batch), loss(alone), rtol=1e-6)


def test_best_of_n_and_rejection():
    batch = best_of_n_batch(FOUND, 9)
    for p in range(3):
        best = FOUND.answers[p][int(np.argmax(FOUND.scores[p]))]
        np.testing.assert_array_equal(batch.targets[p][batch.mask[p] > 0], best)
    limit = float(np.sort(FOUND.scores.max(axis=1))[1])
    kept = best_of_n_batch(FOUND, 9, least=limit)
    assert (kept.mask.sum(axis=1) > 0).tolist() == (FOUND.scores.max(axis=1) >= limit).tolist()
    assert (kept.mask.sum(axis=1) > 0).sum() == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _found(judge=lambda prompts, answers: [1.0]), r"scores of shape \[1\] for 12 answers"),
        (lambda: _found(judge=lambda prompts, answers: [1.0] * 3 + [np.nan] * 9), "answer 3 no finite score"),
        (lambda: online_pairs(_found(samples=1), 20), "at least two answers"),
        (lambda: online_pairs(FOUND, 7), "does not fit 7"),
        (lambda: answers_batch([np.array([1, 2])], [np.array([3, 4])], 2), "4 tokens, rows room for 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
