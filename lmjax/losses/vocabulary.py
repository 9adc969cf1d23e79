"""From hidden states to log-probabilities without ever holding [B, T, V].

Every loss over a vocabulary needs a few numbers a token: log-probability of the target, log-sum-exp, entropy... This
file computes them a slice of time at a time, so that only a slice of logits exists at once:

- `token_statistics` for any use: the backward pass computes each slice of logits again (4 matrix products in all).
- `fused.token_loss` for a loss that is a sum of independent tokens: each slice's gradients are taken while its logits
  are there (3 products).
- `map_vocabulary` for functions of whole rows of logits, of one model or of several (distillation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lmjax.losses.logits import (
    STATISTICS,
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
    count = slices(targets_BT.shape, vocab_size(head, hidden_BTD), elements)
    temperature_BT = broadcast_temperature(temperature_B, targets_BT.shape)
    xs = split(Slice(hidden_BTD, targets_BT, temperature_BT), count)
    names = tuple(sorted(wanted))

    # The head's arrays are constants of the scan, whose transpose then sums their gradients slice by slice.
    def body(carry: tuple[()], part: Slice) -> tuple[tuple[()], Statistics]:
        shape = part.targets.shape
        static = head._replace(weight=None, bias=None)
        stats = _slice_statistics(static, names, head.arrays, Slice(*flatten(part)))
        return carry, jax.tree.map(lambda s: s.reshape(shape), stats)

    _, stats = scan(body, (), xs, count)
    return join(stats, targets_BT.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _slice_statistics(static: Head, names: tuple[str, ...], arrays: Any, part: Slice) -> Statistics:
    z_NV = logits_of(static.with_arrays(arrays), part.hidden, part.temperature)
    return statistics_of_logits(z_NV, part.targets, names)


def _slice_forward(static: Head, names: tuple[str, ...], arrays: Any, part: Slice) -> tuple[Statistics, Any]:
    arrays, part, perturbed = unwrap(arrays, part)
    kept = tuple(sorted({*names, "logsumexp"}))
    stats = _slice_statistics(static, kept, arrays, part)
    return {name: stats[name] for name in names}, (arrays, part, stats, perturbed)


def _slice_backward(static: Head, names: tuple[str, ...], residuals: Any, cotangents: Statistics) -> tuple[Any, Any]:
    arrays, part, stats, perturbed = residuals
    zero = jax.custom_derivatives.SymbolicZero
    present = {k: v for k, v in cotangents.items() if not isinstance(v, zero) and k != "correct"}
    head = static.with_arrays(arrays)
    z_NV = logits_of(head, part.hidden, part.temperature)
    dz_NV = logits_gradient(z_NV, part.targets, stats["logsumexp"], stats, present)
    dhidden, dweight, dbias = head_gradient(head, part, z_NV, dz_NV, perturbed.value)
    return arrays_gradient(head, dweight, dbias, perturbed.value), Slice(
        dhidden.astype(part.hidden.dtype), None, None  # type: ignore[arg-type]
    )


_slice_statistics.defvjp(_slice_forward, _slice_backward, symbolic_zeros=True)


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
    count = slices(shape, max(vocab_size(head, hidden) for head, hidden, _ in operands), elements)
    temperatures = [broadcast_temperature(t, shape) for _, _, t in operands]
    xs = split((targets_BT, [hidden for _, hidden, _ in operands], temperatures), count)

    @jax.checkpoint
    def rows(arrays: Any, piece: Any) -> tuple[Statistics, list[jax.Array]]:
        targets, hiddens, temperatures = piece
        z = [
            logits_of(head.with_arrays(array), *flatten((hidden, temperature)))
            for (head, _, _), array, hidden, temperature in zip(operands, arrays, hiddens, temperatures, strict=True)
        ]
        results = (statistics_of_logits(z[0], targets.reshape(-1), wanted), [function(*z) for function in functions])
        return jax.tree.map(lambda r: r.reshape(targets.shape), results)

    arrays = [head.arrays for head, _, _ in operands]
    _, results = scan(lambda carry, piece: (carry, rows(arrays, piece)), (), xs, count)
    return join(results, shape[1])
