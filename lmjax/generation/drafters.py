"""Who guesses the next tokens for `speculative.speculate`: a smaller model, the model's own first layers, the history.

A drafter is a small object that names a proposer. A proposer gives tokens together with the distributions that it drew
them from, and that is all that exactness needs of it: whatever it proposes, what comes out is the target's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.generation.decoding import Model, forward, next_logits, prepare
from lmjax.generation.engine import Rules
from lmjax.generation.processors import History, apply
from lmjax.generation.sampling import draw, likeliest
from lmjax.models.decoder import Variables
from lmjax.modules.cache import put
from lmjax.policy import Policy


class Proposal(NamedTuple):
    """What may come next, up to K tokens a row.

    Attributes:
      tokens: int32 [B, K].
      probs: float32 [K, B, V], the distribution that each token was drawn from, given the tokens before it.
      count: int32 [B], how many of a row's tokens are proposed, from the first on; the rest is anything.
      cache: the drafter's, after all that it read.
    """

    tokens: jax.Array
    probs: jax.Array
    count: jax.Array
    cache: Any


class Proposer(Protocol):
    """Proposes tokens. A pytree, so that other values of its arrays compile nothing anew."""

    def propose(self, rules: Rules, history: History, cache: Any, room: jax.Array, uniforms: jax.Array) -> Proposal:
        """Guesses what follows.

        Args:
          rules: those of the target, processors and temperatures included.
          history: what the rows have said.
          cache: holds all of it but the newest token, and perhaps the one before.
          room: int32 [B], how many tokens a row may be proposed; 0 for rows that are done.
          uniforms: float32 [B, K, 2], all the randomness there is.
        """
        ...


class Drafter(Protocol):
    """What a person chooses: says who is to propose, once the target is known."""

    def bind(self, model: Model, start: Callable[[Model], Variables]) -> tuple[Proposer, Any]:
        """Makes ready for a target, before anything is compiled.

        Args:
          model: the target.
          start: gives a model's cache with all but the last token of each prompt in it.

        Returns:
          Who proposes, and its cache: a dict of arrays with the rows in front, among them "count", int32 [B], how many
          of its tokens each row holds; or None.

        Raises:
          UserError: it cannot draft for this target.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel:
    """See `draft_model`."""

    policy: Policy
    variables: Any

    def bind(self, model: Model, start: Callable[[Model], Variables]) -> tuple[Proposer, Any]:
        own = prepare(self.policy, self.variables)
        if own.vocab_size != model.vocab_size:
            raise UserError(
                f"the draft model has a vocabulary of {own.vocab_size} and the target one of {model.vocab_size}; "
                "draft with a model of the same tokenizer."
            )
        return ModelProposer(own), start(own)


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """See `early_exit`."""

    num_layers: int

    def bind(self, model: Model, start: Callable[[Model], Variables]) -> tuple[Proposer, Any]:
        depth = getattr(model.policy.config, "num_layers", 0)
        if not 1 <= self.num_layers <= depth:
            raise UserError(
                f"a model of {depth} layers cannot exit after {self.num_layers}; "
                + (f"give a number from 1 to {depth}." if depth else "choose another drafter.")
            )
        own = Model(model.variables, _first_layers(model.policy, self.num_layers))
        return ModelProposer(own), start(own)


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """See `prompt_lookup`."""

    ngram: int

    def bind(self, model: Model, start: Callable[[Model], Variables]) -> tuple[Proposer, Any]:
        if self.ngram < 1:
            raise UserError(f"prompt_lookup is to match {self.ngram} tokens; give at least 1.")
        return LookupProposer(self.ngram, model.vocab_size), None


@functools.lru_cache(maxsize=16)
def _first_layers(policy: Policy, num_layers: int) -> Policy:
    config: Any = policy.config
    return dataclasses.replace(policy, model=dataclasses.replace(config, num_layers=num_layers, layers="unrolled"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelProposer:
    """A model that drafts, one token after the other, each drawn from its own processed distribution."""

    model: Model

    def propose(self, rules: Rules, history: History, cache: Any, room: jax.Array, uniforms: jax.Array) -> Proposal:
        uniforms_KB2 = jnp.moveaxis(uniforms, 1, 0)

        def choose(hidden_BD: jax.Array, history: History, j: Any, uniforms_B2: jax.Array) -> tuple[Any, ...]:
            z_BV = apply(next_logits(self.model, hidden_BD), history, rules.processors, rules.temperature)
            q_BV = probabilities(z_BV, rules)
            token_B = pick(q_BV, uniforms_B2, rules)
            said_B = j < room
            tokens_BS = put(history.tokens, token_B[:, None], jnp.where(said_B, history.length, -1)[:, None])
            return token_B, q_BV, History(tokens_BS, history.length + said_B, history.prompt_length)

        def body(carry: tuple[Any, ...], xs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            cache, history, token_B = carry
            j, uniforms_B2 = xs
            read_B1 = (j < room)[:, None].astype(jnp.int32)
            step = forward(self.model, cache, token_B[:, None], read_B1, cache["count"][:, None])
            token_B, q_BV, history = choose(step.hidden[:, 0], history, j, uniforms_B2)
            return (step.cache, history, token_B), (token_B, q_BV)

        # Where a block was accepted whole, its last token was never read here: so two columns at first, and no extra
        # step of the draft in every block.
        number_B2 = history.length[:, None] + jnp.array([-2, -1])
        unread_B2 = (number_B2 >= cache["count"][:, None]) & (room > 0)[:, None]
        number_B2 = jnp.maximum(number_B2, 0)
        tokens_B2 = jnp.take_along_axis(history.tokens, number_B2, axis=1)
        step = forward(self.model, cache, tokens_B2, unread_B2.astype(jnp.int32), number_B2)
        first_B, q_BV, history = choose(step.hidden[:, 1], history, 0, uniforms_KB2[0])
        carry = (step.cache, history, first_B)
        xs = (jnp.arange(1, uniforms_KB2.shape[0]), uniforms_KB2[1:])
        (cache, _, _), (rest_KB, q_KBV) = jax.lax.scan(body, carry, xs)
        tokens_BK = jnp.concatenate([first_B[:, None], rest_KB.T], axis=1)
        return Proposal(tokens_BK, jnp.concatenate([q_BV[None], q_KBV]), room, cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupProposer:
    """What followed before is proposed with probability 1."""

    ngram: int = dataclasses.field(metadata={"static": True})
    vocab_size: int = dataclasses.field(metadata={"static": True})

    def propose(self, rules: Rules, history: History, cache: Any, room: jax.Array, uniforms: jax.Array) -> Proposal:
        tokens_BS, length_B1 = history.tokens, history.length[:, None]
        S, K = tokens_BS.shape[1], uniforms.shape[1]
        column_S = jnp.arange(S)
        # How many tokens before each column are those before the end, up to `ngram`.
        alike_BS, same_BS = jnp.zeros(tokens_BS.shape, jnp.int32), (column_S < length_B1)
        for back in range(1, min(self.ngram, S) + 1):
            last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B1 - back, 0), axis=1)
            same_BS &= (jnp.roll(tokens_BS, back, axis=1) == last_B1) & (column_S >= back)
            alike_BS += same_BS
        start_B = jnp.argmax(alike_BS, axis=1)  # the first of the longest
        found_B = jnp.max(alike_BS, axis=1) > 0
        follows_BK = jnp.minimum(start_B[:, None] + jnp.arange(K), S - 1)
        tokens_BK = jnp.take_along_axis(tokens_BS, follows_BK, axis=1)
        count_B = jnp.where(found_B, jnp.minimum(room, history.length - start_B), 0).astype(jnp.int32)
        return Proposal(tokens_BK, jax.nn.one_hot(tokens_BK.T, self.vocab_size), count_B, None)


def draft_model(policy: Policy, variables: Any) -> DraftModel:
    """A smaller model of the same vocabulary drafts, with a cache of its own (arXiv:2211.17192, arXiv:2302.01318).

    It draws from its own distribution after the target's processors and temperature, and says which that was.

    Args:
      policy, variables: the model; `variables` may be what `decoding.prepare` made of it.
    """
    return DraftModel(policy, variables)


def early_exit(num_layers: int) -> EarlyExit:
    """The target's first layers, its final norm and its head draft: no parameters but the target's own.

    Worth it for models that were trained to exit early (LayerSkip, arXiv:2404.16710); exact for any.

    Args:
      num_layers: how many layers draft.
    """
    return EarlyExit(num_layers)


def prompt_lookup(ngram: int = 2) -> PromptLookup:
    """What followed the last time the history read as it does now (prompt lookup decoding, A. Saxena 2023).

    Looks for the last `ngram` tokens of a row earlier in it, then for fewer, down to one, and proposes what came after
    the first place that matches, as transformers' `prompt_lookup_num_tokens` does. Rows without a match are proposed
    nothing, and draw from the target. It costs no model; it pays where outputs repeat inputs.

    Args:
      ngram: the most tokens to match.
    """
    return PromptLookup(ngram)


def probabilities(z_BV: jax.Array, rules: Rules) -> jax.Array:
    """What each row draws from, [B, V], of processed logits.

    All on the first of the likeliest for rows of temperature 0; 0 everywhere for a row with no token it may say.
    """
    p_BV = jax.nn.softmax(z_BV, axis=-1)
    if rules.greedy:
        best_BV = jax.nn.one_hot(likeliest(z_BV), z_BV.shape[-1], dtype=p_BV.dtype)
        p_BV = jnp.where(rules.temperature[:, None] == 0, best_BV, p_BV)
    return jnp.where(jnp.max(z_BV, axis=-1, keepdims=True) == -jnp.inf, 0.0, p_BV)


def pick(p_BV: jax.Array, uniforms_B2: jax.Array, rules: Rules) -> jax.Array:
    """A token of each row by its probabilities, int32 [B]. Never one of probability 0, but where all are 0."""
    return draw(jnp.log(p_BV), uniforms_B2).token if rules.drawn else likeliest(p_BV)
