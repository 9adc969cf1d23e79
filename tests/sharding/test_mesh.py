from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lmjax import sharding
from lmjax.batch import next_token_batch
from lmjax.errors import UserError


def test_axes_are_named_auto_and_sized(mesh):
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.size == 8
    assert {device.id for device in mesh.devices.flat} == set(range(8))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 1, -1), (1, 1, 8)), ((2, 4, -1), (2, 4, 1))],
)
def test_minus_one_fills(sizes, expected):
    assert tuple(sharding.make_mesh(*sizes).shape.values()) == expected


def test_a_mesh_of_some_devices():
    mesh = sharding.make_mesh(tensor=2, devices=jax.devices()[4:6])
    assert [device.id for device in mesh.devices.flat] == [4, 5]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((2, 2, 1), ["data=2 × fsdp=2 × tensor=1", "needs 4 devices", "here are 8"]),
        ((3, -1, 1), ["data=3", "8 devices", "multiple of 3"]),
        ((-1, -1, 1), ["only one", "data=-1 × fsdp=-1"]),
        ((0, 1, 1), ["data=0", "at least 1"]),
    ],
)
def test_sizes_that_do_not_fit(sizes, words):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(*sizes)
    for word in words:
        assert word in str(error.value)


def test_mesh_shape_is_free_of_jax():
    code = "import sys, lmjax.sharding as s; s.MeshShape(2, -1).resolve(4); print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_batches_are_split_by_rows_and_come_back_equal(mesh):
    batch = next_token_batch(np.arange(16 * 5).reshape(16, 5))
    placed = sharding.shard_batch({"text": batch, "count": np.int32(3)}, mesh)
    assert placed["count"].sharding.is_fully_replicated
    assert placed["text"].temperature is None
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for field in dataclasses.fields(batch):
        host, device = getattr(batch, field.name), getattr(placed["text"], field.name)
        if host is None:
            continue
        assert device.sharding.is_equivalent_to(sharding.batch_sharding(mesh), device.ndim)
        assert device.sharding.shard_shape(device.shape) == (16 // ways, 4)
        np.testing.assert_array_equal(np.asarray(device), host)


def test_device_arrays_are_moved_to_the_mesh(mesh):
    placed = sharding.shard_batch(jnp.arange(8), mesh)
    assert placed.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 1)
    np.testing.assert_array_equal(np.asarray(placed), np.arange(8))


def test_a_batch_that_does_not_split(make_test_mesh):
    mesh = make_test_mesh((2, 4, 1))
    with pytest.raises(UserError, match=r"batch of 12 rows .* data=2 × fsdp=4 = 8; use 8 or 16 rows"):
        sharding.shard_batch(np.zeros((12, 3)), mesh)
    with pytest.raises(UserError, match=r"batch of 12 rows .* data=2 × fsdp=4 = 8; use 8 or 16 rows"):
        sharding.check_batch_size(12, mesh)
    with pytest.raises(UserError, match=r"8 rows .* microbatches=4 = 32; use 32 rows.*fewer microbatches"):
        sharding.check_batch_size(8, mesh, microbatches=4)
    with pytest.raises(UserError, match="microbatches=0"):
        sharding.check_batch_size(8, mesh, microbatches=0)
    sharding.check_batch_size(64, mesh, microbatches=4)


def test_the_batch_rule_is_read():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    rules = (("batch", "data"),)
    assert sharding.batch_sharding(mesh, rules).spec == P(("data",))
    sharding.check_batch_size(2, mesh, rules)
    assert sharding.batch_sharding(mesh, (("batch", None),)).is_fully_replicated
