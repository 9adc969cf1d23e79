"""What a pretraining run is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from lmjax.data.config import DataConfig
from lmjax.errors import UserError
from lmjax.models.config import BigramConfig, DecoderConfig
from lmjax.models.presets import small
from lmjax.sharding.config import MeshShape
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

FROM_TOKENIZER = 1  # as model.vocab_size: take the tokenizer's


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A language model trained on text to predict the next token.

    Attributes:
      model: the model. A vocab_size of 1 (`FROM_TOKENIZER`) stands for the tokenizer's; any other must hold it.
      data: text, tokenizer, and how rows are made of them.
      optimizer, schedule: how parameters move.
      loop: steps, and how often records, evaluations and samples are made.
      checkpoint: when checkpoints are written and which are kept.
      mesh: how many devices lie along each axis.
      batch_size: rows of a step, over all devices and microbatches.
      microbatches: parts a batch is split into, one after the other, to save memory.
      vocab_multiple: a vocabulary taken from the tokenizer is rounded up to a multiple of this.
      clip_norm: largest global norm of the gradient; 0 for no limit.
      ema_decay: decay of a moving average of the parameters, which is then what is evaluated and sampled; 0 for
        none.
      label_smoothing: share of each target spread over the vocabulary.
      z_loss: weight of the squared log-sum-exp of the logits.
      seed: of the parameters, dropout and samples. The order of the data has its own.
      eval_batches: held-out batches of an evaluation during training; 0 for all. The last one takes all.
      eval_batch_size: rows of a held-out batch; 0 for batch_size.
      compare: score the held-out text before training too, and with bigram counts and gzip, for a table.
      sample_prompt: what samples go on from; empty: the beginning of a document.
      sample_tokens: tokens of a sample; 0 for no samples.
      sample_temperature: divides the logits of samples; 0 takes the likeliest token.
      sample_top_k: sample among so many of the likeliest tokens; 0 for all.
      tensorboard: write records for TensorBoard into the run directory too.
      wandb_project: send records to this project of Weights & Biases; empty for none.
    """

    model: DecoderConfig | BigramConfig = small(FROM_TOKENIZER)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loop: LoopConfig = LoopConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshShape = MeshShape()
    batch_size: int = 16
    microbatches: int = 1
    vocab_multiple: int = 1
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    seed: int = 0
    eval_batches: int = 20
    eval_batch_size: int = 0
    compare: bool = False
    sample_prompt: str = ""
    sample_tokens: int = 200
    sample_temperature: float = 0.8
    sample_top_k: int = 0
    tensorboard: bool = False
    wandb_project: str = ""

    def __post_init__(self) -> None:
        length = self.data.sequence_length
        if isinstance(self.model, DecoderConfig) and length > self.model.max_length:
            raise UserError(
                f"data.sequence_length is {length} but the model's positions end at max_length "
                f"{self.model.max_length}; shorten the one or raise the other"
            )
        if self.batch_size < 1 or self.microbatches < 1 or self.batch_size % self.microbatches:
            raise UserError(
                f"a batch_size of {self.batch_size} does not split into {self.microbatches} microbatches; "
                "make it a multiple"
            )
        if self.model.vocab_size != FROM_TOKENIZER and self.vocab_multiple != 1:
            raise UserError(
                f"model.vocab_size is given ({self.model.vocab_size}), so vocab_multiple {self.vocab_multiple} "
                f"has nothing to round; leave out one of them"
            )
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; give a number from 0 up to, not including, 1")
        for name in (
            "clip_norm",
            "z_loss",
            "eval_batches",
            "eval_batch_size",
            "sample_tokens",
            "sample_top_k",
            "sample_temperature",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.vocab_multiple < 1:
            raise UserError(f"vocab_multiple is {self.vocab_multiple}; give at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; give a number from 0 up to, not including, 1")

    def with_vocabulary(self, tokenizer_size: int) -> PretrainConfig:
        """This config with the vocabulary settled for a tokenizer of so many ids.

        Raises:
          UserError: the model's own vocabulary does not hold them.
        """
        given = self.model.vocab_size
        if given != FROM_TOKENIZER:
            if tokenizer_size > given:
                raise UserError(
                    f"the tokenizer has {tokenizer_size} ids but model.vocab_size is {given}; set it to "
                    f"{tokenizer_size} or more, or to {FROM_TOKENIZER} to take the tokenizer's"
                )
            return self
        size = -(-tokenizer_size // self.vocab_multiple) * self.vocab_multiple
        model = dataclasses.replace(self.model, vocab_size=size)
        return dataclasses.replace(self, model=model, vocab_multiple=1)
