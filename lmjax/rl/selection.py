"""Which prompts come, and which of their rollouts teach something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.errors import UserError
from lmjax.rl.rewards import Scores
from lmjax.rl.rollouts import Rollout


def scores_differ(rollouts: Sequence[Rollout], scores: Scores) -> bool:
    """Whether the rollouts of a prompt were not all judged alike: what DAPO keeps (dynamic sampling)."""
    total = scores.total
    there = total[np.isfinite(total)]
    return len(there) > 1 and bool(np.ptp(there) > 0)


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
        self.rates = np.array([np.nan if rate is None else rate for rate in state["rates"]])
