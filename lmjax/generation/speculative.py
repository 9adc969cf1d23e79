"""Speculative decoding: cheap guesses of several tokens, which the model checks in one forward. Exact.

A drafter proposes up to k tokens of each row; the target reads them at once, and says for each position what it would
draw from. A token x that was drawn from q is kept with probability min(1, p(x) / q(x)); the first that is not is
replaced by one from max(p - q, 0), normalised; behind k kept ones comes one more from p. What comes out is distributed
as if drawn from p, token by token (arXiv:2211.17192, theorem 1; arXiv:2302.01318). p and q are what is left after
processors, temperature and truncation, with the history that each position really has. At temperature 0 they are all
on one token, so that the same rule keeps what the target would have said itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmjax.errors import UserError
from lmjax.generation.decoding import Model, forward, next_logits, prepare
from lmjax.generation.drafters import Drafter, Proposer, pick, probabilities
from lmjax.generation.engine import Rules, State, collect
from lmjax.generation.processors import History, Processor, apply
from lmjax.generation.sampler import begin
from lmjax.generation.sampling import logprob, row_uniforms
from lmjax.models.decoder import Variables
from lmjax.modules.cache import CacheSpec, Dense, LayerCache, put
from lmjax.policy import Policy
from lmjax.sharding.context import tracing_for


class Speculation(NamedTuple):
    """What was sampled after each prompt, and how well it was guessed.

    Attributes:
      tokens, logprobs, sampling_logprobs, lengths, finish: as in `Generation`, under the target.
      drafted: int32 [B], tokens that were proposed to a row.
      judged: int32 [B], those among them that came up: of each block, all up to the first that was refused or ended
        the row.
      accepted: int32 [B], those that were kept.
      steps: int32 [B], forwards of the target in which a row took part. `lengths / steps` tokens came of each.
    """

    tokens: Any
    logprobs: Any
    sampling_logprobs: Any
    lengths: Any
    finish: Any
    drafted: Any
    judged: Any
    accepted: Any
    steps: Any

    @property
    def acceptance_rate(self) -> float:
        """The share of judged tokens that were kept: an estimate of `sum_x min(p(x), q(x))`, averaged over places."""
        return float(np.sum(self.accepted) / np.maximum(np.sum(self.judged), 1))


@dataclasses.dataclass(frozen=True)
class TakenBack:
    """A cache of which the newest `slack` tokens can be taken back."""

    spec: CacheSpec
    slack: int

    def empty(
        self, rows: int, heads: int, length: int, width: int, dtype: str, window: int | None, slack: int
    ) -> LayerCache:
        return self.spec.empty(rows, heads, length, width, dtype, window, max(slack, self.slack))


def speculate(
    policy: Policy,
    variables: Variables,
    prompts: Sequence[Any],
    key: jax.Array,
    *,
    drafter: Drafter,
    max_new_tokens: int | Sequence[int],
    block: int = 4,
    temperature: Any = 1.0,
    processors: Iterable[Processor] = (),
    eos: int | Sequence[int] | None = None,
    samples: int = 1,
    room: int | None = None,
    cache: CacheSpec | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Speculation:
    """Samples a continuation of each prompt, as `generate` does, with fewer forwards of the model.

    The distribution is that of `generate`, processors included, and at temperature 0 so are the tokens; the draws for a
    key are others. Rows advance at their own pace: each by what it accepted. Compiles once for what `generate` does,
    and for a `block` and a kind of drafter besides.

    Args:
      policy, variables, prompts, key, max_new_tokens, temperature, processors, eos, samples: as in `generate`.
      drafter: `drafters.draft_model(...)`, `early_exit(...)` or `prompt_lookup(...)`.
      block: k, tokens drafted at a time.
      cache: the kind of key/value cache, of target and draft model; `Dense()` if None. A cache that quantizes is read
        differently by one token and by several (`LayerCache.holds`), so through it the target is not quite the model
        that `generate` reads through it.
      room, chunk, mesh: as in `sampler.begin`.

    Raises:
      UserError: as `generate`; a draft of another vocabulary; a block below 1.

    >>> import lmjax as lm
    >>> from lmjax.generation.drafters import prompt_lookup
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = {"params": {"table": 50 * jnp.roll(jnp.eye(4), 1, axis=1)}}  # after n comes n + 1
    >>> prompts = [[0, 1, 2, 3, 0]]
    >>> found = speculate(policy, variables, prompts, jax.random.key(0), drafter=prompt_lookup(), max_new_tokens=6)
    >>> found.tokens.tolist(), found.steps.tolist(), found.acceptance_rate
    ([[1, 2, 3, 0, 1, 2]], [2], 1.0)
    """
    if block < 1:
        raise UserError(f"block is {block}; draft at least 1 token at a time.")
    if not hasattr(drafter, "bind"):
        raise UserError(f"{drafter!r} is no drafter; give draft_model(...), early_exit(...) or prompt_lookup(...).")
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, processors=tuple(processors), eos=eos, samples=samples,
        room=room, cache=TakenBack(cache or Dense(), block), chunk=chunk, mesh=mesh,
    )  # fmt: skip
    start = lambda model: begin(model.policy, model, prompts, key, **options)
    model = prepare(policy, variables)
    proposer, drafts = drafter.bind(model, lambda draft: start(draft)[2].cache)
    _, rules, state, rows = start(model)
    run = _run(model, proposer, rules, state, drafts, block=block, mesh=mesh)
    found = collect(run.state, rows)
    counts = (run.drafted, run.judged, run.accepted, run.steps)
    return Speculation(*found, *(count[:rows] for count in counts))


def acceptance(p: jax.Array, q: jax.Array, token: jax.Array) -> jax.Array:
    """The probability [...] that a drafted token is kept, `min(1, p(x) / q(x))`; 0 where q is 0.

    Args:
      p, q: [..., V], what the target would draw from, and what the token was drawn from.
      token: int32 [...].
    """
    p_x, q_x = (jnp.take_along_axis(each, token[..., None], axis=-1)[..., 0] for each in (p, q))
    return jnp.where(q_x > 0, jnp.minimum(p_x / jnp.where(q_x > 0, q_x, 1), 1), 0)


def residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """What is drawn from in place of a token that was refused: `max(p - q, 0)`, normalised. [..., V].

    It is p where q is 0: nothing was drafted, or all drafts were kept. A p that equals q refuses nothing, and gives p.
    """
    excess = jnp.maximum(p - q, 0)
    total = jnp.sum(excess, axis=-1, keepdims=True)
    return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1), p)


class Chances(NamedTuple):
    """The uniform numbers in [0, 1) that a block takes, and all its randomness.

    Attributes:
      drafts: [B, K, 2], draw the drafts.
      accept: [B, K], keep a draft whose `acceptance` lies above.
      last: [B, 2], draw the token behind those that were kept.
    """

    drafts: jax.Array
    accept: jax.Array
    last: jax.Array


class Block(NamedTuple):
    """What happened in a block: K drafts and T = K + 1 places.

    Attributes:
      drafts: int32 [B, K].
      p, q: [T, B, V], what the target, and the drafter, drew from at each place; q is 0 where nothing was drafted.
      kept: int32 [B], how many drafts were accepted.
      last: [B, V], what the token behind them was drawn from.
    """

    drafts: jax.Array
    p: jax.Array
    q: jax.Array
    kept: jax.Array
    last: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """Where the rows are: the sampler's state, the drafter's cache, and the counts of `Speculation`."""

    state: State
    drafts: Any
    drafted: jax.Array
    judged: jax.Array
    accepted: jax.Array
    steps: jax.Array


def begun(state: State, drafts: Any) -> Run:
    """Nothing drafted so far."""
    zeros = lambda: jnp.zeros_like(state.finish)
    return Run(state, drafts, zeros(), zeros(), zeros(), zeros())


@functools.partial(jax.jit, static_argnames=("block", "mesh"), donate_argnames=("state", "drafts"))
def _run(
    model: Model, proposer: Proposer, rules: Rules, state: State, drafts: Any, *, block: int, mesh: Mesh | None
) -> Run:
    def body(run: Run) -> Run:
        return step(model, proposer, rules, run, chances(run.state, block))[0]

    with contextlib.nullcontext() if mesh is None else tracing_for(mesh):
        return jax.lax.while_loop(lambda run: ~jnp.all(run.state.done), body, begun(state, drafts))


def chances(state: State, block: int) -> Chances:
    """Of each row's own key and the number of tokens that it has."""
    uniforms = row_uniforms(state.keys, state.history.generated, 3 * block + 2)
    drafts, accept, last = jnp.split(uniforms, [2 * block, 3 * block], axis=1)
    return Chances(drafts.reshape(-1, block, 2), accept, last)


def step(model: Model, proposer: Proposer, rules: Rules, run: Run, chances: Chances) -> tuple[Run, Block]:
    """Drafts a block for each row, reads it, and keeps what may be kept and a token more."""
    history, going_B = run.state.history, ~run.state.done
    K = chances.accept.shape[1]
    # The target adds a token by itself, so a row never drafts past its limit.
    room_B = jnp.where(going_B, jnp.minimum(K, rules.limit - history.generated - 1), 0)
    proposal = proposer.propose(rules, history, run.drafts, room_B, chances.drafts)
    drafted_BK = jnp.arange(K) < proposal.count[:, None]
    q_TBV = jnp.pad(jnp.where(drafted_BK.T[..., None], proposal.probs, 0), ((0, 1), (0, 0), (0, 0)))

    z_TBV, cache = _read(model, run.state, proposal.tokens, drafted_BK)
    shaped_TBV, p_TBV = _shape(z_TBV, rules, history, proposal.tokens, drafted_BK)

    keep_KB = acceptance(p_TBV[:K], q_TBV[:K], proposal.tokens.T) > chances.accept.T
    kept_B = jnp.sum(jnp.cumprod(keep_KB.astype(jnp.int32), axis=0), axis=0)
    at = lambda x_TBV: jnp.take_along_axis(x_TBV, kept_B[None, :, None], axis=0)[0]
    last_BV = residual(at(p_TBV), at(q_TBV))
    last_B1 = pick(last_BV, chances.last, rules)[:, None]
    drafts_BT = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    tokens_BT = jnp.where(jnp.arange(K + 1) < kept_B[:, None], drafts_BT, last_B1)

    # A row that has no token it may say behind the drafts says those only; one that ends says nothing behind its end.
    stuck_B = going_B & (jnp.max(last_BV, axis=-1) == 0)
    said_B = jnp.where(going_B, kept_B + ~stuck_B, 0)
    ends_BT = jnp.any(tokens_BT[..., None] == rules.eos[:, None], axis=-1) & (jnp.arange(K + 1) < said_B[:, None])
    ended_B = jnp.any(ends_BT, axis=1)
    said_B = jnp.where(ended_B, jnp.argmax(ends_BT, axis=1) + 1, said_B).astype(jnp.int32)

    state = _say(rules, run.state, cache, tokens_BT, said_B, z_TBV, shaped_TBV)
    finish_B = jnp.where(ended_B, 1, jnp.where(stuck_B & ~ended_B, 3, state.finish))
    drafts = proposal.cache
    if drafts is not None:
        drafts = drafts | {"count": jnp.minimum(drafts["count"], state.history.length - 1)}
    run = Run(
        dataclasses.replace(state, done=state.done | ended_B | stuck_B, finish=finish_B),
        drafts,
        run.drafted + proposal.count,
        run.judged + jnp.minimum(jnp.minimum(kept_B + 1, said_B), proposal.count),
        run.accepted + jnp.minimum(kept_B, said_B),
        run.steps + going_B,
    )
    return run, Block(proposal.tokens, p_TBV, q_TBV, kept_B, last_BV)


def _read(model: Model, state: State, drafts_BK: jax.Array, drafted_BK: jax.Array) -> tuple[jax.Array, Variables]:
    """Reads the newest token and the drafts in one forward: logits [T, B, V] of what follows each, and the cache."""
    history, going_B1 = state.history, ~state.done[:, None]
    newest_B1 = jnp.take_along_axis(history.tokens, history.length[:, None] - 1, axis=1)
    tokens_BT = jnp.concatenate([newest_B1, drafts_BK], axis=1)
    segments_BT = jnp.concatenate([going_B1, drafted_BK], axis=1).astype(jnp.int32)
    # What is not read stays within the table of learned positions.
    positions_BT = state.cache["count"][:, None] + segments_BT * jnp.arange(tokens_BT.shape[1])
    read = forward(model, state.cache, tokens_BT, segments_BT, positions_BT)
    hidden_TBD = jnp.moveaxis(read.hidden, 1, 0)
    T, B, D = hidden_TBD.shape
    return next_logits(model, hidden_TBD.reshape(T * B, D)).reshape(T, B, -1), read.cache


def _shape(
    z_TBV: jax.Array, rules: Rules, history: History, drafts_BK: jax.Array, drafted_BK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Processed logits and what is drawn from, [T, B, V] each, as if the drafts before each place had been said."""
    number_BK = history.length[:, None] + jnp.arange(drafts_BK.shape[1])
    tokens_BS = put(history.tokens, drafts_BK, jnp.where(drafted_BK, number_BK, -1))

    def place(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z_BV, ahead = xs
        here = History(tokens_BS, history.length + ahead, history.prompt_length)
        z_BV = apply(z_BV, here, rules.processors, rules.temperature)
        return z_BV, probabilities(z_BV, rules)

    return jax.lax.map(place, (z_TBV, jnp.arange(z_TBV.shape[0])))


def _say(
    rules: Rules, state: State, cache: Variables, tokens_BT: jax.Array, said_B: jax.Array, z_TBV: jax.Array,
    shaped_TBV: jax.Array,
) -> State:  # fmt: skip
    """The state once the first `said` tokens of each row are said and the rest of what was read is taken back."""
    history = state.history
    T, B, V = z_TBV.shape
    behind = lambda first_B: jnp.where(jnp.arange(T) < said_B[:, None], first_B[:, None] + jnp.arange(T), -1)
    each = lambda x_TBV: logprob(x_TBV.reshape(T * B, V), tokens_BT.T.reshape(T * B)).reshape(T, B).T
    tempered_TBV = z_TBV / jnp.where(rules.temperature > 0, rules.temperature, 1.0)[:, None]
    length_B = history.length + said_B
    return State(
        keys=state.keys,
        history=History(put(history.tokens, tokens_BT, behind(history.length)), length_B, history.prompt_length),
        logprobs=put(state.logprobs, each(tempered_TBV), behind(history.generated)),
        sampling_logprobs=put(state.sampling_logprobs, each(shaped_TBV), behind(history.generated)),
        done=state.done | (length_B - history.prompt_length >= rules.limit),
        finish=state.finish,
        cache=cache | {"count": state.cache["count"] + said_B},
    )
