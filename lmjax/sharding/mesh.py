"""The mesh of devices, and batches on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax.errors import UserError
from lmjax.sharding.config import AXES, MeshShape
from lmjax.sharding.rules import DEFAULT_RULES, Rules, mesh_axes


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes data, fsdp, tensor over all devices, or over those given.

    One of the sizes may be -1 and takes the devices that are left. Neighbouring devices differ in `tensor`
    first, the axis that talks most.

    Raises:
      UserError: where the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = MeshShape(data, fsdp, tensor).resolve(len(devices))
    # Auto, said outright: newer jax makes Explicit axes by default, which type-check every operation.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """Rows split by the rule of "batch"; every other axis whole. For arrays [B, ...] of any rank."""
    axes = mesh_axes(rules, "batch")
    return NamedSharding(mesh, PartitionSpec(axes if axes else None))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(rows: int, mesh: Mesh, rules: Rules = DEFAULT_RULES, *, microbatches: int = 1) -> None:
    """Checks that a global batch splits into microbatches, and each of those over the devices.

    Raises:
      UserError: naming the batch, what it is split into, and the nearest sizes that fit.
    """
    if microbatches < 1:
        raise UserError(f"microbatches={microbatches} must be at least 1")
    if rows < 1 or rows % (_shares(mesh, rules) * microbatches):
        raise UserError(_uneven(rows, mesh, rules, microbatches))


def shard_batch(batch: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Puts a batch on the mesh: rows split over the batch axes, whole along tensor.

    Args:
      batch: any pytree of arrays [rows, ...], the rows of this process; scalars are replicated, None
        stays None.
      mesh: the mesh.
      rules: the rules, of which "batch" is read.

    Returns:
      The same tree of global arrays: the rows of all processes in the order of the mesh.

    Raises:
      UserError: where the rows of this process do not split over its devices.
    """
    rows_sharding, whole = batch_sharding(mesh, rules), replicated(mesh)
    shares = _shares(mesh.local_mesh, rules)

    def put(leaf: Any) -> jax.Array:
        sharding = rows_sharding if np.ndim(leaf) else whole
        if np.ndim(leaf) and np.shape(leaf)[0] % shares:
            raise UserError(_uneven(np.shape(leaf)[0], mesh.local_mesh, rules))
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(put, batch)


def _shares(mesh: Mesh, rules: Rules) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes(rules, "batch"))


def _uneven(rows: int, mesh: Mesh, rules: Rules, microbatches: int = 1) -> str:
    parts = {axis: mesh.shape[axis] for axis in mesh_axes(rules, "batch")}
    if microbatches > 1:
        parts["microbatches"] = microbatches
    split, whole = " × ".join(f"{name}={size}" for name, size in parts.items()), math.prod(parts.values())
    below = rows // whole * whole
    fitting = f"{below} or {below + whole}" if below else str(whole)
    mend = "a smaller mesh" + (" or fewer microbatches" if microbatches > 1 else "")
    return (
        f"a batch of {rows} rows does not split evenly over {split} = {whole}; use {fitting} rows, or {mend}"
    )
