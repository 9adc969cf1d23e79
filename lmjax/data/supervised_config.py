"""What supervised fine-tuning reads. Plain data: importing this imports neither JAX nor NumPy."""

from __future__ import annotations

import dataclasses
import math

from lmjax.errors import UserError

FORMATS = ("auto", "messages", "completion", "instruction")
LOSSES = ("assistant", "last", "completion", "all")
PACKINGS = ("best_fit", "padded")
SHORTEST_BUCKET = 32


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"data {name} {value!r} is unknown: use one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class ConversationSource:
    """One source of conversations."""

    path: str = ""
    """A file, directory, glob or URL: JSON lines (.jsonl, .ndjson), a JSON array (.json) or Parquet."""
    format: str = "auto"
    """messages (a list of role and content), completion (prompt and completion, texts or lists of messages),
    instruction (instruction, input, output, as Alpaca), or auto: by the fields of each record."""
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    instruction_field: str = "instruction"
    input_field: str = "input"
    """A text to work on, which follows the instruction after an empty line; it may be missing or empty."""
    output_field: str = "output"
    system: str = ""
    """A system message for conversations that have none."""
    prefix: str = ""
    """Text before the user's first message, such as T5's "translate English to German: "; {domain} is replaced."""
    domain: str = ""
    """A tag for all of these conversations; empty: the name of the file or folder."""
    domain_field: str = ""
    """The field of a record that holds its tag instead."""
    weight: float = 1.0
    """Multiplies the share of these conversations in a mixture."""

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(f"data weight {self.weight} must be a positive number: leave the source out instead")
        if self.domain and self.domain_field:
            raise UserError("data.domain and data.domain_field both name the domain: leave out one of them")


@dataclasses.dataclass(frozen=True)
class SupervisedConfig(ConversationSource):
    """Conversations to learn from: a source (or several), how they are written, and how rows are made of them."""

    mixture: tuple[ConversationSource, ...] = ()
    """Further sources."""
    temperature: float = 1.0
    """T of the mixture: a domain of n conversations is drawn in proportion to min(n, limit)^(1/T)."""
    limit: int = 0
    """The most conversations that a domain counts for in the mixture (T5's and FLAN's K); 0: no limit."""
    validation_path: str = ""
    """Held-out conversations of their own, in this source's format; empty: a part of each source is held out."""
    validation_fraction: float = 0.1
    """The part held out where there is no validation_path, by a hash of the prompt."""
    template: str = "auto"
    """The chat template: auto (the model's own), a family's name, or none (prompt and completion joined)."""
    loss_on: str = "assistant"
    """What is learned: assistant (its turns), last (its last one), completion (its turns in the completion, the last
    one where the record does not tell), all (every token)."""
    sequence_length: int = 256
    """T: the most positions of a row."""
    too_long: str = "cut"
    """What becomes of conversations that are longer: cut (at the end), or drop."""
    packing: str = "best_fit"
    """best_fit: several to a row, isolated by segment ids; padded: one a row, in batches of similar lengths."""
    buckets: tuple[int, ...] = ()
    """padded: the lengths that rows are padded to; empty: powers of two."""
    document_markers: bool = True
    """Template none: put the tokenizer's bos (or else its eos) before each conversation and its eos after it."""
    seed: int = 0
    """Order of the training rows."""
    prefetch: int = 2
    """Batches made ahead in a thread; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("loss_on", self.loss_on, LOSSES)
        _one_of("packing", self.packing, PACKINGS)
        _one_of("too_long", self.too_long, ("cut", "drop"))
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"data.temperature is {self.temperature}: it must be a positive number")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}: it must lie in [0, 1)")
        if self.sequence_length < 1:
            raise UserError(f"data.sequence_length is {self.sequence_length}: it must be at least 1")
        if self.limit < 0 or self.prefetch < 0:
            raise UserError("data.limit and data.prefetch must not be negative")
        if self.buckets and self.packing != "padded":
            raise UserError("data.buckets is read by packing 'padded' only: leave it out or change the packing")
        if any(a >= b for a, b in zip((0, *self.buckets), self.buckets)):
            raise UserError(f"data.buckets is {self.buckets}: give positive lengths that increase")
        if self.buckets and self.buckets[-1] != self.sequence_length:
            raise UserError(
                f"data.buckets ends at {self.buckets[-1]} but data.sequence_length is {self.sequence_length}: the last "
                "bucket must hold the longest rows"
            )

    def sources(self) -> tuple[ConversationSource, ...]:
        """All sources, this config's own first."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(ConversationSource)}
        return (ConversationSource(**own), *self.mixture)

    def edges(self) -> tuple[int, ...]:
        """The lengths that rows of packing 'padded' have.

        >>> SupervisedConfig(packing="padded", sequence_length=100).edges()
        (32, 64, 100)
        """
        if self.buckets:
            return self.buckets
        edges = [SHORTEST_BUCKET]
        while edges[-1] < self.sequence_length:
            edges.append(2 * edges[-1])
        return (*edges[:-1], self.sequence_length)
