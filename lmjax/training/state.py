"""Everything that training changes, and where it lies on the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lmjax.errors import UserError
from lmjax.models.decoder import Variables
from lmjax.policy import Policy
from lmjax.sharding.mesh import replicated
from lmjax.sharding.planning import Plan, plan
from lmjax.sharding.rules import DEFAULT_RULES, Rules
from lmjax.sharding.state import optimizer_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run, except for the position in its data.

    Attributes:
      step: int32 [], the number of batches consumed, those whose update was skipped too.
      variables: every collection of the policy.
      opt_state: the optimizer's state over the trainable collections.
      rng: uint32 key data; the key of a step is this folded with the step, so nothing about randomness needs
        carrying.
      ema: exponential moving average of the trainable collections, or None.
    """

    step: Any
    variables: Variables
    opt_state: Any
    rng: Any
    ema: Variables | None = None


def trainable_part(variables: Variables, trainable: Sequence[str]) -> Variables:
    """The collections that are trained.

    Raises:
      UserError: one of them is not there.
    """
    if missing := [name for name in trainable if name not in variables]:
        raise UserError(
            f"there is no collection {missing[0]!r} to train; the variables hold {', '.join(variables)}."
        )
    return {name: variables[name] for name in trainable}


def new_state(
    variables: Variables,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    trainable: Sequence[str] = ("params",),
    ema: bool = False,
) -> TrainState:
    """The state at step 0 of training these variables. Pure; `key` seeds dropout and the like."""
    part = trainable_part(variables, trainable)
    average = jax.tree.map(jnp.copy, part) if ema else None
    return TrainState(
        jnp.zeros((), jnp.int32), variables, optimizer.init(part), jax.random.key_data(key), average
    )


def init_state(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    trainable: Sequence[str] = ("params",),
    ema: bool = False,
    variables: Variables | None = None,
) -> TrainState:
    """The state at step 0, each array created where it belongs on the mesh.

    Args:
      policy: the model.
      optimizer: any optax transformation.
      key: seeds the parameters and the run.
      mesh, rules: where arrays lie; None: on the default device.
      trainable: collections that are trained.
      ema: whether a moving average is kept.
      variables: start from these (a loaded checkpoint) instead of fresh ones.
    """
    init_key, run_key = jax.random.split(key)

    def fresh() -> TrainState:
        return new_state(policy.model.init(init_key), optimizer, run_key, trainable=trainable, ema=ema)

    def given(variables: Variables) -> TrainState:
        return new_state(variables, optimizer, run_key, trainable=trainable, ema=ema)

    make = fresh if variables is None else given
    arguments = () if variables is None else (variables,)
    if mesh is None:
        return jax.jit(make)(*arguments)
    shapes = jax.eval_shape(make, *arguments)
    return jax.jit(make, out_shardings=state_shardings(policy, shapes, mesh, rules, trainable))(*arguments)


def variables_plan(policy: Policy, variables: Variables, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Plan:
    """Where each of the variables (arrays or shapes) lies."""
    return plan(mesh, variables, policy.logical_axes(variables), rules, units=policy.model.units)


def state_shardings(
    policy: Policy,
    shapes: TrainState,
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
    trainable: Sequence[str] = ("params",),
) -> TrainState:
    """The sharding of every leaf of a state."""
    variables = variables_plan(policy, shapes.variables, mesh, rules).shardings
    part = {name: shapes.variables[name] for name in trainable}
    part_shardings = {name: variables[name] for name in trainable}
    return TrainState(
        step=replicated(mesh),
        variables=variables,
        opt_state=optimizer_shardings(mesh, shapes.opt_state, part, part_shardings),
        rng=replicated(mesh),
        ema=None if shapes.ema is None else part_shardings,
    )
