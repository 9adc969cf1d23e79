"""A bandit and a sequence whose optima are known: every algorithm reaches 95 % of them, on three seeds (law 10)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import objectives, rl
from lmjax.data import Prompt
from lmjax.policy import add_value_head

pytestmark = pytest.mark.slow

V, OPTIMUM = 8, 1.0
POLICY = lm.Policy(lm.models.small(V, num_layers=1, embed_dim=16, num_heads=2, max_length=16))
ARMS = np.array([0.0, 0.1, 0.5, 0.3, 1.0, 0.6, 0.2, 0.4])  # what each token is worth


def bandit(rollout: rl.Rollout) -> float:
    """The prompt's token shifts the arms."""
    return float(ARMS[(rollout.tokens[0] - rollout.prompt[0]) % V])


def counting(rollout: rl.Rollout) -> float:
    """The share of tokens that are one more than the token before, the prompt's last to begin with."""
    before = np.append(rollout.prompt[-1], rollout.tokens[:-1])
    return float(np.mean(rollout.tokens == (before + 1) % V))


class Way(NamedTuple):
    """An algorithm: its objective, its credit, how often it learns from a rollout."""

    objective: Any
    credit: Any
    epochs: int = 1
    samples: int = 16


WAYS = {
    "reinforce": Way(
        objectives.reinforce(), lambda: rl.outcome_credit(rl.ESTIMATORS["reinforce_given"], running=rl.RunningMean())
    ),
    "rloo": Way(objectives.rloo(), lambda: rl.outcome_credit(rl.ESTIMATORS["trl_rloo"])),
    "grpo": Way(objectives.grpo(), lambda: rl.outcome_credit(rl.ESTIMATORS["trl_grpo"]), 2),
    "ppo": Way(objectives.ppo() + 0.5 * objectives.value_loss(0.2), rl.critic_credit, 2),
}
TASKS = {"bandit": (bandit, 1, 120), "counting": (counting, 4, 150)}


@functools.cache
def compiled(way: str) -> tuple[Any, Any]:
    optimizer = optax.adam(1e-2)
    return optimizer, lm.training.make_step(POLICY, WAYS[way].objective, optimizer, trainable=("params", "value"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("way", WAYS)
def test_it_comes_within_five_percent_of_the_optimum(way, task):
    reward, length, iterations = TASKS[task]
    given, (optimizer, step) = WAYS[way], compiled(way)
    plan = rl.Plan(prompts=8, samples=given.samples, max_new_tokens=length, max_prompt=1, epochs=given.epochs)
    prompts = [Prompt(np.array([n])) for n in range(V)]

    def roll_out(variables: Any, asked: Any, key: Any, samples: int = plan.samples, **options: Any) -> Any:
        options = {"first_group": 0} | options
        return rl.roll_out(POLICY, variables, asked, key, samples=samples, max_new_tokens=length, eos=None, **options)

    results = []
    for seed in range(3):
        variables = add_value_head(POLICY.init(jax.random.key(seed)))
        state = lm.training.init_state(
            POLICY, optimizer, jax.random.key(seed), variables=variables, trainable=("params", "value")
        )
        with rl.Judge([rl.Reward(task, reward)]) as judge:
            experience = rl.Experience(
                POLICY, rl.Prompts(prompts, seed), plan, roll_out=roll_out, judge=judge, join=rl.join_scores,
                credit=given.credit(), key=jax.random.key(100 + seed),
            )  # fmt: skip
            experience.follow(state.variables, 0)
            run = rl.following(step, experience)
            for _ in range(iterations * plan.steps):
                state, _ = run(state, next(experience))
            found = judge(roll_out(state.variables, prompts, jax.random.key(7), temperature=0.0))()
        print(f"{way} {task} seed {seed}: {found.total.mean():.3f}")
        results.append(found.total.mean())
    assert min(results) >= 0.95 * OPTIMUM
