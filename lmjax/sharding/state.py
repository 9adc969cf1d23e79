"""Where the state of an optimizer lies: beside the parameters it belongs to."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from lmjax.sharding.mesh import replicated


def optimizer_shardings(mesh: Mesh, opt_state_shapes: Any, param_shapes: Any, param_shardings: Any) -> Any:
    """The shardings of an optimizer's state, whatever optax transformations it is made of.

    A leaf of the state whose path ends with the path of a parameter, and whose shape is that parameter's, is
    a moment of it and takes its sharding. Every other leaf (counts, Adafactor's row and column statistics,
    scales) is replicated: those are small.

    Args:
      mesh: the mesh.
      opt_state_shapes: the state, or `jax.eval_shape(optimizer.init, params)`.
      param_shapes: the tree that `optimizer.init` was given, or its shapes.
      param_shardings: the same tree of shardings.

    Returns:
      A tree like `opt_state_shapes` with a sharding for each leaf.
    """
    shapes = jax.tree_util.tree_leaves_with_path(param_shapes)
    shardings = jax.tree.leaves(param_shardings)
    parameters = {_names(path): (tuple(leaf.shape), place) for (path, leaf), place in zip(shapes, shardings)}
    elsewhere = replicated(mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        names = _names(path)
        for start in range(len(names) + 1):  # the longest ending first
            shape, sharding = parameters.get(names[start:], (None, elsewhere))
            if shape == tuple(leaf.shape):
                return sharding
        return elsewhere

    return jax.tree_util.tree_map_with_path(place, opt_state_shapes)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Path entries (dict keys, attributes, positions) as plain strings."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
