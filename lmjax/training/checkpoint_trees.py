"""Between a state and what lies on disk: nested dicts keyed by the names in the tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.training.layers import names


def restore_tree(folder: Path, wanted: Any, partial: bool = False) -> Any:
    """Arrays by nested dict: onto the sharding of the wanted leaf where it has one, else to NumPy."""
    import orbax.checkpoint as ocp

    def how(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(how, wanted), partial_restore=partial)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder / "state", arguments)


def place(value: Any, target: Any) -> jax.Array:
    # may_alias=False: the step will donate this buffer, which must then not be NumPy's memory.
    return jax.device_put(value, getattr(target, "sharding", None), may_alias=False)


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def insert(tree: dict[str, Any], path: list[str], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def to_nested(tree: Any) -> dict[str, Any]:
    """A pytree as nested dicts keyed by the names in its paths: what lies on disk."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        insert(nested, list(names(path)), leaf)
    return nested


def in_order(nested: dict[str, Any], like: Any) -> list[Any]:
    """The leaves of `to_nested(like)` in the order of `like`."""
    leaves = []
    for path, _ in jax.tree_util.tree_leaves_with_path(like):
        node = nested
        for name in names(path):
            node = node[name]
        leaves.append(node)
    return leaves


def signature(nested: dict[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(nested)
    return {"/".join(names(path)): [str(np.dtype(leaf.dtype)), list(leaf.shape)] for path, leaf in leaves}
