"""What learning from preferences is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.finetuning_config import BatchedConfig
from lmjax.data.config import DataConfig
from lmjax.data.preference_config import PreferenceConfig
from lmjax.errors import UserError
from lmjax.training.config import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class DpoConfig(BatchedConfig):
    """A language model trained on pairs of answers, or on answers that are liked or not.

    Attributes:
      data: the preferences, how they are written, and how rows are made of them.
      objective: a sum of terms of lmjax.objectives, such as "dpo(beta=0.1) + 0.2 * chosen_nll()", "kto()" or
        "dpo() + 0.1 * cross_entropy().on('pretrain')".
      reference: what the reference is. role: the model before training (without the adapter, or a copy); cached: its
        log-probabilities are computed before training, and kept beside the data cache; following: a copy of what is
        trained, which follows it.
      follow_every, follow_rate: following: how often it moves towards the policy, and by what share of the way.
      pretrain: text for terms on the stream "pretrain"; its path and its weight are read, with the model's tokenizer.
      pretrain_batch_size: rows of that text in a step; 0 for none.
      samples: held-out prompts that are answered before, during and after training.
      sample_tokens: tokens of an answer at the most; 0 for no samples.
      sample_temperature: divides the logits of samples; 0 takes the likeliest token.
    """

    data: PreferenceConfig = PreferenceConfig()
    schedule: ScheduleConfig = ScheduleConfig(peak=3e-4, warmup_steps=10)
    objective: str = "dpo(beta=0.1)"
    reference: Literal["role", "cached", "following"] = "role"
    follow_every: int = 512
    follow_rate: float = 0.6
    pretrain: DataConfig = DataConfig()
    pretrain_batch_size: int = 0
    samples: int = 4
    sample_tokens: int = 64
    sample_temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "sample_tokens", "sample_temperature", "pretrain_batch_size"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.follow_every < 1 or not 0 < self.follow_rate <= 1:
            raise UserError(f"the reference follows every {self.follow_every} steps by {self.follow_rate}; "
                            "give 1 or more, and a share above 0 and up to 1")  # fmt: skip
        if "pretrain" in self.objective and not self.pretrain_batch_size:
            raise UserError("the objective reads the stream 'pretrain'; set pretrain_batch_size and pretrain.path")
