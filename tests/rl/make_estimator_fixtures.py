"""Advantages of TRL and verl on the scores of `estimator_cases`, kept as `estimators.npz`.

    PYTHONPATH=. python -m tests.rl.make_estimator_fixtures

Needs torch, trl 1.16 and verl 0.9.1. verl's are functions; TRL's are lines of its trainers' methods, which are run as
they stand.
"""

from __future__ import annotations

import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.rl.estimator_cases import CASES, FIXTURES, arrays


def compute(name: str) -> dict[str, np.ndarray]:
    """The library's "advantages" of a case, and "returns" where there are any."""
    library, _, kind = name.partition("_")
    return {"advantages": _trl(kind)} if library == "trl" else _verl(kind)


def _trl(kind: str) -> np.ndarray:
    import torch
    from trl import GRPOTrainer, RLOOTrainer
    from trl.trainer import grpo_trainer

    a = arrays()
    scores = torch.tensor(np.stack([a["scores"], a["second"]], 1))
    trainer, first, last = GRPOTrainer, "        unscorable_mask = torch.isnan", "        # Slice to keep only"
    if kind == "rloo":
        trainer, first, last = RLOOTrainer, "        grouped_rewards = rewards.view", "        # Unscorable completions"
    source = inspect.getsource(trainer._generate_and_score_completions)
    begin = source.index(first)
    end = source.index("advantages = torch.nan_to_num", begin) if kind != "rloo" else source.index(last, begin)
    code = source[begin:end].rpartition("\n")[0] + "\n"
    own = SimpleNamespace(
        multi_objective_aggregation="normalize_then_sum" if kind == "gdpo" else "sum_then_normalize",
        reward_weights=torch.tensor([1.0, 0.5 if kind == "gdpo" else 0.0]),
        scale_rewards="batch" if "batch" in kind else "group",
        reward_funcs=[None, None], normalize_advantages=False,
    )  # fmt: skip
    names: dict[str, Any] = {
        "torch": torch, "nanstd": grpo_trainer.nanstd, "self": own, "device": "cpu", "num_generations": 4,
        "rewards_per_func": scores, "rewards": scores[:, 0],
    }  # fmt: skip
    exec(textwrap.dedent(code), names)
    return names["advantages"].numpy()


def _verl(kind: str) -> dict[str, np.ndarray]:
    import torch
    from verl.trainer.ppo import core_algos as c

    a = arrays()
    mask, index = torch.tensor(a["mask"]), a["groups"]
    placed = np.zeros(a["mask"].shape)
    placed[np.arange(8), a["lengths"] - 1] = a["scores"]
    scores = torch.tensor(placed)
    if kind.startswith("gae"):
        own = torch.tensor(a["tools"]) if kind == "gae_tools" else mask
        gains, wanted = c.compute_gae_advantage_return(
            torch.tensor(a["rewards"]), torch.tensor(a["values"]), own, torch.tensor(0.97), torch.tensor(0.9)
        )
        return {"advantages": (gains * own).numpy(), "returns": (wanted * own).numpy()}
    if kind == "reinforce_plus_plus":
        config = SimpleNamespace(gamma=0.9)
        gains, wanted = c.compute_reinforce_plus_plus_outcome_advantage(torch.tensor(a["rewards"]), mask, config=config)
        return {"advantages": gains.numpy(), "returns": (wanted * mask).numpy()}
    if kind == "remax":
        gains, _ = c.compute_remax_outcome_advantage(scores, torch.tensor(a["given"]), mask)
        return {"advantages": gains.numpy()[:, 0]}
    if kind == "gdpo":
        second = np.zeros(a["mask"].shape)
        second[np.arange(8), a["lengths"] - 1] = a["second"]
        config = {"gdpo_reward_keys": ["first", "second"], "gdpo_reward_weights": [1.0, 0.5]}
        prompts = torch.zeros((8, 1))
        attention = torch.cat([torch.ones((8, 1)), mask], dim=1).long()
        gains, _ = c.compute_gdpo_outcome_advantage(
            scores, mask, index, config=config, non_tensor_batch={"first": a["scores"], "second": a["second"]},
            batch={"prompts": prompts, "attention_mask": attention},
        )  # fmt: skip
        return {"advantages": gains.numpy()}
    name = {"dr_grpo": "grpo"}.get(kind, kind)
    options: dict[str, Any] = {}
    if "grpo" in kind:
        options["norm_adv_by_std_in_grpo"] = kind != "dr_grpo"
    function = getattr(c, f"compute_{name}_outcome_advantage")
    if kind == "grpo_passk":
        options["config"] = SimpleNamespace(get=lambda key, default=None: default)
    gains, _ = function(scores, mask, index, **options)
    if kind == "reinforce_plus_plus_baseline":
        return {"advantages": gains.numpy()}
    return {"advantages": gains.numpy().sum(1) / a["lengths"]}


if __name__ == "__main__":
    found = {f"{name}/{key}": value for name in CASES for key, value in compute(name).items()}
    np.savez_compressed(FIXTURES, **found)
    print(f"{FIXTURES}: {len(CASES)} cases, {FIXTURES.stat().st_size:,} bytes")
