"""What reinforcement learning is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.adapter_config import AdapterConfig
from experiments.finetuning_config import FinetuningConfig
from lmjax.data.prompt_config import PromptConfig
from lmjax.errors import UserError
from lmjax.rl.plan import Plan
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class ReinforcementConfig(FinetuningConfig):
    """A language model that learns from rewards for what it says itself.

    Attributes:
      data: the prompts; other fields of their records are for rewards.
      rollout: how much is rolled out, and how often it is learned from. max_prompt 0: as long as the longest prompt.
      rewards: each "name(options)" out of lmjax.rl.verifiers and penalties, or "file.py:function" of yours (rollout ->
        number), with a weight in front if it is not 1: "exact_number(where='last')", "0.1 * ended()",
        "rewards.py:politeness", "0.5 * overlong(64, buffer=16)", "without_end(exact_number(), 1.0)".
      reward_timeout: seconds that a function of yours may take for a rollout, in a process of its own; 0: it runs here.
      reference_kl: coefficient of the KL to the model before training, in the loss (k3, weighted); 0: none.
      entropy: coefficient of a bonus for the entropy of tokens; 0: none.
      learn_truncated: learn from rollouts that came to the limit of their length too.
      curriculum: prompts that are answered well now and then come more often than others.
      slots: rows that are decoded together (continuous batching); 0: all at once.
      evaluations: held-out prompts that are answered, likeliest tokens only, at an evaluation; 0 for all.
      samples_shown: rollouts of the last iteration that are written as samples.
    """

    data: PromptConfig = PromptConfig(template="none")
    adapter: AdapterConfig = AdapterConfig(kind="full")
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0, b2=0.99)
    schedule: ScheduleConfig = ScheduleConfig(kind="constant", peak=3e-4, warmup_steps=5)
    loop: LoopConfig = LoopConfig(steps=100, eval_every=20, log_every=1, prefetch=0)
    checkpoint: CheckpointConfig = CheckpointConfig(every=50, keep_best=0)
    rollout: Plan = Plan(prompts=32, samples=8, max_new_tokens=64, max_prompt=0)
    rewards: tuple[str, ...] = ("exact_number()",)
    reward_timeout: float = 0.0
    reference_kl: float = 0.0
    entropy: float = 0.0
    learn_truncated: bool = True
    curriculum: bool = False
    slots: int = 0
    evaluations: int = 256
    samples_shown: int = 4

    @property
    def step_rows(self) -> int:
        """Rows of a step."""
        return self.rollout.rows // self.rollout.minibatches

    @property
    def row_length(self) -> int:
        """The most positions of a row, about."""
        return (self.rollout.max_prompt or self.data.max_length) + self.rollout.width * self.rollout.max_new_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards:
            raise UserError("there are no rewards; give at least one, such as --rewards 'exact_number()'")
        for name in ("reward_timeout", "reference_kl", "entropy", "slots", "evaluations", "samples_shown"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.loop.prefetch:
            raise UserError(
                f"loop.prefetch is {self.loop.prefetch}, but rollouts are of the policy as it is; set it to 0 (see "
                "rollout.stale for rollouts that are made ahead)"
            )


@dataclasses.dataclass(frozen=True)
class GrpoConfig(ReinforcementConfig):
    """GRPO: rollouts of a prompt are compared with each other.

    Attributes:
      objective: of the policy: a sum of terms of lmjax.objectives, such as "dapo()", "gspo()" or "dr_grpo(horizon=64)".
      estimator: what advantages are: a name out of lmjax.rl.advantages.ESTIMATORS; or pass_at_2, pass_at_3 and so on:
        the best of so many is what should be good (PKPO).
      process: rewards of steps are compared too (DeepSeekMath 4.1.3); the rewards must give them.
    """

    objective: str = "grpo()"
    estimator: str = "trl_grpo"
    process: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _compared(self.rollout)


@dataclasses.dataclass(frozen=True)
class TokenRewardConfig(ReinforcementConfig):
    """Rewards of tokens: a KL at each, the score at the end.

    Attributes:
      gamma: discount of a token.
      reward_kl: coefficient of the KL to the model before training, token by token in the reward; 0: none.
      target_kl: nats a rollout that reward_kl is steered to; 0: it stays as it is.
    """

    gamma: float = 1.0
    reward_kl: float = 0.0
    target_kl: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma is {self.gamma}; give a number from 0 to 1")
        if self.reward_kl < 0 or self.target_kl < 0 or (self.target_kl and not self.reward_kl):
            raise UserError("reward_kl and target_kl must not be negative, and a target needs a reward_kl")


@dataclasses.dataclass(frozen=True)
class ReinforceConfig(TokenRewardConfig):
    """REINFORCE: the log-probability of what was said, by how much better than a baseline it was.

    Attributes:
      objective: of the policy.
      baseline: none; batch or group: the mean of either; leave_one_out: of the others of its group (RLOO); optimal: of
        its group by length (OPO); running: a mean that follows the scores; greedy: the score of the likeliest answer to
        the prompt (ReMax), which is rolled out besides. It is taken off the score alone, without the KL.
      whitened: divide advantages by their spread over the batch (REINFORCE++).
    """

    objective: str = "reinforce()"
    baseline: Literal["none", "batch", "group", "leave_one_out", "optimal", "running", "greedy"] = "leave_one_out"
    whitened: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline in ("group", "leave_one_out", "optimal"):
            _compared(self.rollout)


def _compared(plan: Plan) -> None:
    if plan.samples < 2:
        raise UserError(
            "a prompt has a single rollout, which cannot be compared with others of its group; set rollout.samples to "
            "2 or more, or take experiments.reinforce with --baseline batch"
        )


@dataclasses.dataclass(frozen=True)
class PpoConfig(TokenRewardConfig):
    """PPO: a critic says what was to be expected, token by token.

    Attributes:
      objective: of the policy and the critic.
      critic: head: a second head of the policy; model: a copy of it with a head, which learns beside it.
      lam: lambda of GAE.
      position: where a score is placed: at the last token, or one behind it (after_eos, as in the N+ implementation).
      whiten_rewards: whiten rewards, keeping their mean.
    """

    objective: str = "ppo(0.2) + 0.1 * value_loss(0.2)"
    critic: Literal["head", "model"] = "head"
    rollout: Plan = Plan(prompts=64, samples=1, max_new_tokens=64, max_prompt=0, epochs=2, minibatches=2)
    lam: float = 0.95
    position: Literal["last", "after_eos"] = "last"
    whiten_rewards: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1:
            raise UserError(f"lam is {self.lam}; give a number from 0 to 1")
