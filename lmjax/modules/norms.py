"""RMSNorm and LayerNorm, with float32 two-pass statistics."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis (arXiv:1910.07467); float32 inside, x's type outside."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis (arXiv:1607.06450).

    The variance is taken about the mean in a second pass: E[x^2] - E[x]^2 loses all digits when the mean is large.
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


class Norm(nn.Module):
    """The norm that a config names, over the last axis.

    Attributes:
      kind: "rms" or "layer".
      eps: added to the mean square or the variance.
      use_bias: LayerNorm only.
      unit_offset: scale by `1 + scale`, with `scale` starting at 0.
    """

    kind: str = "rms"
    eps: float = 1e-5
    use_bias: bool = True
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        scale = 1.0 + scale if self.unit_offset else scale
        if self.kind == "rms":
            return rms_norm(x, scale, self.eps)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32) if self.use_bias else None
        return layer_norm(x, scale, bias, self.eps)
