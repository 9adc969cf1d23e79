"""Contrastive search: likely tokens whose states do not repeat those before them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.generation.decoding import Model, Prompts, forward, next_logits, pad_prompts, prepare
from lmjax.generation.processors import History, Processor, apply, check, per_row
from lmjax.models.decoder import Variables
from lmjax.modules.cache import CacheSpec, take_rows
from lmjax.policy import Policy


class Contrastive(NamedTuple):
    """What was found after each prompt.

    Attributes:
      tokens: int32 [B, N], the new tokens; 0 behind a row's end.
      logprobs: float32 [B, N], log-probability of each under the policy, untouched by processors: what the trainer
        computes for the same tokens. 0 behind a row's end.
      scores: float32 [B, N], what made each the best of its candidates. 0 behind a row's end.
      lengths: int32 [B], how many of a row's tokens count, the end-of-sequence token included.
    """

    tokens: Any
    logprobs: Any
    scores: Any
    lengths: Any


class _State(NamedTuple):
    """What the loop carries."""

    step: jax.Array  # [], tokens already chosen
    found: Contrastive
    done: jax.Array  # bool [B]
    hidden: jax.Array  # [B, D], of each row's newest token, after the final norm
    seen: jax.Array  # float32 [B, P + N, D], all of them scaled to length 1
    cache: Variables


def contrastive_search(
    policy: Policy,
    variables: Variables | Model,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    alpha: float = 0.6,
    k: int = 4,
    eos: int | Sequence[int] | None = None,
    processors: Iterable[Processor] = (),
    cache: CacheSpec | None = None,
) -> Contrastive:
    """The continuation of each prompt that contrastive search finds. Deterministic.

    Of the k most probable next tokens v it takes the one with the largest

        (1 - alpha) p(v) - alpha max_j cos(h_v, h_j),

    h_v the final hidden state (after the last norm) that v would have, h_j those of all tokens before it, the prompt's
    included. The second term, the degeneration penalty, is 1 for a state that has been there already. Each token costs
    a forward of k rows. Su et al. 2022, arXiv:2202.06417; the reference is transformers 4.55.

    Compiles once for a batch size, a bucket of prompt lengths, `max_new_tokens`, k, the number of `eos` and the kinds
    of processors.

    Args:
      policy, variables: the model; `variables` may be what `decoding.prepare` made of it.
      prompts: B arrays of ids, each of at least one.
      max_new_tokens: N, at least 1. The loop ends sooner when every row has ended.
      alpha: from 0 (greedy search) to 1.
      k: how many candidates, from 1 (greedy search) to the size of the vocabulary.
      eos: the id or ids that end a row.
      processors: act on the logits that candidates and p come from; a token of probability 0 is never taken.
      cache: the kind of key/value cache; `Dense()` if None.

    Raises:
      UserError: as `generate` and `processors.check`; alpha or k out of range.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=3))
    >>> table = jnp.log(jnp.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.4, 0.5, 0.1]]))  # logits are the states
    >>> found = contrastive_search(policy, {"params": {"table": table}}, [[0]], max_new_tokens=2, k=2)
    >>> found.tokens.tolist()
    [[1, 2]]
    """
    policy = variables.policy if isinstance(variables, Model) else policy
    V = policy.config.vocab_size
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; give a number from 0, which is greedy search, to 1.")
    if not 1 <= k <= V:
        raise UserError(f"k is {k}; give a number of candidates from 1 to the {V} tokens there are.")
    ids = np.asarray([] if eos is None else eos, np.int32).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= V):
        raise UserError(f"eos {eos} is outside the model's vocabulary of {V}; name ids of its own tokenizer.")
    padded = pad_prompts(policy, prompts, max_new_tokens)
    chain = per_row(check(processors, V, max_new_tokens), len(prompts))
    model = variables if isinstance(variables, Model) else prepare(policy, variables, rows=len(prompts) * k)
    eos_E = ids if ids.size else np.array([-1], np.int32)
    return _search((max_new_tokens, k, cache), model, padded, chain, np.float32(alpha), eos_E)


@functools.partial(jax.jit, static_argnums=0)
def _search(
    static: tuple[int, int, CacheSpec | None],
    model: Model,
    prompts: Prompts,
    chain: tuple[Processor, ...],
    alpha: jax.Array,
    eos_E: jax.Array,
) -> Contrastive:
    N, k, spec = static
    B, P = prompts.tokens.shape
    row_M = jnp.repeat(jnp.arange(B), k)  # whose candidate each of the model's rows is
    there_BS = jnp.pad(prompts.segments > 0, ((0, 0), (0, N)))

    def body(state: _State) -> _State:
        """Reads the candidates of each row and chooses the next token."""
        z_BV = next_logits(model, state.hidden)
        shaped_BV = apply(z_BV, _history(prompts, state), chain) if chain else z_BV
        p_Bk, token_Bk = jax.lax.top_k(jax.nn.softmax(shaped_BV, axis=-1), k)
        cache = take_rows(state.cache, row_M)
        token_M1 = token_Bk.reshape(-1, 1)
        read = forward(model, cache, token_M1, jnp.ones_like(token_M1), cache["count"][:, None])

        new_BkD = _unit(read.hidden).reshape(B, k, -1)
        cosine_BkS = jnp.einsum("bkd,bsd->bks", new_BkD, state.seen, precision=jax.lax.Precision.HIGHEST)
        before_BS = there_BS | (jnp.arange(P + N) >= P) & (jnp.arange(P + N) < P + state.step)
        penalty_Bk = jnp.max(jnp.where(before_BS[:, None], cosine_BkS, -jnp.inf), axis=-1)
        score_Bk = jnp.where(p_Bk > 0, (1 - alpha) * p_Bk - alpha * penalty_Bk, -jnp.inf)
        best_B = jnp.argmax(score_Bk, axis=-1)

        at = lambda x: jnp.take_along_axis(x, best_B[:, None], axis=1)
        going_B = ~state.done & (at(score_Bk)[:, 0] > -jnp.inf)  # a row without a token it may say ends
        token_B1 = at(token_Bk)
        own_B1 = jnp.take_along_axis(z_BV, token_B1, axis=1) - jax.nn.logsumexp(z_BV, axis=-1, keepdims=True)
        write = lambda buffer, new_B1: jax.lax.dynamic_update_slice(
            buffer, jnp.where(going_B[:, None], new_B1, 0).astype(buffer.dtype), (0, state.step)
        )
        found = Contrastive(
            tokens=write(state.found.tokens, token_B1),
            logprobs=write(state.found.logprobs, own_B1),
            scores=write(state.found.scores, at(score_Bk)),
            lengths=state.found.lengths + going_B,
        )
        chosen_B = k * jnp.arange(B) + best_B
        chosen_B1D = new_BkD.reshape(B * k, 1, -1)[chosen_B]
        return _State(
            step=state.step + 1,
            found=found,
            done=~going_B | jnp.any(token_B1 == eos_E, axis=1),
            hidden=read.hidden[chosen_B, 0],
            seen=jax.lax.dynamic_update_slice(state.seen, chosen_B1D, (0, P + state.step, 0)),
            cache=take_rows(read.cache, chosen_B),
        )

    read = forward(model, model.policy.init_cache(B, P + N, spec), *prompts[:3])
    start = _State(
        step=jnp.zeros((), jnp.int32),
        found=Contrastive(
            jnp.zeros((B, N), jnp.int32), jnp.zeros((B, N)), jnp.zeros((B, N)), jnp.zeros((B,), jnp.int32)
        ),
        done=jnp.zeros((B,), bool),
        hidden=read.hidden[:, -1],
        seen=jnp.pad(_unit(read.hidden), ((0, 0), (0, N), (0, 0))),
        cache=read.cache,
    )
    return jax.lax.while_loop(lambda state: (state.step < N) & ~jnp.all(state.done), body, start).found


def _unit(hidden: jax.Array) -> jax.Array:
    """Scaled to length 1 along the last axis, float32; a state of zeros stays one."""
    hidden = hidden.astype(jnp.float32)
    length = jnp.linalg.norm(hidden, axis=-1, keepdims=True)
    return hidden / jnp.where(length > 0, length, 1.0)


def _history(prompts: Prompts, state: _State) -> History:
    """What each row has said: its tokens from column 0, with neither padding nor gaps."""
    tokens_BS = jnp.concatenate([prompts.tokens, state.found.tokens], axis=1)
    P, S = prompts.tokens.shape[1], tokens_BS.shape[1]
    index_BS = jnp.minimum(jnp.arange(S) + P - prompts.lengths[:, None], S - 1)
    return History(
        jnp.take_along_axis(tokens_BS, index_BS, axis=1), prompts.lengths + state.found.lengths, prompts.lengths
    )
