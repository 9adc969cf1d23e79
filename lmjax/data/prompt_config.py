"""What is asked in reinforcement learning. Plain data: importing this imports neither JAX nor NumPy."""

from __future__ import annotations

import dataclasses

from lmjax.data.supervised_config import ConversationSource
from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptConfig(ConversationSource):
    """Prompts, and how they are written. All other fields of a record are there for rewards to read.

    The prompt of a record is that of a conversation: `prompt` (a text, or messages), `instruction` and `input`, or
    `messages` up to the last of the assistant's.
    """

    validation_path: str = ""
    """Held-out records of their own; empty: a part is held out."""
    validation_fraction: float = 0.1
    """The part held out where there is no validation_path, by a hash of the prompt."""
    template: str = "auto"
    """The chat template: auto (the model's own), a family's name, or none (the prompt as it is)."""
    max_length: int = 256
    """The most tokens of a prompt; longer ones are left out."""
    document_markers: bool = True
    """Template none: put the tokenizer's bos (or else its eos) before each prompt."""
    limit: int = 0
    """Read so many records at the most; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 1 or self.limit < 0:
            raise UserError("data.max_length must be at least 1, and data.limit must not be negative")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}: it must lie in [0, 1)")
