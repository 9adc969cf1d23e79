"""Floating-point operations a token of a decoder transformer, and the share of the peak that a run reaches.

The count follows Kaplan et al. (arXiv:2001.08361) and PaLM's appendix B (arXiv:2204.02311), with causal
attention counted once. A training step costs three forward passes (one forward, two backward):

  a token = 6 * (matrix parameters, the head included, the embedding table not) + attention
  attention = sum over layers of 12 * num_heads * head_dim * keys
  keys = T / 2 for causal attention over T tokens, W - W^2 / (2 T) in a sliding window of W < T

12 is 2 products (scores, values) times 2 operations times 3 passes. PaLM counts keys = T, twice as much as
causal attention needs. Norms, activations, the softmax, dropout, recomputation (remat) and the optimizer are
not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Dense bfloat16 operations a second that the makers state, by a part of `jax.Device.device_kind` in lower
# case. The first match counts, so that longer names stand before their beginnings.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("gh200", 989e12),
    ("h200", 989e12),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h800", 989e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("a40", 150e12),
    ("a30", 165e12),
    ("a10g", 70e12),
    ("a10", 125e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("rtx 4090", 165e12),
    ("rtx 3090", 71e12),
    ("tpu v6 lite", 918e12),
    ("tpu v6e", 918e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5p", 459e12),
    ("tpu v5", 459e12),
    ("tpu v4 lite", 137e12),
    ("tpu v4", 275e12),
    ("tpu v3", 61.5e12),  # a JAX device is one of the two cores of a chip
    ("tpu v2", 22.5e12),
)


def matmul_parameters(
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    gated_mlp: bool,
) -> int:
    """The number of parameters that multiply every token: attention, MLP and head matrices.

    The head counts whether or not it is tied to the embedding table; looking a token up in that table costs
    nothing.

    >>> matmul_parameters(vocab_size=50257, num_layers=12, embed_dim=768, num_heads=12, num_kv_heads=12,
    ...                   head_dim=64, mlp_dim=3072, gated_mlp=False)
    123532032
    """
    attention = embed_dim * head_dim * (2 * num_heads + 2 * num_kv_heads)
    mlp = (3 if gated_mlp else 2) * embed_dim * mlp_dim
    return num_layers * (attention + mlp) + vocab_size * embed_dim


def flops_per_token(
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    gated_mlp: bool,
    context_length: int,
    window: int | Sequence[int | None] | None = None,
) -> float:
    """Floating-point operations of one token in a training step, by the formula of this module.

    Args:
      context_length: tokens in a row, T. Rows packed with several documents attend to less than this says.
      window: width of sliding-window attention, for all layers or for each; None for full causal attention.

    >>> gpt2 = dict(vocab_size=50257, num_layers=12, embed_dim=768, num_heads=12, num_kv_heads=12,
    ...             head_dim=64, mlp_dim=3072, gated_mlp=False)
    >>> flops_per_token(**gpt2, context_length=1024) == 6 * 123532032 + 12 * 12 * 768 * 512
    True
    """
    parameters = matmul_parameters(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        gated_mlp=gated_mlp,
    )
    windows = [window] * num_layers if window is None or isinstance(window, int) else list(window)
    if len(windows) != num_layers:
        raise ValueError(f"{len(windows)} windows for {num_layers} layers")
    T = context_length
    reach = (min(w or T, T) for w in windows)
    keys = sum(w - w * w / (2 * T) for w in reach)
    return 6.0 * parameters + 12.0 * num_heads * head_dim * keys


def peak_flops(device: Any = None) -> float | None:
    """Dense bfloat16 operations a second of a device (default: the first); None for unknown hardware.

    Args:
      device: a `jax.Device`, or its `device_kind`.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("TPU v5 lite"), peak_flops("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    if device is None:
        import jax

        device = jax.devices()[0]
    kind = (device if isinstance(device, str) else device.device_kind).lower()
    return next((peak for name, peak in _PEAKS if name in kind), None)


def mfu(
    tokens_per_second: float, flops_per_token: float | None, num_devices: int = 1, peak: float | None = None
) -> float | None:
    """Model FLOPs utilization: tokens/s * FLOPs a token / the peak of all devices; None if one is unknown.

    >>> mfu(500_000, 0.8e9, num_devices=1, peak=1e15)
    0.4
    """
    if flops_per_token is None or peak is None:
        return None
    return tokens_per_second * flops_per_token / (peak * num_devices)
