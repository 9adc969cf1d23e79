"""What `experiments.compare_adapters` is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError

TASKS = ("synthetic", "instruct")
METHODS = (
    *("full", "norm_tuning", "lora_r1", "lora_r8", "rslora_r8", "dora_r8", "ia3"),
    *("houlsby", "pfeiffer", "parallel", "prefix", "prefix_network", "prompt"),
)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Fine-tuning methods on the same tasks, each at its best learning rate, over several seeds.

    Attributes:
      tasks: synthetic (a new operation on words for a model that knows others), instruct (records that `data` names,
        for the model that `model` names).
      methods: which to compare.
      model: a run directory or a Hugging Face directory, for instruct.
      data: a JSON, JSON lines or Parquet file of instructions, for instruct.
      rates: learning rates tried for each method, each so many times the one before; the first is the method's own.
      extensions: how often the range may grow by one rate, while the best is its lowest or its highest.
      factor: what follows a rate is so many times larger.
      seeds: runs of each method at the rate that was best on the part of the held-out examples that is for choosing.
      steps: of a run on the synthetic task.
      instruct_steps: of a run on instruct.
      batch_size: examples of a step.
      sequence_length: tokens of an example of instruct, at the most.
      base_steps: steps of the model that the synthetic task starts from.
      seed: of that model and of the data.
    """

    tasks: tuple[str, ...] = ("synthetic",)
    methods: tuple[str, ...] = METHODS
    model: str = ""
    data: str = ""
    rates: int = 3
    extensions: int = 4
    factor: float = 3.1622776601683795
    seeds: int = 3
    steps: int = 300
    instruct_steps: int = 80
    batch_size: int = 8
    sequence_length: int = 128
    base_steps: int = 800
    seed: int = 1

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("methods", METHODS)):
            if strangers := [value for value in getattr(self, name) if value not in known]:
                raise UserError(f"{name} has {strangers[0]!r}; choose among {', '.join(known)}")
        for name in ("rates", "seeds", "steps", "instruct_steps", "batch_size", "base_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.seeds > 10:
            raise UserError(f"seeds is {self.seeds}; give at most 10")
        if self.factor <= 1:
            raise UserError(f"factor is {self.factor}; give more than 1")
        if "instruct" in self.tasks and not (self.model and self.data):
            raise UserError("the task instruct needs a model and data; give --model and --data, or leave it out")
