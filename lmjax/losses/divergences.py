"""Divergences between two models: exact ones over rows of logits, and estimates from sampled tokens."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

KLEstimator = Literal["k1", "abs", "k2", "k3"]


def _expectation(p: jax.Array, values: jax.Array) -> jax.Array:
    # The values are replaced before the product, which otherwise differentiates to 0 * inf.
    return jnp.sum(p * jnp.where(p > 0, values, 0.0), axis=-1)


def reverse_kl(logits: jax.Array, other: jax.Array) -> jax.Array:
    """KL(p || q) of p = softmax(logits), q = softmax(other) over the last axis, in nats.

    "Reverse" as in distillation: the model's own distribution weighs the log-ratio (mode seeking).

    >>> round(float(reverse_kl(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))), 6)
    0.0
    """
    logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return _expectation(jnp.exp(logp), logp - logq)


def forward_kl(logits: jax.Array, other: jax.Array) -> jax.Array:
    """KL(q || p), weighed by the other model's distribution (mass covering). Arguments as in `reverse_kl`."""
    return reverse_kl(other, logits)


def jensen_shannon(logits: jax.Array, other: jax.Array, beta: float = 0.5) -> jax.Array:
    """Generalised Jensen-Shannon divergence `beta KL(q || m) + (1 - beta) KL(p || m)`, `m = (1 - beta) p + beta q`.

    The form of GKD (arXiv:2306.13649) with p the student and q the teacher; `beta` strictly between 0 and 1.
    """
    logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    p, q = jnp.exp(logp), jnp.exp(logq)
    mixture = (1 - beta) * p + beta * q
    logm = jnp.log(jnp.where(mixture > 0, mixture, 1.0))  # where it is 0, so are p and q
    return beta * _expectation(q, logq - logm) + (1 - beta) * _expectation(p, logp - logm)


def top_k_kl(logits: jax.Array, other: jax.Array, k: int) -> jax.Array:
    """KL(q || p) restricted to the other model's k likeliest tokens, both renormalised over them."""
    return forward_kl(*top_k_of_other(logits, other, k))


def top_k_of_other(logits: jax.Array, other: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Both logits at the k likeliest tokens of the other model."""
    top, indices = jax.lax.top_k(other, k)
    return jnp.take_along_axis(logits, indices, axis=-1), top


def same_likeliest(logits: jax.Array, other: jax.Array) -> jax.Array:
    """1 where some token is the likeliest of both, else 0; float32, without gradient.

    >>> same_likeliest(jnp.array([[1.0, 2.0], [1.0, 2.0]]), jnp.array([[0.0, 5.0], [3.0, 1.0]])).tolist()
    [1.0, 0.0]
    """
    top = lambda z: z >= jnp.max(z, axis=-1, keepdims=True)  # cheaper than an argmax on CPU
    return jax.lax.stop_gradient(jnp.any(top(logits) & top(other), axis=-1).astype(jnp.float32))


def kl_estimate(
    logprobs: jax.Array,
    other_logprobs: jax.Array,
    estimator: KLEstimator,
    held: float | None = None,
    largest: float | None = None,
) -> jax.Array:
    """Estimates of KL(p || q) from tokens sampled from p, elementwise (Schulman, "Approximating KL divergence", 2020).

    With d = log p - log q: "k1" d (unbiased, high variance), "abs" |d|, "k2" d^2/2 (biased, low variance), "k3"
    exp(-d) - 1 + d (unbiased, never negative). d is held within `held` nats, and the estimate within `largest`, if
    given (verl's k3: 20 and 10).

    As a *loss* on samples from p their gradients differ from their values: k1's has expectation zero, k2's is that of
    KL(p || q), k3's is that of KL(q || p).
    """
    difference = logprobs - other_logprobs
    if held is not None:
        difference = jnp.clip(difference, -held, held)
    if estimator == "k1":
        found = difference
    elif estimator == "abs":
        found = jnp.abs(difference)
    elif estimator == "k2":
        found = jnp.square(difference) / 2
    else:
        found = jnp.expm1(-difference) + difference
    return found if largest is None else jnp.clip(found, -largest, largest)
