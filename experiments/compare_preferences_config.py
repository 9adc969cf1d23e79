"""What `experiments.compare_preferences` is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError

TASKS = ("preferences", "overoptimisation", "pluralistic")
METHODS = ("dpo", "cdpo", "robust_dpo", "ipo", "simpo", "apo_zero", "kto", "online_dpo", "best_of_n")
JUDGES = ("reward_model", "truth")


@dataclasses.dataclass(frozen=True)
class ComparePreferencesConfig:
    """Ways to learn from preferences, on a small language where the reward of every answer is known.

    Attributes:
      tasks: preferences (a reward model, and every method at every strength), overoptimisation (DPO on the labels of a
        judge that is nearly right, as beta falls), pluralistic (beliefs that a population does not share).
      methods: which to compare in preferences.
      betas: of overoptimisation.
      population_betas: of pluralistic.
      seeds: runs of each method at each strength; each has pairs of its own.
      pairs: sampled for each run of a method that learns from pairs; ties are dropped.
      steps: of a run.
      batch_size: pairs of a step; prompts of a step of the methods that sample.
      learning_rate: its peak.
      judge: who scores the answers that online_dpo and best_of_n sample: reward_model (the ensemble) or truth.
      members: reward models of the ensemble.
      reward_pairs: pairs that each reward model learns from.
      reward_steps: steps of a reward model.
      supervised_steps: of the model that all methods start from.
      supervised_examples: sequences of a step of that model.
      samples: fresh answers by which each run is measured; held-out pairs are sampled in proportion.
      missing_eos_penalty: what an answer without an end loses, in labels and when measured.
      seed: of the language, the starting model and the reward models.
    """

    tasks: tuple[str, ...] = TASKS
    methods: tuple[str, ...] = METHODS
    betas: tuple[float, ...] = (30.0, 3.0, 1.0, 0.3, 0.1)
    population_betas: tuple[float, ...] = (1.0, 0.1)
    seeds: int = 3
    pairs: int = 4096
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 1e-3
    judge: str = "reward_model"
    members: int = 3
    reward_pairs: int = 16384
    reward_steps: int = 800
    supervised_steps: int = 400
    supervised_examples: int = 128
    samples: int = 1024
    missing_eos_penalty: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("methods", METHODS)):
            if strangers := [value for value in getattr(self, name) if value not in known]:
                raise UserError(f"{name} has {strangers[0]!r}; choose among {', '.join(known)}")
        if self.judge not in JUDGES:
            raise UserError(f"judge is {self.judge!r}; choose among {', '.join(JUDGES)}")
        counts = (
            *("seeds", "pairs", "steps", "batch_size", "members", "reward_pairs", "reward_steps"),
            *("supervised_steps", "supervised_examples", "samples"),
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.seeds > 10:
            raise UserError(f"seeds is {self.seeds}; give at most 10")
        for name in ("betas", "population_betas"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise UserError(f"{name} are {getattr(self, name)}; give at least one, all positive")
        if self.learning_rate <= 0 or self.missing_eos_penalty < 0:
            raise UserError("learning_rate must be positive, and missing_eos_penalty must not be negative")
