"""Which prompts come, which of their rollouts teach something, and which are learned from once more."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lmjax.errors import UserError
from lmjax.rl.plan import Plan
from lmjax.rl.rewards import Scores
from lmjax.rl.rollouts import Rollout
from lmjax.rl.saving import pack_rollouts, unpack_rollouts


def scores_differ(rollouts: Sequence[Rollout], scores: Scores) -> bool:
    """Whether the rollouts of a prompt were not all judged alike: what DAPO keeps (dynamic sampling).

    Those with a likeliest answer teach something where one of them was judged other than it.
    """
    gap = scores.total if scores.given is None else scores.total - scores.given
    there = gap[np.isfinite(gap)]
    return bool(len(there) > 1 and np.ptp(there) > 0 if scores.given is None else there.any())


class Curriculum:
    """Prompts by how often they were answered well: those in between come most, none is forgotten.

    A prompt that was tried weighs `4 p (1 - p) + least`, p the running share of its rollouts that pass; one that was
    not weighs 1.

    Args:
      count: how many prompts there are.
      passing: the score from which a rollout passes.
      decay: share of the old rate that is kept when a prompt is tried again.
      least: what prompts that always or never pass weigh.

    >>> curriculum = Curriculum(3)
    >>> curriculum.update([0, 0, 1, 1], [1.0, 1.0, 1.0, 0.0])
    >>> curriculum.weights().tolist()
    [0.1, 1.1, 1.0]
    """

    def __init__(self, count: int, *, passing: float = 1.0, decay: float = 0.5, least: float = 0.1):
        if count < 1 or not 0 <= decay < 1 or least <= 0:
            raise UserError(f"count {count}, decay {decay} or least {least} is out of range for a curriculum.")
        self._passing, self._decay, self._least = passing, decay, least
        self.rates = np.full(count, np.nan)

    def update(self, prompts: Any, scores: Any) -> None:
        """Takes the scores of rollouts, and the number of each one's prompt."""
        prompts, scores = np.asarray(prompts), np.asarray(scores, np.float64)
        if prompts.shape != scores.shape or (
            len(prompts) and not 0 <= prompts.min() <= prompts.max() < len(self.rates)
        ):
            raise UserError(
                f"{prompts.shape} prompts and {scores.shape} scores for a curriculum of {len(self.rates)} prompts; "
                "give one score for each, and numbers of known prompts."
            )
        for number in np.unique(prompts):
            own = scores[(prompts == number) & np.isfinite(scores)]
            if not len(own):
                continue
            rate, old = float(np.mean(own >= self._passing)), self.rates[number]
            self.rates[number] = rate if np.isnan(old) else self._decay * old + (1 - self._decay) * rate

    def weights(self) -> np.ndarray:
        """float64 [count]."""
        return np.where(np.isnan(self.rates), 1.0, 4 * self.rates * (1 - self.rates) + self._least)

    def get_state(self) -> dict[str, Any]:
        return {"rates": [None if np.isnan(rate) else float(rate) for rate in self.rates]}

    def set_state(self, state: dict[str, Any]) -> None:
        if len(state["rates"]) != len(self.rates):
            raise UserError(f"the state is of {len(state['rates'])} prompts and the curriculum of {len(self.rates)}.")
        self.rates = np.array([np.nan if rate is None else rate for rate in state["rates"]])


class Replay:
    """Groups of rollouts of earlier policies, learned from again beside fresh ones.

    A replayed rollout keeps the log-probabilities of the policy that said it, so that its importance ratio is right,
    and its `version`, so that `rollout/staleness` tells its age. It is judged again, among its own group.

    Args:
      size: groups that are kept; the oldest give way.
      oldest: updates after which a group is no longer given.
      share: of the prompts of an iteration (of each of its chunks), whose place replayed groups take.

    Raises:
      UserError: a number is out of range.
    """

    def __init__(self, size: int, *, oldest: int, share: float = 0.25):
        if size < 1 or oldest < 1 or not 0 < share < 1:
            raise UserError(f"size {size}, oldest {oldest} or share {share} is out of range for a replay.")
        self.oldest, self.share = oldest, share
        self._groups: collections.deque[list[Rollout]] = collections.deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, rollouts: Sequence[Rollout], scores: Scores | None = None) -> None:
        """Keeps groups that are not kept yet; with scores, only those that teach something (`scores_differ`)."""
        kept = {_identity(group) for group in self._groups}
        groups: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.group, []).append(i)
        for index in groups.values():
            group = [rollouts[i] for i in index]
            teaches = scores is None or scores_differ(group, scores.take(index))
            if teaches and _identity(group) not in kept:
                kept.add(_identity(group))
                self._groups.append(group)

    def draw(self, count: int, version: int, key: jax.Array) -> list[list[Rollout]]:
        """So many groups that are young enough at an update, by chance; none while there are fewer."""
        young = [group for group in self._groups if version - group[0].version <= self.oldest]
        if len(young) < count:
            return []
        random = np.random.default_rng(np.ravel(jax.random.key_data(key)).tolist())
        return [young[i] for i in sorted(random.choice(len(young), count, replace=False).tolist())]

    def mixing(self, roll_out: Callable[..., list[Rollout]], plan: Plan) -> Callable[..., list[Rollout]]:
        """A function for `Experience` that rolls out fewer prompts, and gives kept groups in place of the last ones.

        Until enough are kept it rolls out all, so there are two shapes of rollouts to compile, and no more.

        Raises:
          UserError: the plan keeps no log-probabilities of earlier policies, or has too few prompts for the share.
        """
        if plan.on_policy:
            raise UserError(
                "this plan takes every rollout for one of the present policy, and replayed ones are not; use several "
                "epochs or minibatches, or stale=1."
            )
        if int(self.share * (plan.prompts // plan.chunks)) < 1:
            raise UserError(
                f"a share of {self.share} of {plan.prompts // plan.chunks} prompts is less than one; raise one of them."
            )

        def mixed(
            variables: Any, prompts: Sequence[Any], key: jax.Array, *, first_group: int = 0, version: int = 0
        ) -> list[Rollout]:
            again = self.draw(int(self.share * len(prompts)), version, key)
            fresh = len(prompts) - len(again)
            found = roll_out(variables, prompts[:fresh], key, first_group=first_group, version=version)
            numbered = enumerate(again, first_group + fresh)
            return found + [dataclasses.replace(rollout, group=n) for n, group in numbered for rollout in group]

        return mixed

    def get_state(self) -> dict[str, Any]:
        """What is kept, as JSON values."""
        rollouts = [rollout for group in self._groups for rollout in group]
        return {"sizes": [len(group) for group in self._groups], "rollouts": pack_rollouts(rollouts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on with what was kept."""
        rollouts = iter(unpack_rollouts(state["rollouts"]))
        self._groups.clear()
        self._groups.extend([next(rollouts) for _ in range(size)] for size in state["sizes"])


def _identity(group: Sequence[Rollout]) -> tuple[int, int]:
    return group[0].version, group[0].number
