"""Scores of fixed numbers, and the estimators that TRL, verl and OpenRLHF have too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lmjax import rl
from lmjax.rl import returns
from lmjax.rl.advantages import ESTIMATORS, WHITENED, advantages

FIXTURES = Path(__file__).with_name("estimators.npz")


def arrays(variant: str = "") -> dict[str, Any]:
    """Eight rollouts of two prompts, six tokens wide; "missing": without some scores; "alone": one prompt has one;
    "seed...": other numbers throughout, of other lengths."""
    i, t = np.arange(8)[:, None], np.arange(6)[None]
    random = np.random.default_rng(int(variant[4:])) if variant.startswith("seed") else None
    lengths = np.array([6, 4, 5, 3, 2, 6, 4, 5]) if random is None else random.integers(1, 7, 8)
    mask = (t < lengths[:, None]) * 1.0
    found = {
        "scores": np.array([1.0, 0.25, -0.5, 2.0, 0.0, 0.7, 0.05, -1.1]),
        "groups": np.array([0, 0, 0, 0, 1, 1, 1, 1]),
        "given": np.array([0.3, 0.3, 0.3, 0.3, -0.2, -0.2, -0.2, -0.2]),
        "lengths": lengths,
        "mask": mask,
        "tools": mask * ((i + t) % 4 != 1),  # some tokens are an environment's
        "values": 0.5 * np.sin(1.1 * i + 0.7 * t),
        "rewards": 0.2 * np.cos(i + 2.0 * t) * mask,
        "second": np.array([0.1, 0.9, 0.4, 0.4, 1.0, 0.0, 0.5, 0.2]),
        "kl": 0.3 * np.sin(3.0 * i + t) * mask,
    }
    if random is not None:
        for name in ("scores", "second", "given", "values", "rewards", "kl"):
            found[name] = random.normal(size=found[name].shape) * (mask if name in ("rewards", "kl") else 1)
        found["tools"] = mask * (random.random(mask.shape) > 0.3)
        found["tools"][:, 0] = 1
    if variant == "missing":
        found["scores"][[1, 2, 5, 6, 7]] = found["second"][[1, 5, 6, 7]] = np.nan
    if variant == "alone":
        found["groups"] = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    return found


# A library, what it calls the estimator, and behind a stroke the variant of the scores.
CASES = (
    "trl_grpo", "trl_grpo_batch", "trl_rloo", "trl_rloo_normalized", "trl_gdpo",
    "trl_grpo/missing", "trl_grpo_batch/missing", "trl_rloo/missing", "trl_rloo_normalized/missing", "trl_gdpo/missing",
    "verl_grpo", "verl_dr_grpo", "verl_rloo", "verl_opo", "verl_remax", "verl_gpg", "verl_grpo_passk",
    "verl_grpo/alone", "verl_dr_grpo/alone", "verl_rloo/alone", "verl_opo/alone", "verl_gpg/alone",
    "verl_reinforce_plus_plus", "verl_reinforce_plus_plus_baseline", "verl_reinforce_plus_plus_baseline/alone",
    "verl_gae", "verl_gae_tools", "verl_gdpo",
    "openrlhf_reinforce", "openrlhf_reinforce_baseline", "openrlhf_dr_grpo", "openrlhf_rloo", "openrlhf_group_norm",
    "openrlhf_flash_reinforce", "openrlhf_gae",
)  # fmt: skip
OPENRLHF_KL = 0.05


def ours(case: str) -> dict[str, np.ndarray]:
    """What lmjax makes of a case: "advantages", per rollout or token, and "returns" where there are any."""
    name, _, variant = case.partition("/")
    a = arrays(variant)
    if name.startswith("openrlhf_"):
        return _as_openrlhf(name, a)
    alone = name.removeprefix("verl_")
    if name.startswith("verl_gae"):
        mask = a["tools"] if name.endswith("tools") else a["mask"]
        gains, wanted = returns.gae(a["rewards"], a["values"], mask, 0.97, 0.9)
        return {"advantages": returns.whiten(gains, mask), "returns": wanted * mask}
    if alone == "reinforce_plus_plus":
        togo = returns.rewards_to_go(a["rewards"], a["mask"], 0.9)
        return {"advantages": returns.whiten(togo, a["mask"]), "returns": togo}
    if name == "trl_gdpo":
        return {"advantages": rl.decoupled_advantages([a["scores"], a["second"]], [1.0, 0.5], a["groups"])}
    if alone == "gdpo":  # as verl has it: whitened over tokens
        parts = [advantages(a[key], a["groups"], ESTIMATORS["verl_grpo"]) for key in ("scores", "second")]
        return {"advantages": returns.whiten((parts[0] + 0.5 * parts[1])[:, None] * a["mask"], a["mask"])}
    found = advantages(a["scores"], a["groups"], ESTIMATORS[name], lengths=a["lengths"], given=a["given"])
    if alone == "reinforce_plus_plus_baseline":
        return {"advantages": returns.whiten(found[:, None] * a["mask"], a["mask"], **WHITENED[name])}
    return {"advantages": found}


def _as_openrlhf(name: str, a: dict[str, Any]) -> dict[str, np.ndarray]:
    """Its KL costs come after the baseline, token by token; some estimators are whitened at the end."""
    mask, gamma = a["mask"], 0.9 if name in ("openrlhf_gae", "openrlhf_reinforce") else 1.0
    estimator = ESTIMATORS["reinforce" if name == "openrlhf_gae" else name]
    scores = advantages(a["scores"], a["groups"], estimator)
    rewards = returns.place_scores(scores, a["lengths"], mask.shape[1]) - OPENRLHF_KL * a["kl"]
    if name == "openrlhf_gae":
        gains, wanted = returns.gae(rewards, a["values"], mask, gamma, 0.95)
    else:
        gains = wanted = returns.rewards_to_go(rewards, mask, gamma)
    if name == "openrlhf_gae" or name in WHITENED:
        gains = returns.whiten(gains, mask, **WHITENED["openrlhf_reinforce"])
    return {"advantages": gains, "returns": wanted}
