"""Small random models of every family, the same in transformers and here, without committing a single weight.

Weights are drawn from their names and shapes; only the logits that transformers computed are stored, at the
positions below. Weights are large enough for attention to be far from uniform: a wrong angle or mask shows.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).with_name("huggingface_logits.npz")
LENGTH, VOCAB = 4096, 64
_FAR = [15, 31, 63, 100, 127, 255, 511, 777, 1023, 1500, 2047, 2500, 3071, 3500]
POSITIONS = [*range(9), *_FAR, *range(4088, 4096)]
SLIDING, FULL = "sliding_attention", "full_attention"

_SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=LENGTH,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_ROPE_1M = dict(rope_type="default", rope_theta=1000000.0)
_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024)
_GEMMA = dict(_SHAPE, head_dim=16, sliding_window=100, hidden_activation="gelu_pytorch_tanh")

# Name -> config.json entries.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        model_type="gpt2", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH,
        bos_token_id=None, eos_token_id=None,
    ),
    "llama2": dict(_SHAPE, model_type="llama"),
    "llama3": dict(
        _SHAPE, model_type="llama",
        rope_parameters=dict(_LLAMA3, rope_type="llama3", rope_theta=500000.0),
        tie_word_embeddings=True,
    ),
    "llama_linear": dict(
        _SHAPE, model_type="llama",
        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0),
        attention_bias=True, mlp_bias=True,
    ),
    "llama_yarn": dict(_SHAPE, model_type="llama", rope_parameters=dict(_YARN, rope_theta=10000.0)),
    "qwen2": dict(_SHAPE, model_type="qwen2", rope_parameters=_ROPE_1M),
    "qwen2_yarn_window": dict(
        _SHAPE, model_type="qwen2", rope_parameters=dict(_YARN, rope_theta=1e6), use_sliding_window=True,
        sliding_window=100, max_window_layers=1,
    ),
    "qwen3": dict(
        _SHAPE, model_type="qwen3", head_dim=24, rope_parameters=_ROPE_1M, tie_word_embeddings=True,
    ),
    "mistral": dict(_SHAPE, model_type="mistral", sliding_window=100),
    "gemma2": dict(_GEMMA, model_type="gemma2", query_pre_attn_scalar=24),
    "gemma3": dict(
        _GEMMA, model_type="gemma3_text", query_pre_attn_scalar=16, num_hidden_layers=3,
        layer_types=[SLIDING, SLIDING, FULL],
        rope_parameters={
            SLIDING: dict(rope_type="default", rope_theta=10000.0),
            FULL: dict(rope_type="linear", factor=8.0, rope_theta=1000000.0),
        },
    ),
}  # fmt: skip


def tokens(length: int = LENGTH) -> np.ndarray:
    """int32 [1, length]."""
    return np.random.RandomState(0).randint(0, VOCAB, (1, LENGTH)).astype(np.int32)[:, :length]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a tensor of transformers, from its name and shape alone. RandomState is frozen."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        scaled = 0.2 * normal + (0.5 if "norm" in name or ".ln_" in name else 0.0) * name.endswith("weight")
    elif "embed" in name or ".wte" in name or "lm_head" in name:
        scaled = 0.5 * normal
    elif ".wpe" in name:
        scaled = 0.2 * normal
    else:
        sharp = any(part in name for part in ("q_proj", "k_proj", "c_attn"))
        scaled = (2.0 if sharp else 1.0) * normal / shape[-1] ** 0.5
    return scaled.astype(np.float32)


def write_directory(path: Path, config: dict[str, Any], shapes: dict[str, list[int]], **changes: Any) -> Path:
    """Writes a model directory as transformers does."""
    from safetensors.numpy import save_file

    (path / "config.json").write_text(json.dumps(config | changes))
    tensors = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    return path
