from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lmjax import sharding

EMBED, VOCAB, MLP = 128, 256, 256


def _params():
    return {
        "params": {
            "embed": {"embedding": jnp.ones((VOCAB, EMBED))},
            "layer_0": {
                "mlp": {"up": {"kernel": jnp.ones((EMBED, MLP))}},
                "mlp_norm": {"scale": jnp.ones((EMBED,))},
            },
            "layer_1": {
                "mlp": {"up": {"kernel": jnp.ones((EMBED, MLP))}},
                "mlp_norm": {"scale": jnp.ones((EMBED,))},
            },
        }
    }


def _axes():
    layer = {"mlp": {"up": {"kernel": ("embed", "mlp")}}, "mlp_norm": {"scale": ("norm",)}}
    return {"params": {"embed": {"embedding": ("vocab", "embed")}, "layer_0": layer, "layer_1": layer}}


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    "adafactor": lambda: optax.adafactor(1e-3, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 9))
    ),
    "partitioned": lambda: optax.multi_transform(
        {"matrix": optax.adam(1e-3), "vector": optax.sgd(1e-3, momentum=0.9)},
        lambda tree: jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", tree),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_with_their_parameters(name, mesh):
    params, optimizer = _params(), OPTIMIZERS[name]()
    places = sharding.plan(mesh, params, _axes()).shardings
    state = jax.eval_shape(optimizer.init, params)
    shardings = sharding.optimizer_shardings(mesh, state, params, places)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)

    moments = 0
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings)):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.shape == (VOCAB, EMBED):
            assert text.endswith("params/embed/embedding") and place.spec == P("tensor", "fsdp")
            moments += 1
        elif leaf.shape == (EMBED, MLP):
            assert text.endswith("mlp/up/kernel") and place.spec == P("fsdp", "tensor")
            moments += 1
        else:
            assert place.is_fully_replicated
    # Two moments for Adam, one for Lion and for Adafactor's momentum, for each of the three matrices.
    assert moments == 3 * (1 if name in ("adafactor", "lion") else 2)


def test_a_sharded_update_equals_the_plain_one(mesh):
    params, optimizer = _params(), OPTIMIZERS["adamw"]()
    grads = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) - 7.0, params
    )
    places = sharding.plan(mesh, params, _axes()).shardings
    state_places = sharding.optimizer_shardings(mesh, jax.eval_shape(optimizer.init, params), params, places)
    placed, gradients = jax.device_put(params, places), jax.device_put(grads, places)
    state = jax.jit(optimizer.init, out_shardings=state_places)(placed)
    updates, state = jax.jit(optimizer.update, out_shardings=(places, state_places))(gradients, state, placed)
    expected, _ = optimizer.update(grads, optimizer.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_a_name_shared_by_two_parameters_goes_to_the_longer_path(make_test_mesh):
    mesh = make_test_mesh((1, 2, 4))
    params = {"kernel": jnp.ones((8, 8)), "layer": {"kernel": jnp.ones((8, 8))}}
    axes = {"kernel": ("embed", "mlp"), "layer": {"kernel": ("mlp", "embed")}}
    places = sharding.plan(mesh, params, axes).shardings
    trace = sharding.optimizer_shardings(mesh, optax.trace(0.9).init(params), params, places).trace
    assert trace["kernel"].spec == P("fsdp", "tensor")
    assert trace["layer"]["kernel"].spec == P("tensor", "fsdp")


def test_a_statistic_of_another_shape_is_replicated(make_test_mesh):
    params, optimizer = _params(), OPTIMIZERS["adafactor"]()
    mesh = make_test_mesh((2, 2, 2))
    places = sharding.plan(mesh, params, _axes()).shardings
    state = jax.eval_shape(optimizer.init, params)
    shardings = sharding.optimizer_shardings(mesh, state, params, places)
    factored = [
        (leaf.shape, place)
        for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings))
        if "v_row" in jax.tree_util.keystr(path) and len(leaf.shape) == 1 and leaf.shape[0] > 1
    ]
    assert len(factored) == 3
    assert all(place.is_fully_replicated for _, place in factored)
