"""A reference that follows its policy (TR-DPO, arXiv:2404.09656): a second copy of what is trained, and no more.

    state = init_state(policy, optimizer, key, variables=with_reference(variables, trainable), trainable=trainable)
    step = make_step(policy, objective, optimizer, trainable=trainable, roles={"reference": reference_of})
    step = Following(step, every=512, rate=0.6)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.models.decoder import Variables
from lmjax.training.state import TrainState, overlay, trainable_part

COLLECTION = "reference"


def with_reference(variables: Variables, trainable: Sequence[str]) -> Variables:
    """The variables with a copy of what is trained, as it is now, in the collection "reference"."""
    return variables | {COLLECTION: jax.tree.map(jnp.copy, trainable_part(variables, trainable))}


def reference_of(variables: Variables) -> Variables:
    """The reference's variables: the policy's, with the copy in place of what is trained."""
    rest = {name: tree for name, tree in variables.items() if name != COLLECTION}
    return overlay(rest, variables[COLLECTION])


class Following:
    """A step after which, every so many times, the reference moves towards the policy.

    `reference <- rate policy + (1 - rate) reference`. A rate of 1 is a hard update; every step with a small rate, a
    moving average.

    Args:
      step: from `make_step`, over variables from `with_reference`.
      every: steps from one move to the next.
      rate: from 0 to 1.
    """

    def __init__(self, step: Any, every: int = 512, rate: float = 0.6):
        if every < 1 or not 0 < rate <= 1:
            raise UserError(f"the reference moves every {every} steps at a rate of {rate}; give 1 or more, and 0 to 1.")
        self._step, self._every, self._rate = step, every, rate
        self._made: int | None = None  # steps so far; the state has them too, but reading it would wait for the device
        self._move = jax.jit(self._moved, donate_argnums=0)

    def __call__(self, state: TrainState, batches: Any) -> tuple[TrainState, Any]:
        before = int(state.step) if self._made is None else self._made
        state, metrics = self._step(state, batches)
        self._made = before + 1
        if self._made % self._every == 0:
            state = dataclasses.replace(state, variables=self._move(state.variables))
        return state, metrics

    def _moved(self, variables: Variables) -> Variables:
        old = variables[COLLECTION]
        moved = jax.tree.map(lambda r, p: self._rate * p + (1 - self._rate) * r, old, _like(variables, old))
        return variables | {COLLECTION: moved}


def _like(tree: Any, pattern: Any) -> Any:
    """The leaves of a tree that another, smaller one has."""
    if not isinstance(pattern, dict):
        return tree
    return {name: _like(tree[name], sub) for name, sub in pattern.items()}
