"""A language model that learns from rewards for its own answers: REINFORCE with any baseline.

    python -m experiments.reinforce --model runs/mine --data.path prompts.jsonl --rewards "exact_number()"

As `experiments.grpo`, but that what was said becomes likelier by its advantage alone, without a clip. With
--baseline none --whitened --reward-kl 0.01 it is REINFORCE++.
"""

from __future__ import annotations

from typing import Any

import lmjax as lm
from experiments import reinforcement
from experiments.reinforcement_config import ReinforceConfig
from lmjax import command_line, rl


def run(config: ReinforceConfig, options: command_line.Options) -> int:
    """See `reinforcement.run`."""
    objective = lm.objectives.parse_objective(config.objective)

    def credit(config: ReinforceConfig, reference: rl.Reading) -> tuple[Any, dict[str, Any]]:
        running = rl.RunningMean() if config.baseline == "running" else None
        own: Any = "given" if config.baseline in ("running", "greedy") else config.baseline
        estimator = rl.Estimator(own, "none")
        kl, parts = reinforcement.reward_kl(config, reference)
        given = rl.outcome_credit(
            estimator, kl=kl, gamma=config.gamma, running=running, whitened=config.whitened,
            learn_truncated=config.learn_truncated,
        )  # fmt: skip
        return given, parts if running is None else parts | {"baseline": running}

    method = reinforcement.Method(objective, credit, likeliest=config.baseline == "greedy")
    return reinforcement.run(config, options, method, "reinforce")


if __name__ == "__main__":
    command_line.main(run, ReinforceConfig(), plan=True)
