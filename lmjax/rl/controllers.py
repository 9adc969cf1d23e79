"""Coefficients that follow what is measured. Each has a state that a checkpoint holds."""

from __future__ import annotations

from typing import Any

from lmjax.errors import UserError


class AdaptiveKL:
    """The coefficient of a KL cost, raised while the KL is above its target (Ziegler et al., arXiv:1909.08593).

    `coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * rollouts / horizon`.

    Args:
      coefficient: to begin with (lm-human-preferences: 0.15).
      target: nats a rollout (6).
      horizon: rollouts (10,000).

    >>> controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    >>> controller.update(12.0, rollouts=50)
    >>> round(controller.coefficient, 4)
    0.11
    """

    def __init__(self, coefficient: float, target: float = 6.0, horizon: float = 10_000.0):
        if coefficient <= 0 or target <= 0 or horizon <= 0:
            raise UserError(f"coefficient {coefficient}, target {target} and horizon {horizon} must be positive.")
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, rollouts: int) -> None:
        """Takes the mean KL of so many rollouts, in nats a rollout."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * rollouts / self.horizon

    def get_state(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def set_state(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]


class AdaptiveEntropy:
    """The coefficient of an entropy bonus, by steps towards a target (Skywork-OR1, arXiv:2505.22312, as in TRL).

    It rises by a step while the entropy is at or below the target and falls by one above; it is applied only while the
    entropy last measured was at or below the target.

    Args:
      target: nats a token (TRL: 0.2).
      coefficient: to begin with.
      step: up or down at each update (0.005).
      least, most: bounds (0, 1).
    """

    def __init__(
        self, target: float = 0.2, coefficient: float = 0.0, step: float = 0.005, least: float = 0.0, most: float = 1.0
    ):
        if target <= 0 or step <= 0 or not least <= coefficient <= most:
            raise UserError(
                f"target {target} and step {step} must be positive, and {coefficient} lie within {least} and {most}."
            )
        self.target, self.step, self.least, self.most = target, step, least, most
        self._coefficient, self._last = coefficient, float("inf")

    @property
    def coefficient(self) -> float:
        """What is to be applied now."""
        return self._coefficient if self._last <= self.target else 0.0

    def update(self, entropy: float) -> None:
        """Takes the mean entropy of a batch's tokens."""
        change = self.step if entropy <= self.target else -self.step
        self._coefficient = min(max(self._coefficient + change, self.least), self.most)
        self._last = entropy

    def get_state(self) -> dict[str, Any]:
        return {"coefficient": self._coefficient, "last": None if self._last == float("inf") else self._last}

    def set_state(self, state: dict[str, Any]) -> None:
        self._coefficient = state["coefficient"]
        self._last = float("inf") if state["last"] is None else state["last"]


class RunningMean:
    """A baseline that follows the mean of the scores.

    Args:
      decay: share of the old mean that is kept at an update.
    """

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay < 1:
            raise UserError(f"decay is {decay}; give a number from 0 up to, not including, 1.")
        self.decay, self.mean = decay, 0.0
        self._weight = 0.0

    def update(self, mean: float) -> None:
        """Takes the mean score of a batch. The first one counts whole."""
        self._weight = self.decay * self._weight + 1 - self.decay
        self.mean += (mean - self.mean) * (1 - self.decay) / self._weight

    def get_state(self) -> dict[str, Any]:
        return {"mean": self.mean, "weight": self._weight}

    def set_state(self, state: dict[str, Any]) -> None:
        self.mean, self._weight = state["mean"], state["weight"]
