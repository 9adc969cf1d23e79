"""Stopped and gone on with: bit for bit on the same devices, to rounding on others and in the other layout."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax import sharding
from lmjax.batch import next_token_batch
from lmjax.models.layout import stack_layers, unstack_layers
from lmjax.training.checkpoint import Checkpointer
from lmjax.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from lmjax.training.loop import resume, run
from lmjax.training.optimizers import make_optimizer
from lmjax.training.run_directory import RunDirectory
from lmjax.training.schedules import make_schedule
from lmjax.training.state import init_state
from lmjax.training.step import make_step


class Rows:
    """Rows of random ids; the n-th batch depends on n only."""

    at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return next_token_batch(np.random.default_rng(self.at).integers(0, 64, (8, 17)))

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def train(folder, steps, kind, shape=(1, 1, 1), layers="unrolled"):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    config = lm.models.llama(vocab_size=64, num_layers=2, embed_dim=64, num_heads=8, layers=layers)
    policy = lm.Policy(config)
    schedule = make_schedule(ScheduleConfig(peak=1e-2, warmup_steps=3), 20)
    optimizer = make_optimizer(OptimizerConfig(kind), schedule)
    step = make_step(
        policy, lm.objectives.cross_entropy(), optimizer, mesh=mesh, schedule=schedule, clip_norm=1.0, ema_decay=0.9
    )
    layout = dict(to_disk=unstack_layers, from_disk=stack_layers)
    with RunDirectory.open(folder, config) as directory, Checkpointer(directory.checkpoints, **layout) as checkpointer:
        state = init_state(policy, optimizer, jax.random.key(0), mesh=mesh, ema=True)
        rows = Rows()
        state, start = resume(checkpointer, state, rows, directory)
        result = run(
            step, state, rows, config=LoopConfig(steps, log_every=1), start=start, checkpointer=checkpointer,
            run_directory=directory, progress=False,
        )  # fmt: skip
        losses = [record["loss"] for record in directory.records()]
    return losses, jax.device_get(result.state)


def test_bit_for_bit_on_the_same_devices(tmp_path):
    whole, state = train(tmp_path / "whole", 6, "adamw")
    train(tmp_path / "parts", 3, "adamw")
    parts, again = train(tmp_path / "parts", 6, "adamw")
    assert whole == parts and len(whole) == 6
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["muon", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_from_a_mesh_of_eight_and_stacked_layers_onto_one_device_and_single_layers(tmp_path, kind):
    whole, state = train(tmp_path / "whole", 6, kind)
    train(tmp_path / "parts", 3, kind, (2, 2, 2), "scanned")
    parts, again = train(tmp_path / "parts", 6, kind)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    for x, y in zip(jax.tree.leaves(state.variables), jax.tree.leaves(again.variables), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
