"""A language model that learns from rewards for its own answers, compared with each other: GRPO and its relatives.

    python -m experiments.grpo --model runs/mine --data.path prompts.jsonl --rewards "exact_number()"

Records have a prompt, and what rewards read, such as the answer. Every prompt is answered several times; what was
better than the others becomes likelier. A run directory that holds a checkpoint is gone on with, bit for bit.
"""

from __future__ import annotations

from typing import Any

import lmjax as lm
from experiments import reinforcement
from experiments.reinforcement_config import GrpoConfig
from lmjax import command_line, rl
from lmjax.errors import UserError


def run(config: GrpoConfig, options: command_line.Options) -> int:
    """See `reinforcement.run`."""
    objective = lm.objectives.parse_objective(config.objective)
    estimators = rl.ESTIMATORS
    if config.estimator not in estimators:
        raise UserError(f"there is no estimator {config.estimator!r}; there are {', '.join(estimators)}")

    def credit(config: GrpoConfig, reference: rl.Reading) -> tuple[Any, dict[str, Any]]:
        if config.process:
            return rl.process_credit(learn_truncated=config.learn_truncated), {}
        return rl.outcome_credit(estimators[config.estimator], learn_truncated=config.learn_truncated), {}

    return reinforcement.run(config, options, reinforcement.Method(objective, credit), "grpo")


if __name__ == "__main__":
    command_line.main(run, GrpoConfig(), plan=True)
