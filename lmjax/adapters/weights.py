"""The weights under the adapters: read in full precision whatever they are kept in, and replaced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmjax.adapters.targets import Variables, at
from lmjax.modules.quantized import KINDS


def kernel_of(variables: Variables, path: str) -> jax.Array:
    """The kernel [in, out] of a linear layer; float32 if it is kept quantized."""
    names = path.split("/")
    for kind, make in KINDS.items():
        own = at(variables.get(kind), names)
        if own is not None:
            return make(**own).dense(jnp.dtype("float32")).T
    kernel: jax.Array = at(variables["params"], names)["kernel"]
    return kernel


def replaced(variables: Variables, changes: dict[str, Any]) -> Variables:
    """Variables with other leaves in some layers; a new kernel takes the place of a quantized one.

    Args:
      variables: layers side by side.
      changes: path of a layer -> its new entries, {"kernel": ..., "bias": ...}.
    """
    changed = dict(variables)
    for path, entries in changes.items():
        names = path.split("/")
        if "kernel" in entries:
            for kind in set(KINDS) & set(changed):
                changed[kind] = _without(changed[kind], names)
                if not changed[kind]:
                    del changed[kind]
        changed["params"] = _updated(changed.get("params", {}), names, entries)
    return changed


def _updated(tree: Variables, names: list[str], entries: dict[str, Any]) -> Variables:
    if not names:
        return tree | entries
    return tree | {names[0]: _updated(tree.get(names[0], {}), names[1:], entries)}


def _without(tree: Variables, names: list[str]) -> Variables:
    if names[0] not in tree:
        return tree
    below = _without(tree[names[0]], names[1:]) if len(names) > 1 else {}
    rest = {name: sub for name, sub in tree.items() if name != names[0]}
    return rest | {names[0]: below} if below else rest
