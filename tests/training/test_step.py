"""The step: what it changes, what it refuses, what it costs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import UserError
from lmjax.objectives import Objective, Term, auxiliary, cross_entropy, entropy, evaluate, kl, token_sum
from lmjax.sharding import replicated
from lmjax.training.state import init_state
from lmjax.training.step import make_step
from tests.laws.registry import assert_close, random_batch, tiny_policy

V = 16
POLICY = lm.Policy(lm.models.bigram(V, init_std=1.0))
BATCH = random_batch(4, 6)
KEY = jax.random.key(0)
ADAM = optax.adam(0.1)


def _state(optimizer=ADAM, policy=POLICY, **options):
    return init_state(policy, optimizer, KEY, **options)


@functools.cache
def _plain_step():
    return make_step(POLICY, cross_entropy(), ADAM)


def _host(tree):
    return jax.tree.map(np.array, tree)


def test_a_step_is_the_optimizer_applied_to_the_gradient():
    state = _state()
    loss = lambda variables: evaluate(cross_entropy(), POLICY, variables, BATCH).loss
    value, gradient = jax.value_and_grad(loss)(state.variables)
    updates, opt_state = ADAM.update(gradient, ADAM.init(state.variables), state.variables)
    expected = _host((optax.apply_updates(state.variables, updates), opt_state))
    state, metrics = _plain_step()(state, BATCH)
    assert_close((state.variables, state.opt_state), expected)
    assert_close(metrics["loss"], value)
    assert_close(metrics["grad_norm"], optax.tree.norm(gradient))
    assert int(state.step) == 1 and int(metrics["tokens"]) == (BATCH.segments > 0).sum()


def test_metrics_are_scalars_of_float32():
    _, metrics = _plain_step()(_state(), BATCH)
    assert {"loss", "loss/cross_entropy", "accuracy", "grad_norm", "tokens"} <= set(metrics)
    assert {"nonfinite/cross_entropy", "nonfinite/gradient"} <= set(metrics)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_the_state_is_donated_and_the_second_call_compiles_nothing():
    step = make_step(POLICY, cross_entropy(), ADAM, ema_decay=0.9)
    first = _state(ema=True)
    second, _ = step(first, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.variables, first.opt_state, first.ema)))
    third, _ = step(second, BATCH)
    step(third, dataclasses.replace(BATCH, mask=BATCH.mask * 0.5))
    assert step.cache_size() == 1


def test_steps_are_deterministic_and_resume_bit_for_bit():
    """Also under dropout and microbatches: the randomness of a step follows from the state alone."""
    policy = tiny_policy(dropout=0.3)
    objective = cross_entropy() + 0.1 * kl("reference")
    roles = {"reference": policy.init(jax.random.key(5))}
    step = make_step(policy, objective, ADAM, roles=roles, microbatches=2, clip_norm=0.5, ema_decay=0.9)
    state = _state(policy=policy, ema=True)
    losses, saved = [], None
    for number in range(4):
        state, metrics = step(state, BATCH)
        losses.append(metrics["loss"])
        if number == 1:
            saved = _host(state)
    resumed, again = jax.tree.map(jnp.asarray, saved), []
    for _ in range(2):
        resumed, metrics = step(resumed, BATCH)
        again.append(metrics["loss"])
    assert np.array_equal(losses[2:], again)
    assert jax.tree.all(jax.tree.map(np.array_equal, _host(state), _host(resumed)))
    assert len({float(loss) for loss in losses}) == 4


def test_dropout_changes_with_the_step_and_with_the_microbatch():
    policy = tiny_policy(dropout=0.5)
    step = make_step(policy, cross_entropy(), optax.sgd(0.0))
    state, first = step(_state(optax.sgd(0.0), policy), BATCH)
    _, second = step(state, BATCH)
    assert float(first["loss"]) != float(second["loss"])
    # Both microbatches hold the same row: their losses differ only if their dropout does.
    twice = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), BATCH)
    once = jax.tree.map(lambda x: x[:1], BATCH)
    halves = make_step(policy, cross_entropy(), optax.sgd(0.0), microbatches=2)
    _, both = halves(_state(optax.sgd(0.0), policy), twice)
    _, one = step(_state(optax.sgd(0.0), policy), once)
    assert abs(float(both["loss"]) - float(one["loss"])) > 1e-4


def _broken(name, *, loss):
    """A term whose loss, or else only its gradient, is not finite at tokens 0."""

    def function(outputs, batch):
        zero = batch.tokens == 0
        if loss:
            return outputs.logprobs * jnp.where(zero, -jnp.inf, -0.5), batch.mask
        return jnp.sqrt(outputs.logprobs * jnp.where(zero, 0.0, -1.0)), batch.mask

    return Objective(((1.0, Term(name, function)),))


@pytest.mark.parametrize(("loss", "flag"), [(True, "nonfinite/bad"), (False, "nonfinite/gradient")])
def test_a_step_that_is_not_finite_changes_nothing_and_says_where(loss, flag):
    step = make_step(POLICY, cross_entropy() + _broken("bad", loss=loss), ADAM, ema_decay=0.9)
    harmless = dataclasses.replace(BATCH, tokens=np.maximum(BATCH.tokens, 1), mask=np.ones_like(BATCH.mask))
    state, metrics = step(_state(ema=True), harmless)
    before = _host(state)
    assert not any(float(value) for name, value in metrics.items() if name.startswith("nonfinite"))
    harmful = dataclasses.replace(harmless, tokens=np.zeros_like(BATCH.tokens))
    state, metrics = step(state, harmful)
    assert {name for name, value in metrics.items() if name.startswith("nonfinite") and float(value)} == {flag}
    for field in ("variables", "opt_state", "ema", "rng"):
        assert jax.tree.all(jax.tree.map(np.array_equal, getattr(before, field), _host(getattr(state, field))))
    assert int(state.step) == 2
    state, metrics = step(state, harmless)
    assert not np.array_equal(before.variables["params"]["table"], state.variables["params"]["table"])


def test_clipping():
    gradient_norms = []
    for clip in (None, 0.01):
        step = make_step(POLICY, cross_entropy(), optax.sgd(1.0), clip_norm=clip)
        state = _state(optax.sgd(1.0))
        before = _host(state.variables)
        state, metrics = step(state, BATCH)
        moved = np.linalg.norm(before["params"]["table"] - state.variables["params"]["table"])
        gradient_norms.append(float(metrics["grad_norm"]))
        assert moved == pytest.approx(clip or gradient_norms[0], rel=1e-4)
    assert gradient_norms[0] == gradient_norms[1] > 0.01  # reported before clipping


def test_moving_average():
    step = make_step(POLICY, cross_entropy(), ADAM, ema_decay=0.9)
    state = _state(ema=True)
    expected = np.array(state.variables["params"]["table"])
    for _ in range(3):
        state, _ = step(state, BATCH)
        expected = 0.9 * expected + 0.1 * np.array(state.variables["params"]["table"])
    assert_close(state.ema["params"]["table"], expected)
    with pytest.raises(UserError, match=r"keeps no average; use init_state\(\.\.\., ema=True\)"):
        make_step(POLICY, cross_entropy(), ADAM, ema_decay=0.9)(_state(), BATCH)


def test_only_trainable_collections_move():
    policy = tiny_policy()
    variables = policy.init(KEY) | {"delta": {"shift": jnp.zeros(16)}}
    before = _host(variables)
    state = _state(policy=policy, trainable=("delta",), variables=variables)
    step = make_step(policy, cross_entropy(), ADAM, trainable=("delta",))
    state, _ = step(state, BATCH)
    assert jax.tree.all(jax.tree.map(np.array_equal, before["params"], _host(state.variables["params"])))
    assert np.all(np.array(state.variables["delta"]["shift"]) != 0)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert [leaf.shape for leaf in moments] == [(16,), (16,)]
    with pytest.raises(UserError, match="nothing to train under 'lora'; the variables hold params"):
        _state(trainable=("lora",))


def test_a_role_that_is_a_function_of_the_policy_shares_its_arrays():
    """No copy is passed in, none is kept, and the state can still be donated; it follows the policy as it moves."""
    step = make_step(POLICY, cross_entropy() + kl("self", estimator="abs"), ADAM, roles={"self": lambda v: v})
    state = _state()
    for _ in range(2):
        old, (state, metrics) = state, step(state, BATCH)
        assert old.variables["params"]["table"].is_deleted()
        assert float(metrics["loss/kl_self"]) == 0.0
    assert step._role_variables == {}


def test_a_role_that_holds_the_states_own_arrays_is_refused():
    state = _state()
    step = make_step(POLICY, kl("reference"), ADAM, roles={"reference": state.variables})
    with pytest.raises(UserError, match="role 'reference' holds arrays of the training state"):
        step(state, BATCH)
    copied = jax.tree.map(jnp.copy, state.variables)
    make_step(POLICY, kl("reference"), ADAM, roles={"reference": copied})(state, BATCH)


def test_frozen_roles_stay():
    roles = {"reference": POLICY.init(jax.random.key(9))}
    before = _host(roles)
    step = make_step(POLICY, kl("reference"), ADAM, roles=roles)
    state, _ = step(_state(), BATCH)
    step(state, BATCH)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, _host(roles)))
    with pytest.raises(UserError, match="needs the role 'reference'"):
        make_step(POLICY, kl("reference"), ADAM)


REFUSED = {
    "term 'scalar' couples the rows": auxiliary("scalar"),
    "term 'scalar' has one value for the whole batch": auxiliary("scalar", couples_rows=False),
    "term 'sure' has a mask that depends on the outputs": Objective(
        ((1.0, Term("sure", lambda o, b: (o.logprobs, b.mask * (o.entropy < 1)))),)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_microbatches_that_would_change_the_loss_are_refused(reason):
    policy = tiny_policy()
    objective = cross_entropy() + REFUSED[reason]
    with pytest.raises(UserError, match=f"{reason}.*set microbatches=1"):
        make_step(policy, objective, ADAM, microbatches=2)(_state(policy=policy), BATCH)
    make_step(policy, objective, ADAM)(_state(policy=policy), BATCH)


def test_a_plain_sum_is_reported_whole_under_microbatches():
    objective = cross_entropy(reducer=token_sum)
    _, whole = make_step(POLICY, objective, ADAM)(_state(), BATCH)
    _, parts = make_step(POLICY, objective, ADAM, microbatches=4)(_state(), BATCH)
    assert_close(parts["loss/cross_entropy"], whole["loss/cross_entropy"])
    assert_close(parts["loss"], whole["loss"])


def test_batches_that_do_not_split():
    with pytest.raises(UserError, match="4 rows does not split into 3 microbatches"):
        make_step(POLICY, cross_entropy(), ADAM, microbatches=3)(_state(), BATCH)
    with pytest.raises(UserError, match="microbatches is 0"):
        make_step(POLICY, cross_entropy(), ADAM, microbatches=0)


def test_learning_rate_and_schedules_see_the_step():
    schedule = lambda step: 0.1 / (step + 1.0)
    objective = cross_entropy() + (lambda step: 1.0 * step) * entropy()
    step = make_step(POLICY, objective, optax.sgd(schedule), schedule=schedule)
    state = _state(optax.sgd(schedule))
    for number in range(3):
        state, metrics = step(state, BATCH)
        assert float(metrics["learning_rate"]) == pytest.approx(0.1 / (number + 1))
        expected = metrics["loss/cross_entropy"] + number * metrics["loss/entropy"]
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert step.cache_size() == 1


def test_state_and_metrics_lie_where_the_plan_says(make_test_mesh):
    mesh = make_test_mesh((2, 2, 2))
    policy = tiny_policy()
    state = _state(policy=policy, mesh=mesh, ema=True)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(policy, cross_entropy(), ADAM, mesh=mesh, ema_decay=0.9)
    state, metrics = step(state, BATCH)
    same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, places)
    assert jax.tree.all(same)
    assert all(value.sharding.is_equivalent_to(replicated(mesh), 0) for value in metrics.values())
    table = state.variables["params"]["embed"]["embedding"]
    assert not table.sharding.is_fully_replicated
    step(state, BATCH)
    assert step.cache_size() == 1
    with pytest.raises(UserError, match="3 rows does not split evenly"):
        make_step(policy, cross_entropy(), ADAM, mesh=mesh)(_state(policy=policy, mesh=mesh), random_batch(3, 6))


def test_streams_reach_their_terms():
    batches = {"web": BATCH, "code": random_batch(2, 5, seed=3)}
    objective = cross_entropy().on("web") + 0.5 * cross_entropy().on("code")
    _, metrics = make_step(POLICY, objective, ADAM, microbatches=2)(_state(), batches)
    _, whole = make_step(POLICY, objective, ADAM)(_state(), batches)
    assert_close(metrics, whole, rtol=1e-4)
    assert {"loss/web/cross_entropy", "loss/code/cross_entropy", "code/accuracy"} <= set(metrics)
