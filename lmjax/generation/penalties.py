"""Processors that read what was said: penalties on repetition, biases on tokens and sequences, pressure to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.generation.processor_base import History, Processor, parameter, put

_ABOVE_0 = "give a number above 0, where 1 changes nothing"
_IDS = "give ids of at least 0"


def _counts(z_BV: jax.Array, history: History) -> jax.Array:
    """int32 [B, V], how often each token is among a row's new ones."""
    B, V = z_BV.shape
    column_S = jnp.arange(history.tokens.shape[1])
    new_BS = (column_S >= history.prompt_length[:, None]) & (column_S < history.length[:, None])
    at_BS = jnp.where(new_BS, history.tokens, V)
    return jnp.zeros((B, V), jnp.int32).at[jnp.arange(B)[:, None], at_BS].add(1, mode="drop")


@dataclasses.dataclass(frozen=True, eq=False)
class RepetitionPenalty(Processor):
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or the output (arXiv:1909.05858).

    A token is penalised once, however often it was said.

    Args:
      penalty: above 1 discourages, below 1 encourages; 1 changes nothing.

    >>> history = History(jnp.array([[0, 1]]), jnp.array([2]), jnp.array([1]))
    >>> repetition_penalty(2.0)(jnp.array([[4.0, -1.0, 3.0]]), history).tolist()
    [[2.0, -2.0, 3.0]]
    """

    order, name = 4, "repetition_penalty"
    penalty: Any = parameter(1.0, _ABOVE_0, lambda x: x > 0)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        penalty_B1 = self.penalty[:, None]
        said_BS = jnp.arange(history.tokens.shape[1]) < history.length[:, None]
        z_BS = jnp.take_along_axis(z_BV, history.tokens, axis=1, mode="clip")
        z_BS = jnp.where(z_BS < 0, z_BS * penalty_B1, z_BS / penalty_B1)
        return put(z_BV, history.tokens, said_BS, z_BS)


@dataclasses.dataclass(frozen=True, eq=False)
class FrequencyPenalty(Processor):
    """`z - f count`, where count is how often a token is among the new ones; the prompt does not count (OpenAI, vLLM).

    Args:
      penalty: f; 0 changes nothing, below 0 encourages.

    >>> history = History(jnp.array([[0, 1, 1]]), jnp.array([3]), jnp.array([1]))
    >>> frequency_penalty(0.5)(jnp.zeros((1, 3)), history).tolist()
    [[0.0, -1.0, 0.0]]
    """

    order, name = 4.1, "frequency_penalty"
    penalty: Any = parameter(0.0, "give a number, where 0 changes nothing", np.isfinite)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return z_BV - self.penalty[:, None] * _counts(z_BV, history)


@dataclasses.dataclass(frozen=True, eq=False)
class PresencePenalty(Processor):
    """`z - p` for tokens among the new ones, however often; the prompt does not count (OpenAI, vLLM).

    Args:
      penalty: p; 0 changes nothing, below 0 encourages.
    """

    order, name = 4.2, "presence_penalty"
    penalty: Any = parameter(0.0, "give a number, where 0 changes nothing", np.isfinite)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return z_BV - self.penalty[:, None] * (_counts(z_BV, history) > 0)


def completed(backwards_BNL: jax.Array, history: History) -> jax.Array:
    """bool [B, N], which sequences lack only their last token: the rest of it is what the row said last.

    Args:
      backwards_BNL: int32, each sequence's tokens from its last to its first, then -1.
      history: one shorter than a sequence's beginning does not match it.
    """
    prefix_BNL = backwards_BNL[..., 1:]
    back_BL = history.length[:, None] - 1 - jnp.arange(prefix_BNL.shape[-1])
    said_BL = jnp.take_along_axis(history.tokens, jnp.maximum(back_BL, 0), axis=1)
    said_BL = jnp.where(back_BL >= 0, said_BL, -2)  # neither a token nor the -1 behind a sequence
    return jnp.all((prefix_BNL == -1) | (prefix_BNL == said_BL[:, None]), axis=-1)


def backwards(name: str, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [N, L], what `completed` wants."""
    if not sequences:
        raise UserError(f"{name} is empty; give at least one token or sequence, or leave it out.")
    for sequence in sequences:
        if len(sequence) == 0 or min(sequence) < 0:
            raise UserError(f"{name} holds {list(sequence)}; give sequences of at least one id, {_IDS[5:]}.")
    rows = np.full((len(sequences), max(map(len, sequences))), -1, np.int32)
    for row, sequence in zip(rows, sequences):
        row[: len(sequence)] = sequence[::-1]
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceBias(Processor):
    """Adds to the logit of the token that would complete a sequence; see `sequence_bias`, which makes one.

    Args:
      sequences: int32 [N, L], each one's tokens from its last to its first, then -1.
      bias: float32 [N].
    """

    order, name = 2, "sequence_bias"
    sequences: Any = parameter(-1, _IDS, ids=True, ndim=2)
    bias: Any = parameter(0.0, "give one number for each sequence", lambda x: ~np.isnan(x), ndim=1)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        B, V = z_BV.shape
        last_BN = self.sequences[..., 0]
        at_BN = jnp.where(completed(self.sequences, history) & (last_BN >= 0), last_BN, V)
        bias_BV = jnp.zeros_like(z_BV).at[jnp.arange(B)[:, None], at_BN].add(self.bias, mode="drop")
        return jnp.where(bias_BV == 0, z_BV, z_BV + bias_BV)


def sequence_bias(bias: Mapping[Sequence[int], float]) -> SequenceBias:
    """Adds to the logit of the token that would complete a sequence of tokens.

    A sequence of one token is always about to be completed; longer ones when the row has just said all but the last.

    Args:
      bias: number to add (-inf forbids) by sequence: `{(3, 4): 2.0, (7,): -1.0}`.
    """
    return SequenceBias(backwards("sequence_bias", list(bias)), list(bias.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class LogitBias(SequenceBias):
    """`SequenceBias` of single tokens: sequences int32 [N, 1]. See `logit_bias`."""

    name = "logit_bias"


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyBias(Processor):
    """Adds a number of its own to every token's logit. See `logit_bias`.

    Args:
      bias: float32 [V].
    """

    order, name = 2, "logit_bias"
    bias: Any = parameter(0.0, "give one number for each token of the vocabulary", lambda x: ~np.isnan(x), ndim=1)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return jnp.where(self.bias == 0, z_BV, z_BV + self.bias)

    def resolved(self, vocab_size: int, max_new_tokens: Any) -> Processor:
        if np.shape(self.bias)[-1] != vocab_size:
            raise UserError(
                f"logit_bias has {np.shape(self.bias)[-1]} numbers for a vocabulary of {vocab_size}; "
                "give one for each token, or a dict of those that differ from 0."
            )
        return self


def logit_bias(bias: Mapping[int, float] | Any) -> LogitBias | VocabularyBias:
    """Adds to the logits of tokens.

    Args:
      bias: number to add (-inf forbids) by token: `{5: -2.0}`; or an array [V], or [B, V] with a row for each row.
    """
    if isinstance(bias, Mapping):
        return LogitBias(backwards("logit_bias", [(token,) for token in bias]), list(bias.values()))
    return VocabularyBias(bias)


@dataclasses.dataclass(frozen=True, eq=False)
class ExponentialLengthPenalty(Processor):
    """Raises the logits of eos more and more: `z + |z| (factor^(generated - start) - 1)` once generated > start.

    Args:
      start: how many new tokens are free.
      factor: above 1 hastens the end; 1 changes nothing.
      eos: the id that ends a row, or several.
    """

    order, name = 14, "exponential_length_penalty"
    start: Any = parameter(0, "give a whole number of at least 0", lambda x: x >= 0, dtype=np.int32)
    factor: Any = parameter(1.0, _ABOVE_0, lambda x: x > 0)
    eos: Any = parameter(-1, "give the id that ends a row, or several", ids=True, ndim=1)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        over_B1 = (history.generated - self.start)[:, None]
        z_BE = jnp.take_along_axis(z_BV, self.eos, axis=1, mode="clip")
        more_BE = jnp.abs(z_BE) * jnp.expm1(over_B1 * jnp.log(self.factor)[:, None])
        active_BE = (over_B1 > 0) & (self.factor != 1)[:, None] & jnp.isfinite(z_BE)
        return put(z_BV, self.eos, active_BE, z_BE + more_BE)


repetition_penalty = RepetitionPenalty
frequency_penalty = FrequencyPenalty
presence_penalty = PresencePenalty
exponential_length_penalty = ExponentialLengthPenalty
