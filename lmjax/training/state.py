"""Everything that training changes, and where it lies on the mesh."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lmjax.errors import UserError
from lmjax.models.decoder import Variables
from lmjax.modules.adapted import CONSTANT
from lmjax.modules.quantizers import weights_in
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
      opt_state: the optimizer's state over the trainable leaves.
      rng: uint32 key data; the key of a step is this folded with the step, so nothing about randomness needs
        carrying.
      ema: exponential moving average of the trainable leaves, or None.
    """

    step: Any
    variables: Variables
    opt_state: Any
    rng: Any
    ema: Variables | None = None

    @property
    def averaged(self) -> Variables:
        """The variables with the moving average where one is kept."""
        return overlay(self.variables, self.ema)


def trainable_part(variables: Variables, trainable: Sequence[str]) -> Variables:
    """The leaves that are trained, in dicts like those of the variables.

    Args:
      variables: arrays, shapes, or whatever else lies at their leaves.
      trainable: names of collections, or patterns of paths: "params/*/bias", "params/layer_1[0-1]/*". What lies under
        "constant" is never trained.

    Raises:
      UserError: one of them names nothing that could be trained.

    >>> variables = {"params": {"mlp": {"kernel": 1.0, "bias": 2.0}}, "lora": {"mlp": {"a": 3.0, "constant": 4.0}}}
    >>> trainable_part(variables, ("params/*/bias", "lora"))
    {'params': {'mlp': {'bias': 2.0}}, 'lora': {'mlp': {'a': 3.0}}}
    """
    used: set[str] = set()

    def part(tree: Any, path: str) -> Any:
        if not isinstance(tree, dict):
            matching = {p for p in trainable if fnmatch.fnmatchcase(path, p) or path.startswith(f"{p}/")}
            used.update(matching)
            return tree if matching else None
        below = {
            name: part(sub, f"{path}/{name}" if path else name) for name, sub in tree.items() if name != CONSTANT
        }
        return {name: sub for name, sub in below.items() if sub is not None} or None

    found = part(variables, "") or {}
    if missing := [pattern for pattern in trainable if pattern not in used]:
        raise UserError(
            f"there is nothing to train under {missing[0]!r}; the variables hold {', '.join(variables)}."
        )
    return found


def overlay(variables: Variables, part: Variables | None) -> Variables:
    """The variables with the leaves of a part of them in place of their own."""
    if not part:
        return variables
    return {
        name: overlay(tree, part[name]) if isinstance(tree, dict) and name in part else part.get(name, tree)
        for name, tree in variables.items()
    }


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
      trainable: collections that are trained, or patterns of leaves. See `trainable_part`.
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

    def values(leaf: str, size: int) -> int:
        collection, *_, name = leaf.split("/")
        return weights_in(collection, name, size)

    return plan(mesh, variables, policy.logical_axes(variables), rules, units=policy.model.units, values=values)


def state_shardings(
    policy: Policy,
    shapes: TrainState,
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
    trainable: Sequence[str] = ("params",),
) -> TrainState:
    """The sharding of every leaf of a state."""
    variables = variables_plan(policy, shapes.variables, mesh, rules).shardings
    part, part_shardings = (trainable_part(tree, trainable) for tree in (shapes.variables, variables))
    return TrainState(
        step=replicated(mesh),
        variables=variables,
        opt_state=optimizer_shardings(mesh, shapes.opt_state, part, part_shardings),
        rng=replicated(mesh),
        ema=None if shapes.ema is None else part_shardings,
    )
