"""What `experiments.chat` is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from experiments.generate_config import SamplingConfig
from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ChatConfig(SamplingConfig):
    """A model to talk to, and how it answers.

    Attributes:
      system: what it is told before the conversation; empty for nothing.
      max_new_tokens: tokens of a reply, unless it ends itself; at most half of the model's positions.
      every: tokens from one look at a reply to the next: fewer flow more smoothly, more are a little faster.
    """

    system: str = ""
    max_new_tokens: int = 512
    every: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"every is {self.every}; look at a reply after at least 1 token")
