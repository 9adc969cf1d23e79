"""Layers side by side or stacked: two layouts of the same arrays.

An unrolled model keeps `layer_0`, `layer_1`, ...; a scanned one keeps `layers`, whose leaves have a leading layer
axis. Files always hold the first, so that a checkpoint does not depend on how its model was run.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError

STACKED = "layers"


def layer_name(index: int) -> str:
    return f"layer_{index}"


def unstack_layers(tree: Any) -> Any:
    """Every `layers` entry of every dict in the tree becomes `layer_0`, `layer_1`, ... Other pytree nodes are kept.

    Works on parameters, on optimizer states that mirror them, and on trees of `jax.ShapeDtypeStruct`.
    """
    return _rewrite(tree, _unstack_entry)


def stack_layers(tree: Any) -> Any:
    """The inverse of `unstack_layers`."""
    return _rewrite(tree, _stack_entries)


def stack_adapter(name: str, tree: Any, count: int) -> Any:
    """`stack_layers` of an adapter's collection, whose layers may differ. One without layers is left as it is.

    Args:
      name: the collection's, for the message.
      tree: the collection.
      count: how many layers the model has.

    Raises:
      UserError: a layer has none, or one of another shape.
    """
    layers = {key: sub for key, sub in tree.items() if re.fullmatch(r"layer_\d+", key)}
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), sub) for sub in layers.values()]
    if layers and (len(layers) != count or any(shape != shapes[0] for shape in shapes)):
        raise UserError(
            f"the {name} adapter differs from layer to layer, which stacked layers cannot hold; "
            "set layers='unrolled' in the model's config, or adapt every layer alike."
        )
    return stack_layers(tree)


def _rewrite(tree: Any, rewrite_dict: Any) -> Any:
    """Applies `rewrite_dict` to the outermost dicts of a tree, through any pytree nodes around them."""

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
            return rewrite_dict({key: visit(value) for key, value in node.items()})
        return node

    return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, dict))


def _unstack_entry(entries: dict[str, Any]) -> dict[str, Any]:
    if STACKED not in entries:
        return entries
    leaves = jax.tree.leaves(entries[STACKED])
    if not leaves:  # an optimizer that keeps nothing for the layers, only None
        return entries
    count = leaves[0].shape[0]
    stacked = entries.pop(STACKED)
    for index in range(count):
        entries[layer_name(index)] = jax.tree.map(lambda leaf, index=index: _take(leaf, index), stacked)
    return entries


def _stack_entries(entries: dict[str, Any]) -> dict[str, Any]:
    names = [key for key in entries if re.fullmatch(r"layer_\d+", key)]
    if not names:
        return entries
    layers = [entries.pop(layer_name(index)) for index in range(len(names))]
    entries[STACKED] = jax.tree.map(_stack, *layers)
    return entries


def _take(leaf: Any, index: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[index]


def _stack(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)
