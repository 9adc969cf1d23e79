from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax import sharding
from lmjax.errors import UserError

LAYERS, EMBED, HEADS, KV_HEADS, WIDTH, MLP, VOCAB = 2, 16, 8, 8, 4, 32, 64


def _leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes(kv_heads=KV_HEADS):
    return {
        "params": {
            "embed": {"embedding": _leaf(VOCAB, EMBED)},
            "layers": {
                "attention_norm": {"scale": _leaf(LAYERS, EMBED)},
                "attention": {
                    "query": {
                        "kernel": _leaf(LAYERS, EMBED, HEADS * WIDTH),
                        "bias": _leaf(LAYERS, HEADS * WIDTH),
                    },
                    "key": {"kernel": _leaf(LAYERS, EMBED, kv_heads * WIDTH, dtype=jnp.bfloat16)},
                    "output": {"kernel": _leaf(LAYERS, HEADS * WIDTH, EMBED)},
                },
                "mlp": {"up": {"kernel": _leaf(LAYERS, EMBED, MLP)}},
            },
        }
    }


AXES = {
    "params": {
        "embed": {"embedding": ("vocab", "embed")},
        "layers": {
            "attention_norm": {"scale": ("layers", "norm")},
            "attention": {
                "query": {"kernel": ("layers", "embed", "heads"), "bias": ("layers", "heads")},
                "key": {"kernel": ("layers", "embed", "kv_heads")},
                "output": {"kernel": ("layers", "heads", "embed")},
            },
            "mlp": {"up": {"kernel": ("layers", "embed", "mlp")}},
        },
    }
}
UNITS = {"heads": HEADS, "kv_heads": KV_HEADS}


def _place(shapes, shardings):
    return jax.tree.map(
        lambda leaf, place: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), place), shapes, shardings
    )


def test_specs_follow_the_rules(mesh):
    shardings = sharding.plan(mesh, _shapes(), AXES, units=UNITS).shardings["params"]
    layers = shardings["layers"]
    assert shardings["embed"]["embedding"].spec == P("tensor", "fsdp")
    assert layers["attention_norm"]["scale"].spec == P(None, None)
    assert layers["attention"]["query"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert layers["attention"]["query"]["bias"].spec == P(None, "tensor")
    assert layers["attention"]["output"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert layers["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")


def test_bytes_are_those_that_the_devices_hold(mesh):
    shapes = _shapes()
    plan = sharding.plan(mesh, shapes, AXES, units=UNITS)
    arrays = jax.tree.leaves(_place(shapes, plan.shardings))
    held = {device: 0 for device in mesh.devices.flat}
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {plan.bytes_per_device}
    assert plan.total_bytes == sum(array.nbytes for array in arrays)
    assert plan.num_parameters == sum(array.size for array in arrays)
    assert sharding.bytes_per_device(shapes, plan.shardings) == plan.bytes_per_device


def test_bytes_by_hand(make_test_mesh):
    shapes, axes = (
        {"a": _leaf(64, 16), "b": _leaf(16, dtype=jnp.bfloat16)},
        {"a": ("vocab", "embed"), "b": ("norm",)},
    )
    plan = sharding.plan(make_test_mesh((2, 2, 2)), shapes, axes)
    assert plan.bytes_per_device == 64 * 16 * 4 // 4 + 32
    assert plan.total_bytes == 64 * 16 * 4 + 32


def test_table_prints_every_leaf_and_the_totals(make_test_mesh):
    plan = sharding.plan(make_test_mesh((2, 2, 2)), _shapes(), AXES, units=UNITS)
    lines = plan.table().splitlines()
    line = next(line for line in lines if line.startswith("params/layers/attention/query/kernel"))
    assert line.split("  ")[-1].strip() == f"{LAYERS * EMBED * HEADS * WIDTH * 4 // 4:,}"
    for part in ("(2, 16, 32)", "float32", "(layers, embed, heads)", "(None, fsdp, tensor)"):
        assert part in line
    assert len(lines) == 2 + len(plan.rows) + 1
    assert "data=2 × fsdp=2 × tensor=2" in lines[-1]
    assert f"{plan.bytes_per_device:,} bytes a device" in lines[-1]
    assert f"{plan.total_bytes:,} bytes in all" in lines[-1]


def test_few_key_value_heads_are_replicated_and_said(make_test_mesh):
    plan = sharding.plan(make_test_mesh((1, 1, 8)), _shapes(2), AXES, units={"heads": 8, "kv_heads": 2})
    key = plan.shardings["params"]["layers"]["attention"]["key"]["kernel"]
    assert key.spec == P(None, "fsdp", None)
    assert plan.shardings["params"]["layers"]["attention"]["query"]["kernel"].spec == P(
        None, "fsdp", "tensor"
    )
    assert dict(plan.rules)["kv_heads"] is None
    assert plan.notes == ("2 key/value heads are fewer than tensor=8: each device holds all of them",)
    assert "note: 2 key/value heads" in plan.table()


def test_key_value_heads_that_divide_are_split(make_test_mesh):
    plan = sharding.plan(make_test_mesh((2, 2, 2)), _shapes(2), AXES, units={"heads": 8, "kv_heads": 2})
    assert plan.shardings["params"]["layers"]["attention"]["key"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("units", "words"),
    [
        ({"heads": 6}, ["6 query heads", "tensor=8", "a model with 8 query heads"]),
        ({"heads": 12}, ["12 query heads", "tensor=8", "8 or 16"]),
        ({"heads": 8, "kv_heads": 3}, ["3 key/value heads", "tensor=8"]),
    ],
)
def test_heads_that_do_not_divide(make_test_mesh, units, words):
    # The widths divide (heads × head width = 32 here): only the number of heads tells.
    with pytest.raises(UserError) as error:
        sharding.plan(make_test_mesh((1, 1, 8)), _shapes(), AXES, units=units)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("shape", "axes", "words"),
    [
        ((65, 16), ("vocab", "embed"), ["a/w", "'vocab' size 65", "tensor=2", "64 or 66"]),
        ((64, 15), ("vocab", "embed"), ["a/w", "'embed' size 15", "fsdp=2"]),
        ((64, 16), ("vocab", "width"), ["a/w", "no sharding rule", "'width'", "embed"]),
        ((64, 16), ("vocab",), ["a/w", "(64, 16)", "('vocab',)"]),
        ((64, 16), ("embed", "embed"), ["a/w", "twice", "'fsdp'"]),
        ((64, 16), ("vocab", "mlp"), ["a/w", "twice", "'tensor'", "'vocab'", "'mlp'"]),
        ((64, 16), "vocab", ["a/w", "tuple"]),
        ((64, 16), None, ["a/w", "tuple"]),
    ],
)
def test_leaves_that_cannot_be_placed(make_test_mesh, shape, axes, words):
    with pytest.raises(UserError) as error:
        sharding.plan(make_test_mesh((2, 2, 2)), {"a": {"w": _leaf(*shape)}}, {"a": {"w": axes}})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"a": {}}, "a/w has no logical axes"),
        ({"a": {"w": ("norm",), "v": ("norm",)}}, "name a/v, which is not among"),
        ({"a": ("norm",)}, "a is a dict"),
        ({}, "a has no logical axes"),
    ],
)
def test_trees_that_differ(one_device_mesh, axes, words):
    with pytest.raises(UserError, match=words):
        sharding.plan(one_device_mesh, {"a": {"w": _leaf(4)}}, axes)


def test_a_rule_for_an_axis_the_mesh_has_not(one_device_mesh):
    with pytest.raises(UserError, match=r"rule of 'mlp' names mesh axis 'expert'.*data, fsdp, tensor"):
        sharding.plan(one_device_mesh, {}, {}, rules=(("mlp", "expert"),))


def test_unsharded_dimensions_and_several_mesh_axes(make_test_mesh):
    mesh = make_test_mesh((2, 2, 2))
    rules = (("mlp", ("fsdp", "tensor")),)
    plan = sharding.plan(mesh, {"w": _leaf(3, 8)}, {"w": (None, "mlp")}, rules=rules)
    assert plan.shardings["w"].spec == P(None, ("fsdp", "tensor"))
    assert plan.bytes_per_device == 3 * 2 * 4
    with pytest.raises(UserError, match="fsdp×tensor=4"):
        sharding.plan(mesh, {"w": _leaf(3, 6)}, {"w": (None, "mlp")}, rules=rules)


def test_a_sharded_matmul_gives_the_numbers_of_one_device(mesh):
    x_BD = np.random.default_rng(0).normal(size=(8, EMBED)).astype(np.float32)
    w_DF = np.random.default_rng(1).normal(size=(EMBED, MLP)).astype(np.float32)
    place = sharding.plan(mesh, {"w": _leaf(EMBED, MLP)}, {"w": ("embed", "mlp")}).shardings["w"]
    y_BF = jax.jit(jnp.matmul)(sharding.shard_batch(x_BD, mesh), jax.device_put(w_DF, place))
    np.testing.assert_allclose(np.asarray(y_BF), x_BD @ w_DF, rtol=1e-5, atol=1e-5)
