"""Law 2: one forward a role and stream, one pass over the vocabulary, no [B, T, V]; counted in the jaxpr."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax.objectives import Objective, Role, Term, evaluate, token_mean
from lmjax.policy import add_value_head
from lmjax.training.state import init_state
from lmjax.training.step import make_step
from tests.laws.counting import equations, forwards, largest, primitives, vocabulary_products
from tests.laws.registry import TERMS, tiny_policy

V, D, B, T = 131, 16, 4, 6  # no other axis is V long; the table and the attention weights are smaller than [B, T, V]
SLICE = B * V * 2  # logits of two tokens a row at a time
POLICY = tiny_policy(vocab_size=V, num_heads=2, mlp_dim=40, chunk_elements=SLICE)
SHAPES = jax.eval_shape(POLICY.init, jax.random.key(0))
ROLES = ("reference", "teacher")


def _batch():
    ids = np.random.default_rng(0).integers(0, V, (B, T + 1))
    return lm.batch.next_token_batch(ids)


def _jaxpr(objective: Objective, *, collection: str = "params", variables=SHAPES, streams=None, policy=POLICY):
    """Loss and gradient of one collection."""
    batches = {"batch": _batch()} if streams is None else {name: _batch() for name in streams}

    def run(variables, role_variables, batches):
        roles = {name: Role(role_variables[name]) for name in objective.roles}

        def loss(part):
            return evaluate(objective, policy, variables | {collection: part}, batches, roles=roles).loss

        return jax.grad(loss)(variables[collection])

    return jax.make_jaxpr(run)(variables, dict.fromkeys(ROLES, SHAPES), batches)


def _sum(*names: str) -> Objective:
    built = [TERMS[name].build(token_mean) for name in names]
    return sum(built[1:], built[0])


FUSED = [name for name, case in TERMS.items() if case.fused]
OF_THE_POLICY_ALONE = ["cross_entropy", "label_smoothing", "z_loss", "entropy"]


def _cumulative(outputs, batch):
    return jnp.cumsum(outputs.logprobs, axis=1), batch.mask


GENERAL = Objective(((1.0, Term("cumulative", _cumulative)),))

# objective -> (forwards, products with the vocabulary) of loss and gradient. Fused: logits, d hidden, d weight; a
# frozen role: its logits; general: logits, logits again, d hidden, d weight.
COUNTS = {
    "one fused": (_sum("cross_entropy"), 1, 3),
    "all fused of the policy": (_sum(*OF_THE_POLICY_ALONE), 1, 3),
    "one role": (_sum("kl_k3"), 2, 3 + 1),
    "all fused": (_sum(*FUSED), 2, 3 + 1),
    "general": (GENERAL, 1, 4),
    "general takes the fused along": (_sum(*OF_THE_POLICY_ALONE) + GENERAL, 1, 4),
    "rows of logits": (_sum("reverse"), 2, 2 * 2 + 2),
    "rows of logits, many": (_sum("reverse", "forward", "js", "cross_entropy", "entropy"), 2, 2 * 2 + 2),
    "two roles": (_sum("distillation", "distillation_top_k", "reverse"), 3, 3 * 2 + 2),
    "insides": (_sum("hidden_cosine", "hidden_mse", "attention_scores", "attention_probabilities"), 2, 0),
    "insides beside": (_sum("hidden_mse", "attention_scores", "cross_entropy"), 2, 3),
    "insides and rows": (_sum("hidden_cosine", "attention_scores", "distillation", "distillation_js"), 2, 2 * 2 + 2),
    "auxiliary only": (_sum("auxiliary", "auxiliary_scalar"), 1, 0),
    "auxiliary beside": (_sum("auxiliary", "cross_entropy"), 1, 3),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    objective, expected_forwards, products = COUNTS[name]
    jaxpr = _jaxpr(objective)
    assert forwards(jaxpr, (V, D)) == expected_forwards
    assert vocabulary_products(jaxpr, V) == products
    assert largest(jaxpr) < B * T * V


def test_streams_have_a_forward_and_a_pass_each():
    both = _sum("cross_entropy", "entropy").on("a") + _sum("cross_entropy", "z_loss").on("b")
    jaxpr = _jaxpr(both, streams=("a", "b"))
    assert forwards(jaxpr, (V, D)) == 2
    assert vocabulary_products(jaxpr, V) == 6


def test_reading_logits_is_the_one_way_to_hold_them_and_serves_the_statistics_too():
    def margin(outputs, batch):
        top = jax.lax.top_k(outputs.logits, 2)[0]
        return top[..., 0] - top[..., 1], batch.mask

    jaxpr = _jaxpr(Objective(((1.0, Term("margin", margin)),)) + _sum(*OF_THE_POLICY_ALONE))
    assert largest(jaxpr) >= B * T * V
    assert vocabulary_products(jaxpr, V) == 3
    assert forwards(jaxpr, (V, D)) == 1


def test_no_gradient_of_the_head_unless_it_is_trained():
    variables = SHAPES | {"delta": {"shift": jax.ShapeDtypeStruct((D,), jnp.float32)}}
    for objective, products in ((_sum(*OF_THE_POLICY_ALONE), 2), (GENERAL, 3)):  # one fewer: d weight
        jaxpr = _jaxpr(objective, collection="delta", variables=variables)
        assert vocabulary_products(jaxpr, V) == products
    # Nor of any other kernel: every product with a kernel's shape as its result would be one.
    kernels = {leaf.shape for leaf in jax.tree.leaves(SHAPES) if len(leaf.shape) == 2}
    results = [e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert not kernels & set(results)


def test_a_value_head_alone_costs_no_vocabulary_gradient():
    variables = jax.eval_shape(add_value_head, SHAPES)
    critic = Objective(((1.0, Term("critic", lambda o, b: (jnp.square(o.values - 1), b.mask))),))
    assert vocabulary_products(_jaxpr(critic, collection="value", variables=variables), V) == 0
    both = critic + _sum("cross_entropy")
    jaxpr = _jaxpr(both, collection="value", variables=variables)
    assert vocabulary_products(jaxpr, V) == 1 and forwards(jaxpr, (V, D)) == 1
    assert vocabulary_products(_jaxpr(both, variables=variables), V) == 3


def test_the_whole_step_has_no_callback_and_the_same_counts():
    optimizer = optax.sgd(0.1)
    step = make_step(POLICY, _sum(*OF_THE_POLICY_ALONE), optimizer, clip_norm=1.0, microbatches=2)
    shapes = jax.eval_shape(lambda: init_state(POLICY, optimizer, jax.random.key(0)))
    step._prepare(shapes, {"batch": _batch()})
    jaxpr = jax.make_jaxpr(step._jitted)(shapes, {"batch": _batch()}, {})
    assert forwards(jaxpr, (V, D)) == 1
    assert vocabulary_products(jaxpr, V) == 3
    assert largest(jaxpr) < B * T * V
    assert not {name for name in primitives(jaxpr) if "callback" in name or "infeed" in name}


def test_the_counters_count():
    table, x = jnp.ones((V, D)), jnp.ones((B, T, D))
    jaxpr = jax.make_jaxpr(jax.grad(lambda table: jnp.sum(jax.nn.log_softmax(x @ table.T))))(table)
    assert vocabulary_products(jaxpr, V) == 2 and largest(jaxpr) == B * T * V

    def looped():
        look_up = jax.jit(lambda: jnp.take(table, jnp.ones(3, int), axis=0))
        return jax.lax.scan(lambda carry, _: (carry + look_up(), None), jnp.zeros((3, D)), None, 2)

    assert forwards(jax.make_jaxpr(looped)(), (V, D)) == 1
