"""The rows of a batch on the device: where they are, how they are sampled, and one step of all of them.

`start` reads the prompts but for their last tokens. `advance` is one loop: each step reads the newest token of every
row, shapes the logits, draws, and the loop goes on until every row is done. A row depends on its prompt, its key and
its rules, never on its neighbours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmjax.generation import constraints as grammar
from lmjax.generation.decoding import Model, Prompts, forward, next_logits, prefill
from lmjax.generation.processors import History, Processor, apply, guide
from lmjax.generation.sampling import draw, likeliest, logprob, row_uniforms
from lmjax.models.decoder import Variables
from lmjax.modules.adapted import CONSTANT
from lmjax.modules.cache import CacheSpec, DenseCache, put, take_rows
from lmjax.sharding.context import constrain, tracing_for

FINISH = ("length", "eos", "stop", "dead end")  # why a row ended, by its number


class Generation(NamedTuple):
    """What was sampled after each prompt.

    Attributes:
      tokens: int32 [B, N], the new tokens; 0 behind a row's end.
      logprobs: float32 [B, N], log-probability of each under the model at the temperature it was sampled at (at 1 where
        that was 0): what the trainer computes for the same tokens. 0 behind a row's end.
      sampling_logprobs: float32 [B, N], log-probability of each under the distribution it was drawn from, after all
        processors, guidance and masks.
      lengths: int32 [B], how many of a row's tokens count, the end-of-sequence token included.
      finish: int32 [B], why a row ended, an index of `FINISH`: it reached its length, said an eos, was stopped by the
        caller, or had no token left that it was allowed to say.
    """

    tokens: Any
    logprobs: Any
    sampling_logprobs: Any
    lengths: Any
    finish: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """How the rows of a batch are sampled. Every array has the rows in front.

    Attributes:
      processors: an arranged chain with one value a row.
      temperature: float32 [B].
      limit: int32 [B], new tokens at the most.
      eos: int32 [B, E], the ids that end a row; -1 for none.
      guidance: float32 [B], or None without classifier-free guidance.
      negative: int32 [B], the last token of the prompt that guidance leans away from, or None.
      greedy, drawn: static; whether any row takes the likeliest token, and whether any draws.
    """

    processors: tuple[Processor, ...]
    temperature: Any
    limit: Any
    eos: Any
    guidance: Any = None
    negative: Any = None
    greedy: bool = dataclasses.field(default=True, metadata={"static": True})
    drawn: bool = dataclasses.field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where the rows of a batch are. Every leaf has the rows in front.

    Attributes:
      keys: [B], a random key a row.
      history: prompts and what was said.
      logprobs, sampling_logprobs: float32 [B, N], as in `Generation`.
      done: bool [B].
      finish: int32 [B].
      cache: holds all but the newest token of each row; with guidance, B rows without their prompts behind.
    """

    keys: Any
    history: History
    logprobs: Any
    sampling_logprobs: Any
    done: Any
    finish: Any
    cache: Variables


def _within(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if mesh is None else tracing_for(mesh)


@functools.partial(jax.jit, static_argnames=("N", "room", "spec", "chunk", "samples", "shared", "guided", "mesh"))
def start(
    model: Model,
    prompts: Prompts,
    keys_B: jax.Array,
    prefix: Any,
    *,
    N: int,
    room: int,
    spec: CacheSpec,
    chunk: int | None,
    samples: int,
    shared: bool,
    guided: bool,
    mesh: Mesh | None,
) -> tuple[State, Variables | None]:
    """Reads the prompts but for their last tokens, and makes `samples` rows of each.

    Args:
      model: from `prepare`.
      prompts: padded on the left; with `guided`, those that guidance leans away from behind the others.
      keys_B: a random key a row.
      prefix: see `sampler.begin`.
      N: new tokens at the most.
      room: how many of them the cache has room for (see `widen`).
      spec, chunk, mesh: see `sampler.begin`.
      samples: rows of each prompt.
      shared: keep the keys and values of each prompt once for all its rows, beside their cache.
      guided: whether there is classifier-free guidance.

    Returns:
      The state, and with `shared` the prompts as a "prefix" collection for the model that goes on.
    """
    with _within(mesh):
        tokens_BP, segments_BP, positions_BP = (constrain(x, ("batch", None)) for x in prompts[:3])
        rows, P = tokens_BP.shape
        before = 0 if prefix is None else jax.tree.leaves(prefix)[0].shape[1]
        cache = model.policy.init_cache(rows, before + P + (0 if shared else room), spec)
        if prefix is not None:
            cache = with_prefix(cache, prefix)
        rest = Prompts(tokens_BP, segments_BP.at[:, -1].set(0), positions_BP + before, prompts.lengths)
        cache = prefill(model, cache, rest, chunk)[1]
        read = as_prefix(cache) if shared else None
        if shared:
            cache = model.policy.init_cache(rows * samples, room, spec)
        elif samples > 1:
            cache = take_rows(cache, jnp.repeat(jnp.arange(rows), samples))
        index_BP = jnp.arange(P) + P - prompts.lengths[:, None]
        packed_BP = jnp.take_along_axis(tokens_BP, jnp.minimum(index_BP, P - 1), axis=1)
        prompts_B = rows // 2 if guided else rows
        own = lambda x: jnp.repeat(x[:prompts_B], samples, axis=0)
        B = prompts_B * samples
        history = History(jnp.pad(own(packed_BP), ((0, 0), (0, N))), own(prompts.lengths), own(prompts.lengths))
        zeros = lambda: jnp.zeros((B, N), jnp.float32)
        done_B, finish_B = jnp.zeros((B,), bool), jnp.zeros((B,), jnp.int32)
        return State(keys_B, history, zeros(), zeros(), done_B, finish_B, cache), read


@functools.partial(jax.jit, static_argnames=("more", "spec", "mesh"))
def widen(model: Model, state: State, *, more: int, spec: CacheSpec, mesh: Mesh | None) -> State:
    """The state with a cache that has room for so many more tokens of each row, where there still is some.

    Where token n of a row lies is a function of n alone until a ring is full, so that all stay where they are.
    """
    with _within(mesh):
        rows, length = state.cache["segments"].shape
        wide = model.policy.init_cache(rows, length + more, spec)
        leaves = [
            new.at[tuple(map(slice, old.shape))].set(old)
            for old, new in zip(jax.tree.leaves(state.cache), jax.tree.leaves(wide), strict=True)
        ]
        return dataclasses.replace(state, cache=jax.tree.unflatten(jax.tree.structure(wide), leaves))


def as_prefix(cache: Variables) -> Variables:
    """What a dense cache holds, as a "prefix" collection: seen by all that comes behind, and written to no more."""
    visible_BP = jnp.arange(cache["segments"].shape[1]) < cache["count"][:, None]
    return {
        name: {"attention": {"keys": layer.key, "values": layer.value, CONSTANT: {"visible": visible_BP}}}
        for name, layer in cache.items()
        if isinstance(layer, DenseCache)
    }


def with_prefix(cache: Variables, prefix: Any) -> Variables:
    """An empty cache with the same keys and values in front of every row. See `begin`."""
    P = jax.tree.leaves(prefix)[0].shape[1]
    rows = cache["count"].shape[0]
    numbers, count = jnp.broadcast_to(jnp.arange(P), (rows, P)), jnp.full((rows,), P, jnp.int32)
    changed: Variables = {
        "count": count,
        "segments": put(cache["segments"], jnp.ones((rows, P), jnp.int32), numbers),
        "positions": put(cache["positions"], numbers, numbers),
    }
    for name, (key, value) in prefix.items():
        each = lambda x: jnp.broadcast_to(x, (rows, *x.shape))
        changed[name] = cache[name].extend(each(key), each(value), numbers, count)
    return cache | changed


def advance(
    model: Model, rules: Rules, state: State, steps: int | None = None, bits: Any = None, mesh: Mesh | None = None
) -> State:
    """Samples up to `steps` tokens of each row (None: until all are done). The state given is used up.

    Args:
      model, rules, state: from `begin`.
      bits: uint32 [B, W], which tokens may come next (`constraints.fill_masks`); takes a single step.
      mesh: as in `begin`.
    """
    everything = np.iinfo(np.int32).max if steps is None else steps
    return _advance(model, rules, state, np.int32(everything), bits, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("state",))
def _advance(model: Model, rules: Rules, state: State, steps: Any, bits: Any, *, mesh: Mesh | None) -> State:
    def body(carry: tuple[Any, State]) -> tuple[Any, State]:
        return carry[0] + 1, step(model, rules, carry[1], bits)

    with _within(mesh):
        if bits is not None:
            return step(model, rules, state, bits)
        more = lambda carry: (carry[0] < steps) & ~jnp.all(carry[1].done)
        return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]


def step(model: Model, rules: Rules, state: State, bits: Any) -> State:
    """Reads the newest token of each row and chooses the next."""
    history, going = state.history, (~state.done).astype(jnp.int32)
    last_B = jnp.take_along_axis(history.tokens, history.length[:, None] - 1, axis=1)[:, 0]
    if rules.guidance is not None:
        last_B = jnp.concatenate([last_B, jnp.where(history.generated == 0, rules.negative, last_B)])
        going = jnp.concatenate([going, going])
    read = forward(model, state.cache, last_B[:, None], going[:, None], state.cache["count"][:, None])
    z_BV = shaped_BV = next_logits(model, read.hidden[:, 0])
    if rules.guidance is not None:
        z_BV, negative_BV = jnp.split(z_BV, 2)
        shaped_BV = guide(z_BV, negative_BV, rules.guidance)
    if bits is not None:
        shaped_BV = jnp.where(grammar.unpack(bits, z_BV.shape[1]), shaped_BV, -jnp.inf)
    return say(rules, state, z_BV, shaped_BV, read.cache)


def say(rules: Rules, state: State, z_BV: jax.Array, shaped_BV: jax.Array, cache: Variables) -> State:
    """Chooses a token of each row, and writes down what it was and what follows from it.

    Args:
      rules, state: of the rows.
      z_BV: float32 [B, V], the model's logits: what the trainer computes.
      shaped_BV: what the processors act on, the same array where it is the same.
      cache: with the newest token of each row in it.
    """
    history, going_B = state.history, ~state.done
    shaped = shaped_BV is not z_BV or bool(rules.processors)
    warm_B = jnp.where(rules.temperature > 0, rules.temperature, 1.0)
    drawn_BV = apply(shaped_BV, history, rules.processors, rules.temperature) if shaped else z_BV

    token_B, sampling_B = jnp.zeros(going_B.shape, jnp.int32), jnp.zeros_like(warm_B)
    if rules.drawn:
        uniforms_B2 = row_uniforms(state.keys, history.generated, 2)
        token_B, sampling_B = draw(drawn_BV, uniforms_B2, None if shaped else warm_B)
    if rules.greedy:
        best_B, greedy_B = likeliest(drawn_BV), rules.temperature == 0
        token_B = jnp.where(greedy_B, best_B, token_B)
        sampling_B = jnp.where(greedy_B, logprob(drawn_BV, best_B), sampling_B)
    own_B = logprob(z_BV, token_B, warm_B) if shaped else sampling_B

    # Only what is shaped can leave nothing to say.
    stuck_B = going_B & (jnp.max(drawn_BV, axis=-1) == -jnp.inf) if shaped else jnp.zeros_like(going_B)
    said_B = going_B & ~stuck_B
    ended_B = said_B & jnp.any(token_B[:, None] == rules.eos, axis=1)
    length_B = history.length + said_B
    full_B = length_B - history.prompt_length >= rules.limit
    number_B1 = jnp.where(said_B, history.generated, -1)[:, None]
    place_B1 = jnp.where(said_B, history.length, -1)[:, None]
    return State(
        keys=state.keys,
        history=History(put(history.tokens, token_B[:, None], place_B1), length_B, history.prompt_length),
        logprobs=put(state.logprobs, own_B[:, None], number_B1),
        sampling_logprobs=put(state.sampling_logprobs, sampling_B[:, None], number_B1),
        done=state.done | ended_B | stuck_B | full_B,
        finish=jnp.where(ended_B, 1, jnp.where(stuck_B, 3, state.finish)),
        cache=cache,
    )


@functools.partial(jax.jit, donate_argnums=0)
def stop(state: State, rows: jax.Array) -> State:
    """Ends the rows where `rows`, bool [B], is true. The state given is used up."""
    ends = rows & ~state.done
    return dataclasses.replace(state, done=state.done | rows, finish=jnp.where(ends, 2, state.finish))


@functools.partial(jax.jit, static_argnums=1)
def collect(state: State, rows: int) -> Generation:
    """What the first `rows` rows of a state have said."""
    history, N = state.history, state.logprobs.shape[1]
    index_N = jnp.arange(N)
    index_BN = jnp.minimum(history.prompt_length[:, None] + index_N, history.tokens.shape[1] - 1)
    tokens_BN = jnp.take_along_axis(history.tokens, index_BN, axis=1)
    tokens_BN = jnp.where(index_N < history.generated[:, None], tokens_BN, 0)
    found = Generation(tokens_BN, state.logprobs, state.sampling_logprobs, history.generated, state.finish)
    return jax.tree.map(lambda leaf: leaf[:rows], found)
