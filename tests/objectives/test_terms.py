"""The terms that are there: their values, and that each option matters (law 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import UserError
from lmjax.objectives import auxiliary, cross_entropy, distillation, divergence, evaluate, kl, token_mean
from tests.laws.registry import TERMS, assert_close, random_batch, tiny_policy, tiny_roles

POLICY = tiny_policy()
VARIABLES = POLICY.init(jax.random.key(0))
ROLES = tiny_roles(POLICY)
BATCH = random_batch(3, 6)


INSIDES = {"hidden_cosine", "hidden_mse", "attention_scores", "attention_probabilities"}  # see test_distillation


def _loss(objective):
    return float(evaluate(objective, POLICY, VARIABLES, BATCH, roles=ROLES).loss)


def _rows(variables):
    return jax.nn.log_softmax(POLICY(variables, BATCH).logits)


def _mean(values):
    return float(np.sum(values * BATCH.mask) / BATCH.mask.sum())


def test_values_against_materialised_rows():
    own, reference, teacher = (_rows(v) for v in (VARIABLES, ROLES["reference"].variables, ROLES["teacher"].variables))
    picked = jnp.take_along_axis(own, BATCH.targets[..., None], -1)[..., 0]
    other = jnp.take_along_axis(reference, BATCH.targets[..., None], -1)[..., 0]
    difference = picked - other
    kl_of = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), -1)
    mixture = jnp.log(0.7 * jnp.exp(own) + 0.3 * jnp.exp(reference))
    mixed = jnp.log(0.6 * jnp.exp(own) + 0.4 * jnp.exp(teacher))
    soft_own, soft_teacher = jax.nn.log_softmax(own / 2), jax.nn.log_softmax(teacher / 2)
    top, indices = jax.lax.top_k(teacher, 3)
    top_own = jax.nn.log_softmax(jnp.take_along_axis(own, indices, -1))
    aux = POLICY(VARIABLES, BATCH).aux
    expected = {
        "cross_entropy": -picked,
        "label_smoothing": -0.9 * picked - 0.1 * own.mean(-1),
        "z_loss": jax.nn.logsumexp(POLICY(VARIABLES, BATCH).logits, axis=-1) ** 2,
        "entropy": -jnp.sum(jnp.exp(own) * own, -1),
        "kl_k1": difference,
        "kl_abs": abs(difference),
        "kl_k2": difference**2 / 2,
        "kl_k3": jnp.exp(-difference) - 1 + difference,
        "forward": kl_of(reference, own),
        "reverse": kl_of(own, reference),
        "js": 0.3 * kl_of(reference, mixture) + 0.7 * kl_of(own, mixture),
        "distillation": 4 * kl_of(soft_teacher, soft_own),
        "distillation_top_k": kl_of(jax.nn.log_softmax(top), top_own),
        "distillation_reverse": kl_of(*(jax.nn.log_softmax(rows / 0.7) for rows in (own, teacher))),
        "distillation_js": 0.4 * kl_of(teacher, mixed) + 0.6 * kl_of(own, mixed),
        "agreement": own.argmax(-1) == teacher.argmax(-1),
        "auxiliary": aux["per_token"],
    }
    for name, values in expected.items():
        assert _loss(TERMS[name].build(token_mean)) == pytest.approx(_mean(values), rel=2e-5), name
    assert _loss(TERMS["auxiliary_scalar"].build(token_mean)) == pytest.approx(float(aux["scalar"]), rel=1e-5)
    assert set(expected) | {"auxiliary_scalar"} | INSIDES == set(TERMS)


OPTIONS = {
    "label_smoothing": (cross_entropy(), cross_entropy(label_smoothing=0.1), cross_entropy(label_smoothing=0.3)),
    "kl estimator": tuple(kl("reference", estimator=e) for e in ("k1", "abs", "k2", "k3")),
    "kl role": (kl("reference"), kl("teacher")),
    "divergence kind": tuple(divergence("reference", kind) for kind in ("reverse", "forward", "js")),
    "divergence beta": (divergence("reference", "js"), divergence("reference", "js", beta=0.1)),
    "divergence role": (divergence("reference"), divergence("teacher")),
    "distillation temperature": (distillation(), distillation(temperature=3.0)),
    "distillation beta": tuple(distillation(beta=beta) for beta in (0.0, 0.01, 0.5, 1.0)),
    "distillation scaled": tuple(distillation(temperature=2.0, scaled=scaled) for scaled in (True, False)),
    "distillation top_k": (distillation(), distillation(top_k=2), distillation(top_k=5)),
    "distillation role": (distillation(), distillation("reference")),
    "auxiliary name": (auxiliary("scalar"), auxiliary("per_token")),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_matters(option):
    losses = [_loss(objective) for objective in OPTIONS[option]]
    assert len({round(loss, 5) for loss in losses}) == len(losses)


def test_names_tell_roles_and_kinds_apart():
    assert (kl("a") + kl("b") + divergence("a") + divergence("a", "js") + distillation("b")).labels == (
        "kl_a", "kl_b", "reverse_kl_a", "js_a", "distillation_b",
    )  # fmt: skip


BAD = {
    "label_smoothing is 1.0": lambda: cross_entropy(label_smoothing=1.0),
    "no KL estimator is called 'k4'": lambda: kl("reference", estimator="k4"),
    "no divergence is called 'hellinger'": lambda: divergence("reference", "hellinger"),
    "beta is 1.0": lambda: divergence("reference", "js", beta=1.0),
    "distillation temperature is 0": lambda: distillation(temperature=0),
    "top_k is 0": lambda: distillation(top_k=0),
    "reports no auxiliary loss 'balance'; it reports per_token, scalar": lambda: _loss(auxiliary("balance")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message):
    with pytest.raises(UserError, match=message):
        BAD[message]()


def test_smoothing_reports_the_plain_likelihood_too():
    sums = evaluate(cross_entropy(label_smoothing=0.1), POLICY, VARIABLES, BATCH).sums
    total, weight = sums["nll"]
    assert_close(total / weight, _loss(cross_entropy()))
