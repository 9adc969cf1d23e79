"""Advantages of TRL, verl and OpenRLHF on the scores of `estimator_cases`, kept as `estimators.npz`.

    PYTHONPATH=. python -m tests.rl.make_estimator_fixtures

Needs torch, trl 1.16, verl 0.9.1 and openrlhf 0.11.2, installed with --no-deps; the last two bring a package called
`tests` that hides this one, so delete it. verl's are functions;
TRL's are lines of its trainers' methods, and OpenRLHF's are methods, which are run as they stand.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.rl.estimator_cases import CASES, FIXTURES, OPENRLHF_KL, arrays


def compute(case: str) -> dict[str, np.ndarray]:
    """The library's "advantages" of a case, and "returns" where there are any."""
    name, _, variant = case.partition("/")
    library, _, kind = name.partition("_")
    return {"trl": _trl, "verl": _verl, "openrlhf": _openrlhf}[library](kind, arrays(variant))


def _trl(kind: str, a: dict[str, Any]) -> dict[str, np.ndarray]:
    import torch
    from trl import GRPOTrainer, RLOOTrainer
    from trl.trainer import grpo_trainer

    scores = torch.tensor(np.stack([a["scores"], a["second"]], 1))
    if kind != "gdpo":
        scores = scores[:, :1]
    trainer, first, last = GRPOTrainer, "        unscorable_mask = torch.isnan", "        # Slice to keep only"
    rloo = kind.startswith("rloo")
    if rloo:
        trainer, first, last = RLOOTrainer, "        grouped_rewards = rewards.view", "        # Unscorable completions"
    source = inspect.getsource(trainer._generate_and_score_completions)
    begin = source.index(first)
    end = source.index("advantages = torch.nan_to_num", begin) if not rloo else source.index(last, begin)
    code = source[begin:end].rpartition("\n")[0] + "\n"
    own = SimpleNamespace(
        multi_objective_aggregation="normalize_then_sum" if kind == "gdpo" else "sum_then_normalize",
        reward_weights=torch.tensor([1.0, 0.5])[: scores.shape[1]],
        scale_rewards="batch" if "batch" in kind else "group",
        reward_funcs=[None] * scores.shape[1], normalize_advantages=kind.endswith("normalized"),
    )  # fmt: skip
    names: dict[str, Any] = {
        "torch": torch, "nanstd": grpo_trainer.nanstd, "self": own, "device": "cpu", "num_generations": 4,
        "rewards_per_func": scores, "rewards": scores[:, 0],
    }  # fmt: skip
    exec(textwrap.dedent(code), names)
    return {"advantages": torch.nan_to_num(names["advantages"]).numpy()}  # the line after these


def _verl(kind: str, a: dict[str, Any]) -> dict[str, np.ndarray]:
    import torch
    from verl.trainer.ppo import core_algos as c

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


def _openrlhf(kind: str, a: dict[str, Any]) -> dict[str, np.ndarray]:
    import torch

    folder = Path((importlib.util.find_spec("openrlhf") or SimpleNamespace(origin=None)).origin).parent
    names: dict[str, Any] = {
        "torch": torch, "itertools": itertools, "logger": SimpleNamespace(warning=lambda *_: None),
        "apply_length_penalties": lambda *_: None,
    }  # fmt: skip
    own = ("compute_reward", "compute_advantages_and_returns", "get_advantages_and_returns", "get_cumulative_returns")
    for path in (folder / "models/utils.py", folder / "trainer/ppo_utils/experience_maker.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in own:
                exec("from __future__ import annotations\n" + ast.unparse(node), names)
    advantage = SimpleNamespace(estimator=kind, gamma=0.9, lambd=0.95, no_std_norm=False)
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=4), algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=None),
    )  # fmt: skip
    maker = SimpleNamespace(
        strategy=SimpleNamespace(args=args), kl_ctl=SimpleNamespace(value=OPENRLHF_KL), advantage_estimator=kind,
        get_advantages_and_returns=lambda *given: names["get_advantages_and_returns"](None, *given),
        get_cumulative_returns=lambda *given: names["get_cumulative_returns"](None, *given),
    )  # fmt: skip
    mask = torch.tensor(a["mask"])
    experience = SimpleNamespace(
        index=list(range(8)), rewards=torch.tensor(a["scores"]), kl=torch.tensor(a["kl"]), action_mask=mask,
        values=torch.tensor(a["values"]), info={},
    )  # fmt: skip
    names["compute_advantages_and_returns"](maker, [experience])
    return {"advantages": (experience.advantages * mask).numpy(), "returns": (experience.returns * mask).numpy()}


if __name__ == "__main__":
    found = {f"{name}/{key}": value for name in CASES for key, value in compute(name).items()}
    np.savez_compressed(FIXTURES, **found)
    print(f"{FIXTURES}: {len(CASES)} cases, {FIXTURES.stat().st_size:,} bytes")
