"""Training gives the same losses on any mesh."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax.batch import next_token_batch

POLICY = lm.Policy(
    lm.models.small(32, num_layers=2, embed_dim=16, num_heads=8, max_length=16, layers="unrolled"), chunk_elements=512
)
BATCHES = [next_token_batch(ids) for ids in np.random.default_rng(0).integers(0, 32, (5, 8, 9))]


def losses(mesh: jax.sharding.Mesh | None) -> list[float]:
    optimizer = optax.adamw(3e-3)
    state = lm.training.init_state(POLICY, optimizer, jax.random.key(0), mesh=mesh)
    step = lm.training.make_step(POLICY, lm.objectives.cross_entropy(), optimizer, mesh=mesh, clip_norm=1.0)
    found = []
    for batch in BATCHES:
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def on_one_device() -> list[float]:
    return losses(None)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_the_same_seed_and_data_give_the_same_losses_on_any_mesh(shape, on_one_device):
    found = losses(lm.sharding.make_mesh(*shape))
    assert len(set(on_one_device)) == len(on_one_device)  # it trains, on different batches
    np.testing.assert_allclose(found, on_one_device, atol=1e-5, rtol=0)
