"""Adapters on disk: every method comes back to the bit, in either layout, and onto no other model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import adapters, interop
from lmjax.adapters import files
from lmjax.errors import UserError
from lmjax.models import stack_layers, unstack_layers
from tests.laws.test_adapters import METHODS, MODELS, _adapted, _noisy
from tests.models.small import FAMILIES, scanned, variables_of

CONFIG = MODELS["llama"]


def _same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype, path
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_to_the_bit_in_either_layout(method, tmp_path):
    model = "gpt2" if method == "bitfit" else "llama"
    base = variables_of(MODELS[model])
    adapted = _noisy(_adapted(method, MODELS[model])[1])
    adapters.save(tmp_path / "one", adapted)
    found = adapters.load(tmp_path / "one", base)
    _same(found, adapted)
    assert all(found["params"][name] is tree for name, tree in base["params"].items())
    stacked = adapters.load(tmp_path / "one", stack_layers(base))
    _same(adapters.adapters_of(stacked), stack_layers(adapters.adapters_of(adapted)))
    adapters.save(tmp_path / "two", stacked)
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_several_kinds_types_and_scalars_come_back_together(tmp_path):
    base = variables_of(CONFIG)
    adapted = adapters.lora(2, dropout=0.1, ranks={"layer_1/*": 3}).init(jax.random.key(0), base)
    adapted = adapters.houlsby(4).init(jax.random.key(0), adapters.ia3().init(None, adapted))
    adapted["lora"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapted["lora"])
    visible = jnp.array([[True, True, False]] * 2)
    adapted["prompt"] = {"embedding": jnp.ones((2, 3, 16)), "constant": {"visible": visible}}
    adapters.save(tmp_path, adapted)
    _same(adapters.load(tmp_path, base), adapted)
    assert json.loads((tmp_path / "adapter.json").read_text())["kinds"] == ["bottleneck", "ia3", "lora", "prompt"]


def test_an_adapter_trained_over_a_quantized_model_goes_onto_the_full_one_and_back(tmp_path):
    base = variables_of(CONFIG)
    quantized = adapters.quantize(unstack_layers(base), "int8")
    adapted = _noisy(adapters.lora(2).init(jax.random.key(0), quantized))
    adapters.save(tmp_path, adapted)
    _same(adapters.load(tmp_path, base)["lora"], adapted["lora"])
    _same(adapters.load(tmp_path, quantized), adapted)


def test_peft_directories_are_read_too(tmp_path):
    base = variables_of(FAMILIES["qwen2"])
    adapted = _noisy(adapters.lora(2, targets="query").init(jax.random.key(0), base))
    interop.save_peft(tmp_path, FAMILIES["qwen2"], adapted)
    _same(adapters.load(tmp_path, base, lm.Policy(FAMILIES["qwen2"])), adapted)
    with pytest.raises(UserError, match="is PEFT's; give"):
        adapters.load(tmp_path, base)
    bigram = lm.Policy(lm.models.BigramConfig(vocab_size=19))
    with pytest.raises(UserError, match="no adapters of BigramConfig models"):
        adapters.load(tmp_path, bigram.init(jax.random.key(0)), bigram)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapters.save(tmp_path, _adapted("lora", CONFIG)[1])
    return tmp_path


OTHERS = {
    "wider": (dict(mlp_dim=32), "2 x mlp/down is 24 x 16 there and 32 x 16 here"),
    "deeper": (dict(num_layers=3), "2 x attention/key is 16 x 8 there and no such layers here"),
    "of another vocabulary": (dict(vocab_size=23), "embed is 19 x 16 there and 23 x 16 here"),
    "of another kind": (dict(gated=False), "2 x mlp/gate is 16 x 24 there and no such layers here"),
}


@pytest.mark.parametrize("layout", ["side by side", "stacked"])
@pytest.mark.parametrize("case", OTHERS)
def test_an_adapter_of_another_model_is_refused(case, layout, saved):
    changes, message = OTHERS[case]
    config = dataclasses.replace(CONFIG, **changes)
    other = variables_of(config if layout == "side by side" else scanned(config))
    with pytest.raises(UserError, match=f"another model: {message}"):
        adapters.load(saved, other)


def _cut(name: str, count: int) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def _flip(folder: Path) -> None:
    content = bytearray((folder / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(content)


def _newer(folder: Path) -> None:
    about = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(about | {"version": 99}))


BROKEN = {
    "no description": (lambda folder: (folder / "adapter.json").unlink(), "there is no adapter.json in .*; give a dir"),
    "no tensors": (lambda folder: (folder / "adapter.safetensors").unlink(), "there is no adapter.safetensors in"),
    "a torn description": (_cut("adapter.json", 20), "adapter.json is truncated"),
    "torn tensors": (_cut("adapter.safetensors", 20), "adapter.safetensors is truncated"),
    "a flipped bit": (_flip, "belongs to another adapter.safetensors, or that is damaged"),
    "something else": (lambda folder: (folder / "adapter.json").write_text('{"format": "x"}'), "is not an adapter's"),
    "a newer format": (_newer, "of a newer lmjax"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories(case, saved):
    spoil, message = BROKEN[case]
    spoil(saved)
    with pytest.raises(UserError, match=message):
        adapters.load(saved, variables_of(CONFIG))


def test_a_second_adapter_of_a_kind_and_none_at_all(saved, tmp_path):
    with pytest.raises(UserError, match="have a 'lora' adapter already"):
        adapters.load(saved, _adapted("lora", CONFIG)[1])
    with pytest.raises(UserError, match="no adapter to save"):
        adapters.save(tmp_path / "none", variables_of(CONFIG))
    assert not (tmp_path / "none").exists()


def test_layers_that_differ_do_not_go_onto_stacked_ones(tmp_path):
    adapters.save(tmp_path, adapters.lora(2, targets="layer_0/*").init(jax.random.key(0), variables_of(CONFIG)))
    with pytest.raises(UserError, match="differs from layer to layer"):
        adapters.load(tmp_path, variables_of(scanned(CONFIG)))


def test_what_is_interrupted_leaves_the_old_adapter_or_an_error(saved, monkeypatch):
    before = adapters.load(saved, variables_of(CONFIG))
    other = _noisy(before)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)  # while the tensors are written
    with pytest.raises(KeyboardInterrupt):
        adapters.save(saved, other)
    monkeypatch.undo()
    _same(adapters.load(saved, variables_of(CONFIG)), before)
    monkeypatch.setattr(files, "write_json", stop)  # between the two files
    with pytest.raises(KeyboardInterrupt):
        adapters.save(saved, other)
    monkeypatch.undo()
    with pytest.raises(UserError, match="belongs to another"):
        adapters.load(saved, variables_of(CONFIG))
    adapters.save(saved, other)
    _same(adapters.load(saved, variables_of(CONFIG)), other)
