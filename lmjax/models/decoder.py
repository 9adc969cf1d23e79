"""The decoder transformer: embeddings, layers (unrolled or scanned), final norm, head."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.batch import Fork
from lmjax.errors import UserError
from lmjax.losses.logits import Head
from lmjax.models import adapted, layout
from lmjax.models.noise import neftune
from lmjax.modules.attention import Context, Write, attention_mask
from lmjax.modules.block import Block, norm_like
from lmjax.modules.cache import CacheSpec, Dense, LayerCache, put
from lmjax.modules.config import DecoderConfig
from lmjax.modules.mlp import initial_std
from lmjax.modules.positions import rope_table
from lmjax.sharding.context import constrain

Variables = dict[str, Any]


class ModelOutputs(NamedTuple):
    """What a model hands its policy.

    Attributes:
      hidden: [B, T, D], after the final norm.
      aux: named scalars a layer wants trained on (router losses); empty for dense models.
      cache: the updated cache, or None.
      layers: {n: [B, T, D]}, the residual stream after n layers (0: the embeddings) for each n asked for; or None.
      attentions: {n: float32 [B, H, T, S]}, scores of the n-th layer (from 1) before the softmax, -inf where a query
        does not see a key, for each n asked for; or None.
    """

    hidden: jax.Array
    aux: dict[str, jax.Array]
    cache: Any = None
    layers: Any = None
    attentions: Any = None


# Leaf path (without its collection and layer) -> logical axes. The table of a model beside its code.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"head/embedding", ("vocab", "embed")),
    (r"position/embedding", ("positions", "embed")),
    (r"attention/query/kernel", ("embed", "heads")),
    (r"attention/(key|value)/kernel", ("embed", "kv_heads")),
    (r"attention/query/bias", ("heads",)),
    (r"attention/(key|value)/bias", ("kv_heads",)),
    (r"attention/output/kernel", ("heads", "embed")),
    (r"attention/output/bias", ("norm",)),
    (r"attention/(query|key)_norm/scale", ("norm",)),
    (r"mlp/(gate|up)/kernel", ("embed", "mlp")),
    (r"mlp/(gate|up)/bias", ("mlp",)),
    (r"mlp/down/kernel", ("mlp", "embed")),
    (r"mlp/down/bias", ("norm",)),
    (r"\w*norm/(scale|bias)", ("norm",)),
)

REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda layer: layer,
    "attention": lambda layer: layer,  # inside the attention module
    "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
    "full": jax.checkpoint,
}


class Decoder:
    """A decoder-only transformer as pure functions of its variables. See `DecoderConfig`."""

    def __init__(self, config: DecoderConfig):
        self.config = config

    def init(self, key: jax.Array) -> Variables:
        """Fresh variables: `{"params": nested dict of float32 arrays}`, the same numbers in either layout."""
        config = self.config
        embed_key, position_key, head_key, layers_key = jax.random.split(key, 4)
        normal = jax.nn.initializers.normal(initial_std(config))
        params: dict[str, Any] = {
            "embed": {"embedding": normal(embed_key, (config.vocab_size, config.embed_dim), jnp.float32)}
        }
        if config.position == "learned":
            params["position"] = {"embedding": normal(position_key, (config.max_length, config.embed_dim), jnp.float32)}
        if not config.tied_embeddings:
            params["head"] = {"embedding": normal(head_key, (config.vocab_size, config.embed_dim), jnp.float32)}
        if config.norm_position != "post":
            params["final_norm"] = self._final_norm().init(key, jnp.zeros((1, config.embed_dim)))["params"]

        ones = jnp.ones((1, 1), jnp.int32)
        context = self._contexts(ones, ones * 0, (ones, ones * 0))[0]
        hidden = jnp.zeros((1, config.embed_dim), jnp.dtype(config.dtype))

        def init_layer(layer_key: jax.Array) -> Any:
            return Block(config).init(layer_key, hidden, context)["params"]

        keys = jax.vmap(functools.partial(jax.random.fold_in, layers_key))(jnp.arange(config.num_layers))
        layers = jax.vmap(init_layer)(keys)
        params[layout.STACKED] = layers
        variables = {"params": params}
        return variables if config.scanned else layout.unstack_layers(variables)

    def init_cache(self, batch_size: int, length: int, spec: CacheSpec | None = None, slack: int = 0) -> Variables:
        """An empty key/value cache, as the "cache" collection of the variables. Every leaf has the rows in front.

        Args:
          batch_size: B.
          length: tokens a row will hold at the most.
          spec: the kind of cache; dense if None. Layers with a sliding window keep rings of it.
          slack: how many of the newest tokens may be taken back (by lowering `count`).
        """
        config, spec = self.config, Dense() if spec is None else spec
        cache: dict[str, Any] = {
            "count": jnp.zeros((batch_size,), jnp.int32),
            "segments": jnp.zeros((batch_size, length), jnp.int32),
            "positions": jnp.zeros((batch_size, length), jnp.int32),
        }
        for index in range(config.num_layers):
            # Stacked layers must be of one shape, so there none is a ring.
            window = config.window if config.windowed(index) and not config.scanned else None
            cache[layout.layer_name(index)] = spec.empty(
                batch_size, config.kv_heads, length, config.head_width, config.dtype, window, slack
            )
        if config.scanned:
            cache = layout.stack_layers(cache)
            cache[layout.STACKED] = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), cache[layout.STACKED])
        return cache

    def prefix_of(self, variables: Variables, x_BPD: jax.Array) -> Variables:
        """The keys and values that B sequences of P embeddings leave in each layer, as a "prefix" collection.

        All P are kept and seen in layers with a sliding window too.

        Args:
          variables: without prefix or cache.
          x_BPD: rows as they come out of the embedding table; without B, the prefix is for every row.
        """
        x_PD, rows = x_BPD, x_BPD[None] if x_BPD.ndim == 2 else x_BPD
        B, P, D = rows.shape
        self._check_length(P)
        positions = jnp.broadcast_to(jnp.arange(P), (B, P))
        cache = self.init_cache(B, P, slack=P)
        contexts, cache = self._write(cache, jnp.ones_like(positions), positions)
        x_ND = self._embed(variables, rows, positions).reshape(B * P, D)
        _, caches, *_ = self._layers(variables, cache, x_ND, contexts, None)

        def leaf(x: jax.Array) -> jax.Array:
            x = x if x_PD.ndim == 3 else x[0]
            return jnp.moveaxis(x, 1, 0) if self.config.scanned and x_PD.ndim == 3 else x

        return {
            name: {"attention": {"keys": leaf(layer.key), "values": leaf(layer.value)}}
            for name, layer in caches.items()
        }

    def resolve(self, variables: Variables) -> Variables:
        """The variables as the layers read them, with what is worked out from others (`models.adapted`)."""
        return adapted.resolve(self, variables)

    def apply(
        self,
        variables: Variables,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        *,
        rng: jax.Array | None = None,
        train: bool = False,
        collect: tuple[int, ...] = (),
        attentions: tuple[int, ...] = (),
        embedding_noise: float = 0.0,
        fork: Fork | None = None,
        shared: jax.Array | None = None,
    ) -> ModelOutputs:
        """Hidden states of every token, and the updated cache if the variables hold one.

        `collect` numbers the layers whose residual streams are wanted too, `attentions` those whose scores are (see
        `ModelOutputs`; unrolled layers only).

        `embedding_noise` is the alpha of `models.noise.neftune`; `fork` and `shared` are the batch's, and go without a
        cache.

        Raises:
          UserError: dropout or noise without an `rng`, or more tokens than learned positions.
        """
        config = self.config
        dropping = train and (config.dropout > 0 or adapted.has_dropout(variables))
        if dropping and rng is None:
            raise UserError("this model has dropout: training needs an rng; pass policy(..., rng=key, train=True).")
        if embedding_noise and rng is None:
            raise UserError("noise on the embeddings needs an rng; pass policy(..., rng=key, train=True).")
        variables = self.resolve(variables)
        cache = variables.get("cache")
        length, offset = adapted.prefix_length(variables)
        self._check_length(length + (tokens_BT.shape[1] if fork is None else sum(fork)))
        each = 1 if isinstance(offset, int) else positions_BT.shape[0] // offset.shape[0]
        positions_BT = positions_BT + (offset if each == 1 else jnp.repeat(offset, each, axis=0))
        params = variables["params"]
        table_VD = constrain(params["embed"]["embedding"], ("vocab", None))
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
        if embedding_noise:
            x_BTD = neftune(jax.random.fold_in(rng, config.num_layers + 1), x_BTD, segments_BT, embedding_noise)
        x_BTD = self._embed(variables, x_BTD, positions_BT)
        B, T, D = x_BTD.shape
        x_ND = constrain(x_BTD.reshape(B * T, D), ("batch", None))
        if dropping and config.dropout > 0:
            keep = jax.random.bernoulli(jax.random.fold_in(rng, config.num_layers), 1 - config.dropout, x_ND.shape)
            x_ND = jnp.where(keep, x_ND / (1 - config.dropout), 0).astype(x_ND.dtype)

        if cache is None:
            if fork is not None and shared is None:
                shared = (segments_BT > 1).astype(jnp.int32)
            contexts = self._contexts(segments_BT, positions_BT, (segments_BT, positions_BT), fork=fork, shared=shared)
        else:
            contexts, cache = self._write(cache, segments_BT, positions_BT)
        x_ND, layer_caches, streams, scores = self._layers(
            variables, cache, x_ND, contexts, rng if dropping else None, collect, attentions
        )
        if cache is not None:
            cache = cache | layer_caches
        if config.norm_position != "post":
            x_ND = self._final_norm().apply({"params": params["final_norm"]}, x_ND)
        layers = {number: stream.reshape(B, T, D) for number, stream in streams.items()} or None
        return ModelOutputs(x_ND.reshape(B, T, D), {}, cache, layers, scores or None)

    def head(self, variables: Variables) -> Head:
        """The map from hidden states to logits."""
        config = self.config
        variables = adapted.add_delta(variables)
        weight = variables["params"]["embed" if config.tied_embeddings else "head"]["embedding"]
        weight = constrain(weight, ("vocab", None))  # whole rows: logits are sums over the width
        return Head(weight, None, config.logit_softcap, config.logit_scale, jnp.dtype(config.dtype))

    def logical_axes(self, variables: Variables) -> Variables:
        """The logical axis names of every leaf, in a tree of the same structure."""

        def axes(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
            path = path[1:] if path[0].key in ("reference", "critic") else path  # copies of other collections
            names = [entry.key for entry in path[1:]]
            stacked = layout.STACKED in names
            short = "/".join(n for n in names if n != layout.STACKED and not re.fullmatch(r"layer_\d+", n))
            found = adapted.logical_axes(path[0].key, short, leaf.ndim - stacked, LOGICAL_AXES)
            if found is None:
                found = next((axes for pattern, axes in LOGICAL_AXES if re.fullmatch(pattern, short)), None)
            if found is not None:
                return ("layers", *found) if stacked else found
            raise UserError(f"no rule names the axes of {'/'.join(names)} {leaf.shape}; add it to LOGICAL_AXES.")

        return jax.tree_util.tree_map_with_path(axes, variables)

    @property
    def units(self) -> dict[str, int]:
        """How many indivisible units a logical axis holds, where that is not its size: whole heads."""
        return {"heads": self.config.num_heads, "kv_heads": self.config.kv_heads}

    def _check_length(self, length: int) -> None:
        if self.config.position == "learned" and length > self.config.max_length:
            raise UserError(
                f"a sequence of {length} tokens does not fit {self.config.max_length} learned positions; "
                "shorten it or raise max_length."
            )

    def _embed(self, variables: Variables, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """What the first layer gets for rows out of the embedding table."""
        config = self.config
        x_BTD = x_BTD.astype(jnp.dtype(config.dtype))
        if config.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(config.embed_scale, x_BTD.dtype)
        if config.position == "learned":
            table_TD = variables["params"]["position"]["embedding"]
            x_BTD = x_BTD + jnp.take(table_TD, positions_BT, axis=0).astype(x_BTD.dtype)
        return x_BTD

    def _final_norm(self) -> Any:
        return norm_like(self.config, None)  # type: ignore[arg-type]

    def _contexts(
        self,
        query_segments: jax.Array,
        query_positions: jax.Array,
        *keys: tuple[jax.Array, jax.Array],
        write: Write | None = None,
        fork: Fork | None = None,
        shared: jax.Array | None = None,
    ) -> tuple[Context, Context | None]:
        """Mask and rotations of full layers, and of windowed layers where there are any.

        `keys` are the segments and positions of the keys: of both kinds of layers, or of each.
        """
        config = self.config

        def context(keys: tuple[jax.Array, jax.Array], window: int | None, theta: float, scaling: Any) -> Context:
            mask = attention_mask(query_segments, query_positions, *keys, window, shared)
            rotary = config.position == "rope"
            rope = rope_table(query_positions, config.head_width, theta, scaling) if rotary else None
            return Context(mask, rope, write, fork)

        full = context(keys[0], None, config.rope_theta, config.rope_scaling)
        if config.window is None:
            return full, None
        if config.local_rope_theta is None:
            return full, context(keys[-1], config.window, config.rope_theta, config.rope_scaling)
        return full, context(keys[-1], config.window, config.local_rope_theta, None)

    def _write(
        self, cache: Variables, segments_BT: jax.Array, positions_BT: jax.Array
    ) -> tuple[tuple[Context, Context | None], Variables]:
        """The contexts of tokens that join a cache, and the cache with their segments and positions."""
        real = segments_BT > 0
        before = cache["count"]
        numbers = jnp.where(real, before[:, None] + jnp.cumsum(real, axis=1) - 1, -1)
        count = before + jnp.sum(real, axis=1, dtype=jnp.int32)
        segments = put(cache["segments"], segments_BT, numbers)
        positions = put(cache["positions"], positions_BT, numbers)

        def keys(layer: LayerCache) -> tuple[jax.Array, jax.Array]:
            new = segments_BT.shape[1]
            if layer.holds(new):
                slots = layer.slots(count)
            else:
                slots = jnp.concatenate([layer.slots(before), numbers], axis=1)
            pick = lambda of: jnp.take_along_axis(of, jnp.maximum(slots, 0), axis=1)
            return jnp.where(slots >= 0, pick(segments), -1), pick(positions)

        kinds: dict[bool, tuple[jax.Array, jax.Array]] = {}
        for index in range(self.config.num_layers):
            windowed = self.config.windowed(index) and not self.config.scanned
            if windowed not in kinds:
                kinds[windowed] = keys(self._layer_cache(cache, index))
        pair = [kinds.get(windowed) or next(iter(kinds.values())) for windowed in (False, True)]
        contexts = self._contexts(segments_BT, positions_BT, *pair, write=Write(numbers, count))
        return contexts, cache | {"count": count, "segments": segments, "positions": positions}

    def _layer_cache(self, cache: Variables, index: int) -> LayerCache:
        if self.config.scanned:
            return jax.tree.map(lambda leaf: leaf[:, index], cache[layout.STACKED])
        return cache[layout.layer_name(index)]

    def _layers(
        self,
        variables: Variables,
        cache: Variables | None,
        x_ND: jax.Array,
        contexts: tuple[Context, Context | None],
        rng: jax.Array | None,
        collect: tuple[int, ...] = (),
        attentions: tuple[int, ...] = (),
    ) -> tuple[jax.Array, Variables, dict[int, jax.Array], dict[int, jax.Array]]:
        config = self.config
        full, local = contexts

        def layer(
            x_ND: jax.Array,
            own: Variables,
            layer_cache: LayerCache | None,
            context: Context,
            index: jax.Array | int,
            mutable: tuple[str, ...] = (),
        ) -> tuple[jax.Array, LayerCache | None, Variables]:
            rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, index)}
            (x_ND, layer_cache), kept = Block(config).apply(
                own, x_ND, context, layer_cache, rng is not None, rngs=rngs, mutable=mutable
            )
            return constrain(x_ND, ("batch", None)), layer_cache, kept

        plain, showing = (REMAT[config.remat](functools.partial(layer, mutable=m)) for m in ((), ("intermediates",)))
        collections = {name: tree for name, tree in variables.items() if name != "cache"}
        if not config.scanned:
            caches: Variables = {}
            streams, scores = {0: x_ND}, {}
            for index in range(config.num_layers):
                name = layout.layer_name(index)
                own = {c: tree[name] for c, tree in collections.items() if name in tree}
                context = local if local is not None and config.windowed(index) else full
                shown = index + 1 in attentions
                run = showing if shown else plain
                x_ND, caches[name], kept = run(x_ND, own, cache[name] if cache else None, context, index)
                streams[index + 1] = x_ND
                if shown:
                    scores[index + 1] = kept["intermediates"]["attention"]["scores"]
            return x_ND, caches, {number: streams[number] for number in collect}, scores

        if collect or attentions:
            raise UserError("what single layers do can only be read with layers='unrolled'; change the config.")
        own = {c: tree[layout.STACKED] for c, tree in collections.items() if layout.STACKED in tree}
        windowed = jnp.asarray([config.windowed(index) for index in range(config.num_layers)])

        def body(x_ND: jax.Array, xs: tuple[Any, ...]) -> tuple[jax.Array, LayerCache | None]:
            own, layer_cache, use_window, index = xs
            context = full
            if local is not None:
                pick = functools.partial(jnp.where, use_window)
                context = full._replace(
                    mask=pick(local.mask, full.mask), rope=jax.tree.map(pick, local.rope, full.rope)
                )
            return plain(x_ND, own, layer_cache, context, index)[:2]

        swap = functools.partial(jax.tree.map, lambda leaf: jnp.moveaxis(leaf, 0, 1))
        layer_caches = swap(cache[layout.STACKED]) if cache else None
        x_ND, caches = jax.lax.scan(body, x_ND, (own, layer_caches, windowed, jnp.arange(config.num_layers)))
        return x_ND, {layout.STACKED: swap(caches)} if cache else {}, {}, {}
