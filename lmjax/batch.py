"""The batch of token sequences that a policy reads and that terms are computed on."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

Array = Any  # a NumPy array in a data pipeline, a JAX array or tracer in a step


class Fork(NamedTuple):
    """How the columns of a row are divided: a prompt, and branches of equal width that see it and themselves.

    Attributes:
      prompt: P, columns of the prompt, from 0; its targets never count.
      branch: C, columns of each branch; T is P + n C.
    """

    prompt: int
    branch: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token sequences with every mask explicit.

    Attributes:
      tokens: int32 [B, T], the input ids.
      targets: int32 [B, T], the id that should follow each position.
      mask: float32 [B, T], the loss weight of each target; 0 leaves it out. Never inferred from a pad id.
      segments: int32 [B, T], the number of the document within its row, from 1; 0 is padding. Attention never
        crosses from one segment into another.
      positions: int32 [B, T], the position of each token within its document.
      temperature: float32 [B] or None. Logits are divided by it wherever log-probabilities are taken, in every
        role, so that a sampler, its policy and its reference can never disagree on it.
      fork: None, or that every row is one prompt (segment 1) which several continuations of it (segments from 2, one a
        branch) share: they see it as if it stood before each of them, and it is computed once. A branch begins with
        the prompt's last token, which the prompt leaves out, so that every branch has a first target of its own.
      shared: int32 [B, T] or None. The segment that each token sees besides its own, 0 for none: the same in rows of
        any make.
      scored: int32 [B, S] or None, the columns of each row whose targets may count, T where there are fewer. The pass
        over the vocabulary leaves the others out.
    """

    tokens: Array
    targets: Array
    mask: Array
    segments: Array
    positions: Array
    temperature: Array | None = None
    fork: Fork | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})
    shared: Array | None = dataclasses.field(default=None, kw_only=True)
    scored: Array | None = dataclasses.field(default=None, kw_only=True)

    @property
    def sequences(self) -> Array:
        """int32 [B, T], the number of the sequence each token is of, as reducers count them; 0 for none."""
        return self.segments if self.fork is None else self.segments * (self.segments > 1)

    @property
    def first_target(self) -> int:
        """The columns before this one have no targets that count, in any row."""
        return 0 if self.fork is None else self.fork.prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs of answers: segment 2p + 1 of a row is the chosen answer of its pair p behind its prompt, 2p + 2 the other.

    The two of a pair lie in one row, so that batches split between pairs, and rows hold as many as fit. `mask` has the
    tokens of the answers. The last token of a sequence is an input too, with no target, for scores are read there. The
    prompt of a pair may be a segment that both share: number 2P + 2p + 1, counted to the chosen answer's sequence.

    Attributes:
      pairs: float32 [B, P], the weight of each pair; 0 where a row has fewer.
      answers: K, static. More than 2 for rankings: segments K p + 1 to K p + K are the answers of group p, best first.
      margins: float32 [B, P] or None, by how much the chosen answer is said to be better.
      desirable: float32 [B, P] or None. Where given, there are no pairs: segment 2p + 1 is an answer that is liked (1)
        or not (0), and segment 2p + 2 the answer to another prompt behind this one (KTO).
      reference_logprobs: float32 [B, T] or None, those of the targets under the reference, computed beforehand.
    """

    pairs: Array = None
    answers: int = dataclasses.field(default=2, metadata={"static": True})
    margins: Array | None = None
    desirable: Array | None = None
    reference_logprobs: Array | None = None

    @property
    def sequences(self) -> Array:
        beyond = self.answers * self.pairs.shape[1]
        return self.segments - beyond * (self.segments > beyond)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeliefBatch(PairBatch):
    """Pairs of answers behind stated beliefs (pluralistic GDPO): prompt, belief, answer.

    Attributes:
      beliefs: float32 [B, T, K], the share of a population that holds each of K beliefs, at the token whose next one
        states which; 0 elsewhere.
      belief_mask: float32 [B, T], the tokens of the belief as targets; `mask` does not have them.
    """

    beliefs: Array = None
    belief_mask: Array = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBatch(Batch):
    """What a policy said, and how much better than expected each token of it was.

    `mask` has the tokens that the policy said itself and that are to be learned from; what an environment said, and
    rollouts that are left out, weigh nothing. A sequence is a rollout: a branch of a forked row, or a segment.

    Attributes:
      advantages: float32 [B, T], of each target; 0 where there is none.
      old_logprobs: float32 [B, T] or None, those of the targets under the policy that said them, at the row's
        temperature: the denominator of importance ratios. None: that policy is the one that learns, whose ratio is 1.
      sampling_logprobs: float32 [B, T] or None, under what the targets were drawn from in fact, where that differs.
      reference_logprobs: float32 [B, T] or None, under the reference, computed beforehand.
      values, returns: float32 [B, T] or None, what a critic expected before each target, and what it should have.
      value_mask: float32 [B, T] or None, where values are learned; None: as `mask` says.
      coefficients: name -> float32 [B], numbers that change from step to step by what was measured.
    """

    advantages: Array = None
    old_logprobs: Array | None = None
    sampling_logprobs: Array | None = None
    reference_logprobs: Array | None = None
    values: Array | None = None
    returns: Array | None = None
    value_mask: Array | None = None
    coefficients: dict[str, Array] = dataclasses.field(default_factory=dict)


def positions_within_segments(segments_BT: np.ndarray) -> np.ndarray:
    """Positions that restart at 0 wherever the segment number changes. int32 [B, T].

    >>> positions_within_segments(np.array([[1, 1, 2, 2, 2, 0]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    segments_BT = np.asarray(segments_BT)
    index_T = np.arange(segments_BT.shape[-1])
    starts = np.ones(segments_BT.shape, bool)
    starts[..., 1:] = segments_BT[..., 1:] != segments_BT[..., :-1]
    last_start = np.maximum.accumulate(np.where(starts, index_T, 0), axis=-1)
    return (index_T - last_start).astype(np.int32)


def next_token_batch(ids: np.ndarray, segments: np.ndarray | None = None, mask: np.ndarray | None = None) -> Batch:
    """The language-modelling batch of rows of ids: each position predicts the next one.

    Args:
      ids: int [B, T+1].
      segments: int [B, T+1] or None for one document a row; 0 marks padding.
      mask: [B, T+1] weight of each id as a target (its first column is unused), or None for all ones.

    Returns:
      A `Batch` with [B, T] NumPy leaves. A target counts only if it lies in the segment of its input: the last
      token of a document does not predict the first of the next one.

    >>> b = next_token_batch(np.array([[5, 6, 7, 8]]), segments=np.array([[1, 1, 2, 2]]))
    >>> b.tokens.tolist(), b.targets.tolist(), b.mask.tolist()
    ([[5, 6, 7]], [[6, 7, 8]], [[1.0, 0.0, 1.0]])
    """
    ids = np.asarray(ids, np.int32)
    segments = np.ones_like(ids) if segments is None else np.asarray(segments, np.int32)
    inside = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)
    weight = inside.astype(np.float32)
    if mask is not None:
        weight = weight * np.asarray(mask, np.float32)[:, 1:]
    return Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        mask=weight,
        segments=segments[:, :-1],
        positions=positions_within_segments(segments[:, :-1]),
    )
