"""Continuous batching: a row that has finished makes room for a prompt that waits.

A batch takes as long as its longest row. Here a fixed number of rows is decoded; from time to time the host takes out
what has finished, reads waiting prompts a few at a time, and writes them over the free rows. What a request gets does
not depend on the number of rows, the order or its neighbours: it is what `sampler.generate` draws from the same prompt
and key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lmjax.errors import UserError
from lmjax.generation.decoding import Model, bucket, check_prompts, prepare
from lmjax.generation.engine import Generation, Rules
from lmjax.generation.processors import Processor, check, stack
from lmjax.generation.slots import IDLE, Job, Slots, job_rules
from lmjax.models.decoder import Variables
from lmjax.modules.cache import CacheSpec, Dense
from lmjax.policy import Policy


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued. What is None is as `serve` says for all.

    Attributes:
      prompt: ids, at least one.
      max_new_tokens: at least 1.
      temperature: divides the logits; 0 takes the likeliest token.
      processors: what else is done to the logits, with parameters for a single row.
      eos: the id or ids that end it; `()` for none.
      seed: it draws with `fold_in(key, seed)`; None: with its number among the requests.
    """

    prompt: Any
    max_new_tokens: int | None = None
    temperature: float | None = None
    processors: Sequence[Processor] | None = None
    eos: int | Sequence[int] | None = None
    seed: int | None = None


class Result(NamedTuple):
    """What a request got: NumPy arrays of its N new tokens. See `Generation`.

    Attributes:
      number: which request, counted from 0 as they came.
      tokens: int32 [N], the end-of-sequence token included.
      logprobs: float32 [N], under the model at the request's temperature.
      sampling_logprobs: float32 [N], under what they were drawn from.
      finish: why it ended, an index of `FINISH`.
    """

    number: int
    tokens: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    finish: int


class Progress(NamedTuple):
    """How far `serve` has come.

    Attributes:
      finished: requests that are done.
      running: requests that hold a row.
      steps: decode steps so far, of all rows.
      used: steps of single rows that served a request.
      slots: how many rows there are.
    """

    finished: int
    running: int
    steps: int
    used: int
    slots: int

    @property
    def occupancy(self) -> float:
        """The share of the rows' steps that served a request."""
        return self.used / max(self.steps * self.slots, 1)


def serve(
    policy: Policy,
    variables: Variables | Model,
    requests: Iterable[Any],
    key: jax.Array,
    *,
    slots: int,
    report: Callable[[Progress], Any] | None = None,
    until: Callable[[int, np.ndarray], bool] | None = None,
    **options: Any,
) -> Generator[Result, None, None]:
    """Continues prompts, and yields what each got as it finishes.

    Memory is that of `slots` rows as long as the longest prompt's bucket and the largest `max_new_tokens`, and of up to
    16 rows more for prompts that are read. One compilation serves all decoding, whatever the requests' temperatures,
    lengths, ends and parameters; reading prompts compiles once for each power of two of their lengths and each size of
    `slots.GROUPS`. Requests of one prompt that stand together share its reading: for n samples, give it n times.

    Close it to end early. An error that comes out of lazy requests is raised when what had begun is done.

    Args:
      policy, variables: the model; `variables` may be what `decoding.prepare` made of it.
      requests: `Request`s or bare prompts. A list is checked before any work. Anything lazy, endless too, is asked for
        more only when a row is free, after all that has finished was yielded.
      key: seeds the sampling.
      slots: rows that are decoded together.
      report: called after every look of the host.
      until: asked at every look about each request that goes on, with its number and its tokens so far, whether to
        end it (`FINISH` "stop"), as when its text holds a stop string. What it said meanwhile is part of the result.
      options: those of `accept`; lazy requests need its `max_prompt` and `max_new_tokens`.

    Raises:
      UserError: see `accept`.

    >>> import jax.numpy as jnp, lmjax as lm
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = {"params": {"table": 50 * jnp.roll(jnp.eye(4), 1, axis=1)}}  # after n comes n + 1
    >>> asked = [Request([0], 5), Request([1], 1), Request([2], 2)]
    >>> [(found.number, found.tokens.tolist()) for found in serve(policy, variables, asked, jax.random.key(0), slots=2)]
    [(1, [2]), (2, [3, 0]), (0, [1, 2, 3, 0, 1])]
    """
    plan, jobs = accept(policy, variables, requests, key, slots=slots, **options)
    return _serve(plan, jobs, report, until)


def generate_many(
    policy: Policy,
    variables: Variables | Model,
    requests: Iterable[Any],
    key: jax.Array,
    *,
    slots: int,
    samples: int = 1,
    report: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Generation:
    """What `generate` gives for the same prompts and key, `slots` rows at a time.

    Requests that may become the longest go first, so that the rows come to their ends together.

    Args:
      policy, variables, key, slots, report: as in `serve`.
      requests: `Request`s or bare prompts.
      samples: continuations of each: row `i * samples + j` is sample j of request i.
      options: those of `accept`.

    Returns:
      NumPy arrays in the order of the requests; N is the largest `max_new_tokens` of any.

    Raises:
      UserError: no requests; see `accept` for others.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; ask for at least 1.")
    given = [item if isinstance(item, Request) else Request(item) for item in requests]
    if not given:
        raise UserError("there are no requests; give at least one prompt.")
    seeds = [i if item.seed is None else item.seed for i, item in enumerate(given)]
    copies = [dataclasses.replace(item, seed=s * samples + j) for s, item in zip(seeds, given) for j in range(samples)]
    plan, found_jobs = accept(policy, variables, copies, key, slots=slots, **options)
    jobs = sorted(found_jobs, key=lambda job: -job.limit)
    B, N = len(jobs), jobs[0].limit
    tokens, logprobs, sampling_logprobs = np.zeros((B, N), np.int32), *np.zeros((2, B, N), np.float32)
    lengths, finish = np.zeros((2, B), np.int32)
    for row in _serve(plan, jobs, report):
        lengths[row.number], finish[row.number] = len(row.tokens), row.finish
        for whole, part in ((tokens, row.tokens), (logprobs, row.logprobs), (sampling_logprobs, row.sampling_logprobs)):
            whole[row.number, : len(part)] = part
    return Generation(tokens, logprobs, sampling_logprobs, lengths, finish)


class Plan(NamedTuple):
    """How requests are served: `open` makes the empty rows; for `every` and `refill` see `accept`."""

    open: Callable[[], Slots]
    every: int
    refill: int


def accept(
    policy: Policy,
    variables: Variables | Model,
    requests: Iterable[Any],
    key: jax.Array,
    *,
    slots: int,
    max_prompt: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    processors: Sequence[Processor] = (),
    eos: int | Sequence[int] | None = None,
    every: int = 32,
    refill: int | None = None,
    cache: CacheSpec | None = None,
    chunk: int | None = None,
    prefix: Any = None,
    mesh: Mesh | None = None,
) -> tuple[Plan, Iterable[Job]]:
    """Checks all that can be checked before any work.

    Args:
      policy, variables, requests, key, slots: as in `serve`.
      max_prompt: the most tokens of a prompt. It and `max_new_tokens` fix all shapes: give both to lazy requests, and
        to lists that are to share compilations; of other lists they are counted.
      max_new_tokens: the most new tokens of a request, and those of requests that do not say.
      temperature, eos: of requests that do not say.
      processors: of requests that do not say. Decoding compiles for their kinds, and for those of all requests of a
        list; a lazy request with another kind, or with more ids than any before, compiles it anew.
      every: the most steps from one look of the host to the next.
      refill: while there may be more requests, look when so many rows are free. The default, an eighth of them, leaves
        one in 16 idle and reads prompts about 8 times in the life of a row.
      cache, chunk, prefix, mesh: as in `sampler.begin`.

    Returns:
      The plan, and the requests in full: as lazy as they came, or a list.

    Raises:
      UserError: numbers out of range, lazy requests without bounds, or a bad request.
    """
    data = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if slots < 1 or slots % data:
        raise UserError(f"slots is {slots}; ask for a multiple of {data} above 0, the size of the data axes.")
    if every < 1:
        raise UserError(f"every is {every}; look after at least 1 step.")
    if refill is not None and not 1 <= refill <= slots:
        raise UserError(f"refill is {refill}; give a number of rows from 1 to {slots}.")
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise UserError(f"chunk is {chunk}; take a power of two.")
    known = isinstance(requests, Sized)
    for name, bound in (("max_prompt", max_prompt), ("max_new_tokens", max_new_tokens)):
        if bound is None and not known:
            raise UserError(f"{name} is missing; give the most of any request, since these are not a list.")
        if bound is not None and bound < 1:
            raise UserError(f"{name} is {bound}; ask for at least 1.")

    default = Request((), max_new_tokens, temperature, processors, () if eos is None else eos)
    bounds = {"max_prompt": max_prompt, "max_new_tokens": max_new_tokens}
    before = 0 if prefix is None else jax.tree.leaves(prefix)[0].shape[1]
    chains: dict[tuple[int, ...], tuple[Any, tuple[Processor, ...]]] = {}

    def chain(given: Sequence[Processor], limit: int) -> tuple[Processor, ...]:
        key = (limit, *map(id, given))
        if key not in chains:
            if len(chains) >= 4096:
                chains.clear()
            found = check(given, policy.config.vocab_size, limit)
            stack([found])  # refuses parameters that have rows
            chains[key] = given, found  # what was given lives on, so that no other has its id
        return chains[key][1]

    jobs: Iterable[Job] = (
        _job(policy, number, item, default, bounds, before, chain) for number, item in enumerate(requests)
    )
    template = Rules((), np.float32(1), np.int32(1), np.array([-1], np.int32))
    kinds = []
    if max_new_tokens is not None:
        kinds.append(IDLE._replace(processors=chain(tuple(processors), max_new_tokens)))
    if known:
        jobs = list(jobs)
        max_prompt = max_prompt or max((len(job.prompt) for job in jobs), default=1)
        max_new_tokens = max_new_tokens or max((job.limit for job in jobs), default=1)
        kinds += {(id(job.processors), len(job.eos)): job for job in jobs}.values()
        greedy, drawn = any(job.temperature == 0 for job in jobs), any(job.temperature > 0 for job in jobs)
        template = dataclasses.replace(template, greedy=greedy, drawn=drawn)
    for job in kinds:
        template = job_rules(template, [job])[1]
    assert max_prompt is not None and max_new_tokens is not None
    prompt, new = bucket(max_prompt), max_new_tokens

    def open_slots() -> Slots:
        model = prepare(policy, variables, slots if mesh is None else 0)
        return Slots(
            model, key, slots, prompt=prompt, new=new, template=template, prefix=prefix, spec=cache or Dense(),
            chunk=chunk, mesh=mesh,
        )  # fmt: skip

    return Plan(open_slots, every, max(1, slots // 8) if refill is None else refill), jobs


def _job(
    policy: Policy,
    number: int,
    item: Any,
    default: Request,
    bounds: dict[str, int | None],
    before: int,
    chain: Callable[[Sequence[Processor], int], tuple[Processor, ...]],
) -> Job:
    """A request in full, after its checks."""
    own = item if isinstance(item, Request) else Request(item)
    fill = lambda name: getattr(default, name) if getattr(own, name) is None else getattr(own, name)
    limit, temperature, processors, eos = map(fill, ("max_new_tokens", "temperature", "processors", "eos"))
    seed = number if own.seed is None else own.seed
    ids = np.asarray(eos, np.int32).reshape(-1)
    vocab_size = policy.config.vocab_size
    try:
        if limit is None or limit < 1:
            raise UserError(f"max_new_tokens is {limit}; ask for at least 1.")
        prompt = check_prompts(policy, [own.prompt], before + limit)[0]
        for (name, bound), value in zip(bounds.items(), (len(prompt), limit)):
            if bound is not None and value > bound:
                raise UserError(f"it takes {value} tokens where {name} is {bound}; raise {name} or shorten it.")
        if not (np.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature is {temperature}; give 0 for the likeliest token, or a positive number.")
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise UserError(
                f"eos {eos} is outside the model's vocabulary of {vocab_size}; name ids of its own tokenizer."
            )
        if not 0 <= seed < 2**31:
            raise UserError(f"seed is {seed}; give a whole number from 0, below 2^31.")
        return Job(number, prompt, limit, temperature, chain(tuple(processors), limit), ids, seed)
    except UserError as error:
        sentence = str(error).replace("prompt 0", "its prompt")
        raise UserError(f"request {number}: {sentence}") from error


def _serve(
    plan: Plan,
    jobs: Iterable[Job],
    report: Callable[[Progress], Any] | None,
    until: Callable[[int, np.ndarray], bool] | None = None,
) -> Generator[Result, None, None]:
    waiting, slots = iter(jobs), plan.open()
    count, finished, steps, used = len(slots.jobs), 0, 0, 0
    more, failure = True, None
    while True:
        new: list[Job] = []
        while more and len(new) < len(slots.free):
            try:
                new.append(next(waiting))
            except StopIteration:
                more = False
            except Exception as error:  # what has begun is done first
                more, failure = False, error
        slots.fill(new)
        running = count - len(slots.free)
        if running == 0:
            break
        done, look = slots.run(plan.every, plan.refill if more else count)
        if until is not None:
            over = [row for row, tokens in slots.said(done) if until(slots.jobs[row].number, tokens)]
            slots.stop(over)
            done = done + over
        finished, steps, used = finished + len(done), steps + int(look.steps), used + int(look.used)
        if report is not None:
            report(Progress(finished, running - len(done), steps, used, count))
        for job, found in slots.take(done):
            n = int(found.lengths)
            yield Result(
                job.number, found.tokens[:n], found.logprobs[:n], found.sampling_logprobs[:n], int(found.finish)
            )
    if failure is not None:
        raise failure
