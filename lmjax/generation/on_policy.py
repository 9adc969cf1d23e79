"""A policy's own continuations as a batch to train on, as on-policy distillation wants them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lmjax.batch import Batch, next_token_batch
from lmjax.errors import UserError
from lmjax.generation.sampler import generate
from lmjax.models.decoder import Variables
from lmjax.policy import Policy


def continued_batch(
    policy: Policy, variables: Variables, batch: Batch, key: jax.Array, *, prompt_tokens: int, **options: Any
) -> Batch:
    """The beginnings of a batch's rows, gone on with by the policy; only its own tokens count as targets.

    A row's prompt is the beginning of its longest document, never all of it. Every batch of one shape gives one of that
    shape, so that nothing is compiled anew. No gradient goes through the sampling (GKD, arXiv:2306.13649).

    Args:
      policy, variables: the model.
      batch: token rows [B, T], on the host or on one process's devices.
      key: seeds the sampling.
      prompt_tokens: P, the longest prompt, from 1 to T - 1; T - P tokens are sampled at the most.
      options: of `generate`: temperature, processors, eos, mesh and so on.

    Returns:
      A batch [B, T] of NumPy arrays: a prompt and its continuation, then padding.

    Raises:
      UserError: prompts too long for the rows; and see `generate`.

    >>> import lmjax as lm, jax.numpy as jnp
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = {"params": {"table": 50 * jnp.roll(jnp.eye(4), 1, axis=1)}}  # after n comes n + 1
    >>> batch = next_token_batch(np.array([[2, 2, 1, 1, 0]]))
    >>> own = continued_batch(policy, variables, batch, jax.random.key(0), prompt_tokens=2, eos=0)
    >>> own.tokens.tolist(), own.targets.tolist(), own.mask.tolist()
    ([[2, 2, 3, 0]], [[2, 3, 0, 0]], [[0.0, 1.0, 1.0, 0.0]])
    """
    tokens_BT, segments_BT = np.asarray(batch.tokens), np.asarray(batch.segments)
    B, T = tokens_BT.shape
    if not 1 <= prompt_tokens < T:
        raise UserError(f"prompt_tokens is {prompt_tokens}; rows of {T} tokens have room for 1 to {T - 1}.")
    prompts = [_beginning(tokens_BT[b], segments_BT[b], prompt_tokens) for b in range(B)]
    found = generate(policy, variables, prompts, key, max_new_tokens=T - prompt_tokens, **options)
    new_BN, lengths_B = np.asarray(found.tokens), np.asarray(found.lengths)
    ids, segments, mask = np.zeros((B, T + 1), np.int32), np.zeros((B, T + 1), np.int32), np.zeros((B, T + 1))
    for b, prompt in enumerate(prompts):
        end = len(prompt) + int(lengths_B[b])
        ids[b, :end] = np.concatenate([prompt, new_BN[b, : lengths_B[b]]])
        segments[b, :end], mask[b, len(prompt) : end] = 1, 1.0
    return next_token_batch(ids, segments, mask)


def _beginning(tokens_T: np.ndarray, segments_T: np.ndarray, longest: int) -> np.ndarray:
    numbers, starts, sizes = np.unique(segments_T, return_index=True, return_counts=True)
    sizes = np.where(numbers > 0, sizes, 0)  # padding is no document; a row of nothing else is taken as it comes
    chosen = int(np.argmax(sizes))
    length = min(longest, max(int(sizes[chosen]) - 1, 1))
    return tokens_T[starts[chosen] : starts[chosen] + length]
