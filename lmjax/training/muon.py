"""Muon: momentum whose singular values are all set near one (Jordan et al., 2024).

Source: https://kellerjordan.github.io/posts/muon.

Our own rather than `optax.contrib.muon`, for three reasons: matrices of one shape are orthogonalized in one
batched chain instead of one chain a leaf; scan-stacked leaves [L, in, out] are L matrices instead of falling
to Adam in silence; and the Newton-Schulz products may run in bfloat16 whatever the type of the momentum.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.training.layers import is_matrix

# Coefficients of the quintic that rises fastest at zero (Jordan et al.): singular values end in about [0.7,
# 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x_NIO: jax.Array, steps: int = 5, dtype: Any = jnp.float32, eps: float = 1e-8) -> jax.Array:
    """Pushes the singular values of each matrix towards one: U S V^T -> about U V^T.

    Each matrix is divided by its Frobenius norm, then X <- a X + (b A + c A^2) X with A = X X^T, `steps`
    times, on whichever side makes A the smaller.

    Args:
      x_NIO: float [N, in, out], a batch of matrices.
      steps: iterations.
      dtype: type of the matrix products. The norm is always taken in float32.
      eps: added to the norm, so that a zero matrix stays zero.

    Returns:
      [N, in, out] in the type of `x_NIO`.
    """
    a, b, c = COEFFICIENTS
    x = x_NIO.astype(jnp.float32)
    norm_N11 = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = (x / (norm_N11 + eps)).astype(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    for _ in range(steps):
        x_T = jnp.swapaxes(x, -2, -1)
        gram = x @ x_T if wide else x_T @ x
        poly = b * gram + c * (gram @ gram)
        x = a * x + (poly @ x if wide else x @ poly)
    return x.astype(x_NIO.dtype)


class MuonState(NamedTuple):
    """Moments keyed like the parameters.

    Attributes:
      count: int32 [], updates so far.
      mu: first moment of every leaf.
      nu: second moment of the leaves that go to Adam, None at the matrices.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any


def scale_by_muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    dtype: Any = jnp.float32,
    scale: str = "rms",
    adam_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    state_dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    """Muon's direction for matrices, Adam's for tables, heads, norms and biases; no learning rate.

    For a matrix with gradient G: M <- momentum M + (1 - momentum) G; U = momentum M + (1 - momentum) G with
    Nesterov and M without; the direction is newton_schulz(U) times
      "rms"       0.2 sqrt(max(in, out)): as large as an AdamW update (Liu et al., arXiv:2502.16982)
      "spectral"  sqrt(max(1, out / in)): Jordan's rule.
    Axes before the last two, such as layers and experts, number separate matrices.

    Args: see `lmjax.training.config.OptimizerConfig`.
    """

    def init(params: Any) -> MuonState:
        mu = jax.tree.map(lambda p: jnp.zeros(p.shape, state_dtype), params)
        nu = jax.tree_util.tree_map_with_path(
            lambda path, p: None if is_matrix(path, p) else jnp.zeros(p.shape, jnp.float32), params
        )
        return MuonState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        count = optax.safe_increment(state.count)
        treedef: Any
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        mu_before = treedef.flatten_up_to(state.mu)
        nu_before = treedef.flatten_up_to(state.nu)
        out: list[Any] = [None] * len(leaves)
        mu_after, nu_after = list(mu_before), list(nu_before)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, (path, g) in enumerate(leaves):
            g = g.astype(jnp.float32)
            m = mu_before[i].astype(jnp.float32)
            if is_matrix(path, g):
                m = momentum * m + (1 - momentum) * g
                out[i] = momentum * m + (1 - momentum) * g if nesterov else m
                groups[g.shape[-2:]].append(i)
            else:
                m = b1 * m + (1 - b1) * g
                nu_after[i] = b2 * nu_before[i] + (1 - b2) * jnp.square(g)
                m_hat = m / (1 - b1**count)
                out[i] = adam_scale * m_hat / (jnp.sqrt(nu_after[i] / (1 - b2**count)) + eps)
            mu_after[i] = m.astype(state_dtype)
        for (rows, columns), members in groups.items():
            batches = [out[i].reshape(-1, rows, columns) for i in members]
            factor = 0.2 * max(rows, columns) ** 0.5 if scale == "rms" else max(1.0, columns / rows) ** 0.5
            x = factor * newton_schulz(jnp.concatenate(batches), steps, dtype)
            start = 0
            for i, batch in zip(members, batches, strict=True):
                out[i] = jax.lax.slice_in_dim(x, start, start + len(batch)).reshape(out[i].shape)
                start += len(batch)
        for i, (_, g) in enumerate(leaves):
            out[i] = out[i].astype(g.dtype)
        rebuild = treedef.unflatten
        return rebuild(out), MuonState(count, rebuild(mu_after), rebuild(nu_after))

    return optax.GradientTransformation(init, update)
