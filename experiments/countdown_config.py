"""What the countdown experiment is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CountdownConfig:
    """A small model learns by itself to win at Countdown, after text that teaches form and arithmetic only.

    Attributes:
      largest: the numbers of a game are from 1 to this.
      signs: that may stand between numbers, of + - *.
      two: share of games with two numbers; the others have three. Held-out games have it too.
      documents: games to pretrain on, each with an attempt at random.
      attempts: lines of such an attempt, at the most.
      careless: share of attempts that end with an expression that forgets a number.
      pretrain_steps: batches of 24 rows of 128 tokens.
      games: to learn from by reward.
      prompts, samples: games of an iteration, and rollouts of each.
      grpo_steps: iterations.
      minibatches: updates of an iteration.
      max_new_tokens: of an answer: about seven tries.
      temperature: of rollouts.
      learning_rate: of GRPO.
      held_out: games that are never seen, in whatever order of their numbers, by which each rung is judged.
      seed: of everything.
    """

    largest: int = 12
    signs: str = "+-"
    two: float = 0.25
    documents: int = 60_000
    attempts: int = 6
    careless: float = 0.7
    pretrain_steps: int = 1800
    games: int = 20_000
    prompts: int = 32
    samples: int = 8
    grpo_steps: int = 120
    minibatches: int = 4
    max_new_tokens: int = 112
    temperature: float = 1.0
    learning_rate: float = 3e-4
    held_out: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and field.name != "seed" and getattr(self, field.name) < 1:
                raise UserError(f"{field.name} is {getattr(self, field.name)}; give at least 1")
        if not 2 <= self.largest <= 99:
            raise UserError(f"largest is {self.largest}; give a number from 2 to 99")
        if not self.signs or not set(self.signs) <= set("+-*"):
            raise UserError(f"signs is {self.signs!r}; give some of + - *, such as '+-'")
        if not 0 < self.two < 1:
            raise UserError(f"two is {self.two}; give a share between 0 and 1, so that there are games of both kinds")
        if not 0 <= self.careless < 1:
            raise UserError(f"careless is {self.careless}; give a share from 0 up to, not including, 1")
        if self.max_new_tokens < 12:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; no answer is shorter than 12 tokens")
        if self.samples < 2 or self.samples % 2:
            raise UserError(
                f"samples is {self.samples}; rollouts lie two to a row, so give 2, 4, 6 or so"
            )
        for name in ("temperature", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; give a number above 0")
