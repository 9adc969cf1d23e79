"""From hidden states to log-probabilities without ever holding [B, T, V].

Every loss over a vocabulary needs a few numbers a token: log-probability of the target, log-sum-exp, entropy... This
file computes them a slice of time at a time, so that only a slice of logits exists at once:

- `token_statistics` for any use: the backward pass computes each slice of logits again (4 matrix products in all).
- `token_loss` for a loss that is a sum of independent tokens: each slice's gradients are taken while its logits are
  there (3 products, the least possible), as Liger-Kernel does for cross-entropy (arXiv:2410.10989), but for any
  function of the statistics.
- `map_vocabulary` for functions of whole rows of logits, of one model or of several (distillation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Statistics = dict[str, jax.Array]  # name -> float32 [B, T]

STATISTICS: dict[str, str] = {
    "logprobs": "log p(target)",
    "logsumexp": "log of the sum of exp(logits)",
    "entropy": "-sum p log p, in nats",
    "sum_p2": "sum of p^2 (the collision probability)",
    "mean_logits": "mean of the logits over the vocabulary",
    "correct": "1 where no token is more probable than the target; without gradient",
}


class Head(NamedTuple):
    """How logits come from hidden states: `softcap(scale * (hidden @ weight.T + bias)) / temperature`.

    Attributes:
      weight: [V, D], or None where hidden states are logits already.
      bias: [V] or None.
      softcap: c of `c tanh(x / c)`, or None.
      scale: multiplies before the softcap.
      dtype: type of the operands of the products; sums and everything after are float32.
    """

    weight: jax.Array | None
    bias: jax.Array | None = None
    softcap: float | None = None
    scale: float = 1.0
    dtype: Any = jnp.float32

    @property
    def arrays(self) -> tuple[jax.Array | None, jax.Array | None]:
        return self.weight, self.bias

    def with_arrays(self, arrays: tuple[jax.Array | None, jax.Array | None]) -> Head:
        return self._replace(weight=arrays[0], bias=arrays[1])


def logits_of(head: Head, hidden: jax.Array, temperature: jax.Array | None = None) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]; temperature broadcasts against [...]."""
    if head.weight is None:
        z = hidden.astype(jnp.float32)
    else:
        z = jax.lax.dot_general(
            hidden.astype(head.dtype),
            head.weight.astype(head.dtype),
            (((hidden.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    if head.bias is not None:
        z = z + head.bias
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * jnp.tanh(z / head.softcap)
    return z if temperature is None else z / temperature[..., None]


def statistics_of_logits(z_NV: jax.Array, targets_N: jax.Array, wanted: Sequence[str]) -> Statistics:
    """The named statistics, float32 [N], of rows of logits. Plain differentiable JAX."""
    top_N = jax.lax.stop_gradient(jnp.max(z_NV, axis=-1))
    shifted_NV = z_NV - top_N[:, None]
    exp_NV = jnp.exp(shifted_NV)
    sum_N = jnp.sum(exp_NV, axis=-1)
    target_N = jnp.take_along_axis(z_NV, targets_N[:, None], axis=-1)[:, 0]
    logsumexp_N = top_N + jnp.log(sum_N)
    every: dict[str, Callable[[], jax.Array]] = {
        "logprobs": lambda: target_N - logsumexp_N,
        "logsumexp": lambda: logsumexp_N,
        # Shifted logits of -inf have probability 0 and must add 0, not NaN.
        "entropy": lambda: (
            jnp.log(sum_N) - jnp.sum(exp_NV * jnp.where(exp_NV > 0, shifted_NV, 0.0), axis=-1) / sum_N
        ),
        "sum_p2": lambda: jnp.sum(jnp.square(exp_NV), axis=-1) / jnp.square(sum_N),
        "mean_logits": lambda: jnp.mean(z_NV, axis=-1),
        "correct": lambda: jax.lax.stop_gradient((target_N >= top_N).astype(jnp.float32)),
    }
    return {name: every[name]() for name in wanted}


def _logits_gradient(
    z_NV: jax.Array, targets_N: jax.Array, logsumexp_N: jax.Array, known: Statistics, cotangents: Statistics
) -> jax.Array:
    """d(sum of statistics * cotangents)/d logits, as one fused expression over [N, V].

    With p = exp(z - lse): d logprob = onehot - p; d lse = p; d entropy = -p (z - lse + H);
    d sum_p2 = 2 p (p - sum_p2); d mean = 1/V.
    """
    logp_NV = z_NV - logsumexp_N[:, None]
    p_NV = jnp.exp(logp_NV)
    slope: Any = 0.0
    if "logsumexp" in cotangents:
        slope = slope + cotangents["logsumexp"][:, None]
    if "logprobs" in cotangents:
        slope = slope - cotangents["logprobs"][:, None]
    if "entropy" in cotangents:
        finite_NV = jnp.where(p_NV > 0, logp_NV, 0.0)
        slope = slope - cotangents["entropy"][:, None] * (finite_NV + known["entropy"][:, None])
    if "sum_p2" in cotangents:
        slope = slope + 2 * cotangents["sum_p2"][:, None] * (p_NV - known["sum_p2"][:, None])
    gradient = p_NV * slope
    if "logprobs" in cotangents:
        hit_NV = targets_N[:, None] == jax.lax.broadcasted_iota(targets_N.dtype, z_NV.shape, 1)
        gradient = gradient + jnp.where(hit_NV, cotangents["logprobs"][:, None], 0.0)
    if "mean_logits" in cotangents:
        gradient = gradient + cotangents["mean_logits"][:, None] / z_NV.shape[1]
    return gradient


class _Slice(NamedTuple):
    """One slice of time, flattened: what both passes need to recompute logits and their gradients."""

    hidden: jax.Array  # [N, D]
    targets: jax.Array  # [N]
    temperature: jax.Array | None  # [N]


def _head_gradient(
    head: Head, part: _Slice, z_NV: jax.Array, dz_NV: jax.Array, weight_too: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Pulls a gradient of the logits back to hidden states, weight and bias."""
    if part.temperature is not None:
        dz_NV = dz_NV / part.temperature[:, None]
        z_NV = z_NV * part.temperature[:, None]
    if head.softcap is not None:
        dz_NV = dz_NV * (1 - jnp.square(z_NV / head.softcap))
    if head.scale != 1.0:
        dz_NV = dz_NV * head.scale
    if head.weight is None:
        return dz_NV, None, None
    dbias = None if head.bias is None else jnp.sum(dz_NV, axis=0)
    dz_NV = dz_NV.astype(head.dtype)
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    dhidden = product(dz_NV, head.weight.astype(head.dtype), (((1,), (0,)), ((), ())))
    if not weight_too:
        return dhidden, None, dbias
    return dhidden, product(dz_NV, part.hidden.astype(head.dtype), (((0,), (0,)), ((), ()))), dbias


def _split(tree: Any, count: int) -> Any:
    """[B, T, ...] -> [count, B, T/count, ...], the end padded with the last token. Time is cut, so that every slice
    holds all rows and a batch that is sharded over devices stays so."""

    def split(x: jax.Array) -> jax.Array:
        B, T = x.shape[:2]
        t = -(-T // count)
        x = jnp.pad(x, [(0, 0), (0, count * t - T), *[(0, 0)] * (x.ndim - 2)], mode="edge")
        return jnp.moveaxis(x.reshape(B, count, t, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _join(tree: Any, T: int) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T], tree)


def slices(shape_BT: tuple[int, int], vocab_size: int, elements: int) -> int:
    """How many slices of time keep each slice's logits within `elements` numbers (one token a row at the least)."""
    B, T = shape_BT
    t = max(1, min(T, elements // (B * vocab_size)))
    return -(-T // t)


def _scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, count: int) -> tuple[Any, Any]:
    """`lax.scan`, or a plain call where there is one slice only."""
    if count == 1:
        carry, ys = body(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda y: y[None], ys)
    return jax.lax.scan(body, carry, xs)


def _flatten(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _broadcast_temperature(temperature: jax.Array | None, shape_BT: tuple[int, int]) -> jax.Array | None:
    return None if temperature is None else jnp.broadcast_to(temperature[:, None], shape_BT).astype(jnp.float32)


def token_statistics(
    head: Head,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature_B: jax.Array | None = None,
    wanted: Sequence[str] = tuple(STATISTICS),
    elements: int = 2**24,
) -> Statistics:
    """The named statistics of every token, float32 [B, T], in one pass over the vocabulary.

    Args:
      head: maps hidden states to logits.
      hidden_BTD: hidden states.
      targets_BT: int32, the token whose log-probability is asked for.
      temperature_B: divides the logits of each row.
      wanted: names out of `STATISTICS`; others cost nothing.
      elements: at most so many logits exist at once.
    """
    count = slices(targets_BT.shape, _vocab_size(head, hidden_BTD), elements)
    temperature_BT = _broadcast_temperature(temperature_B, targets_BT.shape)
    xs = _split(_Slice(hidden_BTD, targets_BT, temperature_BT), count)
    names = tuple(sorted(wanted))

    def body(arrays: Any, part: _Slice) -> tuple[Any, Statistics]:
        shape = part.targets.shape
        part = _Slice(*_flatten(part))
        stats = _slice_statistics(head._replace(weight=None, bias=None), names, arrays, part)
        return arrays, jax.tree.map(lambda s: s.reshape(shape), stats)

    # The arrays ride along as constants of the scan, whose transpose then sums their gradients slice by slice.
    _, stats = _scan(lambda carry, part: (carry, body(head.arrays, part)[1]), (), xs, count)
    return _join(stats, targets_BT.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _slice_statistics(static: Head, names: tuple[str, ...], arrays: Any, part: _Slice) -> Statistics:
    z_NV = logits_of(static.with_arrays(arrays), part.hidden, part.temperature)
    return statistics_of_logits(z_NV, part.targets, names)


def _slice_forward(static: Head, names: tuple[str, ...], arrays: Any, part: _Slice) -> tuple[Statistics, Any]:
    arrays, part, perturbed = _unwrap(arrays, part)
    kept = tuple(sorted({*names, "logsumexp"}))
    stats = _slice_statistics(static, kept, arrays, part)
    return {name: stats[name] for name in names}, (arrays, part, stats, perturbed)


class _Static:
    """Python data that travels among the residuals of a custom derivative."""

    def __init__(self, value: Any):
        self.value = value


jax.tree_util.register_pytree_node(_Static, lambda s: ((), s.value), lambda value, _: _Static(value))


def _unwrap(arrays: Any, rest: Any) -> tuple[Any, Any, _Static]:
    """Values of the custom derivative's arguments, and whether a gradient of the weight is wanted at all."""
    is_primal = lambda x: hasattr(x, "perturbed")
    perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(arrays, is_leaf=is_primal))
    values = jax.tree.map(lambda leaf: leaf.value, (arrays, rest), is_leaf=is_primal)
    return *values, _Static(perturbed)


def _slice_backward(static: Head, names: tuple[str, ...], residuals: Any, cotangents: Statistics) -> tuple[Any, Any]:
    arrays, part, stats, perturbed = residuals
    zero = jax.custom_derivatives.SymbolicZero
    present = {k: v for k, v in cotangents.items() if not isinstance(v, zero) and k != "correct"}
    head = static.with_arrays(arrays)
    z_NV = logits_of(head, part.hidden, part.temperature)
    dz_NV = _logits_gradient(z_NV, part.targets, stats["logsumexp"], stats, present)
    dhidden, dweight, dbias = _head_gradient(head, part, z_NV, dz_NV, perturbed.value)
    return _arrays_gradient(head, dweight, dbias, perturbed.value), _Slice(
        dhidden.astype(part.hidden.dtype), None, None  # type: ignore[arg-type]
    )


def _arrays_gradient(head: Head, dweight: Any, dbias: Any, wanted: bool) -> Any:
    """Gradients of `head.arrays` in their own types, or None where nobody asked."""
    if not wanted:
        return None
    cast = lambda gradient, like: None if like is None else gradient.astype(like.dtype)
    return cast(dweight, head.weight), cast(dbias, head.bias)


_slice_statistics.defvjp(_slice_forward, _slice_backward, symbolic_zeros=True)


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
    count = slices(targets_BT.shape, _vocab_size(head, hidden_BTD), elements)
    temperature_BT = _broadcast_temperature(temperature_B, targets_BT.shape)
    leaves, treedef = jax.tree.flatten(extras)
    cut = tuple(leaf.ndim >= 2 and leaf.shape[:2] == targets_BT.shape for leaf in leaves)
    static = _Fused(head._replace(weight=None, bias=None), tuple(sorted(wanted)), loss_of, treedef, cut, count)
    loss, stats = _fused(static, head.arrays, _Slice(hidden_BTD, targets_BT, temperature_BT), leaves)
    return loss, jax.lax.stop_gradient(stats)


class _Fused(NamedTuple):
    head: Head
    names: tuple[str, ...]
    loss_of: Callable[[Statistics, Any], jax.Array]
    treedef: Any
    cut: tuple[bool, ...]
    slices: int

    def xs(self, part: _Slice, leaves: list[Any]) -> Any:
        cut_leaves = [leaf for leaf, cut in zip(leaves, self.cut, strict=True) if cut]
        T = part.targets.shape[1]
        valid = (jnp.arange(self.slices * -(-T // self.slices)) < T).reshape(self.slices, -1)
        return *_split((part, cut_leaves), self.slices), valid

    def total(self, stats: Statistics, extras: Any, valid_t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid_t, self.loss_of(stats, extras), 0.0))

    def extras(self, cut_leaves: list[Any], leaves: list[Any]) -> Any:
        cut_leaves = list(cut_leaves)
        merged = [cut_leaves.pop(0) if cut else leaf for leaf, cut in zip(leaves, self.cut, strict=True)]
        return jax.tree.unflatten(self.treedef, merged)

    def logits(self, arrays: Any, part: _Slice) -> tuple[_Slice, jax.Array]:
        part = _Slice(*_flatten(part))
        return part, logits_of(self.head.with_arrays(arrays), part.hidden, part.temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: _Fused, arrays: Any, part: _Slice, leaves: list[Any]) -> tuple[jax.Array, Statistics]:
    def body(loss: jax.Array, xs: Any) -> tuple[jax.Array, Statistics]:
        piece, cut_leaves, valid = xs
        shape = piece.targets.shape
        piece, z_NV = static.logits(arrays, piece)
        stats = statistics_of_logits(z_NV, piece.targets, static.names)
        stats = jax.tree.map(lambda s: s.reshape(shape), stats)
        return loss + static.total(stats, static.extras(cut_leaves, leaves), valid), stats

    loss, stats = _scan(body, jnp.zeros(()), static.xs(part, leaves), static.slices)
    return loss, _join(stats, part.targets.shape[1])


def _fused_forward(static: _Fused, arrays: Any, part: Any, leaves: Any) -> tuple[Any, Any]:
    arrays, (part, leaves), perturbed = _unwrap(arrays, (part, leaves))
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
        dz_NV = _logits_gradient(z_NV, piece.targets, stats["logsumexp"], stats, cotangents)
        dhidden, dweight, dbias = _head_gradient(head, piece, z_NV, dz_NV, weight_too)
        darrays = jax.tree.map(jnp.add, darrays, _arrays_gradient(head, dweight, dbias, weight_too))
        return (loss + value, darrays), (dhidden.reshape(*shape, -1), named)

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, head.arrays) if weight_too else None)
    (loss, darrays), (dhidden, stats) = _scan(body, start, static.xs(part, leaves), static.slices)
    T = part.targets.shape[1]
    dhidden = _join(dhidden, T).astype(part.hidden.dtype)
    return (loss, _join(stats, T)), (dhidden, darrays)


def _fused_backward(static: _Fused, residuals: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    dhidden, darrays = residuals
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        scale = jnp.zeros(())
    darrays = None if darrays is None else jax.tree.map(lambda d: scale * d, darrays)
    return darrays, _Slice((scale * dhidden).astype(dhidden.dtype), None, None), None  # type: ignore[arg-type]


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


def map_vocabulary(
    functions: Sequence[Callable[..., jax.Array]],
    operands: Sequence[tuple[Head, jax.Array, jax.Array | None]],
    targets_BT: jax.Array,
    *,
    wanted: Sequence[str] = (),
    elements: int = 2**24,
) -> tuple[Statistics, list[jax.Array]]:
    """Functions of whole rows of logits, in one pass over the vocabulary, recomputed in the backward pass.

    Args:
      functions: each maps the operands' logits, float32 [N, V] each, to [N].
      operands: (head, hidden states [B, T, D], temperature [B] or None) of each model.
      targets_BT: int32 targets of the statistics.
      wanted: statistics of the first operand to take in the same pass.

    Returns:
      The statistics [B, T] by name, and the result [B, T] of each function.
    """
    shape = targets_BT.shape
    count = slices(shape, max(_vocab_size(head, hidden) for head, hidden, _ in operands), elements)
    temperatures = [_broadcast_temperature(t, shape) for _, _, t in operands]
    xs = _split((targets_BT, [hidden for _, hidden, _ in operands], temperatures), count)

    @jax.checkpoint
    def rows(arrays: Any, piece: Any) -> tuple[Statistics, list[jax.Array]]:
        targets, hiddens, temperatures = piece
        z = [
            logits_of(head.with_arrays(array), *_flatten((hidden, temperature)))
            for (head, _, _), array, hidden, temperature in zip(operands, arrays, hiddens, temperatures, strict=True)
        ]
        results = (statistics_of_logits(z[0], targets.reshape(-1), wanted), [function(*z) for function in functions])
        return jax.tree.map(lambda r: r.reshape(targets.shape), results)

    arrays = [head.arrays for head, _, _ in operands]
    _, results = _scan(lambda carry, piece: (carry, rows(arrays, piece)), (), xs, count)
    return _join(results, shape[1])


def slice_length(head: Head, hidden_BTD: jax.Array, elements: int) -> int:
    """How many tokens of each row a slice holds."""
    B, T = hidden_BTD.shape[:2]
    return -(-T // slices((B, T), _vocab_size(head, hidden_BTD), elements))


def _vocab_size(head: Head, hidden: jax.Array) -> int:
    return hidden.shape[-1] if head.weight is None else head.weight.shape[0]
