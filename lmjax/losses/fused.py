"""A loss that is a sum of independent tokens, its gradients taken while each slice of logits is there.

Three products with the vocabulary, the least possible, where recomputing slices in the backward pass takes four: what
Liger-Kernel does for cross-entropy (arXiv:2410.10989), for any function of a token's statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.losses.logits import (
    Head,
    Slice,
    Statistics,
    arrays_gradient,
    head_gradient,
    logits_gradient,
    logits_of,
    statistics_of_logits,
)
from lmjax.losses.slices import broadcast_temperature, flatten, join, scan, slices, split, unwrap, vocab_size


def token_loss(
    head: Head,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    loss_of: Callable[[Statistics, Any], jax.Array],
    extras: Any = (),
    *,
    temperature_B: jax.Array | None = None,
    wanted: Sequence[str] = ("logprobs",),
    elements: int = 2**24,
) -> tuple[jax.Array, Statistics]:
    """The sum over tokens of a loss of each, with its gradients taken while each slice of logits is there.

    Args:
      head, hidden_BTD, targets_BT, temperature_B, elements: as in `token_statistics`.
      loss_of: maps statistics [B, t] and a slice of `extras` to the loss of each token [B, t], none of which may look
        at another token.
      extras: a pytree of arrays that `loss_of` reads; those of shape [B, T, ...] are cut along with the tokens, others
        are handed over whole. They get no gradient.
      wanted: the statistics that `loss_of` reads.

    Returns:
      The scalar loss, and the statistics [B, T] without gradient.
    """
    count = slices(targets_BT.shape, vocab_size(head, hidden_BTD), elements)
    temperature_BT = broadcast_temperature(temperature_B, targets_BT.shape)
    leaves, treedef = jax.tree.flatten(extras)
    cut = tuple(leaf.ndim >= 2 and leaf.shape[:2] == targets_BT.shape for leaf in leaves)
    static = _Fused(head._replace(weight=None, bias=None), tuple(sorted(wanted)), loss_of, treedef, cut, count)
    loss, stats = _fused(static, head.arrays, Slice(hidden_BTD, targets_BT, temperature_BT), leaves)
    return loss, jax.lax.stop_gradient(stats)


class _Fused(NamedTuple):
    head: Head
    names: tuple[str, ...]
    loss_of: Callable[[Statistics, Any], jax.Array]
    treedef: Any
    cut: tuple[bool, ...]
    slices: int

    def xs(self, part: Slice, leaves: list[Any]) -> Any:
        cut_leaves = [leaf for leaf, cut in zip(leaves, self.cut, strict=True) if cut]
        T = part.targets.shape[1]
        valid = (jnp.arange(self.slices * -(-T // self.slices)) < T).reshape(self.slices, -1)
        return *split((part, cut_leaves), self.slices), valid

    def total(self, stats: Statistics, extras: Any, valid_t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid_t, self.loss_of(stats, extras), 0.0))

    def extras(self, cut_leaves: list[Any], leaves: list[Any]) -> Any:
        cut_leaves = list(cut_leaves)
        merged = [cut_leaves.pop(0) if cut else leaf for leaf, cut in zip(leaves, self.cut, strict=True)]
        return jax.tree.unflatten(self.treedef, merged)

    def logits(self, arrays: Any, part: Slice) -> tuple[Slice, jax.Array]:
        part = Slice(*flatten(part))
        return part, logits_of(self.head.with_arrays(arrays), part.hidden, part.temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: _Fused, arrays: Any, part: Slice, leaves: list[Any]) -> tuple[jax.Array, Statistics]:
    def body(loss: jax.Array, xs: Any) -> tuple[jax.Array, Statistics]:
        piece, cut_leaves, valid = xs
        shape = piece.targets.shape
        piece, z_NV = static.logits(arrays, piece)
        stats = statistics_of_logits(z_NV, piece.targets, static.names)
        stats = jax.tree.map(lambda s: s.reshape(shape), stats)
        return loss + static.total(stats, static.extras(cut_leaves, leaves), valid), stats

    loss, stats = scan(body, jnp.zeros(()), static.xs(part, leaves), static.slices)
    return loss, join(stats, part.targets.shape[1])


def _fused_forward(static: _Fused, arrays: Any, part: Any, leaves: Any) -> tuple[Any, Any]:
    arrays, (part, leaves), perturbed = unwrap(arrays, (part, leaves))
    head = static.head.with_arrays(arrays)
    weight_too = perturbed.value

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        loss, darrays = carry
        piece, cut_leaves, valid = xs
        shape = piece.targets.shape
        piece, z_NV = static.logits(arrays, piece)
        stats = statistics_of_logits(z_NV, piece.targets, tuple(sorted({*static.names, "logsumexp"})))
        named = {name: stats[name].reshape(shape) for name in static.names}
        total = functools.partial(static.total, extras=static.extras(cut_leaves, leaves), valid_t=valid)
        value, cotangents = jax.value_and_grad(total)(named)
        cotangents = {k: v.reshape(-1) for k, v in cotangents.items() if k != "correct"}
        dz_NV = logits_gradient(z_NV, piece.targets, stats["logsumexp"], stats, cotangents)
        dhidden, dweight, dbias = head_gradient(head, piece, z_NV, dz_NV, weight_too)
        darrays = jax.tree.map(jnp.add, darrays, arrays_gradient(head, dweight, dbias, weight_too))
        return (loss + value, darrays), (dhidden.reshape(*shape, -1), named)

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, head.arrays) if weight_too else None)
    (loss, darrays), (dhidden, stats) = scan(body, start, static.xs(part, leaves), static.slices)
    T = part.targets.shape[1]
    dhidden = join(dhidden, T).astype(part.hidden.dtype)
    return (loss, join(stats, T)), (dhidden, darrays)


def _fused_backward(static: _Fused, residuals: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    dhidden, darrays = residuals
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        scale = jnp.zeros(())
    darrays = None if darrays is None else jax.tree.map(lambda d: scale * d, darrays)
    return darrays, Slice((scale * dhidden).astype(dhidden.dtype), None, None), None  # type: ignore[arg-type]


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
