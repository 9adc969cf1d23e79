"""What a step's numbers mean, in words, where they mean trouble."""

from __future__ import annotations

from collections.abc import Mapping

FAILURES = {"raised": "raised", "timed_out": "timed out", "not_a_number": "gave no number"}


def diagnose(metrics: Mapping[str, float], *, first: bool = False, on_policy: bool = True) -> list[str]:
    """Sentences about what keeps a policy from learning, or is wrong.

    Args:
      metrics: of a step, by the names that `Experience` and the terms give them.
      first: this is the first update, before which policy, sampler and reference are one.
      on_policy: rollouts are of the policy that learns from them, so ratios are 1.

    >>> diagnose({"completions/clipped_ratio": 1.0, "frac_reward_zero_std": 0.2})
    ['every rollout came to the limit of its length: raise max_new_tokens, or check that the model says its end']
    """
    found = []

    def say(condition: bool, text: str) -> None:
        if condition:
            found.append(text)

    get = metrics.get
    say(
        get("completions/clipped_ratio", 0.0) >= 1.0,
        "every rollout came to the limit of its length: raise max_new_tokens, or check that the model says its end",
    )
    say(
        get("frac_reward_zero_std", 0.0) >= 1.0 and get("advantage/mean_abs", 0.0) < 1e-6,
        "the rollouts of every prompt were judged alike, so nothing is learned: easier or harder prompts, more samples "
        "of each, or a reward with finer steps would help",
    )
    say(get("rollouts/left_out", 0.0) >= 1.0, "every rollout was left out, so nothing is learned: " + _blamed(metrics))
    if first:
        ratio = get("ratio", 1.0)
        say(
            abs(ratio - 1) > 1e-3,
            f"the importance ratio is {ratio:.4f} at the first update, and should be 1: sampler and trainer disagree, "
            "as they do with different temperatures",
        )
        kls = {name: value for name, value in metrics.items() if name in ("objective/kl", "loss/kl_reference")}
        for name, kl in kls.items():
            say(
                abs(kl) > 1e-2,
                f"the KL to the reference ({name}) is {kl:.4f} before any update, and should be 0: the reference is "
                "another model, or is asked at another temperature",
            )
    say(
        on_policy and get("sampling/sampling_logp_difference/max", 0.0) > 1e-3,
        "tokens were drawn from another distribution than the policy's (processors change it): correct for it with "
        "Weighing(correct=...), or leave the processors out",
    )
    say(
        get("rollout/entropy", 1.0) < 0.01,
        f"the policy is certain of every token (entropy {get('rollout/entropy', 0.0):.4f}), so its samples are all "
        "alike: raise the temperature, or pay for entropy",
    )
    return found


def _blamed(metrics: Mapping[str, float]) -> str:
    """Rewards that failed, or else the limit of rollouts' lengths, or else nothing in particular."""
    counts = []
    for name, count in metrics.items():
        reward, _, kind = name.removeprefix("rewards/").rpartition("/")
        if name.startswith("rewards/") and kind in FAILURES and count:
            counts.append(f"the reward {reward!r} {FAILURES[kind]} {count:.0f} times")
    if counts:
        return " and ".join(counts)
    if metrics.get("completions/clipped_ratio", 0.0) >= 1.0:
        return "all came to the limit of their length, and those are not learned from"
    return "no reward applies to any of them"
