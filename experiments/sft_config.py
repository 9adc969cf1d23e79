"""What supervised fine-tuning is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.adapter_config import AdapterConfig
from lmjax.data.supervised_config import SupervisedConfig
from lmjax.errors import UserError
from lmjax.sharding.config import MeshShape
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """A language model taught to answer as in given conversations.

    Attributes:
      model: the model to start from: a run directory or a Hugging Face directory.
      step: of a run directory: "last", "best" or the number of a step.
      average: of a run directory: its moving average of the parameters, or not; None: where it kept one.
      tokenizer: a tokenizer to use instead of the model's own.
      quantize: nf4 or int8: the model's linear layers in 4 or 8 bits, under the adapter (QLoRA); empty: as they are.
      quantize_targets: patterns of the layers that are.
      data: the conversations, how they are written, and how rows are made of them.
      adapter: what is trained.
      optimizer, schedule: how that moves.
      loop: steps, and how often records, evaluations and samples are made.
      checkpoint: when checkpoints are written and which are kept.
      mesh: how many devices lie along each axis.
      batch_size: rows of a step, over all devices and microbatches.
      microbatches: parts a batch is split into, one after the other, to save memory.
      clip_norm: largest global norm of the gradient; 0 for no limit.
      neftune: alpha of the noise on the embeddings in training (arXiv:2310.05914 takes 5 to 15); 0 for none.
      label_smoothing: share of each target spread over the vocabulary.
      seed: of the adapter, dropout and noise. The order of the data has its own.
      eval_batches: held-out batches of each domain in an evaluation during training; 0 for all. The last one takes
        all.
      eval_batch_size: rows of a held-out batch; 0 for batch_size.
      samples: held-out prompts that are answered before, during and after training.
      sample_tokens: tokens of an answer at the most; 0 for no samples.
      sample_temperature: divides the logits of samples; 0 takes the likeliest token.
      tensorboard: write records for TensorBoard into the run directory too.
      wandb_project: send records to this project of Weights & Biases; empty for none.
    """

    model: str = ""
    step: str = "last"
    average: bool | None = None
    tokenizer: str = ""
    quantize: Literal["", "nf4", "int8"] = ""
    quantize_targets: tuple[str, ...] = ("*",)
    data: SupervisedConfig = SupervisedConfig()
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(peak=1e-3, warmup_steps=10)
    loop: LoopConfig = LoopConfig(steps=300, eval_every=50)
    checkpoint: CheckpointConfig = CheckpointConfig(every=100)
    mesh: MeshShape = MeshShape()
    batch_size: int = 8
    microbatches: int = 1
    clip_norm: float = 1.0
    neftune: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0
    eval_batches: int = 0
    eval_batch_size: int = 0
    samples: int = 4
    sample_tokens: int = 64
    sample_temperature: float = 0.0
    tensorboard: bool = False
    wandb_project: str = ""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.microbatches < 1 or self.batch_size % self.microbatches:
            raise UserError(
                f"a batch_size of {self.batch_size} does not split into {self.microbatches} microbatches; "
                "make it a multiple"
            )
        if self.quantize and self.adapter.kind == "full":
            raise UserError(f"quantize is {self.quantize}, and quantized weights are not trained; choose an adapter")
        for name in ("clip_norm", "neftune", "eval_batches", "eval_batch_size", "samples", "sample_tokens",
                     "sample_temperature"):  # fmt: skip
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; give a number from 0 up to, not including, 1")
