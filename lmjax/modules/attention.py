"""Multi-head, grouped-query and multi-query self-attention: one code path, 1 to H key/value heads."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmjax.batch import Fork
from lmjax.errors import UserError
from lmjax.modules.adapted import Prefix, attention_prefix
from lmjax.modules.cache import LayerCache
from lmjax.modules.config import DecoderConfig
from lmjax.modules.dense import Dense
from lmjax.modules.mlp import initial_std, output_std
from lmjax.modules.norms import Norm
from lmjax.modules.positions import apply_rope


class Write(NamedTuple):
    """The new tokens of a call, for a cache. See `LayerCache.extend`.

    Attributes:
      numbers: int32 [B, T], which token of its row each is; -1 for padding.
      count: int32 [B], tokens of each row after the call.
    """

    numbers: jax.Array
    count: jax.Array


class Context(NamedTuple):
    """What every layer of a kind shares in one forward.

    Attributes:
      mask: bool [B, 1, T, S], True where a query may see a key.
      rope: cos and sin, or None without rotary positions.
      write: the new tokens, for the cache; None without a cache.
      fork: of the batch; see `lmjax.batch.Batch`.
    """

    mask: jax.Array
    rope: tuple[jax.Array, jax.Array] | None
    write: Write | None = None
    fork: Fork | None = None


def attention_mask(
    query_segments: jax.Array,
    query_positions: jax.Array,
    key_segments: jax.Array,
    key_positions: jax.Array,
    window: int | None = None,
    shared: jax.Array | None = None,
) -> jax.Array:
    """Who sees whom: keys of the same segment, at the same position or before, within the window. bool [B, 1, T, S].

    `shared` [B, T] numbers a segment that each query sees besides its own, 0 for none.
    Padding (segment 0) sees padding only, so no row is ever fully masked (softmax would silently average all values).
    """
    ahead = query_positions[:, :, None] - key_positions[:, None, :]
    mask = query_segments[:, :, None] == key_segments[:, None, :]
    if shared is not None:
        mask |= (shared[:, :, None] > 0) & (shared[:, :, None] == key_segments[:, None, :])
    mask &= ahead >= 0
    if window is not None:
        mask &= ahead < window
    return mask[:, None]


def implementation(config: DecoderConfig, backend: str) -> tuple[str, str]:
    """The attention kernel this config gets on a backend, and why, for the plan.

    cuDNN takes 16-bit types, head widths that are multiples of 8 up to 256, and no softcap of scores.
    """
    if config.attention == "xla":
        return "xla", "chosen in the config"
    obstacles = [
        reason
        for reason, holds in {
            f"backend is {backend}, not an NVIDIA GPU": backend not in ("gpu", "cuda"),
            "dtype is float32": config.dtype == "float32",
            f"head width {config.head_width} is not a multiple of 8 up to 256": config.head_width % 8 != 0
            or config.head_width > 256,
            "scores have a softcap": config.attention_softcap is not None,
        }.items()
        if holds
    ]
    if not obstacles:
        return "cudnn", "shapes and types allow it"
    if config.attention == "cudnn":
        raise UserError(f"attention='cudnn' cannot serve this model: {'; '.join(obstacles)}. Use attention='auto'.")
    return "xla", "; ".join(obstacles)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    index_causal: bool = False,
    prefix: Prefix | None = None,
) -> jax.Array:
    """Softmax attention in plain XLA. [B, T, H, K] queries, [B, G, S, K] keys and values -> [B, T, H, K].

    `jax.nn.dot_product_attention` does the same in about twice the time on CPU, forward and backward: it leaves heads
    inside, which costs a transposition around each of its products, and computes all of the masked triangle.

    Args:
      query, key, value: H is a multiple of G; each group of H / G heads shares a key head.
      mask: bool [B, 1, T, S].
      scale: multiplies the queries.
      softcap: scores pass through `c tanh(x / c)`.
      index_causal: no query sees a key that stands behind it, the last query standing with the last key, so work above
        the diagonal may be left out.
      prefix: keys and values that every query sees besides.
    """
    B, T, H, K = query.shape
    G = key.shape[1]
    query = (query * scale).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)

    def rows(start: int, stop: int) -> jax.Array:
        seen = key.shape[2] - T + stop if index_causal else key.shape[2]
        # The heads of a group are rows of one product. Four dimensions all along: a fifth costs half as much again.
        part = query[:, :, :, start:stop].reshape(B, G, -1, K)
        soft = lambda scores: scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        scores = soft(_batched(part, key[:, :, :seen], 3, 3))
        scores = scores + jnp.tile(bias[:, :, start:stop, :seen], (1, 1, H // G if T > 1 else 1, 1))
        out = _batched(jax.nn.softmax(scores, axis=-1).astype(value.dtype), value[:, :, :seen], 3, 2)
        if prefix is not None:
            # All that a query sees besides counts as one key more, so that rows without a prefix keep their bits: hence
            # the barrier, behind which the softmax above is compiled as it is alone.
            before = soft(_grouped(part, prefix.keys.astype(part.dtype), "bgmk,gpk->bgmp"))
            if prefix.visible is not None:
                visible = jnp.repeat(prefix.visible, B // len(prefix.visible), axis=0)
                before = jnp.where(visible[:, None, None, :], before, -jnp.inf)
            own = jax.nn.logsumexp(jax.lax.optimization_barrier(scores), axis=-1, keepdims=True)
            share, weights = jnp.split(jax.nn.softmax(jnp.concatenate([own, before], axis=-1), axis=-1), [1], axis=-1)
            values = prefix.values.astype(value.dtype)
            out = share * out + _grouped(weights.astype(value.dtype), values, "bgmp,gpk->bgmk")
        return out.reshape(B, G, H // G, stop - start, K)

    count = max(1, min(4, T // 64)) if index_causal else 1
    edges = [T * i // count for i in range(count + 1)]
    out = jnp.concatenate([rows(*edge) for edge in itertools.pairwise(edges)], axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K).astype(query.dtype)


def attend_forked(
    core: Any, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, fork: Fork, prefix: Prefix | None
) -> jax.Array:
    """`attend` for rows of a prompt and its branches: no branch is held against another.

    Args:
      core: `attend`, but for what is given here.
      query, key, value, mask, prefix: as in `attend`, T == S.
      fork: of the batch.
    """
    B, T, H, K = query.shape
    P, C = fork
    n = (T - P) // C
    apart = lambda x: x.reshape(x.shape[0], x.shape[1], n, C, K).transpose(0, 2, 1, 3, 4).reshape(B * n, -1, C, K)
    whole = lambda x: jnp.concatenate([jnp.repeat(x[:, :, :P], n, axis=0), apart(x[:, :, P:])], axis=2)
    own = jnp.moveaxis(jnp.diagonal(mask[:, :, P:, P:].reshape(B, 1, n, C, n, C), axis1=2, axis2=4), -1, 1)
    before = mask[:, :, P:, :P].reshape(B, 1, n, C, P).swapaxes(1, 2)
    mask_branches = jnp.concatenate([before, own], axis=-1).reshape(B * n, 1, C, P + C)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0) if x.ndim in (2, 4) else x, prefix)  # where a row's own
    branches = core(query[:, P:].reshape(B * n, C, H, K), whole(key), whole(value), mask_branches, prefix=repeated)
    branches = branches.reshape(B, n * C, H, K)
    if P == 0:
        return branches
    prompt = core(query[:, :P], key[:, :, :P], value[:, :, :P], mask[:, :, :P, :P], prefix=prefix)
    return jnp.concatenate([prompt, branches], axis=1)


def _batched(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Product over one axis of each, batched over the first two; float32."""
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )


def _grouped(a: jax.Array, b: jax.Array, dimensions: str) -> jax.Array:
    """A product with keys or values of a prefix, of all rows, of each, or of each of several that follow each other."""
    if b.ndim == 4:
        few, (B, G, M) = b.shape[0], a.shape[:3]
        each = a.reshape(few, B // few, G, M, -1).swapaxes(1, 2).reshape(few, G, -1, a.shape[-1])
        found = jnp.einsum(dimensions.replace(",g", ",bg"), each, b, preferred_element_type=jnp.float32)
        return found.reshape(few, G, B // few, M, -1).swapaxes(1, 2).reshape(B, G, M, -1)
    return jnp.einsum(dimensions, a, b, preferred_element_type=jnp.float32)


def attention_scores(
    query: jax.Array, key: jax.Array, mask: jax.Array, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """What the softmax makes weights of: float32 [B, H, T, S], -inf where a query does not see a key.

    Arguments as in `attend`, which never holds them all.
    """
    B, T, H, K = query.shape
    G = key.shape[1]
    query = (query * scale).reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,bgsk->bgrts", query, key, preferred_element_type=jnp.float32)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask, scores.reshape(B, H, T, -1), -jnp.inf)


class Attention(nn.Module):
    """Causal self-attention. Reads and writes flattened activations [B*T, D]; heads exist only inside.

    Attributes:
      config: the decoder's.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        H, KV, K = config.num_heads, config.kv_heads, config.head_width
        B, T = context.mask.shape[0], context.mask.shape[2]
        dense = functools.partial(
            Dense, use_bias=config.qkv_bias, init_std=initial_std(config), dtype=config.dtype
        )
        query = dense(H * K, name="query")(x_ND).reshape(B, T, H, K)
        key = dense(KV * K, name="key")(x_ND).reshape(B, T, KV, K)
        value = dense(KV * K, name="value")(x_ND).reshape(B, T, KV, K)
        if config.qk_norm:
            norm = functools.partial(Norm, "rms", config.norm_eps, unit_offset=config.norm_unit_offset)
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        if context.rope is not None:
            query, key = apply_rope(query, context.rope), apply_rope(key, context.rope)
        key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        written = None
        if cache is not None:
            assert context.write is not None
            written = cache.extend(key, value, *context.write)
            if cache.holds(T):
                key, value = written.read(query.dtype)
            else:
                old_key, old_value = cache.read(query.dtype)
                key, value = jnp.concatenate([old_key, key], axis=2), jnp.concatenate([old_value, value], axis=2)
        if self.is_mutable_collection("intermediates"):  # someone asked to see them
            score = functools.partial(attention_scores, scale=self._scale, softcap=config.attention_softcap)
            self.put_variable("intermediates", "scores", score(query, key, context.mask))
        attended = self._attend(query, key, value, context, cached=cache is not None)
        output = Dense(
            config.embed_dim, config.output_bias, output_std(config), config.dtype, name="output"
        )(attended.reshape(B * T, H * K))
        return output, written

    @property
    def _scale(self) -> float:
        config = self.config
        return config.head_width**-0.5 if config.query_scale is None else config.query_scale

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, context: Context, cached: bool
    ) -> jax.Array:
        config, scale, mask = self.config, self._scale, context.mask
        kernel, _ = implementation(config, jax.default_backend())
        prefix = attention_prefix(self)
        if kernel == "cudnn" and not cached and prefix is None:
            core: Any = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
            return core(query, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), mask=mask)
        core = functools.partial(attend, scale=scale, softcap=config.attention_softcap, index_causal=not cached)
        if config.remat == "attention":
            core = jax.checkpoint(core)
        if context.fork is not None:
            return attend_forked(core, query, key, value, mask, context.fork, prefix)
        return core(query, key, value, mask, prefix=prefix)
