"""Rollouts: what a policy said to a prompt, alone or in turns with an environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer to one prompt, or one whole episode.

    Attributes:
      prompt: int32 [P], ids.
      tokens: int32 [N], the ids behind it, with the end-of-sequence token where there is one.
      group: the number of its prompt; rollouts of one prompt have one number.
      logprobs: float32 [N], of the policy that said them, at its temperature: the trainer's own; 0 where not `own`.
      sampling_logprobs: float32 [N], under what they were drawn from in fact; 0 where not `own`.
      finish: why it ended: a name out of `generation.FINISH`, or what the environment says.
      own: bool [N], False for tokens that an environment put in.
      prompt_text, text: the prompt, and what was said (without the end-of-sequence token), as text.
      record: what else is known of the prompt: the columns of its record, such as the right answer.
      version: the number of updates that the policy had had.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    group: int
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    finish: str
    own: np.ndarray
    prompt_text: str = ""
    text: str = ""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    version: int = 0

    @property
    def ended(self) -> bool:
        """Whether it came to its own end, rather than to the limit of its length."""
        return self.finish != "length"
