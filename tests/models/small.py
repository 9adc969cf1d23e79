"""One tiny model of every family, with the traits of its preset, and its forward pass."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.models import Decoder, gemma2, gemma3, gpt2, llama, mistral, qwen2, qwen3, stack_layers
from lmjax.modules.config import DecoderConfig, RopeScaling

VOCAB = 19
_SHAPE: dict[str, Any] = dict(
    num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, max_length=32, layers="unrolled", init_std=0.3
)
FAMILIES: dict[str, DecoderConfig] = {
    "gpt2": gpt2(VOCAB, **_SHAPE | dict(num_kv_heads=None)),
    "llama": llama(VOCAB, **_SHAPE, rope_scaling=RopeScaling("llama3", 8.0, 16)),
    "mistral": mistral(VOCAB, **_SHAPE, window=3),
    "qwen2": qwen2(VOCAB, **_SHAPE),
    "qwen3": qwen3(VOCAB, **_SHAPE, head_dim=8),
    "gemma2": gemma2(VOCAB, **_SHAPE | dict(window=3)),
    "gemma3": gemma3(VOCAB, **_SHAPE | dict(window=3, window_pattern=(True, False), num_kv_heads=1)),
    "post-norm": DecoderConfig(VOCAB, **_SHAPE, norm="layer", norm_position="post", position="none"),
}


def scanned(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(config, layers="scanned")


@functools.cache
def variables_of(config: DecoderConfig) -> Any:
    """Random variables of a config, the same in either layout: no bias is 0 and no norm is the identity."""
    if config.scanned:
        return stack_layers(variables_of(dataclasses.replace(config, layers="unrolled")))
    random = np.random.RandomState(1)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = random.standard_normal(leaf.shape)
        one = path[-1].key == "scale"
        return (noise * (0.3 if leaf.ndim > 1 else 0.1) + one).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(Decoder(config).init, jax.random.key(0)))


def logits_from(config: DecoderConfig, variables: Any, hidden: jax.Array) -> jax.Array:
    head = Decoder(config).head(variables)
    logits = head.scale * jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), head.weight)
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)


def forward(config: DecoderConfig, variables: Any, tokens, segments=None, positions=None) -> jax.Array:
    """Logits [B, T, V]; by default one document a row."""
    segments = np.ones_like(tokens) if segments is None else segments
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return _forward(config, variables, tokens, segments, positions)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: DecoderConfig, variables: Any, tokens, segments, positions) -> jax.Array:
    return logits_from(config, variables, Decoder(config).apply(variables, tokens, segments, positions).hidden)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(config: DecoderConfig, variables: Any, tokens) -> tuple[jax.Array, Any]:
    ones = jnp.ones_like(tokens[:, 1:])

    def loss(variables: Any) -> jax.Array:
        logprobs = jax.nn.log_softmax(_forward(config, variables, tokens[:, :-1], ones, ones.cumsum(1) - 1))
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    return jax.value_and_grad(loss)(variables)


def random_tokens(B: int, T: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, VOCAB, (B, T)).astype(np.int32)


def assert_close(found: Any, expected: Any, atol: float = 1e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path))
