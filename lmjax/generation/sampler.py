"""The sampler: one prefill and one loop on the device, over the modules that train.

Prompts are padded on the left, so that every row writes the same slot of the cache. Padding is segment 0,
which no token sees, and positions start at 0 with the first real token: a row is the same whatever stands
beside it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.models.config import DecoderConfig
from lmjax.models.decoder import Variables
from lmjax.models.layout import unstack_layers
from lmjax.policy import Outputs, Policy

SHORTEST_BUCKET = 16  # prompts are padded to a power of two, this one at the least


class Generation(NamedTuple):
    """What was sampled after each prompt.

    Attributes:
      tokens: int32 [B, N], the new tokens; 0 behind a row's end.
      logprobs: float32 [B, N], log-probability of each under the policy at the temperature it was sampled at
        (at 1 where that was 0), over the whole vocabulary whatever `top_k`: what the trainer computes for the
        same tokens. 0 behind a row's end.
      lengths: int32 [B], how many of a row's tokens count, the end-of-sequence token included.
    """

    tokens: Any
    logprobs: Any
    lengths: Any


class _State(NamedTuple):
    """What the loop carries."""

    step: jax.Array  # [], tokens already chosen
    last: jax.Array  # int32 [B], the newest of each row, not read yet
    tokens: jax.Array  # int32 [B, N]
    logprobs: jax.Array  # float32 [B, N]
    lengths: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    cache: Variables


def generate(
    policy: Policy,
    variables: Variables,
    prompts: Sequence[Any],
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    eos: int | None = None,
) -> Generation:
    """Samples a continuation of each prompt.

    Compiles once for a batch size, a power of two above the longest prompt, and `max_new_tokens`. Each row
    draws from a key of its own, so its tokens do not depend on its neighbours.

    Args:
      policy, variables: the model.
      prompts: B arrays of ids, each of at least one.
      key: seeds the sampling.
      max_new_tokens: N, at least 1. The loop ends sooner when every row has ended.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only; 0: among all.
      eos: the id that ends a row; None: rows never end early.

    Raises:
      UserError: no or empty prompts, ids outside the vocabulary, or more tokens than learned positions.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = {"params": {"table": 50 * jnp.roll(jnp.eye(4), 1, axis=1)}}  # after n comes n + 1
    >>> found = generate(policy, variables, [[0], [1, 2]], jax.random.key(0), max_new_tokens=3, eos=3)
    >>> found.tokens.tolist(), found.lengths.tolist()
    ([[1, 2, 3], [3, 0, 0]], [3, 1])
    """
    rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    _check(policy, rows, max_new_tokens, temperature, top_k)
    bucket = max(SHORTEST_BUCKET, 1 << (max(map(len, rows)) - 1).bit_length())
    tokens_BP = np.zeros((len(rows), bucket), np.int32)
    segments_BP, positions_BP = np.zeros_like(tokens_BP), np.zeros_like(tokens_BP)
    for b, row in enumerate(rows):
        tokens_BP[b, bucket - len(row) :] = row
        segments_BP[b, bucket - len(row) :] = 1
        positions_BP[b, bucket - len(row) :] = np.arange(len(row))
    return _generate(
        _unrolled(policy),
        max_new_tokens,
        temperature == 0,
        top_k,
        variables,
        (tokens_BP, segments_BP, positions_BP),
        key,
        np.float32(temperature or 1.0),
        np.int32(-1 if eos is None else eos),
    )


def _check(policy: Policy, rows: list[np.ndarray], max_new_tokens: int, temperature: float, top_k: int) -> None:
    config = policy.config
    if not rows or min(map(len, rows)) == 0:
        what = "prompt 0" if not rows else f"prompt {[len(row) for row in rows].index(0)}"
        raise UserError(f"{what} has no tokens; give each prompt at least one, such as the tokenizer's bos or eos.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; ask for at least 1.")
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}; give 0 for the likeliest token, or a positive number.")
    if not 0 <= top_k <= config.vocab_size:
        raise UserError(
            f"top_k is {top_k}; give 0 for all tokens, or a number up to the {config.vocab_size} there are."
        )
    for b, row in enumerate(rows):
        if row.min() < 0 or row.max() >= config.vocab_size:
            stranger = row[(row < 0) | (row >= config.vocab_size)][0]
            raise UserError(
                f"prompt {b} holds the id {stranger}, outside the model's vocabulary of {config.vocab_size}; "
                "encode it with the model's own tokenizer."
            )
    longest = max(map(len, rows)) + max_new_tokens
    if isinstance(config, DecoderConfig) and config.position == "learned" and longest > config.max_length:
        raise UserError(
            f"a prompt of {longest - max_new_tokens} tokens and {max_new_tokens} new ones do not fit "
            f"{config.max_length} learned positions; shorten one of them."
        )


@functools.lru_cache(maxsize=16)
def _unrolled(policy: Policy) -> Policy:
    """The same policy with its layers side by side: a scan would slice its parameters for every token."""
    config = policy.config
    if not isinstance(config, DecoderConfig) or not config.scanned:
        return policy
    return dataclasses.replace(policy, model=dataclasses.replace(config, layers="unrolled"))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    policy: Policy,
    N: int,
    greedy: bool,
    top_k: int,
    variables: Variables,
    prompt: tuple[jax.Array, jax.Array, jax.Array],
    key: jax.Array,
    temperature: jax.Array,
    eos: jax.Array,
) -> Generation:
    variables = unstack_layers(variables)
    tokens_BP, segments_BP, positions_BP = prompt
    B, P = tokens_BP.shape
    keys_B = jax.random.split(key, B)
    temperature_B = jnp.broadcast_to(temperature, (B,))

    def forward(cache: Variables, tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> Outputs:
        weightless = jnp.zeros(tokens.shape)
        batch = Batch(tokens, tokens, weightless, segments, positions, temperature_B)
        return policy(variables | {"cache": cache}, batch)

    def body(state: _State) -> _State:
        """Reads the newest token of each row and chooses the next."""
        position_B = positions_BP[:, -1] + state.step
        outputs = forward(state.cache, state.last[:, None], jnp.ones((B, 1), jnp.int32), position_B[:, None])
        z_BV = outputs.logits[:, 0]
        chosen_B = jnp.argmax(z_BV, axis=-1) if greedy else _sample(z_BV, keys_B, state.step, top_k)
        logprob_B = jnp.take_along_axis(z_BV, chosen_B[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(z_BV, axis=-1)
        chosen_B = jnp.where(state.done, 0, chosen_B).astype(jnp.int32)
        at = (0, state.step)
        return _State(
            step=state.step + 1,
            last=chosen_B,
            tokens=jax.lax.dynamic_update_slice(state.tokens, chosen_B[:, None], at),
            logprobs=jax.lax.dynamic_update_slice(state.logprobs, jnp.where(state.done, 0.0, logprob_B)[:, None], at),
            lengths=state.lengths + ~state.done,
            done=state.done | (chosen_B == eos),
            cache=outputs.cache,
        )

    # The prompts but for their last token, which is the first that the loop reads.
    cache = policy.init_cache(B, P + N)
    cache = forward(cache, tokens_BP[:, :-1], segments_BP[:, :-1], positions_BP[:, :-1]).cache
    start = _State(
        step=jnp.zeros((), jnp.int32),
        last=tokens_BP[:, -1],
        tokens=jnp.zeros((B, N), jnp.int32),
        logprobs=jnp.zeros((B, N)),
        lengths=jnp.zeros((B,), jnp.int32),
        done=jnp.zeros((B,), bool),
        cache=cache,
    )
    end = jax.lax.while_loop(lambda state: (state.step < N) & ~jnp.all(state.done), body, start)
    return Generation(end.tokens, end.logprobs, end.lengths)


def _sample(z_BV: jax.Array, keys_B: jax.Array, step: jax.Array, top_k: int) -> jax.Array:
    """A token of each row, int32 [B]. Its noise depends on the row's key and the step alone."""
    draw = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, step), logits))
    if not top_k:
        return draw(keys_B, z_BV)
    best_BK, index_BK = jax.lax.top_k(z_BV, top_k)
    return jnp.take_along_axis(index_BK, draw(keys_B, best_BK)[:, None], axis=-1)[:, 0]
