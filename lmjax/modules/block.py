"""One transformer layer: attention and MLP, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from lmjax.modules import adapted
from lmjax.modules.attention import Attention, Context
from lmjax.modules.cache import LayerCache
from lmjax.modules.config import DecoderConfig
from lmjax.modules.mlp import MLP
from lmjax.modules.norms import Norm


def norm_like(config: DecoderConfig, name: str) -> Norm:
    """The norm this config names."""
    return Norm(config.norm, config.norm_eps, config.norm_bias, config.norm_unit_offset, name=name)


class Block(nn.Module):
    """[N, D] -> [N, D], with norms before ("pre"), after the sum ("post") or on both sides ("sandwich")."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, context: Context, cache: LayerCache | None = None, train: bool = False
    ) -> tuple[jax.Array, LayerCache | None]:
        dropout = nn.Dropout(self.config.dropout, deterministic=not train)
        attention = Attention(self.config, name="attention")

        def attend(y_ND: jax.Array) -> jax.Array:
            nonlocal cache
            y_ND, cache = attention(y_ND, context, cache)
            return y_ND

        x_ND = self._residual("attention", attend, x_ND, dropout)
        x_ND = self._residual("mlp", MLP(self.config, name="mlp"), x_ND, dropout)
        return x_ND, cache

    def _residual(
        self, name: str, sublayer: Callable[[jax.Array], jax.Array], x_ND: jax.Array, dropout: nn.Module
    ) -> jax.Array:
        norm, place = norm_like(self.config, f"{name}_norm"), self.config.norm_position
        y_ND = sublayer(x_ND if place == "post" else norm(x_ND))
        if place == "sandwich":
            y_ND = norm_like(self.config, f"{name}_post_norm")(y_ND)
        sum_ND = x_ND + dropout(adapted.bottleneck(self, name, y_ND, x_ND))
        return norm(sum_ND) if place == "post" else sum_ND
