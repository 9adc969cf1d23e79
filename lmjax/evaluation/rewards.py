"""What reward models say: scores, those of ensembles, whether probabilities can be believed; KL from samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.batch import Batch, positions_within_segments
from lmjax.errors import UserError
from lmjax.evaluation.logprobs import token_logprobs
from lmjax.models.decoder import Variables
from lmjax.policy import Policy


def sequence_scores(
    policy: Policy, variables: Variables, sequences: Sequence[np.ndarray], *, batch_size: int = 256
) -> np.ndarray:
    """The value head's number at the last token of each sequence, float32 [N].

    Compiles once for each power of two above the longest sequence.

    Args:
      policy, variables: a reward model; the variables have a "value" collection.
      sequences: N arrays of ids, each of at least one: a prompt and its answer.
      batch_size: rows at a time.

    Raises:
      UserError: an empty sequence, or no value head.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    if not lengths.all():
        raise UserError(f"sequence {int(np.argmin(lengths))} is empty and has no last token to score; leave it out.")
    T = 1 << max(int(lengths.max(initial=1)) - 1, 0).bit_length()
    found = []
    for first in range(0, len(sequences), batch_size):
        rows = sequences[first : first + batch_size]
        tokens, segments = np.zeros((2, batch_size, T), np.int32)
        last = np.zeros(batch_size, np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)], segments[b, : len(row)], last[b] = row, 1, len(row) - 1
        batch = Batch(
            tokens, np.zeros_like(tokens), np.zeros(tokens.shape, np.float32), segments,
            positions_within_segments(segments),
        )  # fmt: skip
        found.append(np.asarray(_last_values(policy, variables, batch, last))[: len(rows)])
    return np.concatenate(found) if found else np.zeros(0, np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _last_values(policy: Policy, variables: Variables, batch: Batch, last_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(policy(variables, batch).values, last_B[:, None], axis=1)[:, 0]


class EnsembleScores(NamedTuple):
    """What several reward models say of the same sequences.

    Attributes:
      mean: float64 [N].
      spread: float64 [N], their standard deviation (ddof 1), 0 of one model: how little they know.
      members: float64 [K, N].
    """

    mean: np.ndarray
    spread: np.ndarray
    members: np.ndarray


def ensemble_scores(policy: Policy, members: Sequence[Variables], sequences: Sequence[np.ndarray]) -> EnsembleScores:
    """Scores of each of K reward models of one shape, their mean and spread. See `sequence_scores`.

    Bradley-Terry leaves a model's scores free to shift, so each member's are centred on its mean over the sequences
    before they are compared; the mean's own level is the mean of those.

    Raises:
      UserError: no member.
    """
    if not members:
        raise UserError("the ensemble has no member; give at least one reward model.")
    scores = np.stack([sequence_scores(policy, one, sequences) for one in members]).astype(np.float64)
    centred = scores - (scores.mean(axis=1, keepdims=True) if scores.size else 0.0)
    spread = centred.std(axis=0, ddof=1) if len(scores) > 1 else np.zeros(scores.shape[1])
    return EnsembleScores(scores.mean(axis=0), spread, scores)


def reward_judge(
    policy: Policy, members: Sequence[Variables], *, caution: float = 0.0
) -> Callable[[list[np.ndarray], list[np.ndarray]], np.ndarray]:
    """One or several reward models as a judge (`generation.judged_samples`): their mean less `caution` times spread.

    Caution slows over-optimisation where the members disagree (Coste et al., arXiv:2310.02743).
    """

    def judge(prompts: list[np.ndarray], answers: list[np.ndarray]) -> np.ndarray:
        sequences = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
        found = ensemble_scores(policy, members, sequences)
        return found.mean - caution * found.spread

    return judge


class Calibration(NamedTuple):
    """Predictions beside what came to pass, in bins of equal width.

    Attributes:
      predicted: float64 [K], the mean probability in each bin, NaN where it is empty.
      observed: float64 [K], how often it came to pass.
      counts: int64 [K].
      error: the mean distance of the two, by counts (expected calibration error, Naeini et al. 2015).
    """

    predicted: np.ndarray
    observed: np.ndarray
    counts: np.ndarray
    error: float


def calibration(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = 10) -> Calibration:
    """Whether probabilities can be taken at their word.

    Args:
      probabilities: [N] in [0, 1], as `sigmoid(first - second)` of a reward model's scores. Pairs should come in an
        order that does not depend on which one is better.
      outcomes: [N], 1 where it came to pass.
      bins: K.

    Raises:
      UserError: nothing to look at, or numbers outside [0, 1].

    >>> found = calibration(np.array([0.1, 0.3, 0.9, 0.9]), np.array([0, 0, 1, 0]), bins=2)
    >>> found.predicted.tolist(), found.observed.tolist(), found.counts.tolist(), round(found.error, 3)
    ([0.2, 0.9], [0.0, 0.5], [2, 2], 0.3)
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    if p.shape != y.shape or p.ndim != 1 or not p.size or bins < 1:
        raise UserError(f"there are {p.size} probabilities, {y.size} outcomes and {bins} bins; give one outcome each.")
    if not ((p >= 0) & (p <= 1) & (y >= 0) & (y <= 1)).all():
        raise UserError("probabilities and outcomes must lie in [0, 1]; put scores through a sigmoid first.")
    place = np.minimum((p * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=x, minlength=bins) for x in (p, y)]
    predicted, observed = (np.where(counts > 0, s / np.maximum(counts, 1), np.nan) for s in sums)
    error = float(np.nansum(np.abs(predicted - observed) * counts) / p.size)
    return Calibration(predicted, observed, counts, error)


def sequence_log_ratios(
    policy: Policy, variables: Variables, reference: Variables, batches: Iterable[Batch]
) -> np.ndarray:
    """`log pi(y|x) - log ref(y|x)` of each row, summed over its targets by mask, in nats, float64 [N].

    Over the policy's own samples, at the temperature of the batch, their mean is an unbiased estimate of
    KL(policy || reference) of a whole answer, and its scatter says how good an estimate.

    Args:
      policy, variables, reference: the model and the variables of both.
      batches: any batches, as `generation.answers_batch` of samples.
    """
    found = []
    for batch in batches:
        (own,), (other,) = (token_logprobs(policy, either, [batch]) for either in (variables, reference))
        difference = own.astype(np.float64) - other
        mask = np.asarray(batch.mask)
        found.append(np.sum(np.where(mask > 0, difference, 0.0) * mask, axis=1))
    return np.concatenate(found) if found else np.zeros(0)
