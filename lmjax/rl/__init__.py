"""Reinforcement learning: rollouts, rewards, advantages. Their terms are in `lmjax.objectives`."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "advantages", "arithmetic", "controllers", "credit", "diagnostics", "environments", "experience", "layout",
        "penalties", "plan", "prompts", "returns", "rewards", "rollouts", "saving", "selection", "verifiers", "workers",
    ),
    names={
        "advantages": [
            "ESTIMATORS", "Estimator", "WHITENED", "decoupled_advantages", "pass_at_k_advantages", "process_advantages",
        ],
        "controllers": ["AdaptiveEntropy", "AdaptiveKL", "RunningMean"],
        "credit": ["KLReward", "critic_credit", "outcome_credit", "process_credit"],
        "diagnostics": ["diagnose"],
        "environments": ["Environment", "episode_metrics", "play", "turn_rewards"],
        "experience": ["Credit", "Experience", "Reading", "following"],
        "layout": ["Layout", "lay_out", "rollout_batch", "take_rows"],
        "penalties": ["cosine_length", "overlong", "repetition", "without_end"],
        "plan": ["Plan"],
        "prompts": ["Prompts"],
        "rewards": ["Judge", "Missing", "Reward", "Scores", "join_scores", "of_reward_model", "of_text"],
        "rollouts": ["Rollout", "roll_out", "with_likeliest"],
        "selection": ["Curriculum", "Replay", "scores_differ"],
    },
)
