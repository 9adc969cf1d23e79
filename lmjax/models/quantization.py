"""Kernels of a model replaced by weights in 4 or 8 bits, one at a time, wherever they come from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lmjax.errors import UserError
from lmjax.models import layout
from lmjax.models.patterns import Patterns, matches
from lmjax.modules.quantized import BLOCK, KINDS, Quantized
from lmjax.modules.quantizers import quantize_weight, quantized_shapes

Variables = dict[str, Any]
Path = tuple[str, ...]


def quantize_kernels(
    params: Variables, kind: str, targets: Patterns, make: Callable[[Path, Any], Quantized]
) -> Variables:
    """`{"params": ..., kind: ...}` with the kernels of the layers that match left out of the first.

    Args:
      params: parameters or their shapes, layers side by side or stacked.
      kind: "nf4" or "int8".
      targets: patterns of the layers' paths.
      make: from a kernel's path and leaf to its quantized weight; called for one after the other.

    Raises:
      UserError: an unknown kind; a pattern that matches nothing, or some of stacked layers only; for nf4, a layer whose
        input is no multiple of 64. All before the first call of `make`.
    """
    chosen = _choose(params, kind, targets)
    rest = _without(params, set(chosen))
    own: Variables = {}
    for path, leaf in chosen.items():
        node = own
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node.update(make(path, leaf)._asdict())
    return {"params": rest, kind: own}


def quantize_leaf(shape: tuple[int, ...], kind: str, read: Callable[[int | None], np.ndarray]) -> Quantized:
    """The quantized weight of a kernel of this shape, or of stacked ones, of which one is read at a time.

    Args:
      shape: [in, out], or [layers, in, out].
      kind: "nf4" or "int8".
      read: the number of a layer, None for a kernel alone -> its weight [in, out].
    """
    if len(shape) == 2:
        return quantize_weight(read(None).T, kind)
    stacked = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes_of_leaf(shape, kind))
    for layer in range(shape[0]):
        for all_layers, one in zip(stacked, quantize_weight(read(layer).T, kind), strict=True):
            all_layers[layer] = one
    return stacked


def shapes_of_leaf(shape: tuple[int, ...], kind: str) -> Quantized:
    """The shapes of `quantize_leaf`'s result."""
    *layers, into, out = shape
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*layers, *leaf.shape), leaf.dtype), quantized_shapes(out, into, kind)
    )


def quantized_variable_shapes(shapes: Variables, kind: str, targets: Patterns = "*") -> Variables:
    """The shapes of a model's variables once the kernels that match are quantized. Computes nothing.

    Args:
      shapes: of the variables, as `jax.eval_shape(policy.init, key)` gives them.
      kind, targets: as in `lmjax.adapters.quantize`.
    """
    make = lambda path, leaf: shapes_of_leaf(leaf.shape, kind)
    return shapes | quantize_kernels(shapes["params"], kind, targets, make)


def _choose(params: Variables, kind: str, targets: Patterns) -> dict[Path, Any]:
    if kind not in KINDS:
        raise UserError(f"the kind of quantization is {kind!r}; choose one of {', '.join(KINDS)}.")
    kernels: dict[Path, tuple[Any, list[str]]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(entry.key for entry in key_path)
        if path[-1] == "kernel":
            layer = "/".join(path[:-1])
            count = leaf.shape[0] if path[0] == layout.STACKED else None
            short = layer.removeprefix(layout.STACKED)
            kernels[path] = leaf, [layer] if count is None else [layout.layer_name(i) + short for i in range(count)]
    for pattern in [targets] if isinstance(targets, str) else targets:
        if not any(matches(name, pattern) for _, names in kernels.values() for name in names):
            known = sorted({re.sub(r"^layer_\d+/", "", name) for _, names in kernels.values() for name in names})
            raise UserError(
                f"the target {pattern!r} matches no linear layer that has a kernel; "
                + (f"there are {', '.join(known)}." if known else "all are quantized already.")
            )
    chosen: dict[Path, Any] = {}
    for path, (leaf, names) in kernels.items():
        picked = [name for name in names if matches(name, targets)]
        if not picked:
            continue
        if len(picked) < len(names):
            raise UserError(
                f"the targets choose {picked[0]} and not {next(n for n in names if n not in picked)}, but stacked "
                "layers are quantized alike; set layers='unrolled' in the model's config, or choose all of them."
            )
        if kind == "nf4" and leaf.shape[-2] % BLOCK:
            raise UserError(
                f"{picked[0]} has {leaf.shape[-2]} inputs, no multiple of the {BLOCK} that share a scale in nf4; "
                "leave it out through the targets, or use int8."
            )
        chosen[path] = leaf
    return chosen


def _without(tree: Variables, paths: set[Path], above: Path = ()) -> Variables:
    kept: Variables = {}
    for name, sub in tree.items():
        path = (*above, name)
        if isinstance(sub, dict):
            if below := _without(sub, paths, path):
                kept[name] = below
        elif path not in paths:
            kept[name] = sub
    return kept
