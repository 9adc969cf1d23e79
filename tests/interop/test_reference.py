"""Live comparisons with transformers: fresh weights, and directories that we write."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from lmjax import interop
from lmjax.interop.huggingface_config import canonical
from lmjax.models import Decoder, preset
from lmjax.models.presets import gemma2, gemma3, gpt2, llama, mistral, qwen2, qwen3
from lmjax.modules.config import RopeScaling
from lmjax.modules.positions import rope_frequencies
from tests.interop import cases
from tests.interop.make_fixtures import reference_model
from tests.interop.test_parity import logits_at

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch", reason="compares with torch and transformers (pip install -e '.[dev]')")
transformers = pytest.importorskip("transformers")

LENGTH = 200
ALL = tuple(range(LENGTH))


def reference_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits[0].numpy()


def ours(config, variables) -> np.ndarray:
    return np.asarray(logits_at(config, variables, cases.tokens(LENGTH), ALL))


@pytest.mark.parametrize("name", cases.CASES)
def test_every_position_agrees_with_the_live_model(name, tmp_path):
    model = reference_model(cases.CASES[name])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # other weights than the fixtures'
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    difference = np.abs(
        ours(*interop.load_huggingface(tmp_path)) - reference_logits(model, cases.tokens(LENGTH))
    ).max()
    print(f"{name}: largest difference {difference:.1e}")
    assert difference < 1e-4


_SHAPE = dict(num_layers=3, embed_dim=32, num_heads=4, mlp_dim=48, max_length=4096)
_GQA = _SHAPE | dict(num_kv_heads=2)
_WINDOW = _GQA | dict(window=50)
EXPORTS = {
    "gpt2": gpt2(64, **_SHAPE),
    "llama": llama(64, **_GQA, rope_scaling=RopeScaling("llama3", 8.0, 64)),
    "llama_yarn": llama(64, **_GQA, rope_scaling=RopeScaling("yarn", 4.0, 64, beta_fast=16, truncate=False)),
    "mistral": mistral(64, **_WINDOW),
    "qwen2": qwen2(64, **_WINDOW, window_pattern=(False, True)),
    "qwen3": qwen3(64, **_GQA, head_dim=16, qkv_bias=True, output_bias=True),
    "gemma2": gemma2(64, **_WINDOW, query_scale=24**-0.5),
    "gemma3": gemma3(64, **_WINDOW, window_pattern=(True, False), rope_scaling=RopeScaling("linear", 8.0)),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_transformers_loads_what_we_write_and_gives_the_same_logits(name, tmp_path):
    config = dataclasses.replace(EXPORTS[name], layers="scanned")
    variables = Decoder(config).init(jax.random.key(0))
    random = np.random.RandomState(0)
    variables = jax.tree.map(
        lambda x: x + (0.2 * random.standard_normal(x.shape)).astype(np.float32), variables
    )
    interop.save_huggingface(tmp_path, config, variables, max_shard_bytes=30_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    difference = np.abs(ours(config, variables) - reference_logits(model.eval(), cases.tokens(LENGTH))).max()
    print(f"{name}: largest difference {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize(
    "name", ["gpt2", "llama3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma2-2b", "gemma3-1b"]
)
def test_configs_of_presets_mean_the_same_to_transformers(name, tmp_path):
    """Fields that we leave to transformers' defaults, and those it adds, read back as the same model."""
    written = interop.config_to_huggingface(preset(name))
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.model_type == written["model_type"]
    assert canonical(interop.config_from_huggingface(loaded.to_dict())) == canonical(preset(name))


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8192)
LLAMA3 = dict(
    rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
ROPES = [
    dict(rope_type="linear", factor=3.0),
    LLAMA3 | dict(factor=8.0),
    LLAMA3 | dict(factor=32.0, high_freq_factor=3.0),
    YARN,
    YARN | dict(factor=1.0),
    YARN | dict(truncate=False),
    YARN | dict(beta_fast=16, beta_slow=2),
    YARN | dict(attention_factor=1.3),
    YARN | dict(mscale=0.7, mscale_all_dim=1.2),
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("parameters", ROPES, ids=lambda p: "-".join(map(str, p.values())))
def test_rope_frequencies_are_those_of_transformers(parameters, head_dim, theta):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=32768,
        rope_parameters=parameters | dict(rope_theta=theta),
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    read = interop.config_from_huggingface(config.to_dict() | {"model_type": "llama"})
    found, found_factor = rope_frequencies(head_dim, read.rope_theta, read.rope_scaling)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)  # slow pairs are far below 1e-7
    assert found_factor == pytest.approx(factor, abs=1e-7)
