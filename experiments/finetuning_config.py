"""What every experiment that goes on from a model is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from experiments.adapter_config import AdapterConfig
from lmjax.errors import UserError
from lmjax.sharding.config import MeshShape
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class FinetuningConfig:
    """A model that is trained further.

    Attributes:
      model: the model to start from: a run directory or a Hugging Face directory.
      step: of a run directory: "last", "best" or the number of a step.
      average: of a run directory: its moving average of the parameters, or not; None: where it kept one.
      tokenizer: a tokenizer to use instead of the model's own.
      quantize: nf4 or int8: the model's linear layers in 4 or 8 bits, under the adapter (QLoRA); empty: as they are.
      quantize_targets: patterns of the layers that are.
      data: what is learned from.
      adapter: what is trained.
      optimizer, schedule: how that moves.
      loop: steps, and how often records, evaluations and samples are made.
      checkpoint: when checkpoints are written and which are kept.
      mesh: how many devices lie along each axis.
      microbatches: parts a batch is split into, one after the other, to save memory.
      clip_norm: largest global norm of the gradient; 0 for no limit.
      seed: of the adapter, dropout and samples. The order of the data has its own.
      tensorboard: write records for TensorBoard into the run directory too.
      wandb_project: send records to this project of Weights & Biases; empty for none.
    """

    model: str = ""
    step: str = "last"
    average: bool | None = None
    tokenizer: str = ""
    quantize: Literal["", "nf4", "int8"] = ""
    quantize_targets: tuple[str, ...] = ("*",)
    data: Any = None
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(peak=1e-3, warmup_steps=10)
    loop: LoopConfig = LoopConfig(steps=300, eval_every=50)
    checkpoint: CheckpointConfig = CheckpointConfig(every=100)
    mesh: MeshShape = MeshShape()
    microbatches: int = 1
    clip_norm: float = 1.0
    seed: int = 0
    tensorboard: bool = False
    wandb_project: str = ""

    @property
    def step_rows(self) -> int:
        """Rows of a step, over all devices and microbatches."""
        raise NotImplementedError

    @property
    def row_length(self) -> int:
        """The most positions of a row."""
        data = self.data
        length: int = data.row_length if hasattr(data, "row_length") else data.sequence_length
        return length

    def __post_init__(self) -> None:
        if self.microbatches < 1 or self.step_rows % self.microbatches:
            raise UserError(
                f"a step of {self.step_rows} rows does not split into {self.microbatches} microbatches; "
                "make it a multiple"
            )
        if self.quantize and self.adapter.kind == "full":
            raise UserError(f"quantize is {self.quantize}, and quantized weights are not trained; choose an adapter")
        if self.clip_norm < 0:
            raise UserError(f"clip_norm is {self.clip_norm}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class BatchedConfig(FinetuningConfig):
    """A model that is trained further on batches of given data.

    Attributes:
      batch_size: rows of a step, over all devices and microbatches.
      eval_batch_size: rows of a held-out batch; 0 for batch_size.
    """

    batch_size: int = 8
    eval_batch_size: int = 0

    @property
    def step_rows(self) -> int:
        """Rows of a step."""
        return self.batch_size

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("batch_size", 1), ("eval_batch_size", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; give at least {least}")
