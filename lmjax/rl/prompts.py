"""Prompts in a random order, each once an epoch, with a place to go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.data.prompts import Prompt
from lmjax.errors import UserError


class Prompts:
    """Gives numbers of prompts, in another order every epoch.

    Args:
      prompts: all of them.
      seed: of the orders.

    Raises:
      UserError: there are none.

    >>> prompts = Prompts([Prompt(np.array([n])) for n in range(3)], seed=0)
    >>> first = prompts.take(2)
    >>> sorted([*first, *prompts.take(1)]), prompts.epoch
    ([0, 1, 2], 1)
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int = 0):
        if not prompts:
            raise UserError("there are no prompts to roll out; give at least one.")
        self.prompts = [dataclasses.replace(prompt, number=n) for n, prompt in enumerate(prompts)]
        self._seed, self._taken = seed, 0

    @property
    def epoch(self) -> int:
        """How many times all of them were taken."""
        return self._taken // len(self.prompts)

    def take(self, count: int, weights: np.ndarray | None = None) -> list[int]:
        """The numbers of the next ones.

        Args:
          count: how many.
          weights: float [number of prompts], how often each should come in comparison; None takes each once an epoch.
        """
        first, self._taken = self._taken, self._taken + count
        N = len(self.prompts)
        if weights is not None:
            random = np.random.default_rng([self._seed, 1, first])
            enough = int(np.count_nonzero(weights)) >= count
            found = random.choice(N, count, replace=not enough, p=np.asarray(weights) / np.sum(weights))
            return [int(number) for number in found]
        order = lambda epoch: np.random.default_rng([self._seed, 0, epoch]).permutation(N)
        places = np.arange(first, first + count)
        orders = {epoch: order(epoch) for epoch in set((places // N).tolist())}
        return [int(orders[place // N][place % N]) for place in places.tolist()]

    def get_state(self) -> dict[str, Any]:
        """The position."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._taken = state["taken"]
