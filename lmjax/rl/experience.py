"""Experience: prompts, rollouts, rewards, advantages, minibatches. An iterator of batches like that of any data.

The training loop asks for a batch; where none is left, the policy as it stands rolls out again. With `stale`, rollouts
are made that many iterations ahead, and their rewards are worked out while the policy learns and rolls out.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lmjax.batch import RolloutBatch
from lmjax.models.decoder import Variables
from lmjax.policy import Policy, Request
from lmjax.rl.environments import episode_metrics
from lmjax.rl.layout import Layout, lay_out, rollout_batch, rounded, take_rows
from lmjax.rl.plan import Plan
from lmjax.rl.prompts import Prompts
from lmjax.rl.rollouts import Rollout
from lmjax.rl.saving import pack_batch, pack_rollouts, unpack_batch, unpack_rollouts
from lmjax.sharding.context import tracing_for
from lmjax.sharding.mesh import shard_batch

Metrics = dict[str, float]


class Reading(NamedTuple):
    """Something that is read of every token of rollouts.

    Attributes:
      what: "logprobs" of the tokens, or "values" before them.
      variables: another model's variables, or a function that selects them among the policy's; None: the policy's own.
      policy: that other model; None: the same.
    """

    what: Literal["logprobs", "values"]
    variables: Any = None
    policy: Policy | None = None


Read = Callable[[Reading], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Credit:
    """What rollouts are worth, token by token.

    Attributes:
      advantages: of each rollout: a number, or one a token.
      left_out: of each rollout, whether nothing is learned from it; None: of none.
      fields: further fields of the batch by name: of each rollout one number a token (`values`, `returns`,
        `value_mask`, `reference_logprobs`), or one more with `Plan.last_token`.
      metrics: what is to be reported.
      coefficients: name -> a number for terms, as controllers set it.
    """

    advantages: Sequence[Any]
    left_out: Sequence[bool] | None = None
    fields: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    metrics: Metrics = dataclasses.field(default_factory=dict)
    coefficients: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Iteration(NamedTuple):
    """Rollouts whose scores may not be there yet.

    Attributes:
      number: of the iteration.
      rollouts: in the order of their groups.
      scores: waits for the scores.
      metrics: how they came about.
    """

    number: int
    rollouts: list[Rollout]
    scores: Callable[[], Any]
    metrics: Metrics


class Experience(Iterator[RolloutBatch]):
    """Batches of rollouts of a policy that learns from them.

    Args:
      policy: the model; `follow` tells its variables.
      prompts: what is asked.
      plan: how much.
      roll_out: (variables, prompts, key, first_group=, version=) -> rollouts, those of a prompt one after the other.
      judge: rollouts -> a function that waits for their scores and gives them. It should return at once.
      join: scores of some rollouts, and of others, ... -> those of all.
      credit: (rollouts, scores, read) -> what they are worth. `read(reading)` gives a number for each token of each
        rollout, by the policy as it is.
      key: seeds the rollouts.
      teaches: (rollouts, scores) of one prompt -> whether they are worth learning from, for `Plan.redraws`.
      parts: what else has a state that belongs to a checkpoint: objects with `get_state` and `set_state`.
      weights: gives, at every iteration, how often each prompt should come; None for alike.
      report: called with the number of an iteration, its rollouts, their scores and their credit.
      mesh: where the variables lie.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        plan: Plan,
        *,
        roll_out: Callable[..., list[Rollout]],
        judge: Callable[[list[Rollout]], Callable[[], Any]],
        join: Callable[[list[Any]], Any],
        credit: Callable[[list[Rollout], Any, Read], Credit],
        key: jax.Array,
        teaches: Callable[[list[Rollout], Any], bool] | None = None,
        parts: Mapping[str, Any] | None = None,
        weights: Callable[[], np.ndarray | None] = lambda: None,
        report: Callable[[int, list[Rollout], Any, Credit], None] | None = None,
        mesh: Mesh | None = None,
    ):
        self._policy, self._prompts, self._plan, self._mesh = policy, prompts, plan, mesh
        self._roll_out, self._judge, self._join, self._credit = roll_out, judge, join, credit
        self._key, self._teaches, self._parts = key, teaches, dict(parts or {})
        self._weights, self._report = weights, report
        self._variables: Variables | None = None
        self._iteration = self.updates = 0
        self._ahead: collections.deque[Iteration] = collections.deque()
        self._batches: collections.deque[RolloutBatch] = collections.deque()
        self.metrics: Metrics = {}

    def follow(self, variables: Variables, updates: int) -> None:
        """Tells the policy's variables after so many updates. They are read before the next batch is handed out."""
        self._variables, self.updates = variables, updates

    def __next__(self) -> RolloutBatch:
        if not self._batches:
            assert self._variables is not None, "follow(variables, updates) comes first"
            while len(self._ahead) <= self._plan.stale:
                self._ahead.append(self._start())
            self._batches.extend(self._finish(self._ahead.popleft()))
        return self._batches.popleft()

    def _start(self) -> Iteration:
        """Makes the rollouts of an iteration and has them judged."""
        plan, number = self._plan, self._iteration
        key = jax.random.fold_in(self._key, number)
        self._iteration += 1
        made: list[tuple[list[Rollout], Callable[[], Any]]] = []
        size, drawn = plan.prompts // plan.chunks, 0
        for chunk in range(plan.chunks):
            made.append(self._some(size, jax.random.fold_in(key, chunk), drawn))
            drawn += size
        if plan.redraws:
            made, drawn = self._redrawn(made, key, drawn)
        rollouts = [rollout for some, _ in made for rollout in some]
        metrics = {"prompts_drawn": float(drawn)} if plan.redraws else {}
        return Iteration(number, rollouts, lambda: self._join([wait() for _, wait in made]), metrics)

    def _some(self, count: int, key: jax.Array, first_group: int) -> tuple[list[Rollout], Callable[[], Any]]:
        prompts = [self._prompts.prompts[n] for n in self._prompts.take(count, self._weights())]
        rollouts = self._roll_out(self._variables, prompts, key, first_group=first_group, version=self.updates)
        return rollouts, self._judge(rollouts)

    def _redrawn(self, made: list[Any], key: jax.Array, drawn: int) -> tuple[list[Any], int]:
        """Groups that teach something, of as many draws as it takes; at the end those that do not fill up."""
        assert self._teaches is not None, "redraws need a function that says which groups teach something"
        plan = self._plan
        good: list[Any] = []
        idle: list[Any] = []
        for round_ in range(plan.redraws + 1):
            for rollouts, wait in made:
                scores, groups = wait(), [rollout.group for rollout in rollouts]
                for group in dict.fromkeys(groups):
                    index = [i for i, own in enumerate(groups) if own == group]
                    part = [rollouts[i] for i in index], scores.take(index)
                    (good if self._teaches(*part) else idle).append(part)
            if len(good) >= plan.prompts or round_ == plan.redraws:
                break
            made = [self._some(plan.prompts // plan.chunks, jax.random.fold_in(key, plan.chunks + round_), drawn)]
            drawn += plan.prompts // plan.chunks
        kept = (good + idle)[: plan.prompts]
        return [(rollouts, lambda scores=scores: scores) for rollouts, scores in kept], drawn

    def _finish(self, iteration: Iteration) -> list[RolloutBatch]:
        """Minibatches of rollouts, in the order in which they are learned from."""
        plan, rollouts, scores = self._plan, iteration.rollouts, iteration.scores()
        layout = lay_out(
            rollouts,
            per_row=plan.width,
            prompt=rounded(plan.max_prompt - 1),
            branch=rounded(plan.max_new_tokens + plan.last_token),
            rows=plan.rows,
        )
        batch = rollout_batch(
            rollouts, layout, temperature=plan.temperature, old=not plan.on_policy, last_token=plan.last_token
        )
        credit = self._credit(rollouts, scores, functools.partial(self._read, layout, batch))
        fields: dict[str, Any] = {name: layout.place(values) for name, values in credit.fields.items()}
        if credit.left_out is not None:
            fields["mask"] = batch.mask * layout.place([0.0 if out else 1.0 for out in credit.left_out])
        fields["coefficients"] = {
            name: np.full(plan.rows, value, np.float32) for name, value in credit.coefficients.items()
        }
        batch = dataclasses.replace(batch, advantages=layout.place(credit.advantages), **fields)
        self.metrics = self._about(rollouts) | episode_metrics(rollouts) | iteration.metrics | credit.metrics
        if self._report is not None:
            self._report(iteration.number, rollouts, scores, credit)
        size = plan.rows // plan.minibatches
        seed = [*np.ravel(jax.random.key_data(self._key)).tolist(), iteration.number]
        random = np.random.default_rng(seed)
        orders = [random.permutation(plan.rows) if plan.minibatches > 1 else np.arange(plan.rows)
                  for _ in range(plan.epochs)]  # fmt: skip
        return [take_rows(batch, order[i : i + size]) for order in orders for i in range(0, plan.rows, size)]

    def _read(self, layout: Layout, batch: RolloutBatch, reading: Reading) -> list[np.ndarray]:
        size = self._plan.rows // self._plan.minibatches
        select = reading.variables if callable(reading.variables) else None
        held = self._variables if reading.variables is None or select else reading.variables
        policy = reading.policy or self._policy
        found = []
        for first in range(0, self._plan.rows, size):
            part = take_rows(batch, slice(first, first + size))
            part = part if self._mesh is None else shard_batch(part, self._mesh)
            found.append(np.asarray(_evaluated(policy, reading.what, select, self._mesh, held, part)))
        return layout.pick(np.concatenate(found), extra=int(self._plan.last_token))

    def _about(self, rollouts: list[Rollout]) -> Metrics:
        lengths = np.array([rollout.own.sum() for rollout in rollouts], float)
        ended = np.array([rollout.ended for rollout in rollouts])
        own = np.concatenate([rollout.own for rollout in rollouts])
        together = lambda name: np.concatenate([getattr(rollout, name) for rollout in rollouts])[own].astype(float)
        gap = np.abs(together("sampling_logprobs") - together("logprobs"))
        return {
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": 1 - ended.mean(),
            "completions/mean_terminated_length": lengths[ended].mean() if ended.any() else 0.0,
            "rollout/entropy": -together("logprobs").mean() if own.any() else 0.0,
            "rollout/staleness": float(np.mean([self.updates - rollout.version for rollout in rollouts])),
            "sampling/sampling_logp_difference/mean": gap.mean() if own.any() else 0.0,
            "sampling/sampling_logp_difference/max": gap.max() if own.any() else 0.0,
        }

    def get_state(self) -> Callable[[], dict[str, Any]]:
        """Everything that is needed to go on, as JSON values, made when it is asked for."""
        batches, ahead = tuple(self._batches), tuple(self._ahead)
        now = {
            "iteration": self._iteration,
            "prompts": self._prompts.get_state(),
            "parts": {name: part.get_state() for name, part in self._parts.items()},
            "metrics": dict(self.metrics),
        }
        return lambda: now | {
            "batches": [pack_batch(batch) for batch in batches],
            "ahead": [[some.number, pack_rollouts(some.rollouts), some.metrics] for some in ahead],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there. Rollouts that wait are judged again."""
        self._iteration, self.metrics = state["iteration"], dict(state["metrics"])
        self._prompts.set_state(state["prompts"])
        for name, part in self._parts.items():
            part.set_state(state["parts"][name])
        self._batches = collections.deque(unpack_batch(packed) for packed in state["batches"])
        found = [(number, unpack_rollouts(packed), metrics) for number, packed, metrics in state["ahead"]]
        self._ahead = collections.deque(
            Iteration(number, some, self._judge(some), metrics) for number, some, metrics in found
        )


def following(step: Callable[[Any, Any], tuple[Any, Any]], experience: Experience) -> Callable[..., tuple[Any, Any]]:
    """A training step that tells the experience what came of it, and reports what is known of the rollouts.

    Args:
      step: from `training.make_step`.
      experience: whose batches it takes; `follow` must have been called with the state to start from.
    """

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        state, metrics = step(state, batch)
        experience.follow(state.variables, experience.updates + 1)
        return state, dict(metrics) | experience.metrics

    return run


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _evaluated(
    policy: Policy, what: str, select: Any, mesh: Mesh | None, variables: Variables, batch: RolloutBatch
) -> jax.Array:
    with tracing_for(mesh):
        outputs = policy(variables if select is None else select(variables), batch)
        wanted = frozenset({what}) if what == "logprobs" else frozenset()
        found: jax.Array = getattr(outputs.expecting(Request(wanted), {}), what)
        return found
