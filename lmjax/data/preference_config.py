"""What learning from preferences reads. Plain data: importing this imports neither JAX nor NumPy."""

from __future__ import annotations

import dataclasses

from lmjax.data.supervised_config import ConversationSource
from lmjax.errors import UserError

KINDS = ("auto", "pairs", "answers")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(ConversationSource):
    """Pairs of answers, or answers that are liked or not, and how rows are made of them.

    The prompt of a record is read as that of a conversation: `prompt` (a text, or messages), or `instruction` and
    `input`. Where there is no prompt, chosen and rejected are whole conversations, and what they share comes first.
    """

    kind: str = "auto"
    """pairs (a chosen and a rejected answer), answers (a completion and a label), or auto: by the first record."""
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    margin_field: str = ""
    """A number by which the chosen answer is better; empty: none is read."""
    label_field: str = "label"
    """answers: true where the completion is liked."""
    validation_path: str = ""
    """Held-out records of their own; empty: a part is held out."""
    validation_fraction: float = 0.1
    """The part held out where there is no validation_path, by a hash of the prompt."""
    template: str = "auto"
    """The chat template: auto (the model's own), a family's name, or none (prompt and completion joined)."""
    max_length: int = 256
    """The most tokens of a prompt and an answer; the end of a longer answer is cut."""
    sequence_length: int = 0
    """T: positions of a row, which holds as many pairs as fit; 0: twice max_length."""
    shared_prompts: bool = True
    """Compute the prompt of a pair once for both of its answers; the same numbers, for less work."""
    score_prompts: bool = False
    """Let terms learn prompts too, as orpo() does; else the vocabulary's pass leaves them out."""
    document_markers: bool = True
    """Template none: put the tokenizer's bos (or else its eos) before each sequence and its eos after it."""
    seed: int = 0
    """Order of the training rows."""
    prefetch: int = 2
    """Batches made ahead in a thread; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise UserError(f"data kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if self.max_length < 2 or self.prefetch < 0:
            raise UserError("data.max_length must be at least 2, and data.prefetch must not be negative")
        if self.sequence_length and self.sequence_length < 2 * self.max_length:
            raise UserError(
                f"data.sequence_length is {self.sequence_length}, too short for a pair of {self.max_length} tokens "
                "each: raise it, or lower data.max_length"
            )
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}: it must lie in [0, 1)")

    @property
    def row_length(self) -> int:
        """T."""
        return self.sequence_length or 2 * self.max_length
