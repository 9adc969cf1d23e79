"""Adafactor's second moment (Shazeer and Stern, arXiv:1804.04235), the same for stacked and single layers.

optax factors the two largest axes of a leaf and clips by the root mean square of the whole leaf. For a
scan-stacked leaf [L, in, out] that mixes the layers, and may even factor the layer axis. Here the layer axis,
and any axis before the last two, is a batch axis throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.training.layers import own_ndim

MIN_FACTORED = 32  # below this, two vectors save too little memory to be worth the approximation


class FactoredState(NamedTuple):
    """Second moments keyed like the parameters; None where a leaf uses the other form.

    Attributes:
      count: int32 [], updates so far.
      row: [..., in], means over the output axis of matrices.
      column: [..., out], means over the input axis of matrices.
      full: the shape of the parameter, for vectors and small matrices.
    """

    count: jax.Array  # type: ignore[assignment]
    row: Any
    column: Any
    full: Any


def _factored(path: tuple[Any, ...], leaf: Any) -> bool:
    return own_ndim(path, leaf) >= 2 and min(leaf.shape[-2:]) >= MIN_FACTORED


def _own_axes(path: tuple[Any, ...], leaf: Any) -> tuple[int, ...]:
    """The axes of one parameter of one layer: statistics are never shared between layers."""
    return tuple(range(leaf.ndim - own_ndim(path, leaf), leaf.ndim))


def _rms(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=_own_axes(path, x), keepdims=True))


def scale_by_factored_rms(
    b2_power: float = 0.8, clip_rms: float = 1.0, eps: float = 1e-30
) -> optax.GradientTransformation:
    """Divides gradients by the root of a factored second moment, then clips the result by its own.

    V is estimated by outer(row, column) / mean(row), where row and column are exponential means of G^2 + eps
    over the output and the input axis, with decay 1 - t^-b2_power at update t = 1, 2, .... The update U = G /
    sqrt(V) is divided by max(1, rms(U) / clip_rms).
    """

    def init(params: Any) -> FactoredState:
        def build(shape_of: Any, wanted: bool) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, p: jnp.zeros(shape_of(p), jnp.float32) if _factored(path, p) == wanted else None,
                params,
            )

        return FactoredState(
            count=jnp.zeros([], jnp.int32),
            row=build(lambda p: p.shape[:-1], True),
            column=build(lambda p: (*p.shape[:-2], p.shape[-1]), True),
            full=build(lambda p: p.shape, False),
        )

    def update(updates: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        count = optax.safe_increment(state.count)
        decay = 1 - count.astype(jnp.float32) ** -b2_power
        treedef: Any
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        rows, columns, fulls = (treedef.flatten_up_to(t) for t in (state.row, state.column, state.full))
        out = []
        for i, (path, g) in enumerate(leaves):
            u = g.astype(jnp.float32)
            square = jnp.square(u) + eps
            if _factored(path, g):
                rows[i] = decay * rows[i] + (1 - decay) * square.mean(-1)
                columns[i] = decay * columns[i] + (1 - decay) * square.mean(-2)
                u = u * jax.lax.rsqrt(rows[i] / rows[i].mean(-1, keepdims=True))[..., None]
                u = u * jax.lax.rsqrt(columns[i])[..., None, :]
            else:
                fulls[i] = decay * fulls[i] + (1 - decay) * square
                u = u * jax.lax.rsqrt(fulls[i])
            out.append((u / jnp.maximum(1.0, _rms(path, u) / clip_rms)).astype(g.dtype))
        rebuild = treedef.unflatten
        return rebuild(out), FactoredState(count, rebuild(rows), rebuild(columns), rebuild(fulls))

    return optax.GradientTransformation(init, update)


def scale_by_parameter_rms(floor: float = 1e-3) -> optax.GradientTransformation:
    """Multiplies updates by the root mean square of the parameter, at least `floor`: relative step sizes."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG if hasattr(optax, "NO_PARAMS_MSG") else "params are needed")
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, u, p: u * jnp.maximum(_rms(path, p.astype(jnp.float32)), floor).astype(u.dtype),
            updates,
            params,
        )
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
