"""A policy's own answers, judged, as batches to train on: online DPO, best-of-n distillation, rejection sampling.

A judge is any function `(prompts, answers) -> scores`: lists of id arrays in, one number each out. A reward model is
made one by `evaluation.reward_judge`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.batch import Batch, PairBatch, next_token_batch
from lmjax.data.preferences import Answer, Pair, pair_batch
from lmjax.errors import UserError
from lmjax.generation.engine import FINISH
from lmjax.generation.sampler import generate
from lmjax.models.decoder import Variables
from lmjax.policy import Policy

Judge = Callable[[list[np.ndarray], list[np.ndarray]], Any]


class JudgedSamples(NamedTuple):
    """n answers to each of P prompts.

    Attributes:
      prompts: P arrays of ids.
      answers: P lists of n arrays of ids, with their end-of-sequence token where they have one.
      scores: float64 [P, n], of the judge, less the penalty of answers without an end.
      ended: bool [P, n], whether an answer ends.
    """

    prompts: list[np.ndarray]
    answers: list[list[np.ndarray]]
    scores: np.ndarray
    ended: np.ndarray


def judged_samples(
    policy: Policy,
    variables: Variables,
    prompts: Sequence[Any],
    key: jax.Array,
    judge: Judge,
    *,
    samples: int,
    max_new_tokens: int,
    eos: int | Sequence[int],
    missing_eos_penalty: float = 0.0,
    **options: Any,
) -> JudgedSamples:
    """Samples answers and has them judged.

    Args:
      policy, variables: the model.
      prompts: arrays of ids.
      key: seeds the sampling.
      judge: gives each answer a score, higher is better; answers come with their end-of-sequence token.
      samples: n, answers of each prompt.
      max_new_tokens: of an answer.
      eos: the id or ids that end an answer.
      missing_eos_penalty: what is taken off the score of an answer that does not end.
      options: of `generate`: temperature, processors, mesh and so on.

    Raises:
      UserError: the judge gave too few or too many scores, or one that is no number; and see `generate`.

    >>> import lmjax as lm, jax.numpy as jnp
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = {"params": {"table": 50 * jnp.roll(jnp.eye(4), 1, axis=1)}}  # after n comes n + 1
    >>> longest = lambda prompts, answers: [len(answer) for answer in answers]
    >>> found = judged_samples(policy, variables, [[0], [2]], jax.random.key(0), longest, samples=1,
    ...                        max_new_tokens=2, eos=3, missing_eos_penalty=5.0)
    >>> found.scores.tolist(), found.ended.tolist()
    ([[-3.0], [1.0]], [[False], [True]])
    """
    asked = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    found = generate(
        policy, variables, asked, key, max_new_tokens=max_new_tokens, eos=eos, samples=samples, **options
    )
    tokens_BN, lengths_B = np.asarray(found.tokens), np.asarray(found.lengths)
    said = [tokens_BN[b, : lengths_B[b]] for b in range(len(tokens_BN))]
    scores = np.asarray(judge([asked[b // samples] for b in range(len(said))], said), np.float64)
    if scores.shape != (len(said),):
        raise UserError(f"the judge gave scores of shape {list(scores.shape)} for {len(said)} answers; give one each.")
    if not np.isfinite(scores).all():
        raise UserError(f"the judge gave answer {int(np.argmin(np.isfinite(scores)))} no finite score; mend the judge.")
    shape = (len(asked), samples)
    ended = (np.asarray(found.finish) == FINISH.index("eos")).reshape(shape)
    return JudgedSamples(
        asked,
        [said[p * samples : (p + 1) * samples] for p in range(len(asked))],
        scores.reshape(shape) - missing_eos_penalty * ~ended,
        ended,
    )


def best_and_worst(found: JudgedSamples) -> list[Pair]:
    """The best answer of each prompt against its worst, as `data.pair_batch` takes pairs; None of ties.

    The margin of a pair is the difference of the scores. Prompts whose answers all score the same give no pair.
    """
    pairs = []
    for prompt, answers, scores in zip(found.prompts, found.answers, found.scores):
        best, worst = int(np.argmax(scores)), int(np.argmin(scores))
        if scores[best] > scores[worst]:
            first, second = (_answer(prompt, answers[i]) for i in (best, worst))
            pairs.append(Pair(first, second, float(scores[best] - scores[worst])))
    return pairs


def online_pairs(found: JudgedSamples, sequence_length: int) -> PairBatch:
    """The batch of online DPO (Guo et al., arXiv:2402.04792): a row a prompt, its best answer against its worst.

    A prompt whose answers all score the same has a row without a pair, so that batches keep their shape. (TRL takes
    the first of two as the better one then, which teaches noise.) Margins are left out.

    Args:
      found: at least two answers of each prompt.
      sequence_length: T, at least both answers with their prompts.

    Raises:
      UserError: one answer of each prompt only, or T is too short.

    >>> samples = JudgedSamples([np.array([7])] * 2, [[np.array([1, 2]), np.array([3])]] * 2,
    ...                         np.array([[0.0, 1.0], [2.0, 2.0]]), np.ones((2, 2), bool))
    >>> batch = online_pairs(samples, 6)
    >>> batch.tokens.tolist(), batch.pairs.tolist()
    ([[7, 3, 7, 1, 2, 0], [0, 0, 0, 0, 0, 0]], [[1.0], [0.0]])
    """
    if found.scores.shape[1] < 2:
        raise UserError("pairs need at least two answers of each prompt; sample with samples=2.")
    rows = [[dataclasses.replace(pair, margin=0.0)] for pair in best_and_worst(found)]
    rows += [[] for _ in range(len(found.prompts) - len(rows))]
    return pair_batch(rows, sequence_length, 1)


def best_of_n_batch(found: JudgedSamples, length: int, *, least: float | None = None) -> Batch:
    """The best answer of each prompt as text to learn: best-of-n distillation, RAFT (Dong et al., arXiv:2304.06767).

    Args:
      found: any number of answers of each prompt.
      length: T.
      least: rejection sampling: prompts whose best answer scores less teach nothing.

    Returns:
      A batch [P, T]; only answers count as targets.
    """
    best = np.argmax(found.scores, axis=1)
    answers = [answers[i] for answers, i in zip(found.answers, best)]
    batch = answers_batch(found.prompts, answers, length)
    if least is None:
        return batch
    good = np.max(found.scores, axis=1) >= least
    return dataclasses.replace(batch, mask=batch.mask * good[:, None].astype(np.float32))


def answers_batch(prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], length: int) -> Batch:
    """A row for each prompt and answer, padded; only answers count as targets.

    Args:
      prompts, answers: arrays of ids, as many of one as of the other.
      length: T, at least one less than the longest prompt and answer.

    Raises:
      UserError: T is too short.

    >>> batch = answers_batch([np.array([7, 8])], [np.array([1, 2])], 4)
    >>> batch.tokens.tolist(), batch.targets.tolist(), batch.mask.tolist()
    ([[7, 8, 1, 2]], [[8, 1, 2, 0]], [[0.0, 1.0, 1.0, 0.0]])
    """
    ids, segments = np.zeros((2, len(prompts), length + 1), np.int32)
    mask = np.zeros((len(prompts), length + 1), np.float32)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        if end > length + 1:
            raise UserError(f"a prompt and its answer have {end} tokens, rows room for {length + 1}; give longer rows.")
        ids[b, :end] = np.concatenate([prompt, answer])
        segments[b, :end], mask[b, len(prompt) : end] = 1, 1.0
    return next_token_batch(ids, segments, mask)


def _answer(prompt: np.ndarray, answer: np.ndarray) -> Answer:
    return Answer(np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt))
