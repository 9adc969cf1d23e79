"""The matrix product every layer is made of."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmjax.modules import adapted, quantized


class Dense(nn.Module):
    """`x @ kernel + bias` on flattened activations [N, in] -> [N, out].

    Two dimensions on purpose: on CPU, XLA wraps transposing copies around three-dimensional products in the backward
    pass, which costs a quarter of a training step.

    Attributes:
      features: out.
      use_bias: whether there is a bias.
      init_std: standard deviation of the initial kernel.
      dtype: type of the product; parameters are float32.
    """

    features: int
    use_bias: bool = False
    init_std: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        x_ND = adapted.scaled(self, "input", x_ND.astype(dtype))
        weight = quantized.weight(self)
        if weight is None:
            initial = nn.initializers.normal(self.init_std)
            weight = self.param("kernel", initial, (x_ND.shape[-1], self.features), jnp.float32).astype(dtype)
        y = adapted.product(self, x_ND, weight)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(dtype)
        return adapted.scaled(self, "output", y)
