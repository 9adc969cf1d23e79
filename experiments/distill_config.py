"""What a distillation run is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.pretrain_config import FROM_TOKENIZER
from lmjax.data.config import DataConfig
from lmjax.errors import UserError
from lmjax.models.config import BigramConfig, DecoderConfig
from lmjax.models.presets import small
from lmjax.sharding.config import MeshShape
from lmjax.tokenizers.config import TokenizerConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

NEW_MODEL = small(FROM_TOKENIZER, num_layers=2)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A smaller language model taught by a larger one.

    Attributes:
      teacher: a run directory or a Hugging Face directory.
      teacher_step: of a run directory: "last", "best" or the number of a step.
      student: empty for a new `model`; "teacher" for some of the teacher's layers, evenly spread; or a run directory or
        Hugging Face directory to begin from.
      student_layers: how many of the teacher's layers to take; 0 for half of them.
      model: a new student. A vocab_size of 1 stands for the teacher's, and no other will do.
      data: text, read with the teacher's tokenizer, and how rows are made of it.
      optimizer, schedule: how parameters move.
      loop: steps, and how often records, evaluations and samples are made.
      checkpoint: when checkpoints are written and which are kept.
      mesh: how many devices lie along each axis.
      batch_size: rows of a step, over all devices and microbatches.
      microbatches: parts a batch is split into, one after the other, to save memory.
      clip_norm: largest global norm of the gradient; 0 for no limit.
      ema_decay: decay of a moving average of the parameters, which is then what is evaluated and sampled; 0 for none.
      hard: weight of the cross-entropy to the text's own tokens.
      soft: weight of the divergence from the teacher's next-token distribution.
      beta: 0 for KL(teacher || student), 1 for KL(student || teacher), between them GKD's Jensen-Shannon divergence.
      temperature: divides both models' logits in that divergence.
      scaled: whether it is multiplied by the temperature's square.
      top_k: compare on the teacher's so many likeliest tokens only; 0 for all.
      hidden: weight of the distance of hidden states; through a learned projection where the widths differ.
      hidden_kind: cosine (DistilBERT) or mse (TinyBERT).
      hidden_layers: last, or uniform: every layer of the student beside one of the teacher's.
      attention: weight of the distance of attention of uniformly spread layers (TinyBERT).
      attention_of: scores before the softmax, or probabilities after it.
      on_policy: share of the steps that are taken on the student's own continuations, where the teacher's terms count
        alone (GKD's lambda).
      prompt_tokens: of a row, what the student goes on from; 0 for a quarter of the row.
      on_policy_temperature: divides the student's logits as it goes on; 0 takes the likeliest token.
      seed: of the parameters, dropout, samples and continuations. The order of the data has its own.
      eval_batches: held-out batches of an evaluation during training; 0 for all. The last one takes all.
      eval_batch_size: rows of a held-out batch; 0 for batch_size.
      sample_prompt: what samples go on from; empty: the beginning of a document.
      sample_tokens: tokens of a sample; 0 for no samples.
      sample_temperature: divides the logits of samples; 0 takes the likeliest token.
    """

    teacher: str = ""
    teacher_step: str = "last"
    student: str = ""
    student_layers: int = 0
    model: DecoderConfig | BigramConfig = NEW_MODEL
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loop: LoopConfig = LoopConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshShape = MeshShape()
    batch_size: int = 16
    microbatches: int = 1
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    hard: float = 0.5
    soft: float = 0.5
    beta: float = 0.0
    temperature: float = 1.0
    scaled: bool = True
    top_k: int = 0
    hidden: float = 0.0
    hidden_kind: Literal["cosine", "mse"] = "cosine"
    hidden_layers: Literal["last", "uniform"] = "last"
    attention: float = 0.0
    attention_of: Literal["scores", "probabilities"] = "scores"
    on_policy: float = 0.0
    prompt_tokens: int = 0
    on_policy_temperature: float = 1.0
    seed: int = 0
    eval_batches: int = 20
    eval_batch_size: int = 0
    sample_prompt: str = ""
    sample_tokens: int = 200
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.microbatches < 1 or self.batch_size % self.microbatches:
            raise UserError(
                f"a batch_size of {self.batch_size} does not split into {self.microbatches} microbatches; "
                "make it a multiple"
            )
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; give a number from 0 up to, not including, 1")
        for name in "clip_norm hard soft top_k hidden attention student_layers prompt_tokens on_policy_temperature " \
                    "eval_batches eval_batch_size sample_tokens sample_temperature".split():  # fmt: skip
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not (self.soft or self.hidden or self.attention):
            raise UserError("soft, hidden and attention are all 0, so nothing is learned from the teacher; raise one")
        for name in ("beta", "on_policy"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; give a positive number")
        if self.student_layers and self.student != "teacher":
            raise UserError(f"student_layers is {self.student_layers}, but no layers are taken; set student to teacher")
        length = self.data.sequence_length
        if self.on_policy and not self.prompt_length < length:
            raise UserError(
                f"prompt_tokens is {self.prompt_length} of {length} in a row, which leaves the student nothing to "
                "say; lower it or raise data.sequence_length"
            )
        if self.data.tokenizer != TokenizerConfig():
            raise UserError("data.tokenizer is set, but text is read by the teacher's own tokenizer; leave it out")

    @property
    def prompt_length(self) -> int:
        """Tokens that the student goes on from, with 0 settled."""
        return self.prompt_tokens or max(self.data.sequence_length // 4, 1)

    def with_model(self, model: DecoderConfig | BigramConfig) -> DistillConfig:
        """This config with the student that was found where `student` says.

        Raises:
          UserError: another new one is described besides.
        """
        if self.model not in (NEW_MODEL, model):
            raise UserError(f"the student is that of {self.student!r}, but model describes another; leave out model")
        return dataclasses.replace(self, model=model)

    def with_vocabulary(self, size: int) -> DistillConfig:
        """This config with a student of the teacher's vocabulary.

        Raises:
          UserError: it has another.
        """
        if self.model.vocab_size not in (FROM_TOKENIZER, size):
            raise UserError(
                f"the student's vocabulary is {self.model.vocab_size} and the teacher's {size}; distributions over "
                f"different vocabularies cannot be compared: set model.vocab_size to {FROM_TOKENIZER}"
            )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=size))
