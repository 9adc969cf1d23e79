from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lmjax import sharding
from lmjax.errors import UserError


def test_without_a_mesh_nothing_is_pinned():
    x_BD = jnp.ones((8, 4))
    assert sharding.constrain(x_BD, ("batch", None)) is x_BD
    assert "sharding_constraint" not in str(
        jax.make_jaxpr(lambda x: sharding.constrain(x, ("batch", None)))(x_BD)
    )


def test_activations_are_pinned_to_the_mesh_of_the_trace(mesh):
    with sharding.tracing_for(mesh):
        y_BV = jax.jit(lambda x: sharding.constrain(2 * x, ("batch", "vocab")))(jnp.ones((8, 16)))
    ways = (8 // (mesh.shape["data"] * mesh.shape["fsdp"]), 16 // mesh.shape["tensor"])
    assert y_BV.sharding.shard_shape((8, 16)) == ways
    x_BD = jnp.ones((8, 4))
    assert sharding.constrain(x_BD, ("batch", None)) is x_BD  # the mesh ends with the block


def test_the_rules_are_those_of_the_trace(make_test_mesh):
    mesh = make_test_mesh((2, 2, 2))
    with sharding.tracing_for(mesh, (("batch", "data"), ("batch", "tensor"), ("vocab", None))):
        spec = jax.jit(lambda x: sharding.constrain(x, ("batch", "vocab")))(jnp.ones((8, 16))).sharding
        assert spec.is_equivalent_to(jax.sharding.NamedSharding(mesh, P("data", None)), 2)
        with pytest.raises(UserError, match="'heads'"):
            sharding.constrain(jnp.ones((8, 16)), ("batch", "heads"))
