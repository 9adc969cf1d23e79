"""Time cut into slices, so that only one slice of logits exists at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.losses.logits import Head


def slices(shape_BT: tuple[int, int], vocab_size: int, elements: int) -> int:
    """How many slices of time keep each slice's logits within `elements` numbers (one token a row at the least)."""
    B, T = shape_BT
    t = max(1, min(T, elements // (B * vocab_size)))
    return -(-T // t)


def slice_length(head: Head, hidden_BTD: jax.Array, elements: int) -> int:
    """How many tokens of each row a slice holds."""
    B, T = hidden_BTD.shape[:2]
    return -(-T // slices((B, T), vocab_size(head, hidden_BTD), elements))


def vocab_size(head: Head, hidden: jax.Array) -> int:
    return hidden.shape[-1] if head.weight is None else head.weight.shape[0]


def split(tree: Any, count: int) -> Any:
    """[B, T, ...] -> [count, B, T/count, ...], the end padded with the last token. Time is cut, so that every slice
    holds all rows and a batch that is sharded over devices stays so."""

    def cut(x: jax.Array) -> jax.Array:
        B, T = x.shape[:2]
        t = -(-T // count)
        x = jnp.pad(x, [(0, 0), (0, count * t - T), *[(0, 0)] * (x.ndim - 2)], mode="edge")
        return jnp.moveaxis(x.reshape(B, count, t, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def join(tree: Any, T: int) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T], tree)


def flatten(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, count: int) -> tuple[Any, Any]:
    """`lax.scan`, or a plain call where there is one slice only."""
    if count == 1:
        carry, ys = body(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda y: y[None], ys)
    return jax.lax.scan(body, carry, xs)


def broadcast_temperature(temperature: jax.Array | None, shape_BT: tuple[int, int]) -> jax.Array | None:
    return None if temperature is None else jnp.broadcast_to(temperature[:, None], shape_BT).astype(jnp.float32)


class Static:
    """Python data that travels among the residuals of a custom derivative."""

    def __init__(self, value: Any):
        self.value = value


jax.tree_util.register_pytree_node(Static, lambda s: ((), s.value), lambda value, _: Static(value))


def unwrap(arrays: Any, rest: Any) -> tuple[Any, Any, Static]:
    """Values of the custom derivative's arguments, and whether a gradient of the weight is wanted at all."""
    is_primal = lambda x: hasattr(x, "perturbed")
    perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(arrays, is_leaf=is_primal))
    values = jax.tree.map(lambda leaf: leaf.value, (arrays, rest), is_leaf=is_primal)
    return *values, Static(perturbed)
