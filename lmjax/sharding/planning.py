"""The plan: which device holds which part of every leaf, checked before anything compiles, and printable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.errors import UserError
from lmjax.sharding.rules import DEFAULT_RULES, MeshAxes, Rules, mesh_axes

# What may stay whole when there are fewer of them than devices: several query heads then read the same one.
_REPLICABLE = ("kv_heads",)
_UNIT_NAMES = {"heads": "query heads", "kv_heads": "key/value heads"}


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One leaf: its path, shape, dtype, logical axes, partition spec, and the bytes of it on each device.

    `values` is how many numbers of the model it holds: its size, unless several are packed into one element, or it
    holds what unpacking them takes.
    """

    leaf: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    spec: PartitionSpec
    bytes_per_device: int
    total_bytes: int
    values: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every leaf of a tree of variables lies.

    Attributes:
      mesh: the mesh.
      rules: the rules as applied (an axis that had to stay whole maps to None here).
      shardings: the tree, with a NamedSharding for each leaf.
      rows: one `LeafPlan` a leaf.
      notes: what the plan decided that a reader may not expect, one sentence each.
    """

    mesh: Mesh
    rules: tuple[tuple[str, MeshAxes], ...]
    shardings: Any
    rows: tuple[LeafPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        return sum(row.values for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        return sum(row.bytes_per_device for row in self.rows)

    @property
    def total_bytes(self) -> int:
        return sum(row.total_bytes for row in self.rows)

    def table(self) -> str:
        """The plan as text: a line a leaf, then the totals and the notes."""
        head = ("leaf", "shape", "dtype", "logical axes", "spec", "bytes a device")
        lines = [
            (
                row.leaf,
                _tuple(row.shape),
                row.dtype,
                _tuple(row.axes),
                _tuple(row.spec),
                f"{row.bytes_per_device:,}",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines)]
        text = []
        for line in (head, tuple("-" * width for width in widths), *lines):
            cells = [cell.ljust(width) for cell, width in zip(line[:-1], widths)]
            text.append("  ".join((*cells, line[-1].rjust(widths[-1]))))
        mesh = " × ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        text.append(
            f"mesh {mesh}: {self.num_parameters:,} values, {self.total_bytes:,} bytes in all, "
            f"{self.bytes_per_device:,} bytes a device"
        )
        text += self._packed()
        return "\n".join((*text, *(f"note: {note}" for note in self.notes)))

    def _packed(self) -> list[str]:
        """A line for each collection of packed numbers, and one for all."""
        packed = {row.leaf.partition("/")[0] for row in self.rows if row.values != math.prod(row.shape)}
        if not packed:
            return []
        groups = {name: [row for row in self.rows if row.leaf.startswith(f"{name}/")] for name in sorted(packed)}
        groups["all"] = list(self.rows)
        lines = []
        for name, rows in groups.items():
            values, size = sum(row.values for row in rows), sum(row.total_bytes for row in rows)
            lines.append(f"{name}: {values:,} values in {size:,} bytes, {8 * size / values:.3f} bits a value")
        return lines


def plan(
    mesh: Mesh,
    shapes: Any,
    logical_axes: Any,
    rules: Rules = DEFAULT_RULES,
    *,
    units: Mapping[str, int] | None = None,
    values: Callable[[str, int], int] = lambda leaf, size: size,
) -> Plan:
    """Resolves logical axes to shardings, and refuses what would not fit.

    Args:
      mesh: the mesh.
      shapes: nested dict whose leaves have `.shape` and `.dtype` (arrays, or the output of `jax.eval_shape`).
      logical_axes: the same dict with, for each leaf, a tuple of one logical axis name (or None) a dimension.
      rules: the table from logical axes to mesh axes.
      units: for a logical axis whose dimension holds several units side by side, how many: a projection to
        `heads` is [embed, heads · head width], and the heads are what must divide. Key/value heads fewer than
        the devices of their mesh axis are replicated when they divide it, and the plan notes it.
      values: from a leaf's path and size to how many numbers of the model it holds, where they are packed.

    Raises:
      UserError: a leaf without axes or axes without a leaf; an axis that no rule names; a rule that names no
        mesh axis; one mesh axis for two dimensions of a leaf; a size or a number of heads that does not
        divide.
    """
    for name, _ in rules:
        for axis in mesh_axes(rules, name):
            if axis not in mesh.shape:
                known = ", ".join(mesh.shape)
                raise UserError(f"the rule of {name!r} names mesh axis {axis!r}; the mesh has {known}")
    rules, notes = _fit_units(mesh, tuple((name, target) for name, target in rules), units or {})
    rows: list[LeafPlan] = []

    def resolve(path: tuple[str, ...], shape: Any, axes: Any) -> Any:
        if isinstance(shape, Mapping):
            _check_keys(path, shape, axes)
            return {key: resolve((*path, str(key)), shape[key], axes[key]) for key in shape}
        leaf = "/".join(path)
        spec = _spec(mesh, rules, leaf, tuple(shape.shape), axes, units or {})
        sharding = NamedSharding(mesh, spec)
        dtype = np.dtype(shape.dtype)
        local = math.prod(sharding.shard_shape(tuple(shape.shape))) * dtype.itemsize
        whole = math.prod(shape.shape) * dtype.itemsize
        held = values(leaf, math.prod(shape.shape))
        rows.append(LeafPlan(leaf, tuple(shape.shape), dtype.name, tuple(axes), spec, local, whole, held))
        return sharding

    shardings = resolve((), shapes, logical_axes)
    return Plan(mesh, rules, shardings, tuple(rows), notes)


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """The bytes that one device holds of a tree of shapes under a tree of shardings of the same structure."""
    sizes = jax.tree.map(
        lambda leaf, sharding: (
            math.prod(sharding.shard_shape(tuple(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        ),
        shapes,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def _fit_units(
    mesh: Mesh, rules: tuple[tuple[str, MeshAxes], ...], units: Mapping[str, int]
) -> tuple[tuple[tuple[str, MeshAxes], ...], tuple[str, ...]]:
    """Replicates what may be and must be; refuses the rest."""
    notes = []
    for name, count in units.items():
        axes = mesh_axes(rules, name)
        size = math.prod(mesh.shape[axis] for axis in axes)
        if count % size == 0:
            continue
        words, on = _UNIT_NAMES.get(name, name), "×".join(axes)
        if name in _REPLICABLE and size % count == 0:
            rules = tuple((known, None if known == name else target) for known, target in rules)
            notes.append(f"{count} {words} are fewer than {on}={size}: each device holds all of them")
            continue
        raise UserError(
            f"{count} {words} do not divide over the mesh axis {on}={size}; use a mesh whose {on} divides "
            f"{count}, or a model with {_fitting(count, size)} {words}"
        )
    return rules, tuple(notes)


def _spec(
    mesh: Mesh, rules: Rules, leaf: str, shape: tuple[int, ...], axes: Any, units: Mapping[str, int]
) -> PartitionSpec:
    if not isinstance(axes, tuple):
        raise UserError(
            f"the logical axes of {leaf} are {axes!r}; give a tuple, one name or None a dimension"
        )
    if len(axes) != len(shape):
        raise UserError(f"{leaf} has shape {shape} and logical axes {axes}; give one name a dimension")
    taken: dict[str, str | None] = {}
    entries: list[MeshAxes] = []
    for size, axis in zip(shape, axes):
        targets = mesh_axes(rules, axis, leaf)
        for target in targets:
            if target in taken:
                raise UserError(
                    f"{leaf} with logical axes {axes} would be split twice over the mesh axis {target!r}, by "
                    f"{taken[target]!r} and by {axis!r}; let one of the two rules be None"
                )
            taken[target] = axis
        ways = math.prod(mesh.shape[target] for target in targets)
        if size % ways:
            on = "×".join(targets)
            raise UserError(
                f"{leaf} of shape {shape}: its {axis!r} size {size} does not divide over the mesh axis "
                f"{on}={ways}; use a mesh whose {on} divides {size}, "
                f"or a model with {axis} {_fitting(size, ways)}"
            )
        entries.append(targets[0] if len(targets) == 1 else targets or None)
    return PartitionSpec(*entries)


def _check_keys(path: tuple[str, ...], shapes: Mapping, axes: Any) -> None:
    where = "/".join(path) or "the tree"
    if not isinstance(axes, Mapping):
        raise UserError(
            f"{where} is a dict of arrays, its logical axes are {axes!r}; give a dict of the same keys"
        )
    for key in shapes:
        if key not in axes:
            leaf = "/".join((*path, str(key)))
            raise UserError(f"{leaf} has no logical axes; give a tuple with one name or None a dimension")
    for key in axes:
        if key not in shapes:
            raise UserError(
                f"the logical axes name {'/'.join((*path, str(key)))}, which is not among the variables"
            )


def _fitting(size: int, ways: int) -> str:
    """The multiples of `ways` around a size that is none, in words."""
    below = size // ways * ways
    return f"{below} or {below + ways}" if below else str(ways)


def _tuple(values: Any) -> str:
    return "(" + ", ".join("×".join(v) if isinstance(v, tuple) else str(v) for v in values) + ")"
