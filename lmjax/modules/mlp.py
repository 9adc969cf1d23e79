"""The feed-forward sublayer, plain or gated (arXiv:2002.05202)."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax

from lmjax.modules.config import DecoderConfig
from lmjax.modules.dense import Dense

_GELU_SLOPE, _GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """`x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` (arXiv:1606.08415), as `x sigmoid(...)`, which is the same.

    Its derivative is written out, so that a training step keeps one array of it instead of the parts of a tanh.
    """
    return x * jax.nn.sigmoid(_GELU_SLOPE * x * (1 + _GELU_CUBIC * x * x))


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    gate = jax.nn.sigmoid(_GELU_SLOPE * x * (1 + _GELU_CUBIC * x * x))
    slope = gate * (1 + x * (1 - gate) * _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * x * x))
    return x * gate, slope.astype(x.dtype) * dx


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class MLP(nn.Module):
    """`down(f(up x))`, or `down(f(gate x) * up x)` when gated. [N, D] -> [N, D]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        config, std = self.config, initial_std(self.config)
        dense = functools.partial(Dense, use_bias=config.mlp_bias, dtype=config.dtype)
        hidden = dense(config.mlp_width, init_std=std, name="up")(x_ND)
        activate = ACTIVATIONS[config.activation]
        if config.gated:
            hidden = activate(dense(config.mlp_width, init_std=std, name="gate")(x_ND)) * hidden
        else:
            hidden = activate(hidden)
        return dense(config.embed_dim, init_std=output_std(config), name="down")(hidden)


def initial_std(config: DecoderConfig) -> float:
    """Standard deviation of the initial weights."""
    return config.embed_dim**-0.5 if config.init_std is None else config.init_std


def output_std(config: DecoderConfig) -> float:
    """The same for projections that add into the residual stream, which has 2 num_layers such sums (GPT-2)."""
    return initial_std(config) / (2 * config.num_layers) ** 0.5
