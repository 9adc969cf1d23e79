"""Reinforcement learning: rollouts, rewards, advantages. Their terms are in `lmjax.objectives`."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("experience", "layout", "plan", "prompts", "rollouts", "saving"),
    names={
        "experience": ["Credit", "Experience", "following"],
        "layout": ["Layout", "lay_out", "rollout_batch", "take_rows"],
        "plan": ["Plan"],
        "prompts": ["Prompts"],
        "rollouts": ["Rollout", "roll_out"],
    },
)
