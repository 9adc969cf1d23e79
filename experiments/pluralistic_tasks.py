"""A population that does not agree: seven in ten hold one belief, three the other, and like answers accordingly.

A sequence is a prompt, a belief, an answer. Who holds the first belief likes the letters that were asked for, who holds
the second those that were not. Which belief most hold depends on the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import lmjax as lm
from experiments.compare_preferences_config import ComparePreferencesConfig
from experiments.preference_tasks import (
    ASKED,
    BELIEFS,
    FIRST_BELIEF,
    FIRST_LETTER,
    LENGTH,
    LETTERS,
    Ids,
    Language,
    pair_rows,
    questions,
    small_policy,
    spoken,
    supervised,
    worth,
)  # fmt: skip
from lmjax.batch import Batch, BeliefBatch, PairBatch
from lmjax.data.preferences import Answer, Pair
from lmjax.generation import answers_batch, best_and_worst

MAJORITY = 0.7


def shares(first_letters: np.ndarray) -> np.ndarray:
    """How many hold each belief, by the first letter of the prompt. float32 [..., 2].

    >>> shares(np.array([FIRST_LETTER, FIRST_LETTER + LETTERS - 1])).round(1).tolist()
    [[0.7, 0.3], [0.3, 0.7]]
    """
    first = np.where(np.asarray(first_letters) < FIRST_LETTER + LETTERS // 2, MAJORITY, 1 - MAJORITY)
    return np.stack([first, 1 - first], axis=-1).astype(np.float32)


def belief_reward(prompts: Ids, answers: Ids) -> np.ndarray:
    """What who holds the belief at the end of each prompt makes of each answer.

    >>> prompt, answer = [2, 3, 4, 5, ASK], np.array([2, 9])
    >>> belief_reward([np.array([*prompt, belief]) for belief in BELIEFS], [answer, answer]).tolist()
    [0.0, 0.0]
    """
    letters = np.arange(FIRST_LETTER, FIRST_LETTER + LETTERS)
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        asked = prompt[:ASKED]
        wanted = asked if prompt[ASKED + 1] == FIRST_BELIEF else np.setdiff1d(letters, asked)
        found.append(worth(wanted, answer))
    return np.array(found)


def undecided(config: ComparePreferencesConfig, say: Callable[[str], None]) -> Language:
    """The model to start from: states either belief as often, and answers alike behind both."""
    policy = small_policy()

    def examples(random: np.random.Generator) -> Batch:
        prompts = questions(random, config.supervised_examples)
        beliefs = FIRST_BELIEF + random.integers(0, 2, len(prompts))
        answers = [np.append(belief, answer) for belief, answer in zip(beliefs, spoken(random, prompts))]
        return answers_batch(prompts, answers, LENGTH)

    variables, loss = supervised(policy, config, examples)
    say(f"the model to start from, with beliefs: loss {loss:.4f} a token")
    return Language(policy, variables, config)


def believed(random: np.random.Generator, prompts: Ids) -> list[np.ndarray]:
    """Each prompt with the belief of somebody out of the population behind it."""
    first = shares(np.array([prompt[0] for prompt in prompts]))[:, 0]
    beliefs = np.where(random.random(len(prompts)) < first, *BELIEFS)
    return [np.append(prompt, belief).astype(np.int32) for prompt, belief in zip(prompts, beliefs)]


def voted_pairs(language: Language, label: Sequence[int], count: int) -> list[Pair]:
    """Two samples behind the belief of each of `count` voters, the one that the voter likes better first."""
    random = np.random.default_rng([language.config.seed, 7, *label])
    prompts = believed(random, questions(random, count))
    key = jax.random.key(int(random.integers(2**31)))
    found = best_and_worst(language.samples(language.variables, prompts, key, belief_reward, 2))
    return [dataclasses.replace(pair, margin=0.0) for pair in found]


def belief_rows(pairs: Sequence[Pair]) -> BeliefBatch:
    """Pairs for GDPO: the answers are scored, and the shares stand where a belief comes next."""
    rows = pair_rows(pairs)
    asked = (rows.positions == ASKED) & (rows.segments > 0)
    first_letters = np.roll(rows.tokens, ASKED, axis=1)
    fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    return BeliefBatch(
        **fields, beliefs=shares(first_letters) * asked[..., None], belief_mask=asked.astype(np.float32)
    )


def same_belief_rows(pairs: Sequence[Pair]) -> PairBatch:
    """Pairs for DPO: belief and answer are what is said, behind the same belief on both sides."""
    return pair_rows([Pair(_with_belief(pair.first), _with_belief(pair.second)) for pair in pairs])


def opposed_rows(pairs: Sequence[Pair]) -> PairBatch:
    """Pairs for DPO: a voter's belief and what the voter likes, against the other belief and the other answer."""
    found = []
    for pair in pairs:
        second = _with_belief(pair.second)
        second.ids[ASKED + 1] = sum(BELIEFS) - second.ids[ASKED + 1]
        found.append(Pair(_with_belief(pair.first), second))
    return pair_rows(found)


def _with_belief(answer: Answer) -> Answer:
    return Answer(answer.ids.copy(), np.arange(len(answer.ids)) > ASKED)


def measured(language: Language, variables: Any, seed: int, held_out: BeliefBatch) -> dict[str, float]:
    """Distance of the beliefs to the population's, preference accuracy, and the worth of fresh answers to believers.

    Args:
      language: the starting model.
      variables: of the model that is measured.
      seed: of the samples.
      held_out: pairs from `belief_rows`, with the starting model's log-probabilities.
    """
    sums = lm.evaluation.evaluate_objective(_MEASURES, language.policy, variables, [held_out])
    metric = lambda name: sums[name][0] / sums[name][1]
    (logprobs,) = lm.evaluation.token_logprobs(language.policy, variables, [held_out])
    there = held_out.belief_mask > 0
    stated = np.exp(logprobs[there].astype(np.float64))
    share = np.take_along_axis(held_out.beliefs[there], (held_out.targets[there] - FIRST_BELIEF)[:, None], axis=1)[:, 0]
    random = np.random.default_rng([language.config.seed, 8, seed])
    prompts = believed(random, questions(random, language.config.samples))
    key = jax.random.key(int(random.integers(2**31)))
    return {
        "js_distance": metric("beliefs/js_distance"),
        "majority": float(np.mean(np.where(share > 0.5, stated, 1 - stated))),
        "accuracy": metric("rewards/accuracies"),
        "reward": float(language.samples(variables, prompts, key, belief_reward, 1).scores.mean()),
    }


_MEASURES = lm.objectives.belief_kl(options=BELIEFS) + lm.objectives.with_cached_reference(lm.objectives.dpo())
