"""Loading and saving model directories: layouts, shards, types, and what happens to bad ones."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from lmjax import interop
from lmjax.errors import UserError
from lmjax.interop import tensor_files
from lmjax.interop.huggingface_config import canonical
from lmjax.models import unstack_layers
from tests.interop import cases


def equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_saving_gives_back_the_tensors_that_were_loaded(name, layers, fixtures, make_directory, tmp_path):
    config, variables = interop.load_huggingface(make_directory(name), layers=layers)
    interop.save_huggingface(tmp_path / "out", config, variables)
    shapes = fixtures[name][0]["shapes"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(shapes)
    for key, array in written.items():
        np.testing.assert_array_equal(array, cases.weight(key, tuple(shapes[key])), err_msg=key)
    again, _ = interop.load_huggingface(tmp_path / "out", layers=layers)
    assert canonical(again) == canonical(config)


def test_scanned_leaves_are_the_stacked_unrolled_ones(make_directory):
    path = make_directory("gemma3")
    _, unrolled = interop.load_huggingface(path, layers="unrolled")
    _, scanned = interop.load_huggingface(path, layers="scanned")
    equal(unstack_layers(scanned), unrolled)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_loading_onto_shardings_fills_each_shard(name, layers, make_directory, make_test_mesh):
    path = make_directory(name)
    mesh = make_test_mesh((2, 2, 2))
    _, expected = interop.load_huggingface(path, layers=layers)

    def sharding(leaf):
        """Splits the last two axes where they divide: transposed, fused and stacked reads are all sliced."""
        axes = [None] * leaf.ndim
        for axis, name in zip(range(leaf.ndim)[::-1], ("tensor", "fsdp")):
            axes[axis] = name if leaf.shape[axis] % 2 == 0 else None
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree.map(sharding, expected)
    _, variables = interop.load_huggingface(path, layers=layers, shardings=shardings)
    equal(variables, expected)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, s: leaf.sharding == s, variables, shardings)))


def test_only_the_blocks_of_the_shards_are_read_and_each_once(make_directory, make_test_mesh, monkeypatch):
    path = make_directory("llama2")
    mesh = make_test_mesh((2, 2, 2))
    _, expected = interop.load_huggingface(path)
    by_rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    read = []
    original = tensor_files.TensorFiles.read

    def counted(self, name, index):
        read.append(original(self, name, index))
        return read[-1]

    monkeypatch.setattr(tensor_files.TensorFiles, "read", counted)
    interop.load_huggingface(path, shardings=jax.tree.map(lambda _: by_rows, expected))
    assert sum(block.size for block in read) == sum(leaf.size for leaf in jax.tree.leaves(expected))
    assert max(block.size for block in read) == cases.VOCAB * 32 // 2


def test_shardings_of_another_structure_are_refused(make_directory, one_device_mesh):
    path = make_directory("llama2")
    _, variables = interop.load_huggingface(path)
    shardings = jax.tree.map(lambda _: NamedSharding(one_device_mesh, PartitionSpec()), variables)
    del shardings["params"]["head"]
    with pytest.raises(UserError, match="differ in structure at 'head/embedding'"):
        interop.load_huggingface(path, shardings=shardings)


def test_files_in_shards_load_and_save(make_directory, tmp_path):
    config, variables = interop.load_huggingface(make_directory("qwen3"))
    out = tmp_path / "out"
    interop.save_huggingface(out, config, variables, max_shard_bytes=10_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(file.name for file in out.glob("*.safetensors"))
    assert max(file.stat().st_size for file in out.glob("*.safetensors")) < 12_000
    equal(interop.load_huggingface(out)[1], variables)
    # An export over another leaves none of the other's files to be found first.
    interop.save_huggingface(out, config, variables)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_types_of_files_and_of_parameters(stored, make_directory, tmp_path):
    config, variables = interop.load_huggingface(make_directory("qwen2"))
    interop.save_huggingface(tmp_path / "out", config, variables, dtype=stored)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == stored
    _, loaded = interop.load_huggingface(tmp_path / "out")
    type_ = np.dtype(getattr(ml_dtypes, stored, stored))
    equal(loaded, jax.tree.map(lambda x: np.asarray(x).astype(type_).astype(np.float32), variables))
    _, kept = interop.load_huggingface(tmp_path / "out", dtype=stored)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {stored}


def test_checkpoints_of_the_bare_model_and_with_buffers_load(make_directory):
    """The first GPT-2 files have no leading "transformer." and hold the causal masks."""
    path = make_directory("gpt2")
    _, expected = interop.load_huggingface(path)
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, path / "model.safetensors")
    equal(interop.load_huggingface(path)[1], expected)


def test_a_tied_head_that_is_stored_must_be_the_embedding(make_directory):
    path = make_directory("qwen3")
    tensors = load_file(path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors")
    interop.load_huggingface(path)
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        interop.load_huggingface(path)


def test_tokenizer_files_and_extra_entries_are_written(make_directory, tmp_path):
    config, variables = interop.load_huggingface(make_directory("llama2"))
    (tmp_path / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    interop.save_huggingface(
        out,
        config,
        variables,
        tokenizer_files=[tmp_path / "tokenizer.json"],
        extra_config={"eos_token_id": 3},
    )
    assert (out / "tokenizer.json").read_text() == "{}"
    written = json.loads((out / "config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == (3, None)
    assert written["architectures"] == ["LlamaForCausalLM"]


# Bad input: one sentence, before any tensor is read.


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def cut_header(path):
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 10**6) + file.read_bytes()[8:100])


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no config": (lambda p: (p / "config.json").unlink(), "there is no config.json"),
    "broken config": (lambda p: (p / "config.json").write_text("{"), "is not valid JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "holds a list"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "there is no safetensors file"),
    "missing": (lambda p: rewrite(p, lambda t: t.pop(Q)), f"the tensor {Q} is missing"),
    "unexpected": (lambda p: rewrite(p, lambda t: t.update(odd=t[Q])), "the tensor odd has no place"),
    "shape": (
        lambda p: rewrite(p, lambda t: t.update({Q: t[Q][:-1]})),
        r"q_proj.weight has shape \(31, 32\), but config.json asks for \(32, 32\)",
    ),
    "type": (lambda p: rewrite(p, lambda t: t.update({Q: t[Q].astype(np.int8)})), "is stored as I8"),
    "truncated": (truncate, "truncated"),
    "truncated header": (cut_header, "truncated"),
    "index names a missing file": (
        lambda p: (
            (p / "model.safetensors").unlink(),
            (p / tensor_files.INDEX).write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        ),
        "names model-1.safetensors, which is not there",
    ),
    "broken index": (
        lambda p: ((p / "model.safetensors").unlink(), (p / tensor_files.INDEX).write_text("{}")),
        "is not a safetensors index",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_directories_are_one_sentence_and_nothing_is_read(what, make_directory, monkeypatch):
    path = make_directory("llama2")
    spoil, sentence = BAD[what]
    spoil(path)
    monkeypatch.setattr(tensor_files.TensorFiles, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match=sentence) as error:
        interop.load_huggingface(path)
    assert "\n" not in str(error.value)


def test_saving_what_does_not_fit_writes_nothing(make_directory, tmp_path):
    config, variables = interop.load_huggingface(make_directory("llama2"))
    out = tmp_path / "out"
    params = variables["params"]
    attempts = {
        "merge it": (config, variables | {"lora": {"a": np.ones(2)}}, {}),
        "head/embedding is missing": (
            config,
            {"params": {k: v for k, v in params.items() if k != "head"}},
            {},
        ),
        "odd has no place": (config, {"params": params | {"odd": np.ones(2)}}, {}),
        r"shape \(64, 32\), but the config asks for \(65, 32\)": (
            dataclasses.replace(config, vocab_size=65),
            variables,
            {},
        ),
        "tokenizer file .* is not there": (config, variables, {"tokenizer_files": [tmp_path / "none.json"]}),
    }
    for sentence, (config, variables, options) in attempts.items():
        with pytest.raises(UserError, match=sentence):
            interop.save_huggingface(out, config, variables, **options)
    assert not out.exists()


def test_reading_a_config_imports_no_jax(make_directory):
    code = (
        "import sys; from lmjax import interop; interop.config_from_huggingface(sys.argv[1]);"
        "assert 'jax' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(make_directory("llama3"))], check=True)
