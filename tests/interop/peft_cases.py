"""Adapters of PEFT on small random models, the same there and here, without committing a single weight.

Weights of the models and of the adapters are drawn from their names and shapes; stored are what PEFT wrote into
`adapter_config.json`, the names and shapes of its tensors, and the logits and gradients that it computed.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).with_name("peft.npz")
VOCAB, LENGTH, VIRTUAL = 19, 6, 3

MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(
        model_type="llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    ),
    "gpt2": dict(
        model_type="gpt2", vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=64,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
_LINEAR = {"llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "mlp.c_proj"]}
_DORA = {"llama": ["q_proj", "k_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
_IA3 = {
    "llama": dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "gpt2": dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
}
_RANKS = {"llama": {"layers.1.self_attn.q_proj": 3}, "gpt2": {"h.1.attn.c_attn": 3}}
_ALPHAS = {"llama": {"o_proj": 5, "layers.0.mlp.down_proj": 1}, "gpt2": {"mlp.c_fc": 5, "h.0.attn.c_attn": 1}}


def _cases(model: str) -> dict[str, tuple[str, dict[str, Any]]]:
    linear = dict(target_modules=_LINEAR[model], fan_in_fan_out=model == "gpt2")
    patterns = dict(rank_pattern=_RANKS[model], alpha_pattern=_ALPHAS[model])
    return {
        "lora": ("LoraConfig", dict(linear, r=2, lora_alpha=6, **patterns)),
        "rslora": ("LoraConfig", dict(linear, r=3, lora_alpha=4, use_rslora=True)),
        "dora": ("LoraConfig", dict(linear, r=2, lora_alpha=3, use_dora=True, target_modules=_DORA[model])),
        "ia3": ("IA3Config", dict(_IA3[model], fan_in_fan_out=model == "gpt2")),
        "prompt": ("PromptTuningConfig", dict(num_virtual_tokens=VIRTUAL)),
        "prefix": ("PrefixTuningConfig", dict(num_virtual_tokens=VIRTUAL)),
        "projection": (
            "PrefixTuningConfig",
            dict(num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=5),
        ),
    }


# (model, adapter) -> (class of PEFT's config, its arguments).
CASES = {(model, name): case for model in MODELS for name, case in _cases(model).items()}


def tokens() -> np.ndarray:
    """int32 [2, T + 1]."""
    return np.random.RandomState(3).randint(0, VOCAB, (2, LENGTH + 1)).astype(np.int32)


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a tensor of an adapter holds, from its name and shape alone: nothing is near what it begins with."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    around = 1.0 if name.endswith(("ia3_l", "magnitude_vector")) else 0.0
    return (around + 0.4 * normal).astype(np.float32)


def write_adapter(path: Path, about: dict[str, Any], **changes: Any) -> Path:
    """Writes an adapter directory as PEFT does, with changes to its config."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(about["adapter"] | changes))
    tensors = {name: value(name, tuple(shape)) for name, shape in about["tensors"].items()}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def joined(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """All numbers of some tensors in one row, by name."""
    return np.concatenate([np.asarray(tensors[name], np.float32).reshape(-1) for name in sorted(tensors)])
