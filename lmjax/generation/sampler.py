"""The sampler: continuations of prompts, by one prefill and one loop on the device (`engine`).

It runs the modules and arrays that train, so its log-probabilities are the trainer's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmjax.errors import UserError
from lmjax.generation import constraints as grammar
from lmjax.generation.decoding import Model, check_prompts, pad_prompts, prepare
from lmjax.generation.engine import FINISH, Generation, Rules, State, advance, collect, start, stop, widen
from lmjax.generation.processors import Processor, check, per_row
from lmjax.models.adapted import chosen_rows
from lmjax.models.config import DecoderConfig
from lmjax.models.decoder import Variables
from lmjax.modules.cache import CacheSpec, Dense
from lmjax.policy import Policy

SHARED_FROM = 32  # tokens of prompts from which sharing them among samples saves more than it costs

__all__ = ["FINISH", "Generation", "begin", "generate", "stream"]


def generate(
    policy: Policy,
    variables: Variables | Model,
    prompts: Sequence[Any],
    key: jax.Array,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: Any = 1.0,
    processors: Iterable[Processor] = (),
    eos: int | Sequence[int] | None = None,
    samples: int = 1,
    constraints: Sequence[Any] | None = None,
    grow: int | None = None,
    **options: Any,
) -> Generation:
    """Samples a continuation of each prompt.

    Compiles once for a number of rows, a power of two above the longest prompt, the largest `max_new_tokens`, and the
    kinds of processors; no value of a parameter compiles anything. Each row draws from a key of its own.

    Args:
      policy, variables: the model; `variables` may be what `decoding.prepare` made of it.
      prompts: arrays of ids, each of at least one.
      key: seeds the sampling.
      max_new_tokens: N, at least 1; or one number a prompt. The loop ends sooner when every row has ended.
      temperature: divides the logits; 0 takes the likeliest token. A number, or one a prompt.
      processors: what else is done to the logits (`generation.processors`), in any order.
      eos: the id or ids that end a row; None: rows never end early.
      samples: continuations of each prompt, from one prefill: row `i * samples + j` is sample j of prompt i.
      constraints: what each row may say (`generation.constraints`), one a row; the host then answers at every token.
      grow: the cache begins with room for so many new tokens and grows by as many whenever it is full, so that each
        step reads little more than there is. Compiles once for each size. None: room for all from the beginning.
      options: those of `begin`.

    Raises:
      UserError: see `begin`.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = {"params": {"table": 50 * jnp.roll(jnp.eye(4), 1, axis=1)}}  # after n comes n + 1
    >>> found = generate(policy, variables, [[0], [1, 2]], jax.random.key(0), max_new_tokens=3, eos=3)
    >>> found.tokens.tolist(), found.lengths.tolist(), [FINISH[i] for i in found.finish]
    ([[1, 2, 3], [3, 0, 0]], [3, 1], ['eos', 'eos'])
    """
    model, rules, state, rows = begin(
        policy,
        variables,
        prompts,
        key,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        processors=processors,
        eos=eos,
        samples=samples,
        cache_room=None if constraints is not None else grow,
        share=True,
        **options,
    )
    mesh = options.get("mesh")
    if constraints is None:
        spec, left = options.get("cache") or Dense(), state.logprobs.shape[1]
        while grow is not None and left > grow:
            state = advance(model, rules, state, grow, mesh=mesh)
            if bool(jnp.all(state.done)):
                return collect(state, rows)
            left -= grow
            state = widen(model, state, more=min(grow, left), spec=spec, mesh=mesh)
        return collect(advance(model, rules, state, mesh=mesh), rows)
    if len(constraints) != rows:
        raise UserError(f"there are {len(constraints)} constraints for {rows} rows; give each row one of its own.")
    return collect(_constrained(model, rules, state, constraints, mesh), rows)


def stream(
    policy: Policy,
    variables: Variables | Model,
    prompts: Sequence[Any],
    key: jax.Array,
    *,
    every: int = 8,
    **options: Any,
) -> Generator[Generation, Any, None]:
    """Samples as `generate` does, and shows what there is after every so many tokens.

    Send a bool [B] to end rows (`FINISH` "stop"), as when the text of one holds a stop string; close it to end all.

    Args:
      policy, variables, prompts, key: as in `generate`.
      every: tokens from one look to the next; each look costs a round trip to the host.
      options: those of `generate`, but for `constraints`.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = {"params": {"table": 50 * jnp.roll(jnp.eye(4), 1, axis=1)}}
    >>> looks = stream(policy, variables, [[0]], jax.random.key(0), every=2, max_new_tokens=3)
    >>> [look.tokens[0, : look.lengths[0]].tolist() for look in looks]
    [[1, 2], [1, 2, 3]]
    """
    if every < 1:
        raise UserError(f"every is {every}; look after at least 1 token.")
    model, rules, state, rows = begin(policy, variables, prompts, key, share=True, **options)
    while True:
        state = advance(model, rules, state, every, mesh=options.get("mesh"))
        found = jax.device_get(collect(state, rows))
        done = np.asarray(state.done)[:rows]
        stopped = yield found
        if stopped is not None:
            rest = np.zeros(state.done.shape[0] - rows, bool)
            state = stop(state, np.concatenate([np.asarray(stopped, bool), rest]))
            done = done | stopped
        if np.all(done):
            return


def begin(
    policy: Policy,
    variables: Variables | Model,
    prompts: Sequence[Any],
    key: jax.Array,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: Any = 1.0,
    processors: Iterable[Processor] = (),
    eos: int | Sequence[int] | None = None,
    samples: int = 1,
    room: int | None = None,
    cache_room: int | None = None,
    share: bool = False,
    guidance: Any = None,
    negative_prompts: Sequence[Any] | None = None,
    cache: CacheSpec | None = None,
    chunk: int | None = None,
    prefix: Any = None,
    mesh: Mesh | None = None,
) -> tuple[Model, Rules, State, int]:
    """Checks everything, then reads the prompts.

    Args:
      policy, variables, prompts, key, max_new_tokens, temperature, processors, eos, samples: as in `generate`.
      room: N of the buffers, so that any lengths up to it share one compilation; None: the largest `max_new_tokens`.
      cache_room: tokens the cache has room for behind the prompts, at the least 1; None: N. See `engine.widen`.
      share: keys and values of long prompts may be kept once for all samples, with the model that is returned and not
        in the state: for callers that go on with both.
      guidance: scale of classifier-free guidance (`processors.guide`), a number or one a prompt; doubles the work.
      negative_prompts: what guidance leans away from; None: the last token of each prompt alone.
      cache: the kind of key/value cache; `Dense()` if None.
      chunk: read prompts so many tokens at a time, a power of two; bounds the memory of long ones.
      prefix: keys and values to stand before every prompt, as from prefix tuning: {"layer_0": (key [G, P, K],
        value [G, P, K]), ...}.
      mesh: spread the rows over its data axes and the heads over its tensor axis.

    Returns:
      The model laid out for decoding, the rules, the state, and how many of its rows count (a mesh may need more).

    Raises:
      UserError: no or empty prompts, ids outside the vocabulary, more tokens than learned positions, processors that
        contradict each other, or numbers out of range.
    """
    count = len(prompts)
    limits = np.asarray(max_new_tokens, np.int32).reshape(-1)
    if limits.size and limits.min() < 1:
        raise UserError(f"max_new_tokens is {limits.min()}; ask for at least 1.")
    N = int(limits.max(initial=1)) if room is None else room
    if limits.max(initial=1) > N:
        raise UserError(f"room is {room} but max_new_tokens {limits.max()}; make room for as many.")
    before = 0 if prefix is None else jax.tree.leaves(prefix)[0].shape[1]
    rows: list[Any] = list(prompts)
    negative: Any = negative_prompts
    if guidance is not None:
        negative = [np.ravel(row)[-1:] for row in rows] if negative is None else list(negative)
        if len(negative) != count:
            raise UserError(f"there are {len(negative)} negative prompts for {count} prompts; give each prompt one.")
        rows += negative
    elif negative is not None:
        raise UserError("negative_prompts are given without guidance; give a guidance scale, such as 1.5.")
    check_prompts(policy, rows, before + N)
    if cache_room is not None and cache_room < 1:
        raise UserError(f"the cache is to grow by {cache_room} tokens at a time; give at least 1.")
    if samples < 1:
        raise UserError(f"samples is {samples}; ask for at least 1.")
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise UserError(f"chunk is {chunk}; take a power of two.")

    # Rows that only fill the mesh repeat the last one.
    data = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    filled = list(range(count)) + [count - 1] * (-count % data)
    B = len(filled) * samples
    rows = [rows[offset + i] for offset in range(0, len(rows), count) for i in filled]
    own = variables.variables if isinstance(variables, Model) else variables
    if (chosen := chosen_rows(own)) is not None and (chosen != len(rows) or samples > 1):
        raise UserError(
            f"adapters were chosen for {chosen} rows, and there are {len(rows)} with {samples} samples each; choose "
            "one for each row (negative prompts come last), and repeat prompts instead of asking for samples."
        )
    spread = functools.partial(_per_prompt, rows=np.array(filled), samples=samples)
    temperature_B = spread("temperature", temperature, np.float32)
    if not np.all(temperature_B >= 0) or not np.all(np.isfinite(temperature_B)):
        raise UserError(f"temperature is {temperature}; give 0 for the likeliest token, or a positive number.")
    ids = np.asarray([] if eos is None else eos, np.int32).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= policy.config.vocab_size):
        raise UserError(
            f"eos {eos} is outside the model's vocabulary of {policy.config.vocab_size}; name ids of its own tokenizer."
        )
    limit_B = spread("max_new_tokens", limits if limits.size > 1 else limits[0], np.int32)
    chain = per_row(check(processors, policy.config.vocab_size, N), count)
    chain = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[filled], samples, axis=0), chain)
    rules = Rules(
        processors=chain,
        temperature=temperature_B,
        limit=limit_B,
        eos=np.broadcast_to(ids if ids.size else np.array([-1], np.int32), (B, max(ids.size, 1))),
        guidance=None if guidance is None else spread("guidance", guidance, np.float32),
        negative=None if guidance is None else spread("negative", [np.ravel(row)[-1] for row in negative], np.int32),
        greedy=bool(np.any(temperature_B == 0)),
        drawn=bool(np.any(temperature_B > 0)),
    )
    model = prepare(policy, variables, rows=0 if mesh is not None else B * (1 if guidance is None else 2), by_row=True)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    spec = cache or Dense()
    padded = pad_prompts(policy, rows, before + N)
    shared = (
        share and samples > 1 and padded.tokens.shape[1] >= SHARED_FROM
        and mesh is None and guidance is None and prefix is None and _keeps_prompts_apart(model, spec)
    )  # fmt: skip
    state, read = start(
        model, padded, keys_B, prefix, N=N, room=N if cache_room is None else min(cache_room, N), spec=spec,
        chunk=chunk, samples=samples, shared=shared, guided=guidance is not None, mesh=mesh,
    )  # fmt: skip
    if read is not None:
        model = dataclasses.replace(model, variables=model.variables | {"prefix": read})
    return model, rules, state, count * samples


def _keeps_prompts_apart(model: Model, spec: CacheSpec) -> bool:
    """Whether keys and values of prompts may stand beside the cache: all are seen, as they came, and no others."""
    config = model.policy.config
    plain = isinstance(config, DecoderConfig) and not any(config.windowed(n) for n in range(config.num_layers))
    return plain and isinstance(spec, Dense) and spec.dtype is None and "prefix" not in model.variables


def _per_prompt(name: str, value: Any, kind: Any, rows: np.ndarray, samples: int) -> np.ndarray:
    """One value a row, from one for all or one a prompt."""
    value = np.asarray(value, kind)
    prompts = int(rows.max()) + 1
    if value.ndim > 1 or (value.ndim == 1 and len(value) != prompts):
        raise UserError(f"{name} has shape {list(value.shape)} for {prompts} prompts; give one value, or one a prompt.")
    return np.repeat(np.broadcast_to(value, (prompts,))[rows], samples)


def _constrained(model: Model, rules: Rules, state: State, constraints: Sequence[Any], mesh: Mesh | None) -> State:
    """One step at a time: masks from the host, tokens back to it."""
    B, rows = state.done.shape[0], len(constraints)
    bits_BW = np.full((B, grammar.packed_width(model.vocab_size)), 0xFFFFFFFF, np.uint32)
    done_B = np.zeros(B, bool)
    while not np.all(done_B):
        over = np.array([row.done for row in constraints] + [False] * (B - rows))
        if np.any(over & ~done_B):
            state = stop(state, over)
            done_B = done_B | over
            continue
        grammar.fill_masks([None if done else row for row, done in zip(constraints, done_B)], bits_BW[:rows])
        before_B = np.asarray(state.history.length)
        state = advance(model, rules, state, bits=jnp.asarray(bits_BW), mesh=mesh)
        length_B, done_B = np.asarray(state.history.length), np.array(state.done)
        tokens_B = np.asarray(jnp.take_along_axis(state.history.tokens, state.history.length[:, None] - 1, axis=1))
        for b, row in enumerate(constraints):
            if length_B[b] > before_B[b]:
                row.advance(int(tokens_B[b, 0]))
    return state
