"""A language model that learns from rewards for its own answers, compared with each other: GRPO and its relatives.

    python -m experiments.grpo --model runs/mine --data.path prompts.jsonl --rewards "exact_number()"

Records have a prompt, and what rewards read, such as the answer. Every prompt is answered several times; what was
better than the others becomes likelier. A run directory that holds a checkpoint is gone on with, bit for bit.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import lmjax as lm
from experiments import reinforcement
from experiments.reinforcement_config import GrpoConfig
from lmjax import command_line, rl
from lmjax.errors import UserError


def run(config: GrpoConfig, options: command_line.Options) -> int:
    """See `reinforcement.run`."""
    objective = lm.objectives.parse_objective(config.objective)
    estimator = _estimator(config.estimator, config.rollout.samples)

    def credit(config: GrpoConfig, reference: rl.Reading) -> tuple[Any, dict[str, Any]]:
        if config.process:
            return rl.process_credit(learn_truncated=config.learn_truncated), {}
        whitened = rl.WHITENED.get(config.estimator, False)
        return rl.outcome_credit(estimator, whitened=whitened, learn_truncated=config.learn_truncated), {}

    likeliest = getattr(estimator, "baseline", "") == "given" and not config.process
    return reinforcement.run(config, options, reinforcement.Method(objective, credit, likeliest=likeliest), "grpo")


def _estimator(name: str, samples: int) -> Any:
    if match := re.fullmatch(r"pass_at_([0-9]+)", name):
        found = functools.partial(rl.pass_at_k_advantages, k=int(match.group(1)))
        found([0.0] * samples, [0] * samples)  # raises where k does not go with them
        return found
    if name not in rl.ESTIMATORS:
        raise UserError(f"there is no estimator {name!r}; there are {', '.join(rl.ESTIMATORS)} and pass_at_2 and so on")
    return rl.ESTIMATORS[name]


if __name__ == "__main__":
    command_line.main(run, GrpoConfig(), plan=True)
