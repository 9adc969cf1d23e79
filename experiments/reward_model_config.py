"""What a reward model is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from experiments.finetuning_config import BatchedConfig
from lmjax.data.preference_config import PreferenceConfig
from lmjax.errors import UserError
from lmjax.training.config import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class RewardModelConfig(BatchedConfig):
    """A language model that scores answers, trained on pairs of them.

    Attributes:
      data: the preferences, how they are written, and how rows are made of them.
      center: weight of the squared sum of a pair's scores, which keeps them near zero; 0 for none (0.01 is usual).
      bins: of the calibration that is drawn.
    """

    data: PreferenceConfig = PreferenceConfig(kind="pairs")
    schedule: ScheduleConfig = ScheduleConfig(peak=1e-3, warmup_steps=10)
    center: float = 0.01
    bins: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center < 0 or self.bins < 1:
            raise UserError(f"center is {self.center} and bins {self.bins}; give at least 0 and 1")
        if self.data.kind == "answers":
            raise UserError("a reward model learns from pairs; set data.kind to 'pairs'")
