"""The published decoder families as configs, and their released sizes by name.

A family function gives the family's traits and takes any field of `DecoderConfig` besides; `preset("qwen3-0.6b")` gives
a released model. Values are those of the models' published `config.json` files.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from lmjax.errors import UserError
from lmjax.models.config import BigramConfig, DecoderConfig, RopeScaling


def bigram(vocab_size: int, **fields: Any) -> BigramConfig:
    """A table of logits per previous token."""
    return BigramConfig(vocab_size, **fields)


def _family(traits: dict[str, Any]) -> Callable[..., DecoderConfig]:
    def family(vocab_size: int, **fields: Any) -> DecoderConfig:
        return DecoderConfig(**(traits | {"vocab_size": vocab_size} | fields))

    return family


gpt2 = _family(
    dict(
        position="learned", norm="layer", activation="gelu", gated=False, qkv_bias=True, output_bias=True, mlp_bias=True
    )
)
llama = _family(dict(tied_embeddings=False))
mistral = llama
qwen2 = _family(dict(qkv_bias=True, norm_eps=1e-6, rope_theta=1e6))
qwen3 = _family(dict(qk_norm=True, norm_eps=1e-6, rope_theta=1e6))
_GEMMA: dict[str, Any] = dict(norm_position="sandwich", norm_unit_offset=True, norm_eps=1e-6, activation="gelu")


def gemma2(vocab_size: int, **fields: Any) -> DecoderConfig:
    """Gemma 2: every other layer local, softcaps on scores and logits, embeddings scaled by sqrt(D)."""
    traits = _GEMMA | dict[str, Any](
        window=4096, window_pattern=(True, False), attention_softcap=50.0, logit_softcap=30.0
    )
    return _scaled_embeddings(DecoderConfig(**(traits | {"vocab_size": vocab_size} | fields)), fields)


def gemma3(vocab_size: int, **fields: Any) -> DecoderConfig:
    """Gemma 3: five local layers to a global one, each kind with its own RoPE base, QK-norm."""
    traits = _GEMMA | dict[str, Any](
        window=512, window_pattern=(True,) * 5 + (False,), qk_norm=True, rope_theta=1e6, local_rope_theta=1e4
    )
    return _scaled_embeddings(DecoderConfig(**(traits | {"vocab_size": vocab_size} | fields)), fields)


def _scaled_embeddings(config: DecoderConfig, given: dict[str, Any]) -> DecoderConfig:
    return config if "embed_scale" in given else dataclasses.replace(config, embed_scale=config.embed_dim**0.5)


def small(vocab_size: int, **fields: Any) -> DecoderConfig:
    """Ours, for a laptop: pre-norm RMSNorm, RoPE, QK-norm, SwiGLU, tied embeddings."""
    return DecoderConfig(**(dict[str, Any](qk_norm=True) | {"vocab_size": vocab_size} | fields))


def _shape(
    num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int | None, mlp_dim: int | None, **more: Any
) -> dict[str, Any]:
    return dict(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=mlp_dim,
        **more,
    )


_LLAMA31 = RopeScaling("llama3", factor=8.0)
_LLAMA32 = RopeScaling("llama3", factor=32.0)

PRESETS: dict[str, Callable[[], DecoderConfig]] = {
    "small-3m": lambda: small(512, **_shape(4, 256, 4, None, None, max_length=512)),
    "small-25m": lambda: small(8192, **_shape(8, 448, 7, None, None)),
    "gpt2": lambda: gpt2(50257, **_shape(12, 768, 12, None, None)),
    "gpt2-medium": lambda: gpt2(50257, **_shape(24, 1024, 16, None, None)),
    "gpt2-large": lambda: gpt2(50257, **_shape(36, 1280, 20, None, None)),
    "gpt2-xl": lambda: gpt2(50257, **_shape(48, 1600, 25, None, None)),
    "llama2-7b": lambda: llama(32000, **_shape(32, 4096, 32, None, 11008, max_length=4096)),
    "llama2-13b": lambda: llama(32000, **_shape(40, 5120, 40, None, 13824, max_length=4096)),
    "llama3-8b": lambda: llama(128256, **_shape(32, 4096, 32, 8, 14336, max_length=8192, rope_theta=5e5)),
    "llama3.1-8b": lambda: llama(
        128256, **_shape(32, 4096, 32, 8, 14336, max_length=131072, rope_theta=5e5, rope_scaling=_LLAMA31)
    ),
    "llama3.2-1b": lambda: llama(
        128256,
        **_shape(16, 2048, 32, 8, 8192, max_length=131072, rope_theta=5e5, rope_scaling=_LLAMA32, tied_embeddings=True),
    ),
    "llama3.2-3b": lambda: llama(
        128256,
        **_shape(
            28, 3072, 24, 8, 8192, max_length=131072, rope_theta=5e5, rope_scaling=_LLAMA32, tied_embeddings=True
        ),
    ),
    "mistral-7b": lambda: mistral(32000, **_shape(32, 4096, 32, 8, 14336, max_length=32768, window=4096)),
    "qwen2.5-0.5b": lambda: qwen2(151936, **_shape(24, 896, 14, 2, 4864, max_length=32768)),
    "qwen2.5-1.5b": lambda: qwen2(151936, **_shape(28, 1536, 12, 2, 8960, max_length=131072)),
    "qwen2.5-3b": lambda: qwen2(151936, **_shape(36, 2048, 16, 2, 11008, max_length=32768)),
    "qwen2.5-7b": lambda: qwen2(152064, **_shape(28, 3584, 28, 4, 18944, max_length=131072, tied_embeddings=False)),
    "qwen3-0.6b": lambda: qwen3(151936, **_shape(28, 1024, 16, 8, 3072, head_dim=128, max_length=40960)),
    "qwen3-1.7b": lambda: qwen3(151936, **_shape(28, 2048, 16, 8, 6144, head_dim=128, max_length=40960)),
    "qwen3-4b": lambda: qwen3(151936, **_shape(36, 2560, 32, 8, 9728, head_dim=128, max_length=40960)),
    "qwen3-8b": lambda: qwen3(
        151936, **_shape(36, 4096, 32, 8, 12288, head_dim=128, max_length=40960, tied_embeddings=False)
    ),
    "gemma2-2b": lambda: gemma2(256000, **_shape(26, 2304, 8, 4, 9216, head_dim=256, max_length=8192)),
    "gemma2-9b": lambda: gemma2(256000, **_shape(42, 3584, 16, 8, 14336, head_dim=256, max_length=8192)),
    "gemma3-270m": lambda: gemma3(262144, **_shape(18, 640, 4, 1, 2048, head_dim=256, max_length=32768)),
    "gemma3-1b": lambda: gemma3(262144, **_shape(26, 1152, 4, 1, 6912, head_dim=256, max_length=32768)),
}


def preset(name: str) -> DecoderConfig:
    """The config of a released model.

    Raises:
      UserError: the name is unknown; the nearest one is suggested.

    >>> preset("gpt2").embed_dim
    768
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}."
        raise UserError(f"no preset is named {name!r}; {hint}")
    return PRESETS[name]()
