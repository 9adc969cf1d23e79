"""What `experiments.generate` is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """A model, prompts, and how to go on from them.

    Attributes:
      model: a run directory, or a Hugging Face model directory.
      prompts: texts to continue; an empty one begins a document.
      samples: continuations of each prompt.
      max_new_tokens: tokens of a continuation, unless it ends itself.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among so many of the likeliest tokens; 0 for all.
      seed: of the sampling.
      step: of a run directory: last, best, or the number of a step.
      average: of a run directory: the moving average of the parameters or the parameters; None for the average
        where there is one.
      tokenizer: a tokenizer file or directory to use instead of the one beside the model.
    """

    model: str = ""
    prompts: tuple[str, ...] = ("",)
    samples: int = 1
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    seed: int = 0
    step: str = "last"
    average: bool | None = None
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}; ask for at least 1")
