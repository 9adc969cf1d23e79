"""The model types of transformers: how the `config.json` of each is read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lmjax.errors import UserError
from lmjax.interop.huggingface_fields import FULL, SLIDING, Fields
from lmjax.interop.huggingface_rope import read_rope, scaling_from_parameters, write_rope
from lmjax.modules.config import DecoderConfig


def shortest_pattern(windowed: list[bool]) -> tuple[bool, ...]:
    """The shortest pattern that repeats to the given layers."""
    count = len(windowed)
    fits = (p for p in range(1, count + 1) if all(windowed[i] == windowed[i % p] for i in range(count)))
    return tuple(windowed[: next(fits)])


def _windows(fields: Fields, window: int | None, default: list[str]) -> dict[str, Any]:
    """Sliding windows from `layer_types`, or from the family's rule where the file has none."""
    types = fields.get("layer_types") or default
    if unknown := sorted(set(types) - {SLIDING, FULL}):
        raise UserError(f"config.json: layer_types has {unknown[0]!r}; lmjax knows {SLIDING} and {FULL}.")
    if len(types) != len(default):
        raise UserError(f"config.json: layer_types has {len(types)} entries for {len(default)} layers.")
    windowed = [kind == SLIDING for kind in types]
    if not any(windowed):
        return {}
    if window is None:
        raise UserError(
            f"config.json: layer_types asks for {SLIDING}, but no sliding_window is in force; set one."
        )
    return {"window": window, "window_pattern": shortest_pattern(windowed)}


def _read_common(
    fields: Fields, *, activation: str = "hidden_act", default: str = "silu", tied: bool = False
) -> dict[str, Any]:
    """What the families after GPT-2 share."""
    heads = fields.integer("num_attention_heads")
    return dict(
        vocab_size=fields.integer("vocab_size"),
        num_layers=fields.integer("num_hidden_layers"),
        embed_dim=fields.integer("hidden_size"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=None if fields.get("head_dim") is None else fields.integer("head_dim"),
        mlp_dim=fields.integer("intermediate_size"),
        max_length=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.activation(activation, default),
        gated=True,
        tied_embeddings=fields.flag("tie_word_embeddings", tied),
        init_std=fields.number("initializer_range", 0.02),
    )


def _write_common(config: DecoderConfig, activation: str = "hidden_act") -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        activation: _activation_name(config.activation, "gelu_pytorch_tanh"),
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": initial_std(config),
    }


def initial_std(config: DecoderConfig) -> float:
    return config.embed_dim**-0.5 if config.init_std is None else config.init_std


def _activation_name(activation: str, tanh: str) -> str:
    return {"gelu": tanh, "gelu_erf": "gelu"}.get(activation, activation)


def _layer_types(config: DecoderConfig) -> list[str]:
    return [SLIDING if config.windowed(i) else FULL for i in range(config.num_layers)]


def _read_gpt2(fields: Fields) -> dict[str, Any]:
    fields.refuse(
        "scale_attn_by_inverse_layer_idx", False, "lmjax does not scale attention by the layer's index"
    )
    fields.refuse("add_cross_attention", False, "lmjax has no cross-attention")
    for name in list(fields.raw):
        if name.startswith("summary_"):  # the classification head, which a language model has not
            fields.get(name)
    width = fields.integer("n_embd")
    return dict(
        vocab_size=fields.integer("vocab_size"),
        num_layers=fields.integer("n_layer"),
        embed_dim=width,
        num_heads=fields.integer("n_head"),
        mlp_dim=fields.integer("n_inner", 4 * width),
        max_length=fields.integer("n_positions", 1024),
        position="learned",
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.activation("activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        query_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        init_std=fields.number("initializer_range", 0.02),
    )


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _activation_name(config.activation, "gelu_new"),
        "scale_attn_weights": config.query_scale is None,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": initial_std(config),
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _read_llama(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    biases = dict(qkv_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
    return _read_common(fields) | biases | read_rope(fields)


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return _write_common(config) | biases | write_rope(config)


def _read_mistral(fields: Fields) -> dict[str, Any]:
    window = fields.optional("sliding_window", 4096)
    return _read_common(fields) | read_rope(fields) | {"window": None if window is None else int(window)}


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return _write_common(config) | write_rope(config) | {"sliding_window": config.window}


def _read_qwen(fields: Fields) -> dict[str, Any]:
    common = _read_common(fields) | read_rope(fields)
    fields.refuse("use_mrope", False, "lmjax has no multimodal positions")
    window = fields.optional("sliding_window", 4096)
    window = int(window) if window is not None and fields.flag("use_sliding_window", False) else None
    full = common["num_layers"] if window is None else fields.integer("max_window_layers", 28)
    fields.get("max_window_layers")
    types = [FULL if i < full else SLIDING for i in range(common["num_layers"])]
    return common | _windows(fields, window, types)


def _write_qwen(config: DecoderConfig) -> dict[str, Any]:
    types = _layer_types(config)
    return (
        _write_common(config)
        | write_rope(config)
        | {
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
            "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
            "layer_types": types,
        }
    )


def _read_qwen2(fields: Fields) -> dict[str, Any]:
    return _read_qwen(fields) | dict(qkv_bias=True)


def _read_qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    found = _read_qwen(fields) | dict(qk_norm=True, qkv_bias=bias, output_bias=bias)
    return found | {"head_dim": found["head_dim"] or 128}


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _write_qwen(config) | {"attention_bias": config.qkv_bias}


def _read_gemma(fields: Fields, period: int) -> dict[str, Any]:
    fields.refuse("use_bidirectional_attention", False, "lmjax attends causally")
    fields.get("hidden_act")  # these families read hidden_activation
    common = _read_common(fields, activation="hidden_activation", default="gelu_pytorch_tanh", tied=True)
    bias = fields.flag("attention_bias", False)
    types = [FULL if (i + 1) % period == 0 else SLIDING for i in range(common["num_layers"])]
    window = fields.optional("sliding_window", 4096)
    return (
        common
        | _windows(fields, None if window is None else int(window), types)
        | dict(
            norm_position="sandwich",
            norm_unit_offset=True,
            qkv_bias=bias,
            output_bias=bias,
            head_dim=common["head_dim"] or 256,
            query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            embed_scale=common["embed_dim"] ** 0.5,
        )
    )


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    scale = config.head_width**-0.5 if config.query_scale is None else config.query_scale
    return _write_common(config, "hidden_activation") | {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": config.window or config.max_length,
        "layer_types": _layer_types(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _read_gemma2(fields: Fields) -> dict[str, Any]:
    softcaps = dict(
        attention_softcap=fields.optional("attn_logit_softcapping", 50.0),
        logit_softcap=fields.optional("final_logit_softcapping", 30.0),
    )
    return _read_gemma(fields, 2) | softcaps | read_rope(fields)


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return _write_gemma(config) | write_rope(config)


def _read_gemma3(fields: Fields) -> dict[str, Any]:
    # transformers stores this cap and never applies it, so that no meaning can be kept.
    fields.refuse("attn_logit_softcapping", None, "transformers does not apply it in Gemma 3; remove it")
    found = _read_gemma(fields, fields.integer("sliding_window_pattern", 6))
    found |= dict(qk_norm=True, logit_softcap=fields.optional("final_logit_softcapping"))
    nested = dict(fields.get("rope_parameters") or {})
    if unknown := sorted(set(nested) - {SLIDING, FULL}):
        raise UserError(f"config.json: rope_parameters has {unknown[0]!r}; Gemma 3 has {FULL} and {SLIDING}.")
    full = (nested.get(FULL) or {}) | (fields.get("rope_scaling") or {})
    theta, scaling = scaling_from_parameters(full, fields.number("rope_theta", 1e6), found["max_length"])
    local = scaling_from_parameters(
        nested.get(SLIDING) or {}, fields.number("rope_local_base_freq", 1e4), found["max_length"]
    )
    found |= dict(rope_theta=theta, rope_scaling=scaling)
    if local == (theta, scaling) or "window" not in found:
        return found
    if local[1] is not None:
        raise UserError("config.json: sliding layers with a RoPE scaling of their own are not supported.")
    return found | {"local_rope_theta": local[0]}


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    full = write_rope(config)["rope_parameters"]
    local = dict(full)
    if config.local_rope_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return _write_gemma(config) | {"rope_parameters": {FULL: full, SLIDING: local}}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers: its class, and the two directions of its config."""

    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]


# In the order in which an export tries them.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", _read_gpt2, _write_gpt2),
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", _read_gemma3, _write_gemma3),
}
