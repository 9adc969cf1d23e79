"""Rollouts of fixed numbers, and the terms over them that TRL and verl have too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lmjax as lm
from lmjax.batch import RolloutBatch
from lmjax.objectives import Objective, Weighing

FIXTURES = Path(__file__).with_name("rollouts.npz")
LENGTHS, T = np.array([6, 4, 5, 3]), 6
HORIZON = 8


def numbers() -> dict[str, np.ndarray]:
    """The arrays of the comparison, float32, [4, 6] or [4]."""
    i, t = np.arange(4)[:, None], np.arange(T)[None]
    logprobs = -0.2 - 0.15 * ((3 * i + 2 * t) % 7)
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.1 * np.sin(1.7 * i + 2.3 * t + 0.4) + 0.12 * np.cos(3 * i - t),
        "reference": logprobs + 0.25 * np.cos(2.1 * i + 1.3 * t),
        "sampling": logprobs + 0.5 * np.sin(0.9 * i - 1.9 * t),
        "entropy": 0.3 + 0.1 * ((5 * i + 3 * t) % 11),
        "mask": (t < LENGTHS[:, None]) * 1.0,
        "advantages": np.array([1.1, -0.7, 0.4, -0.9]),
        "values": 0.5 * np.sin(1.1 * i + 0.7 * t),
        "old_values": 0.5 * np.sin(1.1 * i + 0.7 * t) + 0.3 * np.cos(2 * t - i),
        "returns": 0.6 * np.cos(0.8 * i + 0.5 * t),
    }


def batch(on_policy: bool = False) -> RolloutBatch:
    """The same as a batch of rollouts, one a row."""
    found = {name: value.astype(np.float32) for name, value in numbers().items()}
    mask = found["mask"]
    ids = np.zeros(mask.shape, np.int32)
    return RolloutBatch(
        ids, ids, mask, mask.astype(np.int32), ids,
        advantages=np.broadcast_to(found["advantages"][:, None], mask.shape) * mask,
        old_logprobs=None if on_policy else found["old"],
        sampling_logprobs=found["sampling"],
        values=found["old_values"],
        returns=found["returns"],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    build: our objective.
    peer: "trl", "rloo", "openrlhf", or the name of a loss of verl.
    options: of the peer.
    on_policy: without old log-probabilities.
    """

    build: Callable[[], Objective]
    peer: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    on_policy: bool = False


O = lm.objectives
KL = dict(estimator="k3", gradient="weighted")
SEQUENCES = O.sequence_mean
CORRECTED = dict(correct="token_truncate", high=1.2)

CASES: dict[str, Case] = {
    "grpo": Case(lambda: O.grpo(), "trl", dict(loss_type="grpo")),
    "grpo_on_policy": Case(lambda: O.grpo(), "trl", dict(loss_type="grpo"), on_policy=True),
    "grpo_kl": Case(
        lambda: O.grpo() + 0.3 * O.kl(**KL, reducer=SEQUENCES), "trl", dict(loss_type="grpo", beta=0.3)
    ),
    "grpo_kl_plain": Case(
        lambda: O.grpo() + 0.3 * O.kl(estimator="k3", reducer=SEQUENCES),
        "trl", dict(loss_type="grpo", beta=0.3, use_bias_correction_kl=False),
    ),
    "grpo_cap": Case(
        lambda: O.grpo(cap=1.05), "trl", dict(loss_type="grpo", delta=1.05)
    ),
    "bnpo": Case(lambda: O.bnpo(), "trl", dict(loss_type="bnpo")),
    "dr_grpo": Case(lambda: O.dr_grpo(HORIZON), "trl", dict(loss_type="dr_grpo")),
    "dapo": Case(lambda: O.dapo(), "trl", dict(loss_type="dapo", epsilon_high=0.28)),
    "dapo_entropy": Case(
        lambda: O.dapo() - 0.1 * O.entropy(), "trl", dict(loss_type="dapo", epsilon_high=0.28, entropy_coef=0.1)
    ),
    "dapo_top_entropy": Case(
        lambda: O.dapo(weighing=Weighing(top_entropy=0.4)) + 0.3 * O.kl(**KL),
        "trl", dict(loss_type="dapo", epsilon_high=0.28, top_entropy_quantile=0.4, beta=0.3),
    ),
    "dapo_off_policy": Case(
        lambda: O.dapo(weighing=Weighing(off_policy=0.05)),
        "trl", dict(loss_type="dapo", epsilon_high=0.28, off_policy_mask_threshold=0.05, use_sampling=True),
    ),
    **{
        f"dapo_{mode}": Case(
            lambda mode=mode: O.dapo(weighing=Weighing(correct=mode, low=0.7, high=1.2)) + 0.3 * O.kl(**KL),
            "trl", dict(loss_type="dapo", epsilon_high=0.28, correct=mode, low=0.7, high=1.2, beta=0.3),
        )
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
    "dapo_top_entropy_bonus": Case(
        lambda: O.dapo(weighing=Weighing(top_entropy=0.4)) - 0.1 * O.entropy(top=0.4),
        "trl", dict(loss_type="dapo", epsilon_high=0.28, top_entropy_quantile=0.4, entropy_coef=0.1),
    ),
    "gspo_kl": Case(
        lambda: O.gspo((0.02, 0.03)) + 0.3 * O.kl(**KL, level="sequence", reducer=SEQUENCES),
        "trl", dict(
            loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.02, epsilon_high=0.03, beta=0.3
        ),
    ),
    "gspo": Case(
        lambda: O.gspo((0.02, 0.03)),
        "trl", dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.02, epsilon_high=0.03),
    ),
    "luspo": Case(
        lambda: O.luspo(0.02),
        "trl", dict(loss_type="luspo", importance_sampling_level="sequence", epsilon_low=0.02, epsilon_high=0.02),
    ),
    "cispo": Case(lambda: O.cispo((None, 1.05)), "trl", dict(loss_type="cispo", epsilon_high=1.05)),
    "sapo": Case(lambda: O.sapo(), "trl", dict(loss_type="sapo")),
    "vespo": Case(lambda: O.vespo(), "trl", dict(loss_type="vespo")),
    "vespo_corrected": Case(
        lambda: O.vespo(weighing=Weighing(**CORRECTED)),
        "trl", dict(loss_type="vespo", correct="token_truncate", high=1.2),
    ),
    "rloo": Case(lambda: O.rloo(), "rloo"),
    "verl_ppo": Case(
        lambda: O.ppo((0.1, 0.15), dual=1.1, weighing=Weighing(held=20.0)),
        "vanilla", dict(clip_ratio_low=0.1, clip_ratio_high=0.15, clip_ratio_c=1.1),
    ),
    "verl_ppo_sequences": Case(
        lambda: O.ppo(0.1, dual=3.0, reducer=SEQUENCES),
        "vanilla", dict(clip_ratio=0.1, loss_agg_mode="seq-mean-token-mean"),
    ),
    "verl_ppo_sums": Case(
        lambda: O.ppo(0.1, dual=3.0, reducer=O.sequence_sum_mean),
        "vanilla", dict(clip_ratio=0.1, loss_agg_mode="seq-mean-token-sum"),
    ),
    "verl_gspo": Case(
        lambda: O.gspo_token((0.02, 0.03)),
        "gspo", dict(clip_ratio_low=0.02, clip_ratio_high=0.03, loss_agg_mode="seq-mean-token-mean"),
    ),
    **{
        f"verl_{level}_truncated": Case(
            lambda level=level: O.ppo(dual=3.0, weighing=Weighing(held=20.0, correct=f"{level}_truncate", high=1.1)),
            "vanilla", dict(rollout_is=level, rollout_is_threshold=1.1),
        )
        for level in ("token", "sequence")
    },
    "verl_sapo": Case(lambda: O.sapo(), "sapo"),
    "verl_gpg": Case(lambda: O.gpg(), "gpg"),
    "verl_clip_cov": Case(  # all of the band, of which verl draws some
        lambda: O.clip_cov(0.1, share=1.0, band=(0.05, 0.3)),
        "clip_cov", dict(clip_ratio=0.1, clip_cov_ratio=1.0, clip_cov_lb=0.05, clip_cov_ub=0.3),
    ),
    "verl_kl_cov": Case(
        lambda: O.kl_cov(0.7, share=0.3), "kl_cov", dict(kl_cov_ratio=0.3, ppo_kl_coef=0.7)
    ),
    "verl_cispo": Case(
        lambda: O.cispo((0.9, 1.1)), "cispo", dict(clip_ratio_low=0.1, clip_ratio_high=0.1)
    ),
    "verl_gmpo": Case(lambda: O.gmpo(0.1), "geo_mean", dict(clip_ratio=0.1)),
    "verl_dppo_tv": Case(lambda: O.dppo("tv", 0.04), "dppo_tv", dict(clip_ratio=0.04)),
    "verl_dppo_kl": Case(lambda: O.dppo("kl", 0.002), "dppo_kl", dict(clip_ratio=0.002)),
    "verl_dro": Case(lambda: O.dro(0.5), "dro", dict(dro_beta=0.5)),
    "openrlhf_ppo": Case(
        lambda: O.ppo((0.1, 0.15), dual=1.1, weighing=Weighing(held=20.0)),
        "openrlhf", dict(eps_clip_low_high=(0.1, 0.15), dual_clip=1.1),
    ),
    "openrlhf_gspo": Case(
        lambda: O.gspo((0.02, 0.03)), "openrlhf", dict(policy_loss_type="gspo", eps_clip_low_high=(0.02, 0.03))
    ),
    **{
        f"openrlhf_{mode}": Case(
            lambda ours=ours: O.ppo(weighing=Weighing(correct=ours, low=0.7, high=1.2), reducer=SEQUENCES),
            "openrlhf",
            dict(is_correction_mode=mode, is_correction_threshold=(0.7, 1.2), loss_agg_mode="seq-mean-token-mean"),
        )
        for mode, ours in (("mask", "token_mask"), ("clip", "token_truncate"))
    },
    **{
        f"openrlhf_kl_{estimator}{'_unbiased' * unbiased}": Case(
            lambda estimator=estimator, unbiased=unbiased: O.ppo() + 0.3 * O.kl(
                estimator=estimator, gradient="weighted_k2" if unbiased else "own", cap=10.0, largest=10.0
            ),
            "openrlhf",
            dict(use_kl_loss=True, kl_coef=0.3, kl_estimator=estimator, unbiased_gradient=unbiased),
        )
        for estimator, unbiased in (("k1", True), ("k2", False), ("k3", True), ("k3", False))
    },
    "openrlhf_value": Case(lambda: O.value_loss(0.2), "openrlhf", dict(value_clip=0.2)),
    "verl_value": Case(lambda: O.value_loss(0.2), "value", dict(clip=0.2)),
    **{
        f"verl_kl_{name}": Case(
            lambda options=options: O.kl(**options), "kl", dict(kind=kind)
        )
        for name, kind, options in (
            ("k1", "k1", dict(estimator="k1")),
            ("abs", "abs", dict(estimator="abs")),
            ("k2", "k2", dict(estimator="k2")),
            ("k3", "low_var_kl", dict(estimator="k3", held=20.0, largest=10.0)),
            ("k1_plus", "k1+", dict(estimator="k1", gradient="k2")),
            ("k3_plus", "k3+", dict(estimator="k3", gradient="k2", held=20.0, largest=10.0)),
        )
    },
}  # fmt: skip


def is_value(case: Case) -> bool:
    """Whether it is a critic's loss."""
    return case.peer == "value" or "value_clip" in case.options


def preset(case: Case) -> Objective | None:
    """The objective that the library's own options make; None for what its trainers have no options for."""
    options = dict(case.options)
    if case.peer == "rloo":
        return O.trl_rloo(**options)
    if case.peer == "trl":
        mode = options.pop("correct", None)
        bounds = {f"importance_sampling_clip_{side}": options.pop(name, None) for side, name in
                  (("min", "low"), ("max", "high"))}  # fmt: skip
        options.pop("use_sampling", None)
        options["epsilon"] = options.pop("epsilon_low", 0.2)
        correction = {} if mode is None else bounds | {"importance_sampling_mode": mode}
        return O.trl_grpo(**options, **correction, max_completion_length=HORIZON)
    if case.peer == "openrlhf":
        return O.openrlhf_critic(**options) if "value_clip" in options else O.openrlhf_actor(**options)
    if case.peer == "value":
        return O.verl_critic(cliprange_value=options["clip"])
    return None if case.peer == "kl" else O.verl_actor(case.peer, **options)
