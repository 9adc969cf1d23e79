"""Where rollouts lie in a batch: a row is a prompt that is computed once, and rollouts of it beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lmjax.batch import Fork, RolloutBatch
from lmjax.errors import UserError
from lmjax.rl.rollouts import Rollout

MULTIPLE = 8  # widths are rounded up to these, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of N rollouts in a batch [B, T].

    Attributes:
      fork: columns of the prompt, and of each rollout.
      shape: (B, T).
      rows, starts: int [N], the row of each rollout, and the column of its first target.
      lengths: int [N], how many targets it has.
    """

    fork: Fork
    shape: tuple[int, int]
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def place(self, values: Sequence[Any]) -> np.ndarray:
        """float32 [B, T] with numbers of each rollout at its targets: one for all, or one each and perhaps one more."""
        found = np.zeros(self.shape, np.float32)
        for value, row, start, length in zip(values, self.rows, self.starts, self.lengths, strict=True):
            found[row, start : start + (length if np.ndim(value) == 0 else len(value))] = value
        return found

    def pick(self, values_BT: Any, extra: int = 0) -> list[np.ndarray]:
        """The numbers of each rollout's tokens, and of so many places behind: the inverse of `place`."""
        values_BT = np.asarray(values_BT)
        return [values_BT[r, s : s + n + extra] for r, s, n in zip(self.rows, self.starts, self.lengths, strict=True)]


def lay_out(
    rollouts: Sequence[Rollout],
    *,
    per_row: int,
    prompt: int | None = None,
    branch: int | None = None,
    rows: int | None = None,
    last_token: bool = False,
) -> Layout:
    """Places rollouts: those of one prompt that follow each other share rows.

    Args:
      rollouts: in the order of their groups.
      per_row: rollouts of a row at the most.
      prompt, branch: columns for the prompt (without its last token) and for each rollout; None: as many as are needed,
        rounded up.
      rows: B; rows that are not needed stay empty. None: as many as are needed.
      last_token: leave room for the last token of each rollout as an input; see `rollout_batch`.

    Raises:
      UserError: nothing to place, or too little room.

    >>> from lmjax.rl import Rollout
    >>> zeros = np.zeros(2, np.float32)
    >>> say = lambda group: Rollout(np.array([7, 8]), np.array([1, 2]), group, zeros, zeros, "eos", zeros == 0)
    >>> layout = lay_out([say(0), say(0), say(1)], per_row=2, prompt=1, branch=3)
    >>> layout.shape, layout.rows.tolist(), layout.starts.tolist()
    ((2, 7), [0, 0, 1], [1, 4, 1])
    """
    if not rollouts:
        raise UserError("there are no rollouts to learn from.")
    longest_prompt = max(len(rollout.prompt) - 1 for rollout in rollouts)
    longest = max(len(rollout.tokens) for rollout in rollouts) + last_token
    P = rounded(longest_prompt) if prompt is None else prompt
    C = rounded(max(longest, 1)) if branch is None else branch
    if longest_prompt > P or longest > C:
        raise UserError(
            f"the longest prompt has {longest_prompt + 1} tokens and the longest rollout {longest}; "
            f"rows have room for {P + 1} and {C}."
        )
    place, taken, before = [], 0, None
    row = -1
    for rollout in rollouts:
        if rollout.group != before or taken == per_row:
            row, taken, before = row + 1, 0, rollout.group
        place.append((row, P + taken * C))
        taken += 1
    B = row + 1 if rows is None else rows
    if row >= B:
        raise UserError(f"the rollouts need {row + 1} rows, and there are {B}; give more, or more rollouts to a row.")
    where = np.array(place)
    lengths = np.array([len(rollout.tokens) for rollout in rollouts])
    return Layout(Fork(P, C), (B, P + per_row * C), where[:, 0], where[:, 1], lengths)


def rollout_batch(
    rollouts: Sequence[Rollout],
    layout: Layout,
    *,
    temperature: float | None = None,
    left_out: Sequence[bool] | None = None,
    advantages: Sequence[Any] | None = None,
    old: bool = True,
    sampling: bool = False,
    last_token: bool = False,
) -> RolloutBatch:
    """The batch of rollouts, on the host.

    Args:
      rollouts: as they were laid out.
      layout: from `lay_out`.
      temperature: of the policy that said them; None for 1.
      left_out: rollouts that nothing is learned from: their mask is 0, and they weigh nothing in any mean.
      advantages: of each rollout: a number, or one a token; None for 0.
      old: with the log-probabilities they had when they were said.
      sampling: with those under what they were drawn from.
      last_token: the last token of a rollout is an input too, with no target, so that a value can be read behind it.
    """
    (B, T), (P, C) = layout.shape, layout.fork
    tokens, targets, segments, positions = np.zeros((4, B, T), np.int32)
    mask = np.zeros((B, T), np.float32)
    for i, rollout in enumerate(rollouts):
        row, start, n, before = layout.rows[i], layout.starts[i], layout.lengths[i], len(rollout.prompt) - 1
        tokens[row, :before], segments[row, :before] = rollout.prompt[:-1], 1
        positions[row, :before] = np.arange(before)
        at, m = slice(start, start + n), n + last_token
        inputs = slice(start, start + m)
        tokens[row, inputs] = np.concatenate([rollout.prompt[-1:], rollout.tokens])[:m]
        targets[row, at], mask[row, at] = rollout.tokens, rollout.own
        segments[row, inputs], positions[row, inputs] = 2 + (start - P) // C, before + np.arange(m)
        if left_out is not None and left_out[i]:
            mask[row, at] = 0.0
    return RolloutBatch(
        tokens,
        targets,
        mask,
        segments,
        positions,
        None if temperature is None else np.full((B,), temperature, np.float32),
        fork=layout.fork,
        advantages=np.zeros((B, T), np.float32) if advantages is None else layout.place(advantages),
        old_logprobs=layout.place([rollout.logprobs for rollout in rollouts]) if old else None,
        sampling_logprobs=layout.place([rollout.sampling_logprobs for rollout in rollouts]) if sampling else None,
    )


def take_rows(batch: RolloutBatch, index: Any) -> RolloutBatch:
    """Some rows of a batch, in that order."""
    found: RolloutBatch = jax.tree.map(lambda leaf: leaf[index], batch)
    return found


def rounded(length: int) -> int:
    """A number of columns with room for so many: few different ones, within a quarter of what is needed."""
    step = max(MULTIPLE, 2 ** (int(length).bit_length() - 3)) if length else 1
    return -(-length // step) * step
