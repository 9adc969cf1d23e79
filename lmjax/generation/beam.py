"""Beam search: canonical, with the heuristics of Hugging Face, sampled, and in diverse groups.

A row's beams are rows of one batch on the device. Every step scores all their continuations, keeps the best, moves
the cache along, and collects those that ended; nothing returns to the host before all is found.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.generation.decoding import Model, Prompts, forward, next_logits, pad_prompts, prefill, prepare
from lmjax.generation.processors import History, Processor, apply, check, per_row
from lmjax.models.decoder import Variables
from lmjax.modules.cache import CacheSpec, take_rows
from lmjax.policy import Policy


class Beams(NamedTuple):
    """What was found after each prompt, best first.

    Attributes:
      tokens: int32 [B, R, N], the new tokens; 0 behind a sequence's end.
      logprobs: float32 [B, R, N], log-probability of each under the policy, untouched by processors, temperature and
        diversity: what the trainer computes for the same tokens. 0 behind a sequence's end.
      lengths: int32 [B, R], how many tokens count, the end-of-sequence token included. 0 where there are fewer
        sequences than were asked for.
      scores: float32 [B, R], what the sequences were ranked by: the sum of their tokens' processed log-probabilities
        over `length ** length_penalty`. -inf where there is no sequence.
    """

    tokens: Any
    logprobs: Any
    lengths: Any
    scores: Any


class _State(NamedTuple):
    """What the loop carries: G groups of K beams for each of B rows. A model's row is (group, row, beam)."""

    step: jax.Array  # [], tokens already chosen
    running: Beams  # [G, B, K, ...], best first; scores are plain sums, -inf for a beam that is none
    finished: Beams  # [G, B, K, ...], best first
    done: jax.Array  # bool [G, B], nothing better can be found
    cache: Variables


class _Options(NamedTuple):
    """What is compiled in."""

    N: int
    G: int
    K: int
    sampled: bool
    spec: CacheSpec | None
    chunk: int | None


class _Settings(NamedTuple):
    """What is not: other values compile nothing anew."""

    eos_E: Any  # int32 [E]; -1 for none
    divisor_N: Any  # float32 [N + 1], length ** length_penalty
    best_divisor_N: Any  # float32 [N + 1], that of the length at which a beam that runs now may come to score best
    stop_when_full: Any  # bool []
    diversity: Any  # float32 []
    temperature: Any  # float32 []
    keys_B: Any  # a key for each row, or None


def beam_search(
    policy: Policy,
    variables: Variables | Model,
    prompts: Sequence[Any],
    key: jax.Array | None = None,
    *,
    beams: int,
    max_new_tokens: int,
    eos: int | Sequence[int] | None = None,
    returned: int = 1,
    length_penalty: float = 0.0,
    early_stopping: bool | Literal["never"] = "never",
    groups: int = 1,
    diversity: float = 0.0,
    temperature: float = 1.0,
    processors: Iterable[Processor] = (),
    cache: CacheSpec | None = None,
    chunk: int | None = None,
) -> Beams:
    """The most probable continuations that a beam finds.

    As it stands this is the canonical search: sequences are ranked by log-probability, and a row goes on until
    nothing that runs can beat what has ended. With `length_penalty=1.0, early_stopping=False` it is that of
    Hugging Face's `generate(num_beams=...)`, whose sequences and scores it gives under every setting of the two.

    Each step ranks the continuations of all beams and looks at the best `beams * max(2, 1 + E)` of them, E the
    number of `eos`: those among the first `beams` that end are kept as results, the best that do not end run on.
    What still runs after `max_new_tokens` counts as ended.

    Given a key, continuations are drawn: without replacement, in proportion to the exponential of their summed
    log-probability (Gumbel noise, arXiv:1903.06059). The rest is as before, with the drawn ones ranked by score. As
    in Hugging Face's `do_sample=True, num_beams=...`, the better half of those drawn runs on, so this leans towards
    the probable more than sampling does. One beam is sampling.

    In groups (diverse beam search, arXiv:1610.02424) each group searches by itself with `beams / groups` beams, one
    after the other: `diversity` is taken off the score of a token for each beam of an earlier group that chose it
    in this step, before processors. This is the search of transformers 4.55, but that a group which is done chooses
    nothing; there it goes on choosing padding, to the loss of that token in the groups behind it.

    Compiles once for a batch size, a bucket of prompt lengths, `max_new_tokens`, the counts of beams, groups and
    `eos`, and the kinds of processors.

    Args:
      policy, variables: the model; `variables` may be what `decoding.prepare` made of it.
      prompts: B arrays of ids, each of at least one.
      key: draw with it; each row has a key of its own.
      beams: how many run for each prompt, all groups together.
      max_new_tokens: N.
      eos: the id or ids that end a sequence.
      returned: R, how many sequences of each prompt to return, at most `beams`.
      length_penalty: scores are sums over length to this power. Above 0 favours long sequences, below 0 short ones.
      early_stopping: when a row is done, once as many sequences have ended as there are beams (of a group). True: at
        once. "never": when no running beam can beat the worst of those any more, at its best length. False: when none
        would if it ended now, which for a length penalty above 0 is a guess.
      groups: how many groups; divides `beams`.
      diversity: at least 0.
      temperature: divides processed log-probabilities before continuations are drawn and summed; only with a key.
      processors: act on log-probabilities, as in Hugging Face's search: a repetition penalty always multiplies.
      cache, chunk: the kind of key/value cache, and how prompts are read; see `generate`.

    Raises:
      UserError: as `generate` and `processors.check`; counts that do not fit each other; groups with a key.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=3))
    >>> table = jnp.log(jnp.array([[0.0, 0.6, 0.4], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]))
    >>> greedy = beam_search(policy, {"params": {"table": table}}, [[0]], beams=1, max_new_tokens=2)
    >>> found = beam_search(policy, {"params": {"table": table}}, [[0]], beams=2, max_new_tokens=2)
    >>> greedy.tokens.tolist(), found.tokens.tolist(), round(float(jnp.exp(found.scores[0, 0])), 3)
    ([[[1, 0]]], [[[2, 0]]], 0.4)
    """
    policy = variables.policy if isinstance(variables, Model) else policy
    _check(policy, eos, beams, returned, length_penalty, early_stopping, groups, diversity, temperature, key, chunk)
    padded, N = pad_prompts(policy, prompts, max_new_tokens), max_new_tokens
    B = len(prompts)
    chain = per_row(check(processors, policy.config.vocab_size, N), B)
    lengths_N = np.maximum(np.arange(N + 1, dtype=np.float64), 1)
    # With a penalty above 0, a sequence of negative log-probabilities scores best when it is as long as can be.
    best_N = np.full_like(lengths_N, N) if early_stopping == "never" and length_penalty > 0 else lengths_N
    settings = _Settings(
        eos_E=np.asarray(-1 if eos is None else eos, np.int32).reshape(-1),
        divisor_N=np.float32(lengths_N**length_penalty),
        best_divisor_N=np.float32(best_N**length_penalty),
        stop_when_full=np.bool_(early_stopping is True),
        diversity=np.float32(diversity),
        temperature=np.float32(temperature),
        keys_B=None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B)),
    )
    options = _Options(N, groups, beams // groups, key is not None, cache, chunk)
    model = variables if isinstance(variables, Model) else prepare(policy, variables, rows=B * beams)
    return jax.tree.map(lambda x: x[:, :returned], _search(options, model, padded, chain, settings))


def _check(
    policy: Policy, eos: Any, beams: int, returned: int, length_penalty: float, early_stopping: Any, groups: int,
    diversity: float, temperature: float, key: Any, chunk: int | None,
) -> None:  # fmt: skip
    if beams < 1:
        raise UserError(f"beams is {beams}; ask for at least 1.")
    if groups < 1 or beams % groups != 0:
        raise UserError(f"{beams} beams do not divide into {groups} groups; give a number of groups that divides them.")
    if not 1 <= returned <= beams:
        raise UserError(f"returned is {returned}; give a number from 1 up to the {beams} beams there are.")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise UserError(f'early_stopping is {early_stopping!r}; give True, False or "never".')
    if not np.isfinite(length_penalty):
        raise UserError(f"length_penalty is {length_penalty}; give a finite number.")
    if not 0 <= diversity < np.inf or (diversity > 0 and groups == 1):
        raise UserError(f"diversity is {diversity} for {groups} groups; give 0, or a positive number and more groups.")
    if not 0 < temperature < np.inf or (temperature != 1.0 and key is None):
        raise UserError(f"temperature is {temperature}; give a positive number, and a key to draw with.")
    if groups > 1 and key is not None:
        raise UserError("groups are searched, not drawn; leave out the key, or the groups.")
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise UserError(f"chunk is {chunk}; take a power of two.")
    ids, V = np.asarray([] if eos is None else eos).reshape(-1), policy.config.vocab_size
    if eos is not None and not (ids.size and 0 <= ids.min() <= ids.max() < V):
        raise UserError(f"eos is {eos}; give ids inside the vocabulary of {V}, or None.")


@functools.partial(jax.jit, static_argnums=0)
def _search(
    options: _Options, model: Model, prompts: Prompts, chain: tuple[Processor, ...], settings: _Settings
) -> Beams:
    """All beams of every row, best first."""
    N, G, K = options.N, options.G, options.K
    B, P = prompts.tokens.shape
    row_M = jnp.broadcast_to(jnp.arange(B)[:, None], (G, B, K)).reshape(-1)  # whose beam each of the model's rows is

    def group(said_BV: jax.Array, xs: Any, step: jax.Array) -> Any:
        """One group's next tokens, given how often earlier groups have just said each."""
        running, finished, done_B, own_BKV = xs
        added_BKV = own_BKV - settings.diversity * said_BV[:, None] if G > 1 else own_BKV
        if chain or options.sampled:
            added_BKV = _processed(options, settings, chain, prompts, running, added_BKV, step)
        said, *xs = _advance(options, settings, running, finished, done_B, added_BKV, own_BKV, step)
        return said_BV + said, xs

    def body(state: _State) -> _State:
        """Reads the newest token of each beam and chooses the next."""
        newest_M = state.running.tokens[..., state.step - 1].reshape(-1)
        token_M1 = jnp.where(state.step > 0, newest_M, prompts.tokens[row_M, -1])[:, None]
        read = forward(model, state.cache, token_M1, jnp.ones_like(token_M1), state.cache["count"][:, None])
        own_MV = jax.nn.log_softmax(next_logits(model, read.hidden[:, 0]), axis=-1)
        own_GBKV = own_MV.reshape(G, B, K, -1)
        xs = (state.running, state.finished, state.done, own_GBKV)
        nobody_BV = jnp.zeros((B, own_GBKV.shape[-1]))
        _, (running, finished, done, parent_GBK) = jax.lax.scan(
            functools.partial(group, step=state.step), nobody_BV, xs
        )
        first_GB1 = K * jnp.arange(G * B).reshape(G, B, 1)
        cache = take_rows(read.cache, (first_GB1 + parent_GBK).reshape(-1))
        return _State(state.step + 1, running, finished, done, cache)

    # The prompts but for their last token, which is the first that the loop reads.
    rest = prompts._replace(segments=prompts.segments.at[:, -1].set(0))
    cache = prefill(model, model.policy.init_cache(B, P + N, options.spec), rest, options.chunk)[1]
    nothing = Beams(
        tokens=jnp.zeros((G, B, K, N), jnp.int32),
        logprobs=jnp.zeros((G, B, K, N)),
        lengths=jnp.zeros((G, B, K), jnp.int32),
        scores=jnp.full((G, B, K), -jnp.inf),
    )
    start = _State(
        step=jnp.zeros((), jnp.int32),
        running=nothing._replace(scores=nothing.scores.at[..., 0].set(0.0)),  # one: the others would be its copies
        finished=nothing,
        done=jnp.zeros((G, B), bool),
        cache=take_rows(cache, row_M),
    )
    end = jax.lax.while_loop(lambda state: (state.step < N) & ~jnp.all(state.done), body, start)
    finished = end.finished
    if G > 1:
        open_GBK = jnp.where(end.done[..., None], -jnp.inf, end.running.scores / settings.divisor_N[N])
        finished = jax.vmap(_merged)(finished, end.running._replace(scores=open_GBK))
    found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, G * K, *x.shape[3:]), finished)
    return _best(found, G * K)


def _processed(
    options: _Options, settings: _Settings, chain: Any, prompts: Prompts, running: Beams, x_BKV: jax.Array, step: Any
) -> jax.Array:
    """Log-probabilities [B, K, V] of a group's next tokens after the chain and the temperature."""
    B, K, V = x_BKV.shape
    P, S = prompts.tokens.shape[1], prompts.tokens.shape[1] + options.N
    each = lambda x: jnp.repeat(x, K, axis=0)
    length_B1 = prompts.lengths[:, None]
    # A row's tokens from column 0: first the prompt, which ends its padded row, then what the beam has said.
    index_BS = jnp.arange(S) + jnp.where(jnp.arange(S) < length_B1, P - length_B1, -length_B1)
    prompt_MS = each(jnp.take_along_axis(prompts.tokens, jnp.clip(index_BS, 0, P - 1), axis=1))
    said_MS = jnp.take_along_axis(running.tokens.reshape(B * K, -1), each(jnp.clip(index_BS, 0, options.N - 1)), axis=1)
    history = History(
        tokens=jnp.where(each(jnp.arange(S) < length_B1), prompt_MS, said_MS),
        length=each(prompts.lengths + step),
        prompt_length=each(prompts.lengths),
    )
    temperature_M = jnp.broadcast_to(settings.temperature, (B * K,)) if options.sampled else None
    x_MV = apply(x_BKV.reshape(B * K, V), history, jax.tree.map(each, chain), temperature_M)
    return x_MV.reshape(B, K, V)


def _advance(
    options: _Options, settings: _Settings, running: Beams, finished: Beams, done_B: jax.Array,
    added_BKV: jax.Array, own_BKV: jax.Array, step: jax.Array,
) -> tuple[jax.Array, Beams, Beams, jax.Array, jax.Array]:  # fmt: skip
    """One step of one group.

    Args:
      added_BKV: what each continuation adds to the score of its beam.
      own_BKV: the policy's log-probabilities.

    Returns:
      How many running beams of a row have just said each token [B, V]; running and finished beams; rows that are
      done; and which beam each running one continues, int [B, K].
    """
    B, K, V = added_BKV.shape
    E = settings.eos_E.shape[0]
    # Enough for K to remain where every beam's best continuations are its ends. One beam draws just one.
    C = 1 if options.sampled and K == 1 else min(max(2, 1 + E) * K, K * V)
    score_BN = (running.scores[:, :, None] + added_BKV).reshape(B, K * V)
    if options.sampled:
        noise = lambda key: jax.random.gumbel(jax.random.fold_in(key, step), (K * V,))
        index_BC = jax.lax.top_k(score_BN + jax.vmap(noise)(settings.keys_B), C)[1]
        score_BC, order_BC = jax.lax.top_k(jnp.take_along_axis(score_BN, index_BC, axis=1), C)
        index_BC = jnp.take_along_axis(index_BC, order_BC, axis=1)
    else:
        score_BC, index_BC = jax.lax.top_k(score_BN, C)
    parent_BC, token_BC = index_BC // V, (index_BC % V).astype(jnp.int32)
    found = _pick(running, parent_BC)
    found = Beams(
        tokens=found.tokens.at[:, :, step].set(token_BC),
        logprobs=found.logprobs.at[:, :, step].set(jnp.take_along_axis(own_BKV.reshape(B, K * V), index_BC, axis=1)),
        lengths=jnp.full_like(parent_BC, step + 1),
        scores=score_BC,
    )
    eos_BC = jnp.any(token_BC[:, :, None] == settings.eos_E, axis=-1)

    # Groups gather what still runs at the end only where a row is not done, as transformers 4.55 does.
    last = (step + 1 == options.N) & (options.G == 1)
    ended_BK = (eos_BC[:, :K] | last) & ~done_B[:, None]
    score_BK = jnp.where(ended_BK, score_BC[:, :K] / settings.divisor_N[step + 1], -jnp.inf)
    finished = _merged(finished, jax.tree.map(lambda x: x[:, :K], found)._replace(scores=score_BK))

    running_BC = jnp.where(eos_BC, -jnp.inf, score_BC)
    _, kept_BK = jax.lax.top_k(running_BC, K)
    running = _pick(found._replace(scores=running_BC), kept_BK)
    alive_BK = running.scores > -jnp.inf

    # What may yet come: transformers' group search measures it by the best continuation even if that has just ended.
    hope_B = score_BC[:, 0] if options.G > 1 else running.scores[:, 0]
    worst_B = finished.scores[:, -1]
    hopeless_B = hope_B / settings.best_divisor_N[step + 1] <= worst_B
    now_done_B = (worst_B > -jnp.inf) & (settings.stop_when_full | hopeless_B) | ~alive_BK[:, 0]

    counted_BK = (alive_BK & ~done_B[:, None]).astype(jnp.float32)
    said_BV = jnp.zeros((B, V)).at[jnp.arange(B)[:, None], running.tokens[:, :, step]].add(counted_BK)
    parent_BK = jnp.take_along_axis(parent_BC, kept_BK, axis=1)
    return said_BV, running, finished, done_B | now_done_B, parent_BK


def _pick(beams: Beams, index_BC: jax.Array) -> Beams:
    """The beams [B, C, ...] of these indices out of [B, K, ...]."""
    return jax.tree.map(lambda x: x[jnp.arange(x.shape[0])[:, None], index_BC], beams)


def _best(beams: Beams, count: int) -> Beams:
    """The best of [B, K, ...], in order; of equals the first."""
    return _pick(beams, jax.lax.top_k(beams.scores, count)[1])


def _merged(beams: Beams, others: Beams) -> Beams:
    """The best of both, as many as there are of the first."""
    return _best(jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), beams, others), beams.scores.shape[1])
