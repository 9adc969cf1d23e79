"""config.json both ways: every preset, older and newer spellings, and refusals."""

from __future__ import annotations

import dataclasses

import pytest

from lmjax.errors import UserError
from lmjax.interop import config_from_huggingface, config_to_huggingface
from lmjax.interop.huggingface_config import canonical
from lmjax.models.presets import PRESETS, preset
from lmjax.modules.config import DecoderConfig, RopeScaling

LLAMA = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
QWEN = LLAMA | {"model_type": "qwen2"}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "head_dim": 8}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_round_trip(name):
    config = preset(name)
    assert canonical(config_from_huggingface(config_to_huggingface(config))) == canonical(config)


@pytest.mark.parametrize(
    "name, kind",
    [("gpt2", "gpt2"), ("llama3.1-8b", "llama"), ("mistral-7b", "mistral"), ("qwen2.5-7b", "qwen2")]
    + [("qwen3-8b", "qwen3"), ("gemma2-9b", "gemma2"), ("gemma3-1b", "gemma3_text"), ("small-3m", "qwen3")],
)
def test_presets_are_written_as_their_own_family(name, kind):
    assert config_to_huggingface(preset(name))["model_type"] == kind


def test_older_and_newer_spellings_of_rope_are_read_alike():
    llama3 = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    expected = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    for entries in (
        {"rope_theta": 5e5, "rope_scaling": llama3 | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": llama3 | {"type": "llama3"}},
        {"rope_parameters": llama3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    ):
        config = config_from_huggingface(LLAMA | entries)
        assert (config.rope_theta, config.rope_scaling) == (5e5, expected)
    assert config_from_huggingface(LLAMA).rope_theta == 1e4
    assert config_from_huggingface(LLAMA | {"rope_scaling": None}).rope_scaling is None


def test_yarn_as_transformers_completes_it():
    def read(**entries):
        return config_from_huggingface(LLAMA | {"rope_scaling": {"type": "yarn"} | entries}).rope_scaling

    assert read(factor=4.0) == RopeScaling("yarn", 4.0, original_length=4096)
    assert read(original_max_position_embeddings=1024) == RopeScaling("yarn", 4.0, original_length=1024)
    assert read(factor=2.0, beta_fast=0, truncate=False) == RopeScaling("yarn", 2.0, 4096, truncate=False)


def test_gemma3_rope_of_each_kind_of_layer():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    older = {
        "rope_theta": 2e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    expected = (2e6, 2e4, RopeScaling("linear", 8.0))
    for entries in ({"rope_parameters": nested}, older):
        config = config_from_huggingface(GEMMA3 | entries)
        assert (config.rope_theta, config.local_rope_theta, config.rope_scaling) == expected
    default = config_from_huggingface(GEMMA3 | {"num_hidden_layers": 12, "sliding_window_pattern": 3})
    assert (default.rope_theta, default.local_rope_theta) == (1e6, 1e4)
    assert default.window_pattern == (True, True, False)


def test_windows():
    assert config_from_huggingface(QWEN).window is None
    config = config_from_huggingface(
        QWEN | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}
    )
    assert [config.windowed(i) for i in range(4)] == [False, False, False, True]
    config = config_from_huggingface(LLAMA | {"model_type": "mistral", "sliding_window": 7})
    assert all(config.windowed(i) for i in range(4)) and config.window == 7
    assert config_from_huggingface(LLAMA | {"model_type": "mistral", "sliding_window": None}).window is None
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = config_from_huggingface(GEMMA3 | {"layer_types": types, "sliding_window": 9})
    assert [config.windowed(i) for i in range(4)] == [False, True, True, False]


REFUSED = {
    "unknown type": ({"model_type": "mamba"}, "'mamba' .* lmjax loads gpt2, llama"),
    "no type": ({"model_type": None}, "model_type None"),
    "multimodal": ({"model_type": "gemma3"}, "text-only"),
    "missing": ({"hidden_size": None}, "hidden_size is None"),
    "not a number": ({"hidden_size": "32"}, "hidden_size is '32'"),
    "fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5; it must be a whole number"),
    "unknown field": ({"alibi": True}, "does not know the field 'alibi' = True"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "activation": ({"hidden_act": "relu2"}, "hidden_act is 'relu2'"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial rotary, nested": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "rope type": ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope' is not supported"),
    "rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
    "rope parameter": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "gamma": 1}}, "'gamma'"),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}}, "'mrope' is not supported"),
    "qwen mrope": ({"model_type": "qwen2", "use_mrope": True}, "use_mrope"),
    "layer types": ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    "layer count": ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "1 entries for 4 layers"),
    "no window": ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "no sliding_window"),
    "bidirectional": ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "causally"),
    "gemma 3 cap": ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "does not apply it"),
    "sliding scaling": (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
        },
        "scaling of their own",
    ),
    "gpt2 layer scale": (
        dict(model_type="gpt2", n_embd=8, n_layer=1, n_head=1, scale_attn_by_inverse_layer_idx=True),
        "layer's index",
    ),
    "heads": ({"num_key_value_heads": 3}, "num_kv_heads 3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(what):
    entries, sentence = REFUSED[what]
    with pytest.raises(UserError, match=sentence):
        config_from_huggingface(LLAMA | entries)


@pytest.mark.parametrize(
    "changes, fields",
    [
        (dict(logit_scale=0.5), "logit_scale"),
        (dict(norm="layer"), "norm"),
        (dict(norm_position="post"), "norm_position"),
        (dict(embed_scale=3.0), "embed_scale"),
        (dict(position="none"), "position"),
    ],
)
def test_a_model_that_no_family_expresses_is_refused_with_the_difference(changes, fields):
    config = DecoderConfig(vocab_size=64, **changes)
    with pytest.raises(UserError, match=f"differs in: .*{fields}"):
        config_to_huggingface(config)


def test_what_a_run_chooses_does_not_stand_in_the_way():
    config = dataclasses.replace(
        preset("llama3.2-1b"), dropout=0.1, layers="scanned", remat="full", dtype="bfloat16", attention="xla"
    )
    assert config_to_huggingface(config) == config_to_huggingface(preset("llama3.2-1b"))
