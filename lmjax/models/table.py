"""The bigram table: the smallest policy, whose whole behaviour can be written down."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmjax.batch import Fork
from lmjax.models.config import BigramConfig
from lmjax.models.decoder import Head, ModelOutputs, Variables


class Bigram:
    """Logits after a token are its row of a V x V table. See `BigramConfig`."""

    def __init__(self, config: BigramConfig):
        self.config = config

    def init(self, key: jax.Array) -> Variables:
        V = self.config.vocab_size
        return {"params": {"table": self.config.init_std * jax.random.normal(key, (V, V), jnp.float32)}}

    def init_cache(self, batch_size: int, length: int, spec: Any = None, slack: int = 0) -> Variables:
        """The last token is all that matters, so there is nothing to keep but how many there were."""
        return {"count": jnp.zeros((batch_size,), jnp.int32)}

    def apply(
        self,
        variables: Variables,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        *,
        rng: jax.Array | None = None,
        train: bool = False,
        fork: Fork | None = None,
        shared: jax.Array | None = None,
    ) -> ModelOutputs:
        hidden = jnp.take(variables["params"]["table"], tokens_BT, axis=0)
        cache = variables.get("cache")
        if cache is not None:
            cache = {"count": cache["count"] + jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)}
        return ModelOutputs(hidden, {}, cache)

    def head(self, variables: Variables) -> Head:
        return Head(None)

    def logical_axes(self, variables: Variables) -> Variables:
        axes: Any = {"params": {"table": (None, "vocab")}}
        return axes

    @property
    def units(self) -> dict[str, int]:
        return {}
