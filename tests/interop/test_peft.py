"""Law 9 for adapters: PEFT's directories in and out, with PEFT's logits and gradients."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lmjax as lm
from lmjax import adapters, interop
from lmjax.errors import UserError
from lmjax.interop.peft_config import LowRankEntry, lora_fields
from lmjax.interop.peft_reading import collections_from_peft
from lmjax.models import stack_layers
from lmjax.modules.config import DecoderConfig
from tests.interop import cases, peft_cases
from tests.models.small import forward

TOLERANCE = 1e-5
VOCAB = peft_cases.VOCAB
PLAIN = [case for case in peft_cases.CASES if case[1] != "projection"]


@functools.cache
def _stored(model: str, name: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """What PEFT wrote, its logits [B, T, V], its gradients in one row."""
    with np.load(peft_cases.FIXTURES) as stored:
        about, logits, gradients = (stored[f"{model}/{name}/{part}"] for part in ("about", "logits", "gradients"))
    return json.loads(str(about)), logits, gradients


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DecoderConfig, Any]]:
    """Model -> its config and variables."""
    found = {}
    for model in peft_cases.MODELS:
        about, _, _ = _stored(model, "lora")
        path = cases.write_directory(tmp_path_factory.mktemp(model), about["config"], about["shapes"])
        found[model] = interop.load_huggingface(path, layers="unrolled")
    return found


def _logits(config: DecoderConfig, variables: Any) -> np.ndarray:
    return np.asarray(forward(config, variables, peft_cases.tokens()[:, :-1]))


def _loss(config: DecoderConfig, variables: Any) -> jax.Array:
    tokens = peft_cases.tokens()
    logprobs = jax.nn.log_softmax(forward(config, variables, tokens[:, :-1]))
    return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()


def _projection(tensors: dict[str, Any]) -> Any:
    """The parameters of PEFT's prefix encoder as ours."""
    dense = lambda name: {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}
    return {
        "prefix_network": {
            "table": tensors["embedding.weight"], "hidden": dense("transform.0"), "output": dense("transform.2"),
        }
    }  # fmt: skip


def _collections(about: dict[str, Any], tensors: Any, config: DecoderConfig, variables: Any) -> Any:
    if "embedding.weight" in tensors:
        return _projection(tensors)
    return collections_from_peft(about["adapter"], tensors, config, variables)


@pytest.mark.parametrize(("model", "name"), peft_cases.CASES)
def test_logits_and_gradients_are_those_of_peft(model, name, bases):
    """Gradients of PEFT's own tensors, through the map that loads them."""
    config, variables = bases[model]
    about, logits, gradients = _stored(model, name)
    tensors = {key: peft_cases.value(key, tuple(shape)) for key, shape in about["tensors"].items()}
    adapted = variables | _collections(about, tensors, config, variables)
    error = np.abs(_logits(config, adapted) - logits).max()
    found = jax.grad(lambda of: _loss(config, variables | _collections(about, of, config, variables)))(tensors)
    gradient_error = np.abs(peft_cases.joined(found) - gradients).max()
    print(f"{model} {name}: logits differ by {error:.1e}, gradients by {gradient_error:.1e}")
    assert error < TOLERANCE
    assert gradient_error < TOLERANCE
    assert np.abs(_logits(config, variables) - logits).max() > 0.1  # the adapter is felt
    assert np.abs(gradients).max() > 0.05


@pytest.mark.parametrize(("model", "name"), PLAIN)
def test_a_directory_of_peft_is_loaded_and_written_again(model, name, bases, tmp_path):
    config, variables = bases[model]
    about, _, _ = _stored(model, name)
    directory = peft_cases.write_adapter(tmp_path / "theirs", about)
    adapted = adapters.load(directory, variables, lm.Policy(config))
    interop.save_peft(tmp_path / "ours", config, adapted)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for field in set(written) - {"target_modules", "rank_pattern", "alpha_pattern", "encoder_hidden_size"}:
        assert written[field] == about["adapter"][field], field
    found, expected = (load_file(tmp_path / of / "adapter_model.safetensors") for of in ("ours", "theirs"))
    assert set(found) == set(expected)
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    again = interop.load_peft(tmp_path / "ours", config, variables)
    jax.tree.map(np.testing.assert_array_equal, again, adapted)


@pytest.mark.parametrize("name", ["rslora", "dora", "ia3", "prompt", "prefix"])
def test_layers_may_be_stacked(name, bases, tmp_path):
    config, variables = bases["llama"]
    about, logits, _ = _stored("llama", name)
    directory = peft_cases.write_adapter(tmp_path / "theirs", about)
    config, stacked = dataclasses.replace(config, layers="scanned"), stack_layers(variables)
    adapted = interop.load_peft(directory, config, stacked)
    np.testing.assert_allclose(_logits(config, adapted), logits, atol=TOLERANCE)
    interop.save_peft(tmp_path / "ours", config, adapted)
    found, expected = (load_file(tmp_path / of / "adapter_model.safetensors") for of in ("ours", "theirs"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_layers_that_differ_cannot_be_stacked(bases, tmp_path):
    config, variables = bases["llama"]
    directory = peft_cases.write_adapter(tmp_path, _stored("llama", "lora")[0])
    with pytest.raises(UserError, match="differs from layer to layer"):
        interop.load_peft(directory, dataclasses.replace(config, layers="scanned"), stack_layers(variables))


# One module of three ------------------------------------------------------------------------------


def _noisy(variables: Any, seed: int = 0) -> Any:
    """Adapters away from where they start."""
    random = np.random.RandomState(seed)

    def move(path: Any, leaf: jax.Array) -> np.ndarray:
        keys = [entry.key for entry in path]
        if keys[0] not in adapters.COLLECTIONS or "constant" in keys:
            return np.asarray(leaf)
        return np.asarray(leaf) + (0.4 * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(move, variables)


FUSED = {
    "all three": (adapters.lora(2, 3, targets="attention/*"), 6),
    "two of three": (adapters.lora(2, 3, targets=("query", "value")), 4),
    "of several ranks": (adapters.lora(2, 4, targets="attention/*", ranks={"key": 3}), 7),
    "with lengths": (adapters.dora(2, targets=("query", "value", "mlp/up")), 4),
}


@pytest.mark.parametrize("case", FUSED)
def test_three_of_ours_become_one_of_theirs_exactly(case, bases, tmp_path):
    method, rank = FUSED[case]
    config, variables = bases["gpt2"]
    adapted = _noisy(method.init(jax.random.key(0), variables))
    interop.save_peft(tmp_path, config, adapted)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (rank, 16)
    again = interop.load_peft(tmp_path, config, variables)
    for part in ("query", "key", "value"):
        found, own = (of[method.kind]["layer_1"]["attention"].get(part) for of in (again, adapted))
        expected = np.zeros((16, 16), np.float32) if own is None else _product(own)
        np.testing.assert_allclose(_product(found), expected, atol=1e-6)
        if method.kind == "dora":
            norms = np.linalg.norm(variables["params"]["layer_1"]["attention"][part]["kernel"], axis=0)
            np.testing.assert_allclose(found["magnitude"], norms if own is None else own["magnitude"], rtol=1e-6)
    np.testing.assert_allclose(_logits(config, again), _logits(config, adapted), atol=TOLERANCE)


def _product(own: Any) -> np.ndarray:
    return np.asarray((own["a"] * own["constant"]["scale"]) @ own["b"])


def test_a_scale_that_differs_within_a_module_goes_into_b(bases, tmp_path):
    config, variables = bases["llama"]
    adapted = _noisy(adapters.lora(2, targets="mlp/up").init(jax.random.key(0), variables))
    own = adapted["lora"]["layer_0"]["mlp"]["up"]
    own["constant"]["scale"] = np.array([0.5, -2.0], np.float32)
    interop.save_peft(tmp_path, config, adapted)
    found = interop.load_peft(tmp_path, config, variables)["lora"]["layer_0"]["mlp"]["up"]
    np.testing.assert_allclose(_product(found), _product(own), rtol=1e-6)


def test_vectors_of_some_parts_leave_the_others_as_they_are(bases, tmp_path):
    config, variables = bases["gpt2"]
    adapted = _noisy(adapters.ia3().init(None, variables))
    interop.save_peft(tmp_path, config, adapted)
    found = interop.load_peft(tmp_path, config, variables)["ia3"]["layer_0"]["attention"]
    np.testing.assert_array_equal(found["query"]["output"], np.ones(16))
    np.testing.assert_array_equal(found["value"]["output"], adapted["ia3"]["layer_0"]["attention"]["value"]["output"])


def test_a_network_is_written_as_the_prefix_it_makes(bases, tmp_path):
    config, variables = bases["llama"]
    policy = lm.Policy(config)
    adapted = _noisy(adapters.prefix(policy, 3, network_width=5).init(jax.random.key(0), variables))
    interop.save_peft(tmp_path, config, adapted)
    found = interop.load_peft(tmp_path, config, variables)["prefix"]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, adapters.flatten(policy, adapted)["prefix"]
    )


def test_embeddings_are_scaled_where_the_model_scales_them(tmp_path):
    config = lm.models.gemma2(VOCAB, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, max_length=32)
    variables = {"params": {}, "prompt": {"embedding": jnp.ones((3, 16))}}
    interop.save_peft(tmp_path, config, variables)
    np.testing.assert_allclose(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], 4.0)
    found = interop.load_peft(tmp_path, config, {"params": {}})
    np.testing.assert_allclose(found["prompt"]["embedding"], 1.0)


def test_alphas_are_as_they_were_given():
    given = {"a": LowRankEntry(8, float(np.float32(16 / 8))), "b": LowRankEntry(12, float(np.float32(5 / 12)))}
    fields = lora_fields(given | {"c": given["a"]}, 0.1, False)
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (8, 16, False)
    assert (fields["rank_pattern"], fields["alpha_pattern"]) == ({"b": 12}, {"b": 5})
    fields = lora_fields({"a": LowRankEntry(8, float(np.float32(16 / 8**0.5)))}, 0, True)
    assert (fields["lora_alpha"], fields["use_rslora"], fields["use_dora"]) == (16, True, True)
    odd = float(np.float32(0.123456789))
    assert np.float32(lora_fields({"a": LowRankEntry(3, odd)}, 0, False)["lora_alpha"] / 3) == np.float32(odd)


def test_the_dropout_is_kept(bases, tmp_path):
    config, variables = bases["llama"]
    adapted = adapters.lora(2, dropout=0.1, targets="query").init(jax.random.key(0), variables)
    interop.save_peft(tmp_path, config, adapted)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    again = interop.load_peft(tmp_path, config, variables)
    jax.tree.map(np.testing.assert_array_equal, again, adapted)


# Bad input ----------------------------------------------------------------------------------------

FIELDS = {
    "another method": (dict(peft_type="LOHA"), "'LOHA' is not supported; lmjax loads LORA, IA3"),
    "another task": (dict(task_type="SEQ_CLS"), "'SEQ_CLS' is not supported"),
    "biases": (dict(bias="all"), "bias = 'all'.*bias='none'"),
    "whole modules": (dict(modules_to_save=["lm_head"]), r"cannot express modules_to_save = \['lm_head'\]"),
    "a variant": (dict(use_qalora=True), "cannot express use_qalora = True"),
    "a changed base": (dict(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
    "no rank": (dict(r=0), "r or rank_pattern is 0"),
    "alphas in words": (dict(alpha_pattern={"q_proj": "big"}), "alpha_pattern is 'big'"),
    "another rank": (dict(rank_pattern={"q_proj": 5}), "lora_A.weight has shape .* another model"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_that_cannot_be_expressed(case, bases, tmp_path):
    changes, message = FIELDS[case]
    config, variables = bases["llama"]
    directory = peft_cases.write_adapter(tmp_path, _stored("llama", "lora")[0], **changes)
    with pytest.raises(UserError, match=message):
        interop.load_peft(directory, config, variables)


def _rename(old: str, new: str) -> Any:
    def spoil(directory: Path, about: dict[str, Any]) -> None:
        tensors = {key.replace(old, new): shape for key, shape in about["tensors"].items()}
        peft_cases.write_adapter(directory, about | {"tensors": tensors})

    return spoil


def _tear(directory: Path, about: dict[str, Any]) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


_Q = "model.layers.0.self_attn.q_proj"
BROKEN = {
    "a layer too many": (_rename("layers.1", "layers.2"), "layers.2.* has no place in this model"),
    "the embedding": (_rename(f"{_Q}.lora_", "model.embed_tokens.lora_embedding_"), "adapts the embedding"),
    "the head": (_rename(_Q, "lm_head"), "adapts the head"),
    "half of a pair": (_rename(f"{_Q}.lora_B", f"{_Q}.lora_C"), "lora_B.weight is missing"),
    "no config": (lambda directory, about: (directory / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no tensors": (lambda directory, about: (directory / "adapter_model.safetensors").unlink(), "safe_serialization"),
    "a torn config": (lambda directory, about: (directory / "adapter_config.json").write_text("{"), "not valid JSON"),
    "torn tensors": (_tear, "truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_directories_that_are_broken_or_of_another_model(case, bases, tmp_path):
    spoil, message = BROKEN[case]
    config, variables = bases["llama"]
    about = _stored("llama", "lora")[0]
    peft_cases.write_adapter(tmp_path, about)
    spoil(tmp_path, about)
    with pytest.raises(UserError, match=message):
        interop.load_peft(tmp_path, config, variables)


@pytest.mark.parametrize(("name", "message"), [("lora", "asks? for .* another model"), ("prefix", "another model")])
def test_an_adapter_of_a_wider_model(name, message, bases, tmp_path):
    config, variables = bases["llama"]
    directory = peft_cases.write_adapter(tmp_path, _stored("llama", name)[0])
    with pytest.raises(UserError, match=message):
        interop.load_peft(directory, dataclasses.replace(config, embed_dim=32, head_dim=8), variables)


def test_a_second_adapter_of_a_kind(bases, tmp_path):
    config, variables = bases["llama"]
    directory = peft_cases.write_adapter(tmp_path, _stored("llama", "ia3")[0])
    with pytest.raises(UserError, match="have a 'ia3' adapter already"):
        interop.load_peft(directory, config, adapters.ia3().init(None, variables))


def _ia3(side: str, **layers: float) -> dict[str, Any]:
    return {"ia3": {"layer_0": {"attention": {part: {side: jnp.full((16,), v)} for part, v in layers.items()}}}}


UNWRITABLE = {
    "nothing": ({}, "have no adapter"),
    "two kinds": ({"lora": {}, "prompt": {}}, "2 kinds, lora, prompt"),
    "a bottleneck": ({"bottleneck": {}}, "PEFT has no 'bottleneck' adapter"),
    "a prompt a row": ({"prompt": {"embedding": jnp.ones((2, 3, 16))}}, "differs from row to row"),
    "inputs that differ": (_ia3("input", query=1.0, key=2.0, value=1.0), "must be scaled by one input vector"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_peft_cannot_hold(case, bases, tmp_path):
    own, message = UNWRITABLE[case]
    config, variables = bases["gpt2"]
    with pytest.raises(UserError, match=message):
        interop.save_peft(tmp_path / "out", config, variables | own)
    assert not (tmp_path / "out").exists()
