"""Processors that rule tokens out or in: n-grams, bad words, least lengths, forced and suppressed tokens, clean-up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.generation.penalties import backwards, completed
from lmjax.generation.processor_base import FOREVER, Ban, History, Processor, concrete, parameter, put, replaced

_EOS = "give the id that ends a row, or several"
_IDS = "give ids of at least 0"
_WHOLE = "give a whole number of at least 0"


def _ban(ids: Any, first: Any, end: Any) -> Ban | None:
    known = [concrete(value) for value in (ids, first, end)]
    return None if any(value is None for value in known) else Ban(*map(np.asarray, known))


@dataclasses.dataclass(frozen=True, eq=False)
class NoRepeatNgram(Processor):
    """Rules out the token that would complete an n-gram the row, prompt included, has said before.

    Args:
      n: its length; 1 forbids every token said. 0 changes nothing.

    >>> history = History(jnp.array([[0, 1, 2, 0]]), jnp.array([4]), jnp.array([1]))
    >>> no_repeat_ngram(2)(jnp.zeros((1, 3)), history).tolist()
    [[0.0, -inf, 0.0]]
    """

    order, name = 5, "no_repeat_ngram"
    n: Any = parameter(0, _WHOLE, lambda x: x >= 0, dtype=np.int32)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        tokens_BS, length_B1, n_B1 = history.tokens, history.length[:, None], self.n[:, None]
        S = tokens_BS.shape[1]
        padded_B2S = jnp.pad(tokens_BS, ((0, 0), (S, 0)))

        def compare(back: jax.Array, match_BS: jax.Array) -> jax.Array:
            """Whether the token `back` before each column is the one that stands as far before the next token."""
            before_BS = jax.lax.dynamic_slice_in_dim(padded_B2S, S - back, S, axis=1)
            said_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B1 - back, 0), axis=1)
            return match_BS & ((before_BS == said_B1) | (back >= n_B1))

        column_S = jnp.arange(S)
        match_BS = (column_S >= n_B1 - 1) & (column_S < length_B1) & (n_B1 > 0) & (length_B1 >= n_B1)
        # No n-gram longer than the buffer can match, and a longer slice would be moved back inside it.
        match_BS = jax.lax.fori_loop(1, jnp.minimum(jnp.max(self.n), S + 1), compare, match_BS)
        return put(z_BV, tokens_BS, match_BS, -jnp.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class BadWords(Processor):
    """Rules out the token that would complete one of some sequences; see `bad_words`, which makes one.

    Args:
      sequences: int32 [N, L], each one's tokens from its last to its first, then -1.
    """

    order, name = 7, "bad_words"
    sequences: Any = parameter(-1, _IDS, ids=True, ndim=2)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return put(z_BV, self.sequences[..., 0], completed(self.sequences, history), -jnp.inf)

    def banned(self) -> Ban | None:
        known = concrete(self.sequences)
        if known is None:
            return None
        return _ban(np.where(np.all(known[..., 1:] == -1, axis=-1), known[..., 0], -1), 0, FOREVER)


def bad_words(words: Sequence[Sequence[int]], *, eos: int | Sequence[int] = ()) -> BadWords:
    """Sequences of tokens that are never completed. A word of one token is never said at all.

    Args:
      words: sequences of ids, of any lengths.
      eos: the id that ends a row, or several: a word of one of them alone is passed over, as transformers does.
    """
    ends = np.atleast_1d(np.asarray(eos, np.int32))
    sequences = backwards("bad_words", words)
    alone = np.all(sequences[:, 1:] == -1, axis=1) & np.isin(sequences[:, 0], ends)
    return BadWords(np.where(alone[:, None], -1, sequences))


@dataclasses.dataclass(frozen=True, eq=False)
class MinLength(Processor):
    """Rules eos out while a row, its prompt included, has fewer tokens than that. Compare `min_new_tokens`.

    Args:
      length: 0 changes nothing.
      eos: the id that ends a row, or several.
    """

    order, name = 8, "min_length"
    length: Any = parameter(0, _WHOLE, lambda x: x >= 0, dtype=np.int32)
    eos: Any = parameter(-1, _EOS, ids=True, ndim=1)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return put(z_BV, self.eos, (history.length < self.length)[:, None], -jnp.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class MinNewTokens(Processor):
    """Rules eos out while a row has fewer new tokens than that.

    Args:
      length: 0 changes nothing.
      eos: the id that ends a row, or several.
    """

    order, name = 9, "min_new_tokens"
    length: Any = parameter(0, _WHOLE, lambda x: x >= 0, dtype=np.int32)
    eos: Any = parameter(-1, _EOS, ids=True, ndim=1)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return put(z_BV, self.eos, (history.generated < self.length)[:, None], -jnp.inf)

    def resolved(self, vocab_size: int, max_new_tokens: Any) -> Processor:
        length, most = concrete(self.length), concrete(max_new_tokens)
        if length is not None and most is not None and np.any(length > most):
            raise UserError(
                f"min_new_tokens is {length.max()}, above max_new_tokens, {most.min()}; lower one or raise the other."
            )
        return self

    def banned(self) -> Ban | None:
        return _ban(self.eos, 0, self.length)


@dataclasses.dataclass(frozen=True, eq=False)
class Forced(Processor):
    """Tokens that must be the ones at some places of the output; see `forced`, which makes one.

    Args:
      positions: int32 [P], places among the new tokens, from 0; below 0, from the end, where `check` fills them in.
      tokens: int32 [P]. Several at one place leave the choice between them.
      from_end: whether positions still count from the end.
    """

    order, name = 11, "forced"
    positions: Any = parameter(-1, "give whole numbers", ndim=1, dtype=np.int32)
    tokens: Any = parameter(-1, _IDS, ids=True, ndim=1)
    from_end: bool = False

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        if self.from_end:
            raise UserError("forced counts a place from the end; call check(processors, ...) and use what it returns.")
        here_BP = (self.positions == history.generated[:, None]) & (self.tokens >= 0)
        return put(jnp.where(jnp.any(here_BP, axis=1, keepdims=True), -jnp.inf, z_BV), self.tokens, here_BP, 0.0)

    def resolved(self, vocab_size: int, max_new_tokens: Any) -> Processor:
        most = np.asarray(max_new_tokens)[..., None]
        known = concrete(self.positions)
        if known is None:
            return self
        tokens = np.asarray(self.tokens)
        positions = np.where(known < 0, known + most, known)
        wrong = ((positions < 0) | (positions >= most)) & (tokens != -1)
        if np.any(wrong):
            place = np.broadcast_to(known, wrong.shape)[wrong][0]
            raise UserError(f"forced has the place {place} of {np.min(most)} new tokens; give one that is reached.")
        if self.from_end:
            same = (positions[..., :, None] == positions[..., None, :]) & (known[..., :, None] != known[..., None, :])
            if np.any(same):
                raise UserError(
                    f"forced has the place {positions[np.any(same, axis=-1)][0]} from the start and from the end; "
                    "keep one, or ask for more new tokens."
                )
        return replaced(self, positions=positions.astype(np.int32), from_end=False)

    def conflict(self, other: Processor) -> str | None:
        places, tokens, ban = concrete(self.positions), concrete(self.tokens), other.banned()
        if places is None or tokens is None or ban is None:
            return None
        during = (ban.first[..., None] <= places) & (places < ban.end[..., None]) & (tokens != -1)
        both = during[..., None] & (tokens[..., None] == ban.ids[..., None, :])
        if not np.any(both):
            return None
        token = np.broadcast_to(tokens[..., None], both.shape)[both][0]
        return f"token {token} is both forced and ruled out by {other.name}; take it out of one of them."


def forced(tokens: Mapping[int, int | Sequence[int]]) -> Forced:
    """Tokens that must be the ones at some places of the output: their logit is 0 and every other -inf.

    Args:
      tokens: the id, or the ids to choose between, by place among the new tokens. Places count from 0, or from the
        end: `{0: bos, -1: eos}`.
    """
    pairs = [(place, token) for place, ids in tokens.items() for token in np.atleast_1d(ids).tolist()]
    if not pairs or min(token for _, token in pairs) < 0:
        raise UserError(f"forced is {dict(tokens)}; give an id of at least 0 for each place.")
    places, ids = zip(*pairs)
    return Forced(places, ids, from_end=min(places) < 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Clean(Processor):
    """NaN becomes 0, and ±inf the largest and smallest float: the tokens ruled out so far may be drawn again.

    Args:
      active: bool, or bool [B]: the rows it is for.
    """

    order, name = 13, "clean"
    active: Any = parameter(False, "give True or False", dtype=bool, default=True)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return jnp.where(self.active[:, None], jnp.nan_to_num(z_BV), z_BV)


@dataclasses.dataclass(frozen=True, eq=False)
class Suppress(Processor):
    """Rules tokens out.

    Args:
      tokens: int32 [N]; -1 stands for none.
    """

    order, name = 15, "suppress"
    tokens: Any = parameter(-1, _IDS, ids=True, ndim=1)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return put(z_BV, self.tokens, self.tokens >= 0, -jnp.inf)

    def banned(self) -> Ban | None:
        return _ban(self.tokens, 0, FOREVER)


@dataclasses.dataclass(frozen=True, eq=False)
class SuppressAtStart(Processor):
    """Rules tokens out as a row's first new token.

    Args:
      tokens: int32 [N]; -1 stands for none.
      start: the place, among the new tokens, that counts as the first: 1 behind a forced first token.
    """

    order, name = 16, "suppress_at_start"
    tokens: Any = parameter(-1, _IDS, ids=True, ndim=1)
    start: Any = parameter(0, _WHOLE, lambda x: x >= 0, dtype=np.int32, default=0)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return put(z_BV, self.tokens, (history.generated == self.start)[:, None], -jnp.inf)

    def banned(self) -> Ban | None:
        return _ban(self.tokens, self.start, self.start + 1)


no_repeat_ngram = NoRepeatNgram
min_length = MinLength
min_new_tokens = MinNewTokens
clean = Clean
suppress = Suppress
suppress_at_start = SuppressAtStart
