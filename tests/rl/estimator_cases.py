"""Scores of fixed numbers, and the estimators that TRL and verl have too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lmjax import rl
from lmjax.rl import returns
from lmjax.rl.advantages import ESTIMATORS, advantages

FIXTURES = Path(__file__).with_name("estimators.npz")


def arrays() -> dict[str, Any]:
    """Eight rollouts of two prompts, six tokens wide."""
    i, t = np.arange(8)[:, None], np.arange(6)[None]
    lengths = np.array([6, 4, 5, 3, 2, 6, 4, 5])
    mask = (t < lengths[:, None]) * 1.0
    return {
        "scores": np.array([1.0, 0.25, -0.5, 2.0, 0.0, 0.7, 0.05, -1.1]),
        "groups": np.array([0, 0, 0, 0, 1, 1, 1, 1]),
        "given": np.array([0.3, 0.3, 0.3, 0.3, -0.2, -0.2, -0.2, -0.2]),
        "lengths": lengths,
        "mask": mask,
        "tools": mask * ((i + t) % 4 != 1),  # some tokens are an environment's
        "values": 0.5 * np.sin(1.1 * i + 0.7 * t),
        "rewards": 0.2 * np.cos(i + 2.0 * t) * mask,
        "second": np.array([0.1, 0.9, 0.4, 0.4, 1.0, 0.0, 0.5, 0.2]),
    }


CASES = (
    "trl_grpo", "trl_grpo_batch", "trl_rloo", "trl_gdpo", "verl_grpo", "verl_dr_grpo", "verl_rloo", "verl_opo",
    "verl_remax", "verl_gpg", "verl_grpo_passk", "verl_reinforce_plus_plus", "verl_reinforce_plus_plus_baseline",
    "verl_gae", "verl_gae_tools", "verl_gdpo",
)  # fmt: skip


def ours(name: str) -> dict[str, np.ndarray]:
    """What lmjax makes of a case: "advantages", per rollout or token, and "returns" where there are any."""
    a = arrays()
    alone = name.removeprefix("verl_")
    if name.startswith("verl_gae"):
        mask = a["tools"] if name.endswith("tools") else a["mask"]
        gains, wanted = returns.gae(a["rewards"], a["values"], mask, 0.97, 0.9)
        return {"advantages": returns.whiten(gains, mask), "returns": wanted * mask}
    if alone == "reinforce_plus_plus":
        togo = returns.rewards_to_go(a["rewards"], a["mask"], 0.9)
        return {"advantages": returns.whiten(togo, a["mask"]), "returns": togo}
    if alone == "reinforce_plus_plus_baseline":
        centered = advantages(a["scores"], a["groups"], ESTIMATORS["dr_grpo"])
        return {"advantages": returns.whiten(centered[:, None] * a["mask"], a["mask"])}
    if alone == "grpo_passk":
        return {"advantages": rl.best_advantages(a["scores"], a["groups"])}
    if name == "trl_gdpo":
        return {"advantages": rl.decoupled_advantages([a["scores"], a["second"]], [1.0, 0.5], a["groups"])}
    if alone == "gdpo":  # as verl has it: whitened over tokens
        parts = [advantages(a[key], a["groups"], ESTIMATORS["verl_grpo"]) for key in ("scores", "second")]
        return {"advantages": returns.whiten((parts[0] + 0.5 * parts[1])[:, None] * a["mask"], a["mask"])}
    estimator = ESTIMATORS["dr_grpo" if alone == "dr_grpo" else name]
    return {"advantages": advantages(a["scores"], a["groups"], estimator, lengths=a["lengths"], given=a["given"])}
