"""What every way of decoding shares: prompts made ready, a model laid out for small steps, a step through a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.models.adapted import WORKED_OUT, chosen_rows
from lmjax.models.config import DecoderConfig
from lmjax.models.decoder import Variables
from lmjax.models.layout import unstack_layers
from lmjax.policy import Policy

SHORTEST_BUCKET = 16  # prompts are padded to a power of two, this one at the least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A policy and its variables, laid out for decoding. From `prepare`.

    Attributes:
      variables: layers side by side; on CPU and for single rows, the head transposed besides ("decode").
      policy: static; its layers are unrolled.
    """

    variables: Variables
    policy: Policy = dataclasses.field(metadata={"static": True})

    @property
    def vocab_size(self) -> int:
        return self.policy.config.vocab_size


class Prompts(NamedTuple):
    """Prompts padded on the left to a common length P. From `pad_prompts`.

    Attributes:
      tokens: int32 [B, P].
      segments: int32 [B, P], 1 where there is a token and 0 where there is padding.
      positions: int32 [B, P], from 0 with the first token of each row.
      lengths: int32 [B].
    """

    tokens: Any
    segments: Any
    positions: Any
    lengths: Any


class Step(NamedTuple):
    """What a forward through a cache gives.

    Attributes:
      hidden: [B, T, D], after the final norm.
      cache: with the T tokens of each row in it.
      layers: residual streams that were asked for, [B, T, D] each. See `ModelOutputs`.
    """

    hidden: jax.Array
    cache: Variables
    layers: Any


def prepare(policy: Policy, variables: Variables | Model, rows: int = 0, *, by_row: bool = False) -> Model:
    """Lays a model out for decoding. Arrays that need no change are shared, not copied.

    Layers that are stacked for a scan are unstacked: a loop would slice them for every token. For one row on CPU, the
    head is kept transposed too, for a vector times [D, V] streams from memory half as fast again as [V, D] times a
    vector; for more rows the latter is the faster. Keep the result where the same model is used again.

    Args:
      policy, variables: the model. One that was prepared before is handed back.
      rows: how many rows will be decoded together.
      by_row: whether rows stay where they are, so that adapters may have been chosen for each.

    Raises:
      UserError: adapters were chosen row by row for a way of decoding that moves rows.
    """
    if isinstance(variables, Model):
        return variables
    own: Variables = {name: tree for name, tree in variables.items() if name != "cache"}
    if not by_row and chosen_rows(own) is not None:
        raise UserError(
            "these adapters were chosen row by row, which lmjax.generation.generate and stream can decode with; "
            "here, give a model with one adapter for all rows."
        )
    config = policy.config
    if isinstance(config, DecoderConfig) and config.scanned:
        policy = _unrolled(policy)
        own = _unstack(own)
    if WORKED_OUT & set(own):
        own = _resolve(policy, own)
    if rows == 1 and jax.default_backend() == "cpu":
        weight = policy.model.head(own).weight
        if weight is not None:
            own = own | {"decode": {"head": _transpose(weight)}}
    return Model(own, policy)


@functools.lru_cache(maxsize=16)
def _unrolled(policy: Policy) -> Policy:
    config: Any = policy.config
    return dataclasses.replace(policy, model=dataclasses.replace(config, layers="unrolled"))


@functools.partial(jax.jit, static_argnums=0)
def _resolve(policy: Policy, variables: Variables) -> Variables:
    """Adapters that are functions of others, once and not for every token."""
    found: Variables = policy.model.resolve(variables)
    return found


_unstack = jax.jit(unstack_layers)
_transpose = jax.jit(jnp.transpose)


def forward(
    model: Model,
    cache: Variables,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    collect: tuple[int, ...] = (),
) -> Step:
    """Reads T tokens of each row behind what the cache holds; those of segment 0 are not read."""
    variables = model.variables | {"cache": cache}
    options = {"collect": collect} if collect else {}
    outputs = model.policy.model.apply(variables, tokens_BT, segments_BT, positions_BT, **options)
    return Step(outputs.hidden, outputs.cache, outputs.layers)


def next_logits(model: Model, hidden_BD: jax.Array) -> jax.Array:
    """Float32 [B, V], the logits of the token after each hidden state."""
    return model.policy.next_logits(model.variables, hidden_BD)


def prefill(model: Model, cache: Variables, prompts: Prompts, chunk: int | None = None) -> tuple[jax.Array, Variables]:
    """Reads the prompts, `chunk` tokens at a time (all at once if None).

    Returns:
      The hidden state of each row's last token [B, D], and the cache.
    """
    parts = (prompts.tokens, prompts.segments, prompts.positions)
    P = parts[0].shape[1]
    if chunk is None or chunk >= P:
        step = forward(model, cache, *parts)
        return step.hidden[:, -1], step.cache  # padded on the left: the last column is the last token
    if P % chunk:
        raise UserError(f"prompts of {P} tokens cannot be read {chunk} at a time; take a power of two.")
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], P // chunk, chunk), 1, 0)

    def body(cache: Variables, part: Any) -> tuple[Variables, jax.Array]:
        step = forward(model, cache, *part)
        return step.cache, step.hidden[:, -1]

    cache, hidden = jax.lax.scan(body, cache, tuple(map(cut, parts)))
    return hidden[-1], cache


def pad_prompts(policy: Policy, prompts: Sequence[Any], new_tokens: int) -> Prompts:
    """Prompts as NumPy arrays, padded on the left to a power of two, after all checks.

    Args:
      policy: whose vocabulary and positions they must fit.
      prompts: B arrays of ids.
      new_tokens: how many tokens are to come behind the longest.

    Raises:
      UserError: no or empty prompts, ids outside the vocabulary, or more tokens than learned positions.
    """
    rows = check_prompts(policy, prompts, new_tokens)
    lengths = np.array([len(row) for row in rows], np.int32)
    P = bucket(int(lengths.max()))
    if isinstance(policy.config, DecoderConfig) and policy.config.position == "learned":
        P = min(P, policy.config.max_length)
    tokens, segments, positions = np.zeros((3, len(rows), P), np.int32)
    for b, row in enumerate(rows):
        tokens[b, P - len(row) :] = row
        segments[b, P - len(row) :] = 1
        positions[b, P - len(row) :] = np.arange(len(row))
    return Prompts(tokens, segments, positions, lengths)


def bucket(length: int) -> int:
    """Tokens that a prompt is padded to: a power of two, so that few shapes compile."""
    return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def check_prompts(policy: Policy, prompts: Sequence[Any], new_tokens: int) -> list[np.ndarray]:
    """The prompts as int32 rows. Raises what `pad_prompts` raises."""
    config = policy.config
    rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    if not rows or min(map(len, rows)) == 0:
        what = "prompt 0" if not rows else f"prompt {[len(row) for row in rows].index(0)}"
        raise UserError(f"{what} has no tokens; give each prompt at least one, such as the tokenizer's bos or eos.")
    if new_tokens < 1:
        raise UserError(f"max_new_tokens is {new_tokens}; ask for at least 1.")
    for b, row in enumerate(rows):
        if row.min() < 0 or row.max() >= config.vocab_size:
            stranger = row[(row < 0) | (row >= config.vocab_size)][0]
            raise UserError(
                f"prompt {b} holds the id {stranger}, outside the model's vocabulary of {config.vocab_size}; "
                "encode it with the model's own tokenizer."
            )
    longest = max(map(len, rows)) + new_tokens
    if isinstance(config, DecoderConfig) and config.position == "learned" and longest > config.max_length:
        raise UserError(
            f"a prompt of {longest - new_tokens} tokens and {new_tokens} new ones do not fit "
            f"{config.max_length} learned positions; shorten one of them."
        )
    return rows
