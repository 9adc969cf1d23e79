"""What the ladder is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LadderConfig:
    """One small model from nothing to reasoning: pretraining, worked solutions, preferences, rewards.

    Attributes:
      largest: questions are about numbers from 1 to this.
      documents: of the text to pretrain on, ten lines each.
      wrong: share of its lines that are wrong.
      pretrain_steps: batches of 32 rows of 64 tokens.
      solutions: worked ones that are shown.
      sft_steps: batches of them.
      pairs: preferences between a right solution and a wrong one.
      dpo_steps: batches of 16 rows of pairs.
      grpo_steps: iterations of 32 questions, 8 rollouts each.
      held_out: questions that no rung ever sees, by which each is judged.
      seed: of everything.
    """

    largest: int = 9
    documents: int = 12_000
    wrong: float = 0.1
    pretrain_steps: int = 500
    solutions: int = 160
    sft_steps: int = 120
    pairs: int = 1000
    dpo_steps: int = 30
    grpo_steps: int = 150
    held_out: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("wrong", "seed") and getattr(self, field.name) < 1:
                raise UserError(f"{field.name} is {getattr(self, field.name)}; give at least 1")
        if not 0 <= self.wrong < 1:
            raise UserError(f"wrong is {self.wrong}; give a share from 0 up to, not including, 1")
        most = 4 * self.largest**3
        if self.solutions + self.pairs + self.held_out > 0.8 * most:
            raise UserError(f"there are {most} questions about numbers up to {self.largest}; ask fewer, or raise it")
