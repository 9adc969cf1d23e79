"""The training step: one jitted, sharded, donating function from state and batches to state and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.models.decoder import Variables
from lmjax.objectives.algebra import Objective, Role
from lmjax.objectives.evaluation import Evaluation, as_streams, check_roles, evaluate, finalize, term_weights
from lmjax.policy import Policy
from lmjax.sharding.context import tracing_for
from lmjax.sharding.mesh import batch_sharding, check_batch_size, replicated, shard_batch
from lmjax.sharding.rules import DEFAULT_RULES, Rules
from lmjax.training.state import TrainState, overlay, state_shardings, trainable_part

Metrics = dict[str, jax.Array]


def make_step(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Sequence[str] = ("params",),
    roles: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    microbatches: int = 1,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
    schedule: Callable[[Any], Any] | None = None,
) -> Step:
    """Builds `step(state, batches) -> (state, metrics)`.

    The state is donated: its arrays are overwritten. A step whose loss or gradient is not finite changes
    nothing but the step count, and says which term it was in `nonfinite/<term>`.

    Args:
      policy: the model that is trained.
      objective: a sum of terms.
      optimizer: any optax transformation over the trainable collections.
      trainable: collections that get gradients, or patterns of leaves (`training.state.trainable_part`); no gradient of
        another is ever computed.
      roles: the objective's other models by name: variables, a function of the policy's variables, or a
        `Role`.
      mesh, rules: the devices, and which logical axis goes over which of their axes.
      microbatches: the batch is split into so many parts, one after the other; the result does not depend on
        it.
      clip_norm: largest global norm of the gradient.
      ema_decay: decay of the moving average kept in `state.ema`.
      schedule: the learning rate at a step, to report it.
    """
    if microbatches < 1:
        raise UserError(f"microbatches is {microbatches}; give at least 1.")
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    policy = dataclasses.replace(policy, chunk_elements=policy.chunk_elements * shards)
    known = check_roles(objective, roles or {})
    selected = {name: role for name, role in known.items() if callable(role.variables)}
    frozen = {name: role for name, role in known.items() if not callable(role.variables)}
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(
        state: TrainState, batches: dict[str, Batch], role_variables: dict[str, Variables]
    ) -> tuple[TrainState, Metrics]:
        roles = selected | {
            name: dataclasses.replace(role, variables=role_variables[name]) for name, role in frozen.items()
        }
        part = trainable_part(state.variables, trainable)
        if ema_decay is not None and state.ema is None:
            raise UserError("ema_decay is set, but the state keeps no average; use init_state(..., ema=True).")
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def loss(part: Variables, batches: dict[str, Batch], key: jax.Array, weights: Any) -> Any:
            result = evaluate(
                objective,
                policy,
                overlay(state.variables, part),
                batches,
                roles=roles,
                step=state.step,
                rng=key,
                train=True,
                weights=weights,
            )
            return result.loss, result

        gradient_of = jax.grad(loss, has_aux=True)
        if microbatches == 1:
            gradients, result = gradient_of(part, batches, key, None)
        else:
            weights = term_weights(objective, policy, state.variables, batches, roles)
            gradients, result = _accumulate(gradient_of, part, batches, key, weights, microbatches)
            # The weights of parts need not add up to that of the whole: a plain sum's is 1 in each.
            whole = {
                f"loss/{label}": (result.sums[f"loss/{label}"][0], weight)
                for label, weight in zip(objective.labels, weights, strict=True)
            }
            result = dataclasses.replace(result, sums=result.sums | whole)

        norm = optax.tree.norm(gradients)
        flags = {
            f"nonfinite/{label}": ~jnp.isfinite(result.sums[f"loss/{label}"][0]) for label in objective.labels
        }
        some = jnp.any(jnp.stack(list(flags.values())))
        flags["nonfinite/gradient"] = ~jnp.isfinite(norm) & ~some
        finite = ~(some | flags["nonfinite/gradient"])
        if clip_norm is not None:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            gradients = jax.tree.map(lambda g: g * scale, gradients)

        def update(old: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            part, opt_state, average = old
            updates, opt_state = optimizer.update(gradients, opt_state, part, step=state.step)
            part = optax.apply_updates(part, updates)
            if ema_decay is not None:
                average = jax.tree.map(lambda a, p: ema_decay * a + (1 - ema_decay) * p, average, part)
            return part, opt_state, average

        # A branch, not a select: selecting between old and new makes the compiler copy the whole optimizer state.
        part, opt_state, average = jax.lax.cond(
            finite, update, lambda old: old, (part, state.opt_state, state.ema)
        )
        new_state = dataclasses.replace(
            state, step=state.step + 1, variables=overlay(state.variables, part), opt_state=opt_state, ema=average
        )
        metrics = finalize(result.sums) | {name: flag.astype(jnp.float32) for name, flag in flags.items()}
        metrics["grad_norm"] = norm
        metrics["tokens"] = sum(
            (jnp.sum(batch.segments > 0).astype(jnp.float32) for batch in batches.values()), jnp.zeros(())
        )
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return new_state, metrics

    return Step(train_step, policy, tuple(trainable), frozen, mesh, rules, microbatches)


def _accumulate(
    gradient_of: Callable[..., Any],
    part: Variables,
    batches: Any,
    key: jax.Array,
    weights: Any,
    microbatches: int,
) -> tuple[Variables, Evaluation]:
    """Sums gradients and metrics over microbatches, each divided by the weights of the whole batch."""

    def split(x: jax.Array) -> jax.Array:
        # Row r goes to microbatch r mod M, so that each one spreads over all devices of a sharded batch.
        return jnp.moveaxis(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 1, 0)

    def body(total: Any, xs: Any) -> tuple[Any, None]:
        batches, index = xs
        found = gradient_of(part, batches, jax.random.fold_in(key, index), weights)
        return jax.tree.map(jnp.add, total, found), None

    xs = (jax.tree.map(split, batches), jnp.arange(microbatches))
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    shapes = jax.eval_shape(lambda x: gradient_of(part, x[0], key, weights), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (gradients, result), _ = jax.lax.scan(body, zeros, xs)
    loss_total, _ = result.sums["loss"]
    return gradients, dataclasses.replace(result, sums=result.sums | {"loss": (loss_total, jnp.ones(()))})


class Step:
    """A compiled training step; see `make_step`. `lower` and `trace` are those of the jitted function.

    Compiles at the first call, for the shapes and shardings of its state.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        policy: Policy,
        trainable: tuple[str, ...],
        frozen: dict[str, Role],
        mesh: Mesh | None,
        rules: Rules,
        microbatches: int,
    ):
        self._function = function
        self._policy = policy
        self._trainable = trainable
        self._role_variables = {name: role.variables for name, role in frozen.items()}
        self._mesh = mesh
        self._rules = rules
        self._microbatches = microbatches
        self._jitted: Any = None

    def __call__(self, state: TrainState, batches: Batch | Mapping[str, Batch]) -> tuple[TrainState, Metrics]:
        streams = as_streams(batches)
        if self._jitted is None:
            self._prepare(state, streams)
        if self._mesh is not None and any(_on_host(batch) for batch in streams.values()):
            streams = {name: shard_batch(batch, self._mesh, self._rules) for name, batch in streams.items()}
        return self._jitted(state, streams, self._role_variables)

    def lower(self, state: Any, batches: Batch | Mapping[str, Batch]) -> Any:
        """The lowered program, for arrays or shapes: `.compile().cost_analysis()` and `.memory_analysis()`."""
        streams = as_streams(batches)
        self._prepare(state, streams)
        return self._jitted.lower(state, streams, self._role_variables)

    def cache_size(self) -> int:
        """How many times the step was compiled."""
        return 0 if self._jitted is None else self._jitted._cache_size()

    def _prepare(self, state: TrainState, streams: dict[str, Batch]) -> None:
        """Checks what can be checked before compiling, and sets up the jitted function."""
        owned = {id(leaf) for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)}
        for name, variables in self._role_variables.items():
            if any(id(leaf) in owned for leaf in jax.tree.leaves(variables)):
                raise UserError(
                    f"role {name!r} holds arrays of the training state, which every step overwrites; "
                    "pass a function of the policy's variables, or a copy."
                )
        for name, batch in streams.items():
            rows = batch.tokens.shape[0]
            if self._mesh is not None:
                check_batch_size(rows, self._mesh, self._rules, microbatches=self._microbatches)
            elif rows % self._microbatches:
                raise UserError(
                    f"the batch {name!r} of {rows} rows does not split into {self._microbatches} microbatches; "
                    "change one of them."
                )

        def run(state: TrainState, streams: dict[str, Batch], role_variables: Any) -> Any:
            with tracing_for(self._mesh, self._rules):
                return self._function(state, streams, role_variables)

        if self._mesh is None:
            self._jitted = jax.jit(run, donate_argnums=0)
            return
        shapes = jax.eval_shape(lambda state: state, state)
        places = state_shardings(self._policy, shapes, self._mesh, self._rules, self._trainable)
        rows = batch_sharding(self._mesh, self._rules)
        self._jitted = jax.jit(
            run,
            in_shardings=(places, rows, None),
            out_shardings=(places, replicated(self._mesh)),
            donate_argnums=0,
        )


def _on_host(batch: Batch) -> bool:
    return not isinstance(batch.tokens, jax.Array)
