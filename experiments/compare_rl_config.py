"""What `experiments.compare_rl` is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError

METHODS = ("ppo", "grpo", "rloo", "grpo_process", "ppo_process")


@dataclasses.dataclass(frozen=True)
class CompareRlConfig:
    """Ways to learn from rewards, on made-up arithmetic, from one starting model a seed and with one budget.

    Attributes:
      methods: which to compare: ppo (a critic, GAE), grpo and rloo are rewarded for the answer alone, ppo_process and
        grpo_process for each step that is right.
      strengths: coefficients of the KL to the starting model in the loss, which every method is run with.
      seeds: starting models; from each every method is run at every strength.
      iterations: of a run.
      prompts: questions of an iteration.
      samples: rollouts of each.
      max_new_tokens: of a rollout.
      epochs: how often each rollout is learned from.
      minibatches: of an epoch; each is an update.
      learning_rate: of every method; it goes up over the first tenth of the updates.
      critic: coefficient of the critic's loss (ppo).
      evaluations: of the accuracy during a run.
      answers: samples of each held-out question, by which reward and KL are measured.
      largest, documents, pretrain_steps, solutions, sft_steps, held_out: of the starting models, as in
        `experiments.ladder`.
      seed: of the first starting model; the others follow.
    """

    methods: tuple[str, ...] = METHODS[:4]
    strengths: tuple[float, ...] = (0.03, 0.3)
    seeds: int = 3
    iterations: int = 64
    prompts: int = 16
    samples: int = 8
    max_new_tokens: int = 28
    epochs: int = 1
    minibatches: int = 2
    learning_rate: float = 3e-4
    critic: float = 0.1
    evaluations: int = 4
    answers: int = 4
    largest: int = 9
    documents: int = 12_000
    pretrain_steps: int = 500
    solutions: int = 160
    sft_steps: int = 120
    held_out: int = 512
    seed: int = 0

    @property
    def updates(self) -> int:
        """Of a run."""
        return self.iterations * self.epochs * self.minibatches

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"methods has {method!r}; choose among {', '.join(METHODS)}")
        if not self.methods or not self.strengths:
            raise UserError("there is nothing to compare; give at least one of methods and one of strengths")
        for name in ("methods", "strengths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name} are {getattr(self, name)}; give each once")
        if min(self.strengths) < 0 or self.learning_rate <= 0 or self.critic <= 0:
            raise UserError("strengths must not be negative, and learning_rate and critic must be positive")
        counts = (
            *("seeds", "iterations", "prompts", "max_new_tokens", "epochs", "minibatches", "evaluations", "answers"),
            *("largest", "documents", "pretrain_steps", "solutions", "sft_steps", "held_out"),
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.samples < 2:
            raise UserError(f"samples is {self.samples}; rollouts of a prompt are compared, so give at least 2")
        if self.seeds > 10:
            raise UserError(f"seeds is {self.seeds}; give at most 10")
        if self.prompts % self.minibatches:
            raise UserError(f"{self.prompts} prompts do not divide into {self.minibatches} minibatches; change one")
        if self.evaluations > self.iterations:
            raise UserError(f"evaluations is {self.evaluations}, but there are {self.iterations} iterations; lower it")
