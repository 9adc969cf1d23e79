"""Rollouts: what a policy said to a prompt, alone or in turns with an environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lmjax.data.prompts import Prompt
from lmjax.errors import UserError
from lmjax.generation.batching import generate_many
from lmjax.generation.engine import FINISH
from lmjax.generation.sampler import generate
from lmjax.models.decoder import Variables
from lmjax.policy import Policy
from lmjax.tokenizers.base import Tokenizer

GROWS_FROM = 128  # new tokens from which the cache grows with what is said


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
      number: of its prompt among all prompts.
      likeliest: the likeliest answer to its prompt, one object for all rollouts of a group: it is judged with them and
        not learned from, and its score is what theirs are compared with (`Scores.given`); see `with_likeliest`.
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
    number: int = 0
    likeliest: Rollout | None = None

    @property
    def ended(self) -> bool:
        """Whether it came to its own end, rather than to the limit of its length."""
        return self.finish != "length"


def roll_out(
    policy: Policy,
    variables: Variables,
    prompts: Sequence[Prompt],
    key: jax.Array,
    *,
    samples: int,
    max_new_tokens: int,
    eos: int | Sequence[int] | None,
    temperature: float = 1.0,
    tokenizer: Tokenizer | None = None,
    slots: int | None = None,
    first_group: int = 0,
    version: int = 0,
    **options: Any,
) -> list[Rollout]:
    """Samples answers to each prompt with the arrays that are trained; a prompt is read once for all its samples.

    Args:
      policy, variables: the model.
      prompts: what is asked.
      key: seeds the sampling; the same rollouts come of it with or without `slots`.
      samples: n, rollouts of each prompt.
      max_new_tokens: of a rollout, at the most.
      eos: the id or ids that end one.
      temperature: divides the logits.
      tokenizer: makes their texts; None leaves those empty.
      slots: rows that are decoded together, finished ones replaced by waiting prompts (continuous batching): for
        rollouts of lengths that differ much. None decodes all at once.
      first_group: the number of the first prompt's group.
      version: see `Rollout`.
      options: of `generate`: processors, cache, mesh and so on.

    Raises:
      UserError: see `generate`.
    """
    ids = [prompt.ids for prompt in prompts]
    options |= {"samples": samples, "eos": eos, "max_new_tokens": max_new_tokens, "temperature": temperature}
    if slots is None:
        # Quarters: most of what can be saved by reading no more than there is, for four programs.
        if max_new_tokens >= GROWS_FROM:
            options.setdefault("grow", -(-max_new_tokens // 4))
        found = jax.device_get(generate(policy, variables, ids, key, **options))
    else:
        found = generate_many(policy, variables, ids, key, slots=slots, max_prompt=max(map(len, ids)), **options)
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    rollouts = []
    for i, length in enumerate(found.lengths):
        prompt, tokens = prompts[i // samples], np.asarray(found.tokens[i, :length], np.int32)
        words = tokens[:-1] if len(tokens) and int(tokens[-1]) in ends else tokens
        rollouts.append(
            Rollout(
                prompt=np.asarray(prompt.ids, np.int32),
                tokens=tokens,
                group=first_group + i // samples,
                logprobs=np.asarray(found.logprobs[i, :length], np.float32),
                sampling_logprobs=np.asarray(found.sampling_logprobs[i, :length], np.float32),
                finish=FINISH[int(found.finish[i])],
                own=np.ones(length, bool),
                prompt_text=prompt.text,
                text="" if tokenizer is None else tokenizer.decode(words.tolist()),
                record=prompt.record,
                version=version,
                number=prompt.number,
            )
        )
    return rollouts


def with_likeliest(rollouts: Sequence[Rollout], answers: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts beside the likeliest answers to their prompts: the baseline of ReMax (Li et al., arXiv:2310.10505).

    Args:
      rollouts: sampled.
      answers: of the same variables at temperature 0, one for each group.

    Raises:
      UserError: a group has no answer, or several.
    """
    known = {answer.group: answer for answer in answers}
    if len(known) != len(answers) or not known.keys() >= {rollout.group for rollout in rollouts}:
        raise UserError(f"{len(answers)} likeliest answers do not go with the groups; give one for each prompt.")
    return [dataclasses.replace(rollout, likeliest=known[rollout.group]) for rollout in rollouts]
