"""The device's side of continuous batching: a fixed number of rows, each free or serving a request."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmjax.generation import engine
from lmjax.generation.decoding import Model, bucket, pad_prompts
from lmjax.generation.engine import Generation, Rules, State, collect
from lmjax.generation.processors import History, Processor, stack
from lmjax.modules.cache import CacheSpec
from lmjax.sharding.context import tracing_for

GROUPS = (16, 4, 1)  # how many prompts are read at once: few sizes, for each compiles in each bucket of lengths


class Job(NamedTuple):
    """A request after all checks, with nothing left open."""

    number: int
    prompt: np.ndarray
    limit: int
    temperature: float
    processors: tuple[Processor, ...]
    eos: np.ndarray
    seed: int


IDLE = Job(-1, np.zeros(1, np.int32), 1, 1.0, (), np.array([-1], np.int32), 0)


class Look(NamedTuple):
    """What the host sees between two runs: which rows are done, bool [B]; steps taken, and steps of rows that were
    not done, int32."""

    done: Any
    steps: Any
    used: Any


def job_rules(template: Rules, jobs: Sequence[Job]) -> tuple[Rules, Rules]:
    """The rules of some rows, of the kinds and widths of a template; and the template, wider where a job needs it.

    A template holds the rules of one row, without an axis of rows. A job has neutral values for the kinds of
    processors it lacks.
    """
    eos = np.full((1 + len(jobs), max(template.eos.shape[-1], *(len(job.eos) for job in jobs))), -1, np.int32)
    for row, job in zip(eos[1:], jobs):
        row[: len(job.eos)] = job.eos
    both = Rules(
        processors=stack([template.processors, *(job.processors for job in jobs)]),
        temperature=np.array([template.temperature, *(job.temperature for job in jobs)], np.float32),
        limit=np.array([template.limit, *(job.limit for job in jobs)], np.int32),
        eos=eos,
        greedy=template.greedy,
        drawn=template.drawn,
    )
    pick = lambda part: jax.tree.map(lambda leaf: leaf[part], both)
    return pick(slice(1, None)), pick(0)


def _form(rules: Rules) -> tuple[Any, ...]:
    return jax.tree.structure(rules), [np.shape(leaf) for leaf in jax.tree.leaves(rules)]


class Slots:
    """Rows on the device and the requests they serve.

    Args:
      model: from `decoding.prepare`.
      key: seeds the sampling.
      count: B, the rows.
      prompt, new: tokens of the longest prompt's bucket, and the most new ones.
      template: see `job_rules`.
      prefix, spec, chunk, mesh: as in `sampler.begin`; `spec` is its `cache`.
    """

    def __init__(
        self,
        model: Model,
        key: jax.Array,
        count: int,
        *,
        prompt: int,
        new: int,
        template: Rules,
        prefix: Any,
        spec: CacheSpec,
        chunk: int | None,
        mesh: Mesh | None,
    ):
        self.model, self.key, self.mesh = model, key, mesh
        self.jobs = [IDLE] * count
        self._width, self._prefix = prompt + new, prefix
        self._start = {"spec": spec, "chunk": chunk, "samples": 1, "shared": False, "guided": False, "mesh": mesh}
        before = 0 if prefix is None else jax.tree.leaves(prefix)[0].shape[1]
        self._state = _empty(model, key, B=count, N=new, S=self._width, before=before, spec=spec, mesh=mesh)
        self._rules: Rules
        self._set_rules(template)
        data = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self._groups = [-(-size // data) * data for size in GROUPS]
        # The prompts that were read last stay, with their places, for requests of the same prompts.
        self._read: State | None = None
        self._places: dict[bytes, int] = {}

    @property
    def free(self) -> list[int]:
        """The rows that serve no request."""
        return [row for row, job in enumerate(self.jobs) if job is IDLE]

    def fill(self, jobs: Sequence[Job]) -> None:
        """Gives jobs to free rows; there must be enough."""
        waiting = list(zip(self.free, jobs))
        for row, job in waiting:
            self.jobs[row] = job
        while waiting:
            ready: dict[int, tuple[int, Job]] = {}
            others = []
            for row, job in waiting:
                place = self._places.get(job.prompt.tobytes())
                if place is None or place in ready:
                    others.append((row, job))
                else:
                    ready[place] = (row, job)
            if ready:
                self._insert(ready)
            else:
                self._read_prompts([job.prompt for _, job in others])
            waiting = others

    def _read_prompts(self, prompts: Sequence[np.ndarray]) -> None:
        """Reads some of the prompts: those of the first one's bucket, each once, so many as there are sizes for."""
        P = bucket(len(prompts[0]))
        rows = list({prompt.tobytes(): prompt for prompt in prompts if bucket(len(prompt)) == P}.values())
        size = next((size for size in self._groups if 4 * len(rows) >= 3 * size), self._groups[-1])
        rows = rows[:size]
        self._places = {prompt.tobytes(): place for place, prompt in enumerate(rows)}
        self._read = None  # frees its memory before the next takes as much
        padded = pad_prompts(self.model.policy, rows + [IDLE.prompt] * (size - len(rows)), 1)
        left = self._width - P
        read, _ = engine.start(self.model, padded, None, self._prefix, N=left, room=left, **self._start)
        self._read = dataclasses.replace(read, logprobs=None, sampling_logprobs=None)  # as wide as this bucket leaves

    def _insert(self, ready: dict[int, tuple[int, Job]]) -> None:
        """Starts jobs whose prompts were read: by place, the row and the job."""
        assert self._read is not None
        size = self._read.done.shape[0]
        jobs, rows = [IDLE] * size, len(self.jobs) + np.arange(size)  # rows that do not exist are not written
        for place, (row, job) in ready.items():
            jobs[place], rows[place] = job, row
        rules, template = job_rules(self._template, jobs)
        if _form(template) != _form(self._template):
            self._set_rules(template)
        seeds = np.array([job.seed for job in jobs], np.int32)
        self._state, self._rules = _insert(self._state, self._rules, self._read, rules, self.key, seeds, rows)

    def _set_rules(self, template: Rules) -> None:
        rules, self._template = job_rules(template, self.jobs)
        self._rules = jax.tree.map(jnp.asarray, rules)

    def run(self, steps: int, ended: int) -> tuple[list[int], Look]:
        """Decodes up to `steps` tokens a row, or until so many rows are done, the free ones counted.

        Returns:
          Rows whose jobs are done, and the look.
        """
        self._state, look = _run(
            self.model, self._rules, self._state, np.int32(steps), np.int32(ended), mesh=self.mesh
        )
        look = jax.device_get(look)
        return [row for row, job in enumerate(self.jobs) if look.done[row] and job is not IDLE], look

    def said(self, done: Sequence[int]) -> list[tuple[int, np.ndarray]]:
        """The rows that serve a job, but for those that are done, and the new tokens of each, int32 [n]."""
        found = collect(self._state, len(self.jobs))
        tokens, lengths = jax.device_get((found.tokens, found.lengths))
        rows = [row for row, job in enumerate(self.jobs) if job is not IDLE and row not in done]
        return [(row, tokens[row, : lengths[row]]) for row in rows]

    def stop(self, rows: Sequence[int]) -> None:
        """Ends the jobs of some rows."""
        if rows:
            self._state = engine.stop(self._state, np.isin(np.arange(len(self.jobs)), rows))

    def take(self, rows: Sequence[int]) -> list[tuple[Job, Generation]]:
        """The jobs of some rows and what they got, NumPy arrays [N] of one row each; the rows are free then."""
        found = jax.device_get(collect(self._state, len(self.jobs))) if rows else None
        taken = [(self.jobs[row], jax.tree.map(lambda leaf, row=row: np.array(leaf[row]), found)) for row in rows]
        for row in rows:
            self.jobs[row] = IDLE
        return taken


@functools.partial(jax.jit, static_argnames=("B", "N", "S", "before", "spec", "mesh"))
def _empty(
    model: Model, key: jax.Array, *, B: int, N: int, S: int, before: int, spec: CacheSpec, mesh: Mesh | None
) -> State:
    """Free rows."""
    with tracing_for(mesh):
        ones = lambda: jnp.ones((B,), jnp.int32)
        zeros = lambda *shape: jnp.zeros((B, *shape))
        history = History(zeros(S).astype(jnp.int32), ones(), ones())
        return State(
            keys=jnp.broadcast_to(key, (B, *key.shape)),
            history=history,
            logprobs=zeros(N),
            sampling_logprobs=zeros(N),
            done=jnp.ones((B,), bool),
            finish=jnp.zeros((B,), jnp.int32),
            cache=model.policy.init_cache(B, before + S, spec),
        )


@functools.partial(jax.jit, donate_argnames=("state", "rules"))
def _insert(
    state: State, rules: Rules, read: State, new_rules: Rules, key: jax.Array, seeds_R: Any, rows_R: Any
) -> tuple[State, Rules]:
    """Writes prompts that were read over rows; all of a row, so that nothing is left of what it served before."""
    keys_R = jax.vmap(jax.random.fold_in, (None, 0))(key, seeds_R)
    nothing = jnp.zeros((seeds_R.shape[0], state.logprobs.shape[1]), jnp.float32)
    new = dataclasses.replace(read, keys=keys_R, logprobs=nothing, sampling_logprobs=nothing)
    write = lambda old, new: old.at[rows_R].set(new, mode="drop", unique_indices=True)
    return jax.tree.map(write, (state, rules), (new, new_rules))


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("state",))
def _run(model: Model, rules: Rules, state: State, steps: Any, ended: Any, *, mesh: Mesh | None) -> tuple[State, Look]:
    """See `Slots.run`."""

    def more(carry: tuple[Any, Any, State]) -> jax.Array:
        taken, _, state = carry
        return (taken < steps) & (jnp.sum(state.done) < ended)

    def body(carry: tuple[Any, Any, State]) -> tuple[Any, Any, State]:
        taken, used, state = carry
        return taken + 1, used + jnp.sum(~state.done, dtype=jnp.int32), engine.step(model, rules, state, None)

    with tracing_for(mesh):
        taken, used, state = jax.lax.while_loop(more, body, (jnp.int32(0), jnp.int32(0), state))
    return state, Look(state.done, taken, used)
