"""Rollouts of a small model, for losses of TRL's trainers and verl through all of its weights.

Weights are drawn from the names and shapes of tensors, as for preferences; stored are losses and gradients, and the
log-probabilities that the rollouts are said to have had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lmjax as lm
from lmjax import rl
from lmjax.batch import RolloutBatch
from lmjax.objectives import Objective
from tests.objectives.trl_cases import EOS

FIXTURES = Path(__file__).parent / "fixtures" / "rollout_models.npz"
TEMPERATURE, LONGEST, HORIZON = 0.8, 6, 8
PROMPTS, ANSWERS = (3, 1, 4), ((4, 6), (2, 5), (6, 3))
ADVANTAGES = np.array([1.1, -0.7, 0.4, -0.9, 0.6, -0.3])
O = lm.objectives


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    trainer: "grpo" or "rloo" of TRL, or "ppo": verl's losses of actor and critic.
    options: of its config.
    build: the objective of ours that is the same function.
    """

    trainer: str
    options: dict[str, Any]
    build: Callable[[], Objective]


def _grpo(*, trl: dict[str, Any] | None = None, **options: Any) -> Case:
    """A preset, and the same options for TRL but for those that are called otherwise there."""
    vllm = ("importance_sampling_mode", "importance_sampling_clip_max")
    theirs = {f"vllm_{key}" if key in vllm else key: value for key, value in options.items()}
    return Case("grpo", theirs | (trl or {}), lambda: O.trl_grpo(**options))


CASES: dict[str, Case] = {
    "grpo": _grpo(loss_type="grpo", beta=0.2, epsilon=0.1),
    "grpo on policy": _grpo(loss_type="grpo", trl=dict(on_policy=True)),
    "bnpo": _grpo(loss_type="bnpo", delta=1.05, epsilon=0.1),
    "dr_grpo": _grpo(loss_type="dr_grpo", max_completion_length=HORIZON, epsilon=0.1),
    "dapo": _grpo(loss_type="dapo", epsilon=0.1, epsilon_high=0.15, entropy_coef=0.1),
    "dapo corrected": _grpo(
        loss_type="dapo", epsilon_high=0.28, beta=0.2, off_policy_mask_threshold=0.1,
        importance_sampling_mode="token_mask", importance_sampling_clip_max=1.3,
    ),
    "dapo top entropy": _grpo(loss_type="dapo", top_entropy_quantile=0.4, entropy_coef=0.1, beta=0.2),
    "gspo": _grpo(
        loss_type="grpo", importance_sampling_level="sequence", epsilon=0.03, epsilon_high=0.04, beta=0.2
    ),
    "luspo": _grpo(loss_type="luspo", importance_sampling_level="sequence", epsilon=0.03),
    "cispo": _grpo(loss_type="cispo", epsilon_high=1.1),
    "sapo": _grpo(loss_type="sapo"),
    "vespo": _grpo(loss_type="vespo"),
    "rloo": Case("rloo", dict(epsilon=0.1, beta=0.0), lambda: O.trl_rloo(epsilon=0.1)),
    "ppo": Case(
        "ppo", dict(clip_ratio=0.1, cliprange_value=0.1),
        lambda: O.verl_actor(clip_ratio=0.1) + 0.5 * O.verl_critic(cliprange_value=0.1),
    ),
}  # fmt: skip


def conversations() -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Prompt, answer, which of its tokens the policy said itself, and the prompt's number."""
    random, found = np.random.RandomState(11), []
    for group, (length, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        prompt = random.randint(0, EOS, length)
        for n in answers:
            answer = np.append(random.randint(0, EOS, n - 1), EOS)
            found.append((prompt, answer, np.arange(n) != 2, group))  # the third is a tool's
    return found


def shifts() -> dict[str, np.ndarray]:
    """Numbers of each token of each answer, [6, 6]."""
    i, t = np.arange(len(ADVANTAGES))[:, None], np.arange(LONGEST)[None]
    return {
        "old": 0.1 * np.sin(1.7 * i + 2.3 * t + 0.4) + 0.12 * np.cos(3 * i - t),
        "sampling": 0.3 * np.sin(0.9 * i - 1.9 * t),
        "values": 0.5 * np.sin(1.1 * i + 0.7 * t),
        "returns": 0.6 * np.cos(0.8 * i + 0.5 * t),
    }


def batch(old: np.ndarray, on_policy: bool, tools: bool) -> RolloutBatch:
    """Forked rows, two answers to a prompt in each.

    Args:
      old: [6, 6], the log-probabilities of the answers' tokens as they were said.
      on_policy: without them.
      tools: leave the tools' tokens out; RLOO of TRL knows none.
    """
    given, made = shifts(), []
    for i, (prompt, answer, own, group) in enumerate(conversations()):
        n = len(answer)
        own = own if tools else np.ones(n, bool)
        drawn = old[i, :n] + given["sampling"][i, :n]
        made.append(rl.Rollout(prompt, answer, group, old[i, :n], drawn, "eos", own))
    place = rl.lay_out(made, per_row=2)
    found = rl.rollout_batch(
        made, place, temperature=TEMPERATURE, advantages=list(ADVANTAGES), old=not on_policy, sampling=True
    )
    tokens = lambda name: place.place([row[: len(rollout.tokens)] for row, rollout in zip(given[name], made)])
    return dataclasses.replace(found, values=tokens("values"), returns=tokens("returns"))
