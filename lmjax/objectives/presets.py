"""The objectives of other libraries by their own options, with their defaults: TRL 1.16, verl 0.9.1, OpenRLHF 0.11.2.

Each is a sum of the terms that there are already. Means are over all tokens, or rollouts, of a step, where some of
those libraries average the means of microbatches; and a rollout that is masked altogether does not count in a mean over
rollouts, as in verl and OpenRLHF, where TRL counts it. What advantages are is not said here: see `lmjax.rl`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from lmjax.errors import UserError
from lmjax.losses.policy_gradient import Correction
from lmjax.objectives import policy_gradient as G
from lmjax.objectives.algebra import Objective
from lmjax.objectives.covariance import clip_cov, kl_cov
from lmjax.objectives.importance import Level, Weighing
from lmjax.objectives.reducers import (
    Reducer,
    constant_horizon,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
    token_sum,
)
from lmjax.objectives.terms import entropy, kl

VERL_KL: dict[str, dict[str, Any]] = {
    "k1": dict(estimator="k1"),
    "kl": dict(estimator="k1"),
    "abs": dict(estimator="abs"),
    "k2": dict(estimator="k2"),
    "mse": dict(estimator="k2"),
    "k3": dict(estimator="k3", held=20.0, largest=10.0),
    "low_var_kl": dict(estimator="k3", held=20.0, largest=10.0),
}


def _choice(options: Any, name: str, what: str) -> Any:
    if name not in options:
        raise UserError(f"there is no {what} {name!r}; there are {', '.join(sorted(options))}.")
    return options[name]


def _both(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    return (value if low is None else low, value if high is None else high)


def trl_grpo(
    loss_type: str = "dapo",
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    importance_sampling_level: Level = "token",
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    importance_sampling_mode: Correction | None = None,
    importance_sampling_clip_min: float | None = None,
    importance_sampling_clip_max: float | None = 3.0,
    max_completion_length: int = 512,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Objective:
    """The loss of TRL's `GRPOTrainer`. Options are those of its `GRPOConfig`.

    Args:
      loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo".
      epsilon, epsilon_high, delta: of the clip. For "cispo", `epsilon_high` is the bound of the ratio itself.
      beta: of the KL to the role "reference", k3; its gradient is the right one with `use_bias_correction_kl`.
      importance_sampling_level: "token" or "sequence".
      off_policy_mask_threshold, top_entropy_quantile: see `Weighing`.
      entropy_coef: of the entropy bonus.
      importance_sampling_mode: what TRL does where vLLM samples, by default there "sequence_mask"; None where it does
        not. With its bounds, that are called `vllm_importance_sampling_clip_...` there.
      max_completion_length: of "dr_grpo".
      sapo_..., vespo_...: of these losses.
    """
    reducers: dict[str, Reducer] = {
        "grpo": sequence_mean,
        "bnpo": token_mean,
        "dr_grpo": constant_horizon(max_completion_length),
        "dapo": token_mean,
        "luspo": sequence_sum_mean,
        "cispo": token_mean,
        "sapo": sequence_mean,
        "vespo": token_mean,
    }
    reducer = _choice(reducers, loss_type, "loss_type")
    high = epsilon if epsilon_high is None else epsilon_high

    def weighing(level: Level) -> Weighing:
        return Weighing(
            level=level,
            off_policy=off_policy_mask_threshold,
            top_entropy=top_entropy_quantile,
            correct=importance_sampling_mode,
            low=importance_sampling_clip_min,
            high=importance_sampling_clip_max,
        )

    own = weighing(importance_sampling_level)
    if loss_type == "cispo":
        objective = G.cispo((None, high), weighing=own, reducer=reducer)
    elif loss_type == "sapo":
        objective = G.sapo(sapo_temperature_pos, sapo_temperature_neg, weighing=own, reducer=reducer)
    elif loss_type == "vespo":
        positive, negative = (vespo_k_pos, vespo_lambda_pos), (vespo_k_neg, vespo_lambda_neg)
        objective = G.vespo(positive, negative, weighing=weighing("token"))
    else:
        objective = G.ppo((epsilon, high), cap=delta, weighing=own, reducer=reducer).named(loss_type)
    if beta:
        gradient: Literal["own", "weighted"] = "weighted" if use_bias_correction_kl else "own"
        level = importance_sampling_level
        objective += beta * kl("reference", estimator="k3", gradient=gradient, level=level, reducer=reducer)
    if entropy_coef:
        objective -= entropy_coef * entropy(top=top_entropy_quantile)
    return objective


def trl_rloo(*, epsilon: float = 0.2, epsilon_high: float | None = None) -> Objective:
    """The loss of TRL's `RLOOTrainer`. Its KL (`beta` 0.05) is a cost in the reward: see `lmjax.rl.KLReward`.

    Args:
      epsilon, epsilon_high: of the clip.
    """
    return G.rloo(_both(epsilon, None, epsilon_high))


def trl_ppo(
    *, cliprange: float = 0.2, cliprange_value: float = 0.2, vf_coef: float = 0.1, role: str | None = None
) -> Objective:
    """PPO as in "The N+ implementation details" (arXiv:2403.17031) and TRL's `PPOTrainer` before it was removed.

    Args:
      cliprange: of the policy.
      cliprange_value: of the critic.
      vf_coef: of its loss.
      role: of a critic of its own; None: the policy's value head.
    """
    return G.ppo(cliprange) + vf_coef * G.value_loss(cliprange_value, role=role)


def _verl_reducer(loss_agg_mode: str, loss_scale_factor: int | None) -> Reducer:
    reducers: dict[str, Callable[[], Reducer]] = {
        "token-mean": lambda: token_mean,
        "token-sum": lambda: token_sum,
        "seq-mean-token-mean": lambda: sequence_mean,
        "seq-mean-token-sum": lambda: sequence_sum_mean,
        "seq-mean-token-sum-norm": lambda: constant_horizon(loss_scale_factor or 0),
    }
    found = _choice(reducers, loss_agg_mode, "loss_agg_mode")
    if loss_agg_mode == "seq-mean-token-sum-norm" and not loss_scale_factor:
        raise UserError("seq-mean-token-sum-norm needs a loss_scale_factor: the most tokens of a rollout.")
    return found()


def verl_actor(
    loss_mode: str = "vanilla",
    *,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: int | None = None,
    entropy_coeff: float = 0.0,
    use_kl_loss: bool = False,
    kl_loss_coef: float = 0.001,
    kl_loss_type: str = "low_var_kl",
    rollout_is: Literal["token", "sequence"] | None = None,
    rollout_is_threshold: float = 2.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    clip_cov_ratio: float = 2e-4,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    kl_cov_ratio: float = 2e-4,
    ppo_kl_coef: float = 0.1,
    dro_beta: float | None = None,
) -> Objective:
    """The loss of verl's actor (`ppo_loss`). Options are those of its `ActorConfig` and `PolicyLossConfig`.

    Args:
      loss_mode: "vanilla", "gspo", "sapo", "gpg", "cispo", "clip_cov", "kl_cov", "geo_mean", "dppo_tv", "dppo_kl" or
        "dro".
      clip_ratio, clip_ratio_low, clip_ratio_high: of the clip.
      clip_ratio_c: of the dual clip of "vanilla".
      loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", or
        "seq-mean-token-sum-norm" with `loss_scale_factor`. "sapo" and "geo_mean" have one of their own.
      entropy_coeff: of the entropy bonus.
      use_kl_loss, kl_loss_coef, kl_loss_type: the KL to the role "reference": "k1", "abs", "k2", "low_var_kl" (k3), or
        one of these and "+" for the gradient of k2.
      rollout_is, rollout_is_threshold: truncated importance weights of trainer over sampler; None for none.
      tau_pos, tau_neg: of "sapo".
      clip_cov_..., kl_cov_ratio, ppo_kl_coef, dro_beta: of these losses.
    """
    clip = _both(clip_ratio, clip_ratio_low, clip_ratio_high)
    reducer = _verl_reducer(loss_agg_mode, loss_scale_factor)
    correct: Correction | None = None
    if rollout_is is not None:
        modes: dict[str, Correction] = {"token": "token_truncate", "sequence": "sequence_truncate"}
        correct = _choice(modes, rollout_is, "rollout_is")
    plain = Weighing(correct=correct, high=rollout_is_threshold)
    held, whole = dataclasses.replace(plain, held=20.0), dataclasses.replace(plain, level="sequence_token")
    band = (clip_cov_lb, clip_cov_ub)
    losses: dict[str, Callable[[], Objective]] = {
        "vanilla": lambda: G.ppo(clip, dual=clip_ratio_c, weighing=held, reducer=reducer),
        "gspo": lambda: G.gspo_token(clip, weighing=whole, reducer=reducer),
        "sapo": lambda: G.sapo(tau_pos, tau_neg, weighing=held),
        "gpg": lambda: G.reinforce(weighing=plain, reducer=reducer),
        "cispo": lambda: G.cispo((1 - clip[0], 1 + clip[1]), weighing=held, reducer=reducer),
        "clip_cov": lambda: clip_cov(clip, share=clip_cov_ratio, band=band, weighing=plain, reducer=reducer),
        "kl_cov": lambda: kl_cov(ppo_kl_coef, share=kl_cov_ratio, weighing=plain, reducer=reducer),
        "geo_mean": lambda: G.gmpo(clip, weighing=plain),
        "dppo_tv": lambda: G.dppo("tv", clip, weighing=held, reducer=reducer),
        "dppo_kl": lambda: G.dppo("kl", clip, weighing=held, reducer=reducer),
        "dro": lambda: G.dro(dro_beta or 0.0, weighing=plain, reducer=reducer),
    }
    objective = _choice(losses, loss_mode, "loss_mode")().named(loss_mode)
    if use_kl_loss:
        options = _choice(VERL_KL, kl_loss_type.removesuffix("+"), "kl_loss_type")
        gradient: Literal["own", "k2"] = "k2" if kl_loss_type.endswith("+") else "own"
        objective += kl_loss_coef * kl("reference", gradient=gradient, reducer=reducer, **options)
    if entropy_coeff:
        objective -= entropy_coeff * entropy(reducer=reducer)
    return objective


def verl_critic(
    *,
    cliprange_value: float = 0.5,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: int | None = None,
    role: str | None = None,
) -> Objective:
    """The loss of verl's critic.

    Args:
      cliprange_value: how far values may move for free.
      loss_agg_mode, loss_scale_factor: as in `verl_actor`.
      role: of a critic of its own; None: the policy's value head.
    """
    return G.value_loss(cliprange_value, role=role, reducer=_verl_reducer(loss_agg_mode, loss_scale_factor))


def openrlhf_actor(
    policy_loss_type: str = "ppo",
    *,
    eps_clip: float = 0.2,
    eps_clip_low_high: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    loss_agg_mode: str = "token-mean",
    entropy_coef: float = 0.0,
    use_kl_loss: bool = False,
    kl_coef: float = 0.01,
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    unbiased_gradient: bool = False,
    is_correction_mode: Literal["mask", "clip"] | None = None,
    is_correction_threshold: tuple[float, float] = (0.5, 5.0),
) -> Objective:
    """The loss of OpenRLHF's actor. Options are those of its `PolicyLoss` and `--algo.kl`.

    Args:
      policy_loss_type: "ppo" or "gspo" (whose mean is over rollouts).
      eps_clip, eps_clip_low_high, dual_clip: of the clip.
      loss_agg_mode: "token-mean" or "seq-mean-token-mean".
      entropy_coef: of the entropy bonus.
      use_kl_loss: a KL to the role "reference" in the loss; else it is a cost in the reward, as there by default.
      kl_coef, kl_estimator, unbiased_gradient: of that.
      is_correction_mode, is_correction_threshold: its importance weights of tokens over the sampler, of "ppo" only.
    """
    reducers = {"token-mean": token_mean, "seq-mean-token-mean": sequence_mean}
    reducer = _choice(reducers, loss_agg_mode, "loss_agg_mode")
    clip = (eps_clip, eps_clip) if eps_clip_low_high is None else eps_clip_low_high
    correct: Correction | None = None
    if is_correction_mode is not None:
        modes: dict[str, Correction] = {"mask": "token_mask", "clip": "token_truncate"}
        correct = _choice(modes, is_correction_mode, "is_correction_mode")
    low, high = is_correction_threshold
    if policy_loss_type == "gspo":
        if correct is not None:
            raise UserError("OpenRLHF has no such correction of gspo; leave is_correction_mode out.")
        weighing, reducer = G.SEQUENCE, sequence_mean
    elif policy_loss_type == "ppo":
        weighing = Weighing(held=20.0, correct=correct, low=low, high=high)
    else:
        raise UserError(f"there is no policy_loss_type {policy_loss_type!r}; there are gspo and ppo.")
    objective = G.ppo(clip, dual=dual_clip, weighing=weighing, reducer=reducer).named(policy_loss_type)
    if use_kl_loss:
        gradient: Literal["own", "weighted_k2"] = "weighted_k2" if unbiased_gradient else "own"
        # Beyond 20 nats its k3 stands still at 10; without a bound exp would overflow here.
        held = 20.0 if kl_estimator == "k3" else None
        objective += kl_coef * kl(
            "reference", estimator=kl_estimator, gradient=gradient, cap=10.0, held=held, largest=10.0
        )
    if entropy_coef:
        objective -= entropy_coef * entropy()
    return objective


def openrlhf_critic(*, value_clip: float | None = 0.5, role: str | None = None) -> Objective:
    """The loss of OpenRLHF's critic.

    Args:
      value_clip: how far values may move for free; None for no clip.
      role: of a critic of its own; None: the policy's value head.
    """
    return G.value_loss(value_clip, role=role)
