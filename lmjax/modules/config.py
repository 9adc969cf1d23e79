"""What a decoder is made of, as data. Importable without JAX, so that a command line can be checked at once."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lmjax.errors import UserError

Activation = Literal["gelu", "gelu_erf", "relu", "silu"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length they were trained at.

    Attributes:
      kind: "linear" divides every position by `factor` (position interpolation, arXiv:2306.15595); "llama3" leaves
        short wavelengths, divides long ones and blends between (Llama 3.1); "yarn" ramps by the number of rotations
        and scales the attention (arXiv:2309.00071).
      factor: extended length over original length.
      original_length: the length in tokens that the frequencies were trained for (llama3, yarn).
      low_frequency_factor, high_frequency_factor: ends of Llama 3's blend, in rotations over the original length.
      beta_fast, beta_slow: ends of YaRN's ramp, in rotations over the original length.
      attention_factor: multiplies cos and sin under YaRN; None takes `0.1 ln(factor) + 1`, or the ratio of
        `mscale` to `mscale_all_dim` where both are given.
      mscale, mscale_all_dim: DeepSeek's form of the attention factor.
      truncate: YaRN: whether the ends of the ramp are rounded to whole dimensions.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = 1.0
    original_length: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
      vocab_size: V, number of token ids.
      num_layers, embed_dim, num_heads: depth, D, H.
      num_kv_heads: key/value heads (None: as many as `num_heads`; 1: multi-query; in between: grouped-query).
      head_dim: K, width of a head (None: `embed_dim / num_heads`).
      mlp_dim: hidden width of the MLP (None: 4 D, or 8/3 D rounded up to a multiple of 32 when gated).
      max_length: longest sequence in tokens; the size of the table of learned positions.
      position: "rope" (rotary, half-split layout), "learned" or "none".
      rope_theta, rope_scaling: base of the rotary frequencies and their stretching.
      local_rope_theta: another, unscaled base for the layers with a sliding window (Gemma 3); None: `rope_theta`.
      norm: "rms" or "layer", with `norm_eps`; statistics are always float32 and two-pass.
      norm_bias: whether LayerNorm has a bias.
      norm_position: "pre" (before each sublayer), "post" (after the residual add, as in the first transformer) or
        "sandwich" (before and after each sublayer, as in Gemma 2).
      norm_unit_offset: RMSNorm scales by `1 + scale` (Gemma) instead of `scale`.
      qk_norm: RMSNorm over the head width of queries and keys, before the rotation.
      qkv_bias, output_bias, mlp_bias: biases of the attention projections, attention output and MLP.
      activation, gated: MLP is `down(f(up x))`, or `down(f(gate x) * up x)` when gated (SwiGLU: silu; GEGLU: gelu).
        "gelu" is the tanh form, "gelu_erf" the exact one.
      window: a layer with a sliding window sees the last `window` tokens, itself included. None: all.
      window_pattern: which layers have the window, repeated over the depth: (True, False) is every other layer.
      query_scale: multiplies queries (None: `head_dim ** -0.5`).
      attention_softcap, logit_softcap: `c * tanh(x / c)` on attention scores and on logits.
      logit_scale: multiplies logits, before the softcap.
      embed_scale: multiplies the token embeddings (Gemma: `sqrt(embed_dim)`).
      tied_embeddings: the head is the transposed embedding table.
      dropout: rate on embeddings, and on the output of each sublayer, while training.
      init_std: standard deviation of the initial weights (None: `embed_dim ** -0.5`); output projections are
        divided by `sqrt(2 num_layers)` besides (GPT-2).
      layers: "unrolled", "scanned", or "auto" (scanned from 13 layers on). Checkpoints do not depend on it.
      remat: what the backward pass recomputes: "none", "attention" (scores and their softmax), "dots" (all but matrix
        products) or "full" (whole layers).
      dtype: type of activations and of matrix products ("float32" or "bfloat16"); parameters, softmax, norms and
        log-probabilities stay float32.
      attention: "xla", "cudnn", or "auto": cuDNN on an NVIDIA GPU where the shapes allow it, XLA elsewhere.
    """

    vocab_size: int
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    max_length: int = 1024
    position: Literal["rope", "learned", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    norm_unit_offset: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    gated: bool = True
    window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    embed_scale: float = 1.0
    tied_embeddings: bool = True
    dropout: float = 0.0
    init_std: float | None = 0.02
    layers: Literal["auto", "unrolled", "scanned"] = "auto"
    remat: Literal["none", "attention", "dots", "full"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "xla", "cudnn"] = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number of at least 1.")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise UserError(
                f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}; change one or set head_dim."
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}; change one of them."
            )
        if self.position == "rope" and self.head_width % 2:
            raise UserError(f"rotary positions need an even head_dim, not {self.head_width}; change it or position.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout is {self.dropout}; give a rate from 0 up to, not including, 1.")
        if self.window is not None and self.window < 1:
            raise UserError(f"window is {self.window}; give at least 1 token, or None for full attention.")
        if not self.window_pattern:
            raise UserError("window_pattern is empty; give at least one entry, such as (True,).")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        if self.mlp_dim is not None:
            return self.mlp_dim
        return -(-8 * self.embed_dim // 3 // 32) * 32 if self.gated else 4 * self.embed_dim

    @property
    def scanned(self) -> bool:
        return self.layers == "scanned" or (self.layers == "auto" and self.num_layers > 12)

    def windowed(self, layer: int) -> bool:
        """Whether layer `layer` has the sliding window."""
        return self.window is not None and self.window_pattern[layer % len(self.window_pattern)]
