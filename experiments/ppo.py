"""A language model that learns from rewards for its own answers, with a critic: PPO.

    python -m experiments.ppo --model runs/mine --data.path prompts.jsonl --rewards "exact_number()"

As `experiments.grpo`, but that a critic says what was to be expected of each token: a second head of the policy, or a
model of its own (--critic model).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import lmjax as lm
from experiments import reinforcement
from experiments.reinforcement_config import PpoConfig
from lmjax import command_line, rl


def run(config: PpoConfig, options: command_line.Options) -> int:
    """See `reinforcement.run`."""
    apart = config.critic == "model"
    objective = lm.objectives.parse_objective(config.objective)
    if apart:
        objective = _of_critic(objective)
    values = rl.Reading("values", _critic if apart else None)

    def credit(config: PpoConfig, reference: rl.Reading) -> tuple[Any, dict[str, Any]]:
        kl, parts = reinforcement.reward_kl(config, reference)
        given = rl.critic_credit(
            values, gamma=config.gamma, lam=config.lam, kl=kl, position=config.position,
            whiten_rewards=config.whiten_rewards, learn_truncated=config.learn_truncated,
        )  # fmt: skip
        return given, parts

    def with_critic(variables: Any) -> Any:
        import jax
        import jax.numpy as jnp

        from lmjax.policy import add_value_head

        if not apart:
            return add_value_head(variables)
        return variables | {"critic": jax.tree.map(jnp.copy, add_value_head(variables))}

    method = reinforcement.Method(
        objective,
        credit,
        roles=(("critic", lm.objectives.critic_role()),),
        also_trained=("critic",) if apart else ("value",),
        beside=with_critic,
        last_token=config.position == "after_eos",
    )
    return reinforcement.run(config, options, method, "ppo")


def _of_critic(objective: Any) -> Any:
    """The objective whose value loss reads the critic, and not the policy's own head."""
    own = lambda term: dataclasses.replace(term, roles=("critic",)) if term.name == "value_loss" else term
    return lm.objectives.Objective(tuple((coefficient, own(term)) for coefficient, term in objective.terms))


def _critic(variables: Any) -> Any:
    return variables["critic"]


if __name__ == "__main__":
    command_line.main(run, PpoConfig(), plan=True)
