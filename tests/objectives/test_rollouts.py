"""Terms over rollouts give the losses and gradients of TRL and verl, and KL estimates pull where they should."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax.errors import UserError
from lmjax.objectives import Objective, Weighing, kl
from tests.objectives.rollout_cases import CASES, FIXTURES, batch, is_value, numbers, preset


@functools.cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(FIXTURES) as found:
        return dict(found)


def _loss(objective: Objective, given: dict[str, Any], rollouts: Any) -> Any:
    """The value of an objective on outputs that are given, as `evaluate` makes it of a policy's."""
    total = 0.0
    for coefficient, term in objective.terms:
        outputs = SimpleNamespace(**given)
        others = [SimpleNamespace(logprobs=given["reference"]) for _ in term.roles]
        values, mask, *_ = term.function(outputs, rollouts, *others)
        share, weight = term.reducer.coefficients(jax.lax.stop_gradient(mask), rollouts.sequences)
        total += coefficient * jnp.sum(values * share) / weight
    return total


def _ours(name: str, objective: Objective | None = None) -> tuple[float, np.ndarray]:
    case, given = CASES[name], {key: jnp.asarray(value, jnp.float32) for key, value in numbers().items()}
    leaf = "values" if is_value(case) else "logprobs"
    objective = objective or case.build()
    loss = lambda values: _loss(objective, given | {leaf: values}, batch(case.on_policy))
    value, gradient = jax.value_and_grad(loss)(given[leaf])
    return float(value), np.asarray(gradient)


def _compare(name: str, loss: float, gradient: np.ndarray, objective: Objective | None = None) -> None:
    own_loss, own_gradient = _ours(name, objective)
    error = np.abs(own_gradient - gradient).max() / np.abs(gradient).max()
    print(f"{name}: losses differ by {abs(own_loss - loss):.1e}, gradients by {error:.1e}")
    assert own_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert error < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_peers(name):
    _compare(name, float(_stored()[f"{name}/loss"]), _stored()[f"{name}/gradient"])


@pytest.mark.parametrize("name", [name for name in CASES if preset(CASES[name]) is not None])
def test_options_of_the_peers_make_the_same_losses(name):
    _compare(name, float(_stored()[f"{name}/loss"]), _stored()[f"{name}/gradient"], preset(CASES[name]))


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "k1+", "k3+"])
def test_the_kl_of_verls_actor(kind):
    """It is added to the loss, with the same mean over tokens."""
    name = f"verl_kl_{kind.replace('+', '_plus')}"
    options = dict(CASES["verl_ppo"].options, use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type=kind)
    loss, gradient = (
        _stored()[f"verl_ppo/{part}"] + 0.3 * _stored()[f"{name}/{part}"] for part in ("loss", "gradient")
    )
    _compare("verl_ppo", float(loss), gradient, lm.objectives.verl_actor(**options))


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_the_peers_themselves(name):
    library = {"trl": "trl", "rloo": "trl", "openrlhf": "openrlhf"}.get(CASES[name].peer, "verl")
    pytest.importorskip(library, reason=f"runs {library}'s own losses (pip install {library})")
    from tests.objectives.make_rollout_fixtures import compute

    _compare(name, *compute(name))


def test_the_cases_differ():
    """No two are one function by accident, so that a wrong option would show, but for those that are one by design."""
    found = {name: np.append(_stored()[f"{name}/gradient"], _stored()[f"{name}/loss"]) for name in CASES}
    alike = {(a, b) for a in CASES for b in CASES if a < b and np.allclose(found[a], found[b], rtol=1e-4)}
    shared = ("sapo", "verl_sapo"), ("gspo", "openrlhf_gspo", "verl_gspo"), ("openrlhf_ppo", "verl_ppo"), (
        "openrlhf_value", "verl_value")  # fmt: skip
    assert alike == {(a, b) for group in shared for a in group for b in group if a < b}
    assert set(_stored()) == {f"{name}/{part}" for name in CASES for part in ("loss", "gradient")}


def test_gradients_of_kl_estimates():
    """All tokens of a vocabulary, weighed by their probability: expectations, exactly."""
    policy, old, reference = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (3, 5)))

    def pull(weights_from: jax.Array, off_policy: bool, **options: Any) -> jax.Array:
        """The expected gradient of the term with respect to logits, on tokens drawn from some policy."""
        ((_, term),) = kl("reference", **options).terms
        rollouts = SimpleNamespace(old_logprobs=old[None] if off_policy else None, mask=jnp.ones((1, 5)))
        weights = jnp.exp(weights_from)

        def expected(logits: jax.Array) -> jax.Array:
            outputs = SimpleNamespace(logprobs=jax.nn.log_softmax(logits)[None])
            values, *_ = term.function(outputs, rollouts, SimpleNamespace(logprobs=reference[None]))
            return jnp.sum(weights * values[0])

        return jax.grad(expected)(policy)

    divergence = lambda logits, other: jnp.sum(
        jnp.exp(jax.nn.log_softmax(logits)) * (jax.nn.log_softmax(logits) - jax.nn.log_softmax(other))
    )
    reverse, forward = jax.grad(divergence)(policy, reference), jax.grad(divergence, argnums=1)(reference, policy)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    close(pull(policy, False, estimator="k1"), 0)
    close(pull(policy, False, estimator="k2"), reverse)
    close(pull(policy, False, estimator="k3"), forward)
    for estimator in ("k1", "k3"):
        close(pull(policy, False, estimator=estimator, gradient="weighted"), reverse)
        close(pull(policy, False, estimator=estimator, gradient="k2"), reverse)
        close(pull(policy, False, estimator=estimator, gradient="weighted_k2"), reverse)
        for gradient in ("weighted", "weighted_k2"):  # tokens of another policy
            close(pull(old, True, estimator=estimator, gradient=gradient), reverse)
    assert np.abs(forward - reverse).max() > 0.05


def test_a_sampler_that_gave_no_number_counts_as_if_it_were_right():
    rollouts = batch()
    missing = dataclasses.replace(rollouts, sampling_logprobs=np.full(rollouts.mask.shape, np.nan, np.float32))
    given = {key: jnp.asarray(value, jnp.float32) for key, value in numbers().items()}
    corrected = lm.objectives.dapo(weighing=Weighing(correct="token_mask", low=0.5, off_policy=0.1))
    plain = _loss(lm.objectives.dapo(), given, rollouts)
    np.testing.assert_allclose(_loss(corrected, given, missing), plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Weighing(level="word"), "by 'word'"),
        (lambda: Weighing(top_entropy=0.0), "top_entropy is 0.0"),
        (lambda: Weighing(correct="clip"), "no correction"),
        (lambda: Weighing(held=-1.0), "held is -1.0"),
        (lambda: lm.objectives.ppo(-0.2), "not negative"),
        (lambda: lm.objectives.ppo(dual=0.5), "above 1"),
        (lambda: lm.objectives.cispo((2.0, 1.0)), "below the second"),
        (lambda: lm.objectives.dppo("js"), "no kind 'js'"),
        (lambda: lm.objectives.dro(0.0), "beta is 0.0"),
        (lambda: lm.objectives.value_loss(0.0), "clip is 0.0"),
        (lambda: kl(gradient="none"), "no gradient 'none'"),
        (lambda: lm.objectives.entropy(top=0.0), "top is 0.0"),
        (lambda: lm.objectives.clip_cov(band=(2.0, 1.0)), "below the second"),
        (lambda: lm.objectives.clip_cov(share=0.0), "share is 0.0"),
        (lambda: lm.objectives.kl_cov(-1.0), "not negative"),
        (lambda: lm.objectives.trl_grpo("ppo"), "no loss_type 'ppo'; there are bnpo"),
        (lambda: lm.objectives.verl_actor("ppo"), "no loss_mode 'ppo'"),
        (lambda: lm.objectives.verl_actor("dro"), "beta is 0.0"),
        (lambda: lm.objectives.verl_actor(loss_agg_mode="mean"), "no loss_agg_mode 'mean'"),
        (lambda: lm.objectives.verl_actor(loss_agg_mode="seq-mean-token-sum-norm"), "needs a loss_scale_factor"),
        (lambda: lm.objectives.verl_actor(use_kl_loss=True, kl_loss_type="k4"), "no kl_loss_type 'k4'"),
        (lambda: lm.objectives.openrlhf_actor("gspo", is_correction_mode="mask"), "leave is_correction_mode out"),
        (lambda: lm.objectives.openrlhf_actor("reinforce"), "no policy_loss_type"),
    ],
)
def test_options_that_cannot_be(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()


def test_batches_that_lack_something():
    policy = lm.Policy(lm.models.bigram(4))
    variables = lm.policy.add_value_head(policy.init(jax.random.key(0)))
    plain = lm.batch.next_token_batch(np.arange(8).reshape(2, 4) % 4)
    evaluate = lambda objective, given: lm.objectives.evaluate(objective, policy, variables, given)
    with pytest.raises(UserError, match="rollout_batch"):
        evaluate(lm.objectives.grpo(), plain)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    rollouts = lm.batch.RolloutBatch(**fields, advantages=plain.mask)
    with pytest.raises(UserError, match="no sampling_logprobs"):
        evaluate(lm.objectives.grpo(weighing=Weighing(correct="token_mask")), rollouts)
    with pytest.raises(UserError, match="no returns"):
        evaluate(lm.objectives.value_loss(), rollouts)
    with pytest.raises(UserError, match="no coefficient 'entropy'"):
        evaluate(lm.objectives.by_coefficient("entropy", lm.objectives.entropy()), rollouts)
