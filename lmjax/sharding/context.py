"""The mesh a computation is being traced for, so that models can pin their activations without knowing it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.sharding.rules import DEFAULT_RULES, Rules, mesh_axes

_current: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def tracing_for(mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Within it, `constrain` pins activations to this mesh."""
    token = _current.set(None if mesh is None else (mesh, rules))
    try:
        yield
    finally:
        _current.reset(token)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins an activation's sharding by the logical names of its axes; without a mesh, x itself.

    The compiler would otherwise be free to carry a parameter's sharding over into activations: an embedding
    table cut along its width makes it cut every activation along the width, and gather the batch.
    """
    current = _current.get()
    if current is None:
        return x
    mesh, rules = current
    spec = PartitionSpec(*(mesh_axes(rules, axis) or None for axis in axes))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
