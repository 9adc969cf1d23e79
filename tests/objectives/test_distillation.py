"""Distillation against libraries nobody here wrote, and what its terms refuse."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import UserError
from lmjax.losses import matching
from lmjax.objectives import Role, agreement, attention_maps, distillation, evaluate, hidden_states
from lmjax.policy import Request, add_projection
from lmjax.training.state import init_state
from lmjax.training.step import make_step
from tests.laws.registry import assert_close, random_batch
from tests.models.small import FAMILIES, scanned, variables_of
from tests.objectives import make_distillation_fixtures as fixtures

FIXTURES = np.load(fixtures.FIXTURES)


def _gkd(beta, temperature):
    """Loss and gradient of a table of logits: a policy whose hidden states are logits already."""
    own, teacher, counted = fixtures.random_logits()
    V = len(own)
    policy = lm.Policy(lm.models.bigram(V), chunk_elements=4 * V)  # a few rows at a time
    ones = np.ones((1, V), np.int32)
    batch = lm.Batch(np.arange(V)[None], 0 * ones, counted[None].astype(np.float32), ones, ones)
    objective = distillation(beta=beta, temperature=temperature, scaled=False)
    roles = {"teacher": {"params": {"table": teacher}}}

    def loss(table):
        return evaluate(objective, policy, {"params": {"table": table}}, batch, roles=roles).loss

    return jax.value_and_grad(loss)(jnp.asarray(own))


@pytest.mark.parametrize("case", range(len(fixtures.GKD)), ids=[str(case) for case in fixtures.GKD])
def test_gkd_is_that_of_trl(case):
    loss, gradient = _gkd(*fixtures.GKD[case])
    np.testing.assert_allclose(loss, FIXTURES["gkd/loss"][case], rtol=1e-5)
    np.testing.assert_allclose(gradient, FIXTURES["gkd/gradient"][case], atol=1e-6)


def test_the_published_values_of_gkd():
    own, teacher = jnp.array([[1.0, 0, -1], [0.5, 0.2, 0.1]]), jnp.array([[0, 1.0, 0], [2.0, 0, -2]])
    policy = lm.Policy(lm.models.bigram(3))
    ones = np.ones((1, 2), np.int32)
    batch = lm.Batch(np.array([[0, 1]]), ones, ones.astype(np.float32), ones, ones)
    table = lambda rows: {"params": {"table": jnp.concatenate([rows, jnp.zeros((1, 3))])}}
    for beta, expected in {0.0: 0.912863, 0.1: 0.082511, 0.5: 0.242299, 1.0: 1.260311}.items():
        objective = distillation(beta=beta, reducer=lm.objectives.token_sum)
        found = evaluate(objective, policy, table(own), batch, roles={"teacher": table(teacher)})
        assert float(found.loss) == pytest.approx(expected, abs=2e-6)


def test_the_factor_keeps_gradients_of_one_size():
    """Hinton's argument: at high temperature the gradient goes with 1 / t^2, and the factor undoes that."""
    own, teacher = jax.random.normal(jax.random.key(0), (2, 5))
    policy = lm.Policy(lm.models.bigram(5))
    batch = lm.batch.next_token_batch(np.zeros((1, 2), int))

    def gradient(temperature, scaled):
        objective = distillation(temperature=temperature, scaled=scaled)
        table = lambda row: {"params": {"table": jnp.tile(row, (5, 1))}}
        loss = lambda row: evaluate(objective, policy, table(row), batch, roles={"teacher": table(teacher)}).loss
        return jax.grad(loss)(own)

    assert_close(gradient(3.0, True), 9 * gradient(3.0, False))
    matched = (own - own.mean() - teacher + teacher.mean()) / 5  # its limit: matching of logits
    np.testing.assert_allclose(gradient(200.0, True), matched, atol=5e-3)


def test_agreement_counts_the_tokens_where_both_say_the_same():
    policy = lm.Policy(lm.models.bigram(4))
    table = lambda ids: {"params": {"table": jax.nn.one_hot(jnp.array(ids), 4)}}
    batch = lm.batch.next_token_batch(np.array([[0, 1, 2, 3, 0]]), mask=np.array([[0, 1.0, 1, 1, 0]]))
    roles = {"teacher": table([1, 2, 3, 0])}
    found = evaluate(agreement(), policy, table([1, 0, 3, 1]), batch, roles=roles)
    assert float(found.loss) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["cosine", "mse", "scores", "probabilities"])
def test_distances_of_insides_are_those_of_torch(name):
    hidden, other_hidden, scores, other_scores = fixtures.random_insides()
    distances = {
        "cosine": lambda own: matching.cosine_distance(own, other_hidden),
        "mse": lambda own: matching.mean_squared_difference(own, other_hidden),
        "scores": lambda own: matching.attention_difference(own, other_scores, "scores"),
        "probabilities": lambda own: matching.attention_difference(own, other_scores, "probabilities"),
    }
    own = hidden if name in ("cosine", "mse") else scores
    loss, gradient = jax.value_and_grad(lambda own: jnp.mean(distances[name](own)))(jnp.asarray(own))
    np.testing.assert_allclose(loss, FIXTURES[f"{name}/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, FIXTURES[f"{name}/gradient"], atol=1e-6)


def _outputs(config, variables=None):
    tokens = fixtures.tokens_of_insides()
    batch = lm.batch.next_token_batch(np.pad(tokens, ((0, 0), (0, 1))))
    return lm.Policy(config)(variables_of(config) if variables is None else variables, batch)


@pytest.mark.parametrize("family", fixtures.INSIDES)
def test_streams_and_attention_are_those_of_transformers(family):
    outputs = _outputs(FAMILIES[family])
    for n in range(FAMILIES[family].num_layers):
        np.testing.assert_allclose(outputs.layer(n), FIXTURES[f"{family}/layer/{n}"], rtol=1e-4, atol=1e-4)
        weights = jax.nn.softmax(outputs.attention(n + 1))
        np.testing.assert_allclose(weights, FIXTURES[f"{family}/attention/{n + 1}"], atol=1e-5)
    np.testing.assert_allclose(outputs.hidden, FIXTURES[f"{family}/hidden"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_declared_reads_come_from_one_forward_and_change_nothing(family):
    plain = _outputs(FAMILIES[family])
    declared = _outputs(FAMILIES[family]).expecting(Request(layers=frozenset({1}), attentions=frozenset({2})), {})
    np.testing.assert_allclose(declared.hidden, plain.hidden, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(declared.layer(1), plain.layer(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(declared.attention(2), plain.attention(2), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="layers of layer 2 were read, but not when"):
        declared.layer(2)


@functools.cache
def _loss_and_gradient(remat):
    policy = lm.Policy(dataclasses.replace(FAMILIES["gemma2"], remat=remat))
    batch = dataclasses.replace(random_batch(2, 7), temperature=None)
    roles = {"teacher": jax.tree.map(lambda x: 0.8 * x, variables_of(FAMILIES["gemma2"]))}
    objective = hidden_states(kind="mse", layers="uniform") + attention_maps(of="probabilities")
    return jax.jit(jax.value_and_grad(lambda v: evaluate(objective, policy, v, batch, roles=roles).loss))


def test_the_gradient_of_insides_is_the_slope():
    variables = variables_of(FAMILIES["gemma2"])
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), variables)
    moved = lambda size: jax.tree.map(lambda v, d: v + size * d, variables, direction)
    (low, _), (high, _), (_, gradient) = (_loss_and_gradient("none")(moved(size)) for size in (-1e-4, 1e-4, 0.0))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)))
    assert float(high - low) / 2e-4 == pytest.approx(float(slope), rel=1e-2)


@pytest.mark.parametrize("remat", ["attention", "dots", "full"])
def test_gradients_of_insides_do_not_depend_on_what_is_recomputed(remat):
    variables = variables_of(FAMILIES["gemma2"])
    assert_close(_loss_and_gradient(remat)(variables), _loss_and_gradient("none")(variables), rtol=1e-4)


TEACHER = lm.models.small(16, num_layers=4, embed_dim=24, num_heads=2, mlp_dim=16, max_length=16, init_std=0.3)
STUDENT = dataclasses.replace(TEACHER, num_layers=2, embed_dim=8)


def test_a_projection_is_trained_with_the_student_and_bridges_widths():
    teacher, student = lm.Policy(TEACHER), lm.Policy(STUDENT)
    variables = add_projection(student.init(jax.random.key(0)), 24, jax.random.key(1))
    objective = hidden_states(kind="mse", layers="uniform", project=True) + attention_maps()
    roles = {"teacher": Role(teacher.init(jax.random.key(2)), teacher)}
    optimizer, before = optax.adam(1e-2), jax.tree.map(np.array, variables)
    step = make_step(student, objective, optimizer, roles=roles, trainable=("params", "projection"), microbatches=2)
    state = init_state(
        student, optimizer, jax.random.key(0), trainable=("params", "projection"), variables=variables
    )
    batch = dataclasses.replace(random_batch(4, 6), temperature=None)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0] and np.isfinite(losses).all()
    moved = state.variables["projection"]["kernel"] - before["projection"]["kernel"]
    assert float(jnp.abs(moved).min()) > 0
    assert set(jax.tree.leaves(student.logical_axes(variables)["projection"]["kernel"])) <= {None}


def test_pairs_of_layers_name_what_is_compared():
    teacher, student = lm.Policy(TEACHER), lm.Policy(dataclasses.replace(TEACHER, num_layers=2))
    variables, other = student.init(jax.random.key(0)), teacher.init(jax.random.key(1))
    batch = dataclasses.replace(random_batch(2, 6), temperature=None)
    roles = {"teacher": Role(other, teacher)}
    loss = lambda objective: float(evaluate(objective, student, variables, batch, roles=roles).loss)
    mean = lambda values: float(jnp.sum(values * batch.mask) / batch.mask.sum())
    own, theirs = student(variables, batch), teacher(other, batch)

    pairs = [(0, 0), (1, 2), (2, 4)]
    expected = mean(sum(matching.mean_squared_difference(own.layer(a), theirs.layer(b)) for a, b in pairs))
    assert loss(hidden_states(kind="mse", layers="uniform")) == pytest.approx(expected, rel=1e-5)
    expected = mean(matching.cosine_distance(own.layer(2), theirs.layer(1)))
    assert loss(hidden_states(layers=((2, 1),))) == pytest.approx(expected, rel=1e-5)
    assert loss(hidden_states()) == pytest.approx(
        mean(matching.cosine_distance(own.hidden, theirs.hidden)), rel=1e-5
    )
    pairs = [(1, 2), (2, 4)]
    for of in ("scores", "probabilities"):
        expected = mean(
            sum(matching.attention_difference(own.attention(a), theirs.attention(b), of) for a, b in pairs)
        )
        assert loss(attention_maps(of=of)) == pytest.approx(expected, rel=1e-5)


def test_attention_of_different_windows_is_compared_where_both_see():
    scores = jnp.arange(9.0).reshape(1, 3, 3)
    causal = jnp.where(jnp.tri(3, dtype=bool), scores, -jnp.inf)
    narrow = jnp.where(jnp.tri(3, dtype=bool) & ~jnp.tri(3, k=-2, dtype=bool), scores + 1, -jnp.inf)
    np.testing.assert_allclose(matching.attention_difference(causal, narrow, "scores"), [1, 1, 1])
    gradient = jax.grad(lambda x: matching.attention_difference(x, narrow, "probabilities").sum())(causal)
    assert np.isfinite(gradient).all() and np.any(gradient[0, 2])


def _refused(objective, student=STUDENT, teacher=TEACHER, prefix=None):
    policies = [lm.Policy(config) for config in (student, teacher)]
    shapes = [jax.eval_shape(policy.init, jax.random.key(0)) for policy in policies]
    shapes[0] = shapes[0] | (prefix or {})
    batch = random_batch(2, 6)

    def run(variables, other):
        return evaluate(objective, policies[0], variables, batch, roles={"teacher": Role(other, policies[1])}).loss

    return jax.eval_shape(run, *shapes)


WIDE = dataclasses.replace(STUDENT, embed_dim=24)
BAD = {
    "beta is 1.5": lambda: distillation(beta=1.5),
    "no distance of hidden states is called 'l1'": lambda: hidden_states(kind="l1"),
    "attention has no 'values' to compare": lambda: attention_maps(of="values"),
    "layers is 'first'; give 'last' or 'uniform', or pairs": lambda: hidden_states(layers="first"),
    "layers is 'last'; give 'uniform', or pairs": lambda: attention_maps(layers="last"),
    "hidden states 8 wide cannot be compared with the 24 of 'teacher'": lambda: _refused(hidden_states()),
    "these variables have no 'projection'": lambda: _refused(hidden_states(project=True)),
    "of 4 heads cannot be compared with the 2": lambda: _refused(
        attention_maps(), dataclasses.replace(WIDE, num_heads=4)
    ),
    "stream after layer 3 is asked for; this model counts from 0 to 2": lambda: _refused(
        hidden_states(layers=((3, 4),)), WIDE
    ),
    "attention of layer 0 is asked for; this model counts from 1": lambda: _refused(attention_maps(layers=((0, 1),))),
    "with layers='unrolled'": lambda: _refused(hidden_states(layers="uniform"), WIDE, scanned(TEACHER)),
    "a BigramConfig has no layers": lambda: _refused(
        hidden_states(layers="uniform"), WIDE, lm.models.bigram(16)
    ),
    "these variables hold a prefix": lambda: _refused(attention_maps(), prefix={"prefix": {}}),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_compared_is_refused_before_anything_is_compiled(message):
    with pytest.raises(UserError, match=message):
        BAD[message]()


def test_a_student_of_some_layers_of_its_teacher():
    policy = lm.Policy(TEACHER)
    variables = policy.init(jax.random.key(0))
    config, taken = lm.models.take_layers(TEACHER, variables, lm.models.spread_layers(2, 4))
    assert config == dataclasses.replace(TEACHER, num_layers=2)
    params, own = variables["params"], taken["params"]
    assert set(own) == set(params) - {"layer_2", "layer_3"}
    for new, old in ((0, 0), (1, 3)):  # the very arrays
        pairs = zip(jax.tree.leaves(own[f"layer_{new}"]), jax.tree.leaves(params[f"layer_{old}"]), strict=True)
        assert all(a is b for a, b in pairs)
    batch = random_batch(2, 6)
    every, everything = lm.models.take_layers(TEACHER, variables, range(4))
    np.testing.assert_array_equal(lm.Policy(every)(everything, batch).hidden, policy(variables, batch).hidden)
    deep = dataclasses.replace(TEACHER, num_layers=14)  # scanned, and its half is not
    stacked = jax.eval_shape(lm.Policy(deep).init, jax.random.key(0))
    half, its = lm.models.take_layers(deep, stacked, range(0, 14, 2))
    assert not half.scanned and "layer_6" in its["params"] and "layers" not in its["params"]
    with pytest.raises(UserError, match="there is no layer 4"):
        lm.models.take_layers(TEACHER, variables, (0, 4))
    with pytest.raises(UserError, match="9 layers cannot be taken out of 4"):
        lm.models.spread_layers(9, 4)
    with pytest.raises(UserError, match="do not alternate"):
        lm.models.take_layers(FAMILIES["gemma2"], {}, (1, 0))


@pytest.mark.reference
def test_the_fixtures_are_what_the_libraries_say_today():
    pytest.importorskip("torch")
    found = fixtures.torch_insides()
    pytest.importorskip("transformers")
    for family in fixtures.INSIDES:
        found |= fixtures.transformers_insides(family)
    assert found.keys() == {name for name in FIXTURES if not name.startswith("gkd/")}
    for name, value in found.items():
        np.testing.assert_allclose(value, FIXTURES[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.reference
def test_gkd_is_what_trl_says_today():
    pytest.importorskip("trl")
    losses, gradients = fixtures.gkd_losses()
    np.testing.assert_allclose(losses, FIXTURES["gkd/loss"], rtol=1e-6)
    np.testing.assert_allclose(gradients, FIXTURES["gkd/gradient"], atol=1e-7)


def test_the_view_of_a_slice_has_no_insides():
    """A term that reads layers cannot be taken slice by slice, and must not believe that it is."""
    from lmjax.objectives.tracing import View

    view = View("policy", SimpleNamespace(), {})
    for read in (lambda: view.layer(0), lambda: view.attention(1), lambda: view.collection("projection")):
        with pytest.raises(AttributeError):
            read()
