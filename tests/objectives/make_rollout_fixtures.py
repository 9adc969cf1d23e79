"""Losses and gradients of TRL and verl on the rollouts of `rollout_cases`, kept as `rollouts.npz`.

    python -m tests.objectives.make_rollout_fixtures

Needs torch, trl 1.16, verl 0.9.1 and openrlhf 0.11.2. Their own methods run, on objects that hold just what they read.
"""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.objectives.rollout_cases import CASES, FIXTURES, HORIZON, is_value, numbers

TRL_DEFAULTS = dict(
    loss_type="dapo", importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, beta=0.0,
    top_entropy_quantile=1.0, off_policy_mask_threshold=None, entropy_coef=0.0, delta=None,
    use_bias_correction_kl=True, correct=None, low=None, high=3.0, use_sampling=False,
)  # fmt: skip


def compute(name: str) -> tuple[float, np.ndarray]:
    """The peer's loss, and its gradient with respect to what the policy says: log-probabilities, or values."""
    import torch

    case = CASES[name]
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers().items()}
    leaf = given["values" if is_value(case) else "logprobs"].requires_grad_()
    if case.peer in ("trl", "rloo"):
        loss = _trl(case, given)
    elif case.peer == "openrlhf":
        loss = _openrlhf(case, given)
    else:
        loss = _verl(case, given)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient.numpy()


def _trl(case: Any, given: dict[str, Any]) -> Any:
    import torch
    from trl import GRPOTrainer, RLOOTrainer

    options = SimpleNamespace(**TRL_DEFAULTS | case.options)
    N, T = given["mask"].shape
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x, pad_across_processes=lambda x, dim, pad_index: x,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (given["logprobs"], given["entropy"], None),
        aux_loss_enabled=False, get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights, accelerator=accelerator, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=HORIZON, use_adaptive_entropy=False,
        _entropy_bonus_enabled=options.entropy_coef != 0, _metrics={"train": collections.defaultdict(list)},
        use_vllm=options.correct is not None, vllm_importance_sampling_correction=True, **vars(options),
        args=SimpleNamespace(
            use_bias_correction_kl=options.use_bias_correction_kl, delta=options.delta, steps_per_generation=1,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
            vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
    )  # fmt: skip
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    ids = torch.zeros((N, T), dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
        "completion_mask": given["mask"], "advantages": given["advantages"],
        "ref_per_token_logps": given["reference"], "num_items_in_batch": given["mask"].sum(),
    }  # fmt: skip
    if case.peer == "rloo":
        inputs["old_logps"] = (given["old"] * given["mask"]).sum(1)
        return RLOOTrainer._compute_loss(trainer, None, inputs)
    if not case.on_policy:
        inputs["old_per_token_logps"] = given["old"]
    if options.use_sampling:
        inputs["sampling_per_token_logps"] = given["sampling"]
    if options.correct is not None:  # as `_generate_and_score_completions` makes it
        gap = (given["old"] - given["sampling"]) * given["mask"]
        weight = torch.exp(gap.sum(-1, keepdim=True) if options.correct.startswith("sequence") else gap)
        if options.correct.endswith("truncate"):
            weight = torch.clamp(weight, min=options.low, max=options.high)
        else:
            weight = weight.masked_fill((weight < (options.low or 0.0)) | (weight > options.high), 0.0)
        inputs["importance_sampling_ratio"] = weight
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def _verl(case: Any, given: dict[str, Any]) -> Any:
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
    from verl.workers.config import ActorConfig

    mask, options = given["mask"], dict(case.options)
    if case.peer == "kl":
        values = core_algos.kl_penalty(given["logprobs"], given["reference"], options["kind"])
        return (values * mask).sum() / mask.sum()
    if case.peer == "value":
        return core_algos.compute_value_loss(
            given["values"], given["returns"], given["old_values"], mask, options["clip"]
        )[0]
    mode = options.pop("loss_agg_mode", "token-mean")
    of_loss = ("dro_beta", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef")
    of_loss = {name: options.pop(name) for name in of_loss if name in options}
    weights = None
    if "rollout_is" in options:
        level, most = options.pop("rollout_is"), options.pop("rollout_is_threshold")
        weights = compute_rollout_correction_weights(given["old"] - given["sampling"], mask, level, most)[0]
    if "clip_ratio" in options:
        options |= {"clip_ratio_low": options["clip_ratio"], "clip_ratio_high": options["clip_ratio"]}
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    for name, value in of_loss.items():
        object.__setattr__(config.policy_loss, name, value)
    advantages = given["advantages"][:, None] * mask
    loss = core_algos.get_policy_loss_fn(case.peer)
    return loss(given["old"], given["logprobs"], advantages, mask, mode, config, weights)[0]


def _openrlhf(case: Any, given: dict[str, Any]) -> Any:
    PolicyLoss, ValueLoss, aggregate_loss, compute_approx_kl = _parts_of_openrlhf()
    options, mask, lp, old = dict(case.options), given["mask"], given["logprobs"], given["old"]
    if is_value(case):
        return ValueLoss(options["value_clip"])(given["values"], given["old_values"], given["returns"], mask)
    coefficient = options.pop("kl_coef", 0.0) * options.pop("use_kl_loss", False)
    kl = dict(kl_estimator=options.pop("kl_estimator", "k1"), unbiased_gradient=options.pop("unbiased_gradient", False))
    low, high = options.pop("eps_clip_low_high", (0.2, 0.2))
    made = PolicyLoss(
        low, high, token_level_loss=options.pop("loss_agg_mode", "token-mean") == "token-mean",
        is_correction_level="token" if "is_correction_mode" in options else "off", **options,
    )  # fmt: skip
    advantages = given["advantages"][:, None] * mask
    loss = made(lp, old, advantages, mask, rollout_log_probs=given["sampling"])[0]
    # As `training_step` of its actor adds it. It makes float32 of log-probabilities, which costs some digits.
    return loss + coefficient * aggregate_loss(compute_approx_kl(lp, given["reference"], old, **kl), mask)


def _parts_of_openrlhf() -> tuple[Any, ...]:
    """Its losses, without the rest of its `models`, which wants flash attention and DeepSpeed; losses use neither."""
    import importlib
    import sys
    import types

    import openrlhf

    name = "openrlhf.models"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [f"{path}/models" for path in openrlhf.__path__]
        sys.modules[name] = package
    without = "deepspeed" not in sys.modules
    sys.modules.setdefault("deepspeed", types.ModuleType("deepspeed"))
    loss, utils = importlib.import_module(f"{name}.loss"), importlib.import_module(f"{name}.utils")
    if without:
        del sys.modules["deepspeed"]  # others ask whether it is installed
    return loss.PolicyLoss, loss.ValueLoss, loss.aggregate_loss, utils.compute_approx_kl


if __name__ == "__main__":
    found = {name: compute(name) for name in CASES}
    arrays = {f"{name}/loss": loss for name, (loss, _) in found.items()}
    arrays |= {f"{name}/gradient": gradient for name, (_, gradient) in found.items()}
    np.savez_compressed(FIXTURES, **arrays)
    print(f"{FIXTURES}: {len(found)} cases, {FIXTURES.stat().st_size:,} bytes")
