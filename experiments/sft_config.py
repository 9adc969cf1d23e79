"""What supervised fine-tuning is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from experiments.finetuning_config import BatchedConfig
from lmjax.data.supervised_config import SupervisedConfig
from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SftConfig(BatchedConfig):
    """A language model taught to answer as in given conversations.

    Attributes:
      data: the conversations, how they are written, and how rows are made of them.
      neftune: alpha of the noise on the embeddings in training (arXiv:2310.05914 takes 5 to 15); 0 for none.
      label_smoothing: share of each target spread over the vocabulary.
      eval_batches: held-out batches of each domain in an evaluation during training; 0 for all. The last one takes
        all.
      samples: held-out prompts that are answered before, during and after training.
      sample_tokens: tokens of an answer at the most; 0 for no samples.
      sample_temperature: divides the logits of samples; 0 takes the likeliest token.
    """

    data: SupervisedConfig = SupervisedConfig()
    neftune: float = 0.0
    label_smoothing: float = 0.0
    eval_batches: int = 0
    samples: int = 4
    sample_tokens: int = 64
    sample_temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("neftune", "eval_batches", "samples", "sample_tokens", "sample_temperature"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; give a number from 0 up to, not including, 1")
