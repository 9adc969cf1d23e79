"""The algebra of objectives: sums, coefficients, streams, names, roles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import UserError
from lmjax.objectives import Role, cross_entropy, divergence, entropy, evaluate, finalize, kl, term, z_loss
from lmjax.objectives.algebra import coefficient_at

V = 6
POLICY = lm.Policy(lm.models.bigram(V, init_std=1.0))
VARIABLES = POLICY.init(jax.random.key(0))


def _batch(seed=0, rows=3):
    return lm.batch.next_token_batch(np.random.default_rng(seed).integers(0, V, (rows, 6)))


def _loss(objective, batches=None, **options):
    return float(evaluate(objective, POLICY, VARIABLES, batches or _batch(), **options).loss)


def test_sums_and_coefficients():
    a, b = _loss(cross_entropy()), _loss(entropy())
    assert _loss(cross_entropy() + entropy()) == pytest.approx(a + b)
    assert _loss(cross_entropy() - 0.1 * entropy()) == pytest.approx(a - 0.1 * b)
    assert _loss(2 * (cross_entropy() + entropy() * 3) / 4) == pytest.approx((a + 3 * b) / 2)
    assert _loss(-cross_entropy()) == pytest.approx(-a)
    assert _loss(sum([cross_entropy(), entropy()])) == pytest.approx(a + b)
    assert _loss(np.float32(0.5) * cross_entropy()) == pytest.approx(a / 2)
    assert _loss(0.0 * cross_entropy() + entropy()) == pytest.approx(b)
    with pytest.raises(TypeError):
        cross_entropy() + 1


def test_schedules_are_coefficients():
    ramp = lambda step: 0.1 * step
    a, b = _loss(cross_entropy()), _loss(entropy())
    objective = cross_entropy() + 2 * (ramp * entropy())
    for step in (0, 5):
        assert _loss(objective, step=step) == pytest.approx(a + 0.2 * step * b)
    (_, (squared, _)) = (cross_entropy() + ramp * (ramp * entropy())).terms
    assert float(coefficient_at(squared, jnp.asarray(3.0))) == pytest.approx(0.09)


def test_metrics_are_those_of_each_term_before_its_coefficient():
    found = evaluate(cross_entropy() + 0.5 * z_loss(), POLICY, VARIABLES, _batch())
    metrics = finalize(found.sums)
    assert float(metrics["loss"]) == pytest.approx(
        float(metrics["loss/cross_entropy"] + 0.5 * metrics["loss/z_loss"]), rel=1e-6
    )
    outputs = POLICY(VARIABLES, _batch())
    assert float(metrics["accuracy"]) == pytest.approx(float(outputs.correct.mean()))


def test_labels():
    objective = cross_entropy() + cross_entropy() + cross_entropy().on("web") + cross_entropy().named("other")
    assert objective.labels == ("cross_entropy", "cross_entropy#2", "web/cross_entropy", "other")
    with pytest.raises(UserError, match="takes a single term, not a sum of 4"):
        objective.named("all")


def test_streams():
    batches = {"web": _batch(1, 2), "code": _batch(2, 4)}
    both = cross_entropy().on("web") + 3 * cross_entropy().on("code")
    expected = _loss(cross_entropy(), batches["web"]) + 3 * _loss(cross_entropy(), batches["code"])
    assert _loss(both, batches) == pytest.approx(expected)
    # A term without a stream is on the one that no other term names.
    assert _loss(cross_entropy() + cross_entropy().on("web"), batches) == pytest.approx(
        _loss(cross_entropy(), batches["code"]) + _loss(cross_entropy(), batches["web"])
    )
    assert _loss(cross_entropy(), {"only": _batch(1, 2)}) == pytest.approx(_loss(cross_entropy(), batches["web"]))
    metrics = finalize(evaluate(both, POLICY, VARIABLES, batches).sums)
    assert {"loss/web/cross_entropy", "loss/code/cross_entropy", "web/accuracy", "code/accuracy"} <= set(metrics)


def test_streams_that_are_not_there_or_could_be_several():
    batches = {"web": _batch(), "code": _batch()}
    with pytest.raises(UserError, match=r"could be meant for code or web; say which with \.on"):
        _loss(cross_entropy(), batches)
    with pytest.raises(UserError, match="no batch is called 'wiki'; there are code, web"):
        _loss(cross_entropy().on("wiki"), batches)
    with pytest.raises(UserError, match="no batch is called 'web'"):
        _loss(cross_entropy().on("web"))


def test_roles():
    other = POLICY.init(jax.random.key(1))
    objective = kl("reference", estimator="k1")
    expected = float(jnp.mean(POLICY(VARIABLES, _batch()).logprobs - POLICY(other, _batch()).logprobs))
    assert _loss(objective, roles={"reference": other}) == pytest.approx(expected, rel=1e-5)
    assert _loss(objective, roles={"reference": lambda variables: variables}) == 0.0
    with pytest.raises(UserError, match=r"needs the role 'reference'; pass roles="):
        _loss(objective)
    assert (objective + divergence("teacher")).roles == ("reference", "teacher")


def test_a_role_may_have_a_policy_of_its_own():
    small = lm.Policy(lm.models.small(V, num_layers=1, embed_dim=8, num_heads=2, init_std=0.5))
    teacher = small.init(jax.random.key(3))
    found = _loss(divergence("teacher", "forward"), roles={"teacher": Role(teacher, small)})
    own, others = (jax.nn.log_softmax(p(v, _batch()).logits) for p, v in ((POLICY, VARIABLES), (small, teacher)))
    assert found == pytest.approx(float(jnp.mean(jnp.sum(jnp.exp(others) * (others - own), -1))), rel=1e-5)


def test_roles_get_no_gradient():
    objective = kl("reference", estimator="k2") + divergence("reference", "js")

    def loss(variables, other):
        roles = {"reference": Role(other), "self": Role(lambda v: v)}
        return evaluate(objective, POLICY, variables, _batch(), roles=roles).loss

    own, others = jax.grad(loss, (0, 1))(VARIABLES, POLICY.init(jax.random.key(1)))
    assert jnp.any(own["params"]["table"] != 0) and not jnp.any(others["params"]["table"])


def test_a_term_of_ones_own():
    @term(roles=("reference",))
    def margin(outputs, batch, reference, gain=1.0):
        values = jax.nn.relu(gain * (reference.logprobs - outputs.logprobs))
        return values, batch.mask, {"behind": (values > 0, batch.mask)}

    roles = {"reference": POLICY.init(jax.random.key(1))}
    metrics = finalize(evaluate(margin(gain=2.0), POLICY, VARIABLES, _batch(), roles=roles).sums)
    gap = POLICY(roles["reference"], _batch()).logprobs - POLICY(VARIABLES, _batch()).logprobs
    assert float(metrics["loss/margin"]) == pytest.approx(2 * float(jnp.maximum(gap, 0).mean()), rel=1e-5)
    assert float(metrics["behind"]) == pytest.approx(float((gap > 0).mean()))
    assert margin.__name__ == "margin"
    assert _loss(margin(reducer=lm.objectives.token_sum), roles=roles) == pytest.approx(
        _loss(margin(), roles=roles) * 15, rel=1e-5
    )


def test_terms_that_return_something_else():
    reduced = term(lambda outputs, batch: outputs.logprobs.mean())
    with pytest.raises(UserError, match=r"must return \(values, mask\)"):
        _loss(reduced())
    uneven = term(lambda outputs, batch: (outputs.logprobs, jnp.ones(())))
    with pytest.raises(UserError, match=r"its values have shape \(3, 5\) and their mask \(\)"):
        _loss(uneven())


def test_two_terms_that_report_the_same_metric_keep_both():
    batch = _batch()
    rows = jnp.arange(batch.tokens.shape[0]) % 2

    @term
    def even(outputs, batch):
        return outputs.logprobs, batch.mask, {"share": (jnp.ones_like(batch.mask), batch.mask)}

    @term
    def odd(outputs, batch):
        weight = batch.mask * rows[:, None]
        return outputs.logprobs, weight, {"share": (jnp.zeros_like(weight), weight)}

    metrics = finalize(evaluate(even() + odd(), POLICY, VARIABLES, batch).sums)
    assert (metrics["share"], metrics["odd/share"]) == (1.0, 0.0)


def test_an_empty_objective_is_refused():
    with pytest.raises(UserError, match="at least one term"):
        lm.objectives.Objective(())
