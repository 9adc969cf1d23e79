"""Logits, the statistics of a row of them, and the way back: what happens within one slice of time."""

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


def logits_gradient(
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


class Slice(NamedTuple):
    """One slice of time, flattened: what both passes need to recompute logits and their gradients."""

    hidden: jax.Array  # [N, D]
    targets: jax.Array  # [N]
    temperature: jax.Array | None  # [N]


def head_gradient(
    head: Head, part: Slice, z_NV: jax.Array, dz_NV: jax.Array, weight_too: bool
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


def arrays_gradient(head: Head, dweight: Any, dbias: Any, wanted: bool) -> Any:
    """Gradients of `head.arrays` in their own types, or None where nobody asked."""
    if not wanted:
        return None
    cast = lambda gradient, like: None if like is None else gradient.astype(like.dtype)
    return cast(dweight, head.weight), cast(dbias, head.bias)
