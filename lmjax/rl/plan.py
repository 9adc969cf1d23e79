"""How much is rolled out, and how it is learned from. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is rolled out, and how it is learned from.

    Attributes:
      prompts: of an iteration.
      samples: rollouts of each prompt.
      max_new_tokens: of a rollout.
      max_prompt: tokens of the longest prompt, for which rows are made.
      temperature: of the policy, in rollouts and in terms alike.
      epochs: how often each rollout is learned from.
      minibatches: of an epoch; each is a step.
      per_row: rollouts beside each other in a row, which share their prompt; 0 for all of a prompt.
      stale: iterations that rollouts are made ahead.
      chunks: rollouts of an iteration are made in so many parts; each is judged while the next is made.
      redraws: how often prompts are drawn anew for groups that teach nothing (dynamic sampling); 0 keeps them.
      last_token: rows have room for a number behind each rollout.
    """

    prompts: int
    samples: int
    max_new_tokens: int
    max_prompt: int
    temperature: float = 1.0
    epochs: int = 1
    minibatches: int = 1
    per_row: int = 0
    stale: int = 0
    chunks: int = 1
    redraws: int = 0
    last_token: bool = False

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "max_new_tokens", "epochs", "minibatches", "chunks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1.")
        for name in ("stale", "per_row", "redraws", "max_prompt"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if self.temperature <= 0:
            raise UserError(f"the temperature is {self.temperature}; rollouts need one above 0.")
        if self.samples % self.width:
            raise UserError(f"{self.samples} samples do not divide into rows of {self.per_row}; change per_row.")
        if self.prompts % self.chunks:
            raise UserError(f"{self.prompts} prompts do not divide into {self.chunks} chunks; change one of them.")
        if self.rows % self.minibatches:
            raise UserError(
                f"{self.prompts} prompts make {self.rows} rows, which do not divide into {self.minibatches} "
                "minibatches; change one of them, or per_row."
            )

    @property
    def width(self) -> int:
        """Rollouts of a row."""
        return self.per_row or self.samples

    @property
    def rows(self) -> int:
        """Rows of an iteration."""
        return self.prompts * self.samples // self.width

    @property
    def steps(self) -> int:
        """Updates that an iteration is good for."""
        return self.epochs * self.minibatches

    @property
    def on_policy(self) -> bool:
        """Whether each rollout is learned from once, by the policy that made it: importance ratios are 1."""
        return self.steps == 1 and not self.stale
