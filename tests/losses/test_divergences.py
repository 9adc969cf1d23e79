"""Divergences against their definitions, in NumPy's double precision and in torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.losses import forward_kl, jensen_shannon, kl_estimate, reverse_kl, smoothed_cross_entropy, top_k_kl
from tests.laws.registry import assert_close

rng = np.random.default_rng(0)
OWN, OTHER = rng.normal(size=(2, 6, 9)).astype(np.float32) * 2


def _softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _kl(p, q):
    return np.sum(np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(np.where(p > 0, q, 1))), 0), -1)


P, Q = _softmax(OWN), _softmax(OTHER)


def test_exact_divergences():
    assert_close(reverse_kl(OWN, OTHER), _kl(P, Q), rtol=1e-5)
    assert_close(forward_kl(OWN, OTHER), _kl(Q, P), rtol=1e-5)
    for beta in (0.1, 0.5, 0.8):
        mixture = beta * Q + (1 - beta) * P
        expected = beta * _kl(Q, mixture) + (1 - beta) * _kl(P, mixture)
        assert_close(jensen_shannon(OWN, OTHER, beta), expected, rtol=1e-5)


def test_top_k_is_the_whole_at_k_of_v_and_renormalises_below():
    assert_close(top_k_kl(OWN, OTHER, 9), forward_kl(OWN, OTHER), rtol=1e-5)
    top = np.argsort(-OTHER, -1)[:, :3]
    p, q = (np.take_along_axis(x, top, -1) for x in (P, Q))
    expected = _kl(q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True))
    assert_close(top_k_kl(OWN, OTHER, 3), expected, rtol=1e-5)


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jensen_shannon])
def test_nothing_at_the_minimum(divergence):
    value, gradient = jax.value_and_grad(lambda x: divergence(x, OWN).sum())(jnp.asarray(OWN))
    assert abs(float(value)) < 1e-5 and float(jnp.abs(gradient).max()) < 1e-5


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jensen_shannon])
def test_tokens_banned_in_both_add_nothing_and_poison_nothing(divergence):
    banned = np.array([0, 4])
    own, other = OWN.copy(), OTHER.copy()
    own[:, banned] = other[:, banned] = -np.inf
    left = np.setdiff1d(np.arange(9), banned)
    value, gradient = jax.value_and_grad(lambda x: divergence(x, other).sum())(jnp.asarray(own))
    without = jax.value_and_grad(lambda x: divergence(x, other[:, left]).sum())
    value_left, gradient_left = without(jnp.asarray(own[:, left]))
    assert_close(value, value_left)
    assert_close(gradient[:, left], gradient_left)
    assert not np.any(gradient[:, banned])


@pytest.mark.reference
def test_torch_agrees():
    torch = pytest.importorskip("torch")
    own, other = (torch.log_softmax(torch.tensor(x), -1) for x in (OWN, OTHER))
    kl = torch.nn.functional.kl_div
    assert_close(reverse_kl(OWN, OTHER), kl(other, own, log_target=True, reduction="none").sum(-1).numpy(), rtol=1e-5)
    assert_close(forward_kl(OWN, OTHER), kl(own, other, log_target=True, reduction="none").sum(-1).numpy(), rtol=1e-5)
    targets = rng.integers(0, 9, 6)
    logp = jax.nn.log_softmax(jnp.asarray(OWN))
    ours = smoothed_cross_entropy(
        logp[np.arange(6), targets], OWN.mean(-1), jax.nn.logsumexp(OWN, axis=-1), smoothing=0.2
    )
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(OWN), torch.tensor(targets), reduction="none", label_smoothing=0.2
    )
    assert_close(ours, theirs.numpy(), rtol=1e-5)


def test_smoothing_is_cross_entropy_to_the_smoothed_target():
    targets = rng.integers(0, 9, 6)
    smoothed = 0.9 * np.eye(9)[targets] + 0.1 / 9
    logp = np.log(P)
    found = smoothed_cross_entropy(
        logp[np.arange(6), targets], OWN.mean(-1), np.asarray(jax.nn.logsumexp(OWN, axis=-1)), 0.1
    )
    assert_close(found, -(smoothed * logp).sum(-1), rtol=1e-5)


def test_estimators_by_formula():
    own, other = np.log([0.5, 0.2, 0.9]), np.log([0.25, 0.4, 0.9])
    ratio = np.exp(other - own)
    expected = {
        "k1": -np.log(ratio),
        "abs": np.abs(np.log(ratio)),
        "k2": np.log(ratio) ** 2 / 2,
        "k3": ratio - 1 - np.log(ratio),
    }
    for name, values in expected.items():
        assert_close(kl_estimate(jnp.asarray(own), jnp.asarray(other), name), values, rtol=1e-5)


def test_the_expectations_the_documents_claim():
    """Exact expectations under p: k1 and k3 estimate KL(p||q); as losses k1's gradient vanishes, k2's is that of
    KL(p||q), k3's is that of KL(q||p)."""
    x, q = jnp.asarray(OWN[0]), jax.nn.log_softmax(OTHER[0])
    p = jax.lax.stop_gradient(jax.nn.softmax(x))

    def expected(name):
        return lambda x: jnp.sum(p * kl_estimate(jax.nn.log_softmax(x), q, name))

    for name in ("k1", "k3"):
        np.testing.assert_allclose(expected(name)(x), reverse_kl(x, q), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(expected("k1"))(x), 0, atol=1e-6)
    assert_close(jax.grad(expected("k2"))(x), jax.grad(lambda x: reverse_kl(x, q))(x), rtol=1e-4)
    assert_close(jax.grad(expected("k3"))(x), jax.grad(lambda x: forward_kl(x, q))(x), rtol=1e-4)
