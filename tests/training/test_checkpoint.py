"""Checkpoints: what is saved comes back, whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.errors import UserError
from lmjax.models.layout import stack_layers, unstack_layers
from lmjax.training.checkpoint import Checkpointer, load_part, read_metadata, steps
from lmjax.training.config import CheckpointConfig, OptimizerConfig
from lmjax.training.optimizers import make_optimizer
from lmjax.training.state import TrainState


def make_state(layers: str = "single", width: int = 4, value: float = 0.0, kind: str = "adamw"):
    def leaf(*shape):
        return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) / 7 + value

    layer = lambda: {"up": {"kernel": leaf(width, 8), "bias": leaf(8)}}
    if layers == "single":
        blocks = {f"layer_{i}": jax.tree.map(lambda x, i=i: x + i, layer()) for i in range(12)}
    else:
        blocks = {"layers": jax.tree.map(lambda x: jnp.stack([x + i for i in range(12)]), layer())}
    params = {"embed": {"embedding": leaf(5, width).astype(jnp.bfloat16)}, **blocks}
    optimizer = make_optimizer(OptimizerConfig(kind), lambda step: 0.1)
    variables = {"params": params}
    average = jax.tree.map(jnp.copy, variables)
    return TrainState(
        jnp.int32(3), variables, optimizer.init(variables), jax.random.key_data(jax.random.key(1)), average
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def shapes(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def damage(folder: Path, how: str) -> None:
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    if how == "metadata":
        (folder / "meta" / "metadata").write_text('{"step": 2, "lea')
    elif how == "data state":
        (folder / "data" / "metadata").write_text("")
    elif how == "missing":
        for path in files:
            path.unlink()
    else:
        path = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        if how == "truncated":
            content = content[: len(content) // 2]
        else:
            for i in range(len(content) // 3, 2 * len(content) // 3):
                content[i] ^= 0x55
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
def test_round_trip_of_state_data_and_metadata(tmp_path, kind):
    state = make_state(kind=kind)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(shapes(state)) is None
        checkpointer.save(3, state, {"epoch": 2, "index": [1, 5]}, metric=1.5, config={"model": {"width": 4}})
    restored = Checkpointer(tmp_path).restore(shapes(state))
    assert restored is not None and restored.step == 3
    assert_same(restored.state, state)
    assert restored.data_state == {"epoch": 2, "index": [1, 5]}
    meta = read_metadata(tmp_path)
    assert meta["config"] == {"model": {"width": 4}} and meta["metric"] == 1.5 and meta["step"] == 3
    assert meta["leaves"]["variables/params/embed/embedding"] == ["bfloat16", [5, 4]]


@pytest.mark.parametrize("written, read", [("single", "stacked"), ("stacked", "single"), ("stacked", "stacked")])
def test_stacked_and_single_layers_share_one_format(tmp_path, written, read):
    layout = dict(to_disk=unstack_layers, from_disk=stack_layers)
    if read == "single":
        reader = dict(to_disk=unstack_layers, from_disk=None)
    else:
        reader = layout
    with Checkpointer(tmp_path, **layout) as checkpointer:
        checkpointer.save(1, make_state(written, value=2.0))
    restored = Checkpointer(tmp_path, **reader).restore(make_state(read))
    assert_same(restored.state, make_state(read, value=2.0))
    part = load_part(tmp_path, "variables/params")
    np.testing.assert_array_equal(part["layer_11"]["up"]["bias"], np.arange(8, dtype=np.float32) / 7 + 2 + 11)
    assert part["embed"]["embedding"].dtype == jnp.bfloat16


def test_load_part_reads_only_that_part_and_names_what_there_is(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    assert_same(load_part(tmp_path, "variables"), jax.device_get(state.variables))
    with pytest.raises(UserError, match="no part 'lora': it has ema, opt_state, rng, step, variables"):
        load_part(tmp_path, "lora")
    with pytest.raises(UserError, match="no checkpoint of step 2"):
        load_part(tmp_path, step=2)
    with pytest.raises(UserError, match="give the folder of a run"):
        load_part(tmp_path / "elsewhere")


@pytest.mark.parametrize("layers", ["single", "stacked"])
def test_restores_onto_another_mesh(tmp_path, layers):
    devices = np.array(jax.devices()[:8])
    before = NamedSharding(Mesh(devices.reshape(8), ("x",)), PartitionSpec())
    mesh = Mesh(devices.reshape(4, 2), ("a", "b"))
    state = jax.device_put(make_state(layers, width=8, value=1.0), before)
    layout = dict(to_disk=unstack_layers, from_disk=stack_layers)
    with Checkpointer(tmp_path, **layout) as checkpointer:
        checkpointer.save(1, state)

    def spec(leaf):
        return PartitionSpec(*(None,) * (leaf.ndim - 1), "a") if leaf.ndim and leaf.shape[-1] == 8 else PartitionSpec()

    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))), state
    )
    restored = Checkpointer(tmp_path, **layout).restore(target)
    assert_same(restored.state, state)
    for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target)):
        assert leaf.sharding == wanted.sharding


@pytest.mark.parametrize("layers", ["single", "stacked"])
def test_saving_is_safe_while_the_step_donates_the_state(tmp_path, layers):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + jnp.ones_like(x), state), donate_argnums=0)
    width = 4096  # large enough that the write is still going on
    state = make_state(layers, width=width, value=3.0)
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    checkpointer = Checkpointer(tmp_path, to_disk=unstack_layers, from_disk=stack_layers)
    checkpointer.save(1, state)
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    checkpointer.close()
    assert_same(Checkpointer(tmp_path, to_disk=unstack_layers, from_disk=stack_layers).restore(state).state, expected)


def test_restored_state_can_be_donated(tmp_path):
    with Checkpointer(tmp_path, to_disk=unstack_layers, from_disk=stack_layers) as checkpointer:
        checkpointer.save(1, make_state("stacked"))
        restored = checkpointer.restore(make_state("stacked"))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones_like(x), state), donate_argnums=0)
    expected = jax.tree.map(lambda x: np.asarray(x) + np.ones_like(x), make_state("stacked"))
    assert_same(step(restored.state), expected)


def test_keeps_the_last_and_the_best(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_best=2)
    with Checkpointer(tmp_path, config) as checkpointer:
        for step, metric in enumerate([5.0, 1.0, 3.0, 2.0, None, float("nan"), 9.0], start=1):
            checkpointer.save(step, {"x": jnp.float32(step)}, metric=metric)
    assert steps(tmp_path) == [2, 4, 6, 7]
    assert read_metadata(tmp_path, "best")["step"] == 2
    assert read_metadata(tmp_path)["step"] == 7


def test_keep_best_by_maximum(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1, keep_best=1, best_mode="max")) as checkpointer:
        for step, metric in enumerate([0.1, 0.9, 0.5], start=1):
            checkpointer.save(step, {"x": jnp.float32(step)}, metric=metric)
    assert steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("how", ["truncated", "garbled", "missing", "metadata", "data state"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, how):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(value=1.0), {"at": 1})
        checkpointer.save(2, make_state(value=2.0), {"at": 2})
    damage(tmp_path / "step_00000002", how)
    checkpointer = Checkpointer(tmp_path)
    with pytest.warns(RuntimeWarning, match="step_00000002 is damaged and is passed over"):
        restored = checkpointer.restore(make_state())
    assert restored.step == 1 and restored.data_state == {"at": 1}
    assert_same(restored.state, make_state(value=1.0))
    damage(tmp_path / "step_00000001", how)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(UserError, match=r"none of the 2 checkpoints .* remove that folder"),
    ):
        checkpointer.restore(make_state())


def test_a_checkpoint_of_another_model_is_refused_before_its_arrays_are_read(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
    monkeypatch.setattr("lmjax.training.checkpoint.restore_tree", lambda *args: pytest.fail("read the arrays"))
    other = Checkpointer(tmp_path)
    message = (
        r"another model: leaf variables/params/embed/embedding is bfloat16\[5,4\] there and bfloat16\[5,6\] "
        "here; start in a new run directory, or use the model configuration"
    )
    for look in (other.check, other.restore):
        with pytest.raises(UserError, match=message):
            look(make_state(width=6))
        with pytest.raises(UserError, match=r"another optimizer: leaf opt_state/\S+ is absent there"):
            look(make_state(kind="adafactor"))
    other.check(make_state())


def test_a_full_disk_is_one_sentence_and_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(value=1.0))
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
            with pytest.raises(UserError, match="MB left: free some space"):
                checkpointer.save(2, make_state(value=2.0))
    assert_same(Checkpointer(tmp_path).restore(make_state()).state, make_state(value=1.0))


SAVE_FOR_EVER = """
import sys
import jax.numpy as jnp
from lmjax.training.checkpoint import Checkpointer
from lmjax.training.config import CheckpointConfig
with Checkpointer(sys.argv[1], CheckpointConfig(keep_last=2)) as checkpointer:
    restored = checkpointer.restore({"x": jnp.zeros(50_000), "y": jnp.zeros(3)})
    step = restored.step if restored else 0
    while True:
        step += 1
        state = {"x": jnp.full(50_000, float(step)), "y": jnp.full(3, -float(step))}
        checkpointer.save(step, state, {"at": step})
        print(step, flush=True)
"""


def test_killed_at_any_moment_an_earlier_checkpoint_stays_whole(tmp_path):
    moments = random.Random(0)
    reached = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3):
            line = process.stdout.readline()
            reached = int(line)
        time.sleep(moments.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
        restored = Checkpointer(tmp_path).restore({"x": jnp.zeros(50_000), "y": jnp.zeros(3)})
        assert restored.step >= reached - 1
        assert restored.data_state == {"at": restored.step}
        np.testing.assert_array_equal(restored.state["x"], float(restored.step))
        np.testing.assert_array_equal(restored.state["y"], -float(restored.step))


WRITE_TOO_MUCH = """
import resource, sys
import jax, jax.numpy as jnp
from lmjax.errors import UserError
from lmjax.training.checkpoint import Checkpointer
x = jax.random.normal(jax.random.key(0), (200_000,))
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, {"x": x})
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpointer.save(2, {"x": x + 1})
        checkpointer.wait()
    except UserError as error:
        print(error)
"""


def test_a_write_that_fails_half_way_leaves_earlier_checkpoints(tmp_path):
    out = subprocess.run([sys.executable, "-c", WRITE_TOO_MUCH, str(tmp_path)], capture_output=True, text=True)
    assert "could not be written" in out.stdout, out.stderr
    assert len(out.stdout.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["step_00000001"]
    x = jax.random.normal(jax.random.key(0), (200_000,))
    np.testing.assert_array_equal(Checkpointer(tmp_path).restore({"x": x}).state["x"], x)


def test_leftovers_of_a_killed_run_are_removed_and_never_read(tmp_path):
    (tmp_path / "step_00000009.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "step_00000008.deleting").mkdir()
    assert steps(tmp_path) == []
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(2)})
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_metadata_is_plain_json(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(2)}, config={"a": 1})
    assert json.loads((tmp_path / "step_00000001" / "meta" / "metadata").read_text())["config"] == {"a": 1}
