"""Terms of all sorts give the loss and the gradient of a materialised reference, whichever path they take."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import lmjax as lm
from lmjax.batch import Batch
from lmjax.objectives import Role, Term, evaluate, token_mean
from lmjax.objectives.tracing import token_program, trace
from tests.laws.registry import assert_close

V = 7
SHAPES = [(3, 8), (4, 4), (1, 5)]  # rows and time told apart, the same, a single row
rng = np.random.default_rng(0)
CONSTANTS = {shape: rng.normal(size=shape).astype(np.float32) for shape in SHAPES}


def _batch(shape) -> Batch:
    B, T = shape
    generator = np.random.default_rng(B * T)
    tokens, targets = generator.integers(0, V, (2, B, T)).astype(np.int32)
    mask = generator.choice([0.0, 0.5, 1.0], shape).astype(np.float32)
    segments = np.sort(generator.integers(1, 3, shape), axis=1).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return Batch(tokens, targets, mask, segments, positions, np.linspace(0.6, 1.4, B, dtype=np.float32))


@jax.custom_jvp
def _mixing_jvp(x):
    return x * 1.0


@_mixing_jvp.defjvp
def _(primals, tangents):
    return primals[0] * 1.0, tangents[0] - jnp.mean(tangents[0], axis=-1, keepdims=True)


@jax.custom_vjp
def _mixing_vjp(x):
    return x * 1.0


_mixing_vjp.defvjp(lambda x: (x * 1.0, None), lambda _, ct: (jnp.cumsum(ct, axis=1),))


@jax.custom_vjp
def _straight_through(x):
    return jnp.round(x)


_straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (2 * ct,))


@jax.custom_jvp
def _doubling(x):
    return x * 1.0


@_doubling.defjvp
def _(primals, tangents):
    return primals[0] * 1.0, 2.0 * tangents[0]


@jax.jit
def _with_inner_constant(x):
    return x * CONSTANTS[x.shape] if x.shape in CONSTANTS else x * 0.0


def _sequence_sum(x, batch):
    T = x.shape[1]
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    return jnp.einsum("bts,bs->bt", same.astype(x.dtype), x) / T


def _ratio(o, b, r):
    return jnp.exp(o.logprobs - jax.lax.stop_gradient(r.logprobs))


# What each does to [B, T]; every one of them is a function of a token alone.
TOKENWISE = {
    "focal": lambda o, b, r: -((1 - jnp.exp(o.logprobs)) ** 2.0) * o.logprobs,
    "where": lambda o, b, r: jnp.where(o.entropy > 1.5, o.logprobs, o.logsumexp**2),
    "relu": lambda o, b, r: jax.nn.relu(o.logprobs + 2.0),
    "softplus": lambda o, b, r: jax.nn.softplus(o.logsumexp) * jax.nn.sigmoid(o.logprobs),
    "gelu_silu": lambda o, b, r: jax.nn.gelu(o.entropy) + jax.nn.silu(o.logprobs) + jax.nn.log_sigmoid(o.logprobs),
    "erf_tanh": lambda o, b, r: jax.scipy.special.erf(o.logprobs) + jnp.tanh(o.entropy) * jnp.log2(o.sum_p2),
    "stop_gradient": lambda o, b, r: jax.lax.stop_gradient(o.logprobs) * o.entropy,
    "clipped_ratio": lambda o, b, r: jnp.minimum(_ratio(o, b, r), jnp.clip(_ratio(o, b, r), 0.8, 1.2)),
    "integers": lambda o, b, r: o.logprobs * (b.positions % 2) + o.entropy * (b.targets == 3),
    "temperature": lambda o, b, r: o.logprobs * b.temperature[:, None] + o.sum_p2,
    "mask_inside": lambda o, b, r: o.logprobs * b.mask + jnp.abs(b.mask - 0.5),
    "logaddexp": lambda o, b, r: jnp.logaddexp(o.logprobs, r.logprobs) + o.mean_logits,
    "jitted": lambda o, b, r: jax.jit(lambda x: jnp.sin(x) * 2)(o.logprobs),
    "checkpointed": lambda o, b, r: jax.checkpoint(lambda x: jnp.sin(x) * x)(o.logprobs),
    "straight_through": lambda o, b, r: _straight_through(o.logprobs) * o.entropy,
    "doubling": lambda o, b, r: _doubling(o.logprobs),
    "other_role_only": lambda o, b, r: r.logprobs * o.entropy + jnp.sqrt(r.entropy),
    "scalar_closure": lambda o, b, r: o.logprobs * np.float32(0.3) + jnp.float32(2.0) * o.entropy,
    "constant": lambda o, b, r: 0.0 * o.logprobs + 1.0,
}

# Every one of these looks beyond its token, or holds arrays or sizes of its own.
MIXING = {
    "cumsum": lambda o, b, r: jnp.cumsum(o.logprobs, axis=1),
    "sequence_sum": lambda o, b, r: _sequence_sum(o.logprobs, b),
    "whiten": lambda o, b, r: (o.logprobs - jnp.mean(o.logprobs)) * o.entropy,
    "mask_mean": lambda o, b, r: o.logprobs / jnp.sum(b.mask),
    "row_mean": lambda o, b, r: o.logprobs * jnp.sum(b.mask, axis=1, keepdims=True),
    "column_mean": lambda o, b, r: o.logprobs - jnp.mean(o.logprobs, axis=0),
    "sort": lambda o, b, r: jnp.sort(o.logprobs, axis=1),
    "roll": lambda o, b, r: jnp.roll(o.logprobs, 1, axis=1) * o.entropy,
    "reverse": lambda o, b, r: o.logprobs[:, ::-1] * o.entropy,
    "gather": lambda o, b, r: jnp.take_along_axis(o.logprobs, b.positions[:, ::-1], axis=1),
    "first_token": lambda o, b, r: o.logprobs[:, :1] * o.entropy,
    "iota": lambda o, b, r: o.logprobs * jnp.arange(o.logprobs.shape[1]),
    "closure_T": lambda o, b, r: o.logprobs * CONSTANTS[b.tokens.shape][0] if b.tokens.shape in CONSTANTS else 0.0,
    "closure_BT": lambda o, b, r: o.logprobs * CONSTANTS[_whole_shape[0]],
    "closure_jax": lambda o, b, r: o.logprobs * jnp.asarray(CONSTANTS[_whole_shape[0]]),
    "closure_in_jit": lambda o, b, r: _with_inner_constant(o.logprobs),
    "softmax_over_time": lambda o, b, r: jax.nn.softmax(o.logprobs, axis=1),
    "logsumexp_over_time": lambda o, b, r: jax.nn.logsumexp(o.logprobs, axis=1, keepdims=True) + o.logprobs,
    "scan": lambda o, b, r: jax.lax.scan(lambda c, x: (0.9 * c + x,) * 2, o.logprobs[:, 0] * 0, o.logprobs.T)[1].T,
    "length_in_python": lambda o, b, r: o.logprobs / o.logprobs.shape[1],
    "length_as_array": lambda o, b, r: o.logprobs * jnp.float32(b.tokens.shape[1]),
    "branch_on_length": lambda o, b, r: o.logprobs * 2 if b.tokens.shape[1] > 3 else o.entropy,
    "shape_written_down": lambda o, b, r: o.logprobs * jnp.ones(_whole_shape[0]),
    "mixing_jvp": lambda o, b, r: _mixing_jvp(o.logprobs),
    "mixing_vjp": lambda o, b, r: _mixing_vjp(o.logprobs) * o.entropy,
    "vmap_over_rows": lambda o, b, r: jax.vmap(lambda row: row - row.max())(o.logprobs),
    "matmul": lambda o, b, r: o.logprobs @ jnp.tri(o.logprobs.shape[1]),
    "temperature_along_time": lambda o, b, r: o.logprobs * jnp.resize(b.temperature, b.tokens.shape[1:]),
}
_whole_shape: list[tuple[int, int]] = [(3, 8)]

POLICY = lm.Policy(lm.models.bigram(V, init_std=1.0))
VARIABLES = POLICY.init(jax.random.key(0))
OTHER = POLICY.init(jax.random.key(1))


def _term(function) -> Term:
    return Term("mine", lambda o, b, r: (function(o, b, r), b.mask), token_mean, ("reference",))


def _reference_outputs(variables, batch):
    z = variables["params"]["table"][batch.tokens] / batch.temperature[:, None, None]
    logp = jax.nn.log_softmax(z)
    p = jnp.exp(logp)
    return SimpleNamespace(
        logprobs=jnp.take_along_axis(logp, jnp.asarray(batch.targets)[..., None], -1)[..., 0],
        logsumexp=jax.nn.logsumexp(z, axis=-1),
        entropy=-jnp.sum(p * logp, -1),
        sum_p2=jnp.sum(p * p, -1),
        mean_logits=jnp.mean(z, -1),
    )


def _reference(function, batch):
    other = _reference_outputs(OTHER, batch)

    def loss(variables):
        values = function(_reference_outputs(variables, batch), batch, other)
        return jnp.sum(values * batch.mask) / jnp.sum(batch.mask)

    return jax.value_and_grad(loss)(VARIABLES)


def _evaluated(function, batch, tokens_a_slice):
    policy = lm.Policy(POLICY.model, chunk_elements=tokens_a_slice * batch.tokens.shape[0] * V)
    objective = lm.objectives.Objective(((1.0, _term(function)),))
    roles = {"reference": Role(OTHER)}
    return jax.value_and_grad(lambda v: evaluate(objective, policy, v, batch, roles=roles).loss)(VARIABLES)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", [*TOKENWISE, *MIXING])
def test_both_paths_give_the_reference(name, shape):
    function = (TOKENWISE | MIXING)[name]
    _whole_shape[0] = shape
    batch = _batch(shape)
    expected = _reference(function, batch)
    tokens = 3 if shape == (3, 8) else 1  # 3 does not divide 8; arrays [B, 1] broadcast by mistake
    assert_close(_evaluated(function, batch, tokens), expected, rtol=1e-5)


def _sliceable(function, batch, length=1) -> bool:
    found = trace(_term(function), batch, lambda role, field: None)
    return found.tokenwise and found.program == token_program(_term(function), batch, length)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TOKENWISE)
def test_tokenwise_terms_are_fused(name, shape):
    assert _sliceable(TOKENWISE[name], _batch(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MIXING)
def test_mixing_terms_are_not(name, shape):
    _whole_shape[0] = shape
    assert not _sliceable(MIXING[name], _batch(shape))


def test_a_mask_that_depends_on_the_outputs_is_general_and_gets_no_gradient():
    batch = _batch((3, 8))
    confident = Term("confident", lambda o, b: (o.logprobs, b.mask * jnp.exp(o.logprobs)))
    found = trace(confident, batch, lambda role, field: None)
    assert found.mask_depends_on_outputs and not found.tokenwise

    def reference(variables):
        outputs = _reference_outputs(variables, batch)
        weights = jax.lax.stop_gradient(batch.mask * jnp.exp(outputs.logprobs))
        return jnp.sum(outputs.logprobs * weights) / jnp.sum(weights)

    objective = lm.objectives.Objective(((1.0, confident),))
    actual = jax.value_and_grad(lambda v: evaluate(objective, POLICY, v, batch).loss)(VARIABLES)
    assert_close(actual, jax.value_and_grad(reference)(VARIABLES), rtol=1e-5)


EXTRAS = {"fused": lm.objectives.entropy(), "general": lm.objectives.divergence("reference")}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_a_token_without_weight_cannot_poison_the_gradient(extra):
    """Where the derivative is infinite: 0 times infinity is NaN, and would skip the update of the whole batch."""
    batch = _batch((3, 8))
    table = VARIABLES["params"]["table"].at[batch.tokens[0, 0], batch.targets[0, 0]].set(200.0)
    mask = (batch.tokens != batch.tokens[0, 0]).astype(np.float32)
    batch = dataclasses.replace(batch, mask=mask)
    certain = Term("certain", lambda o, b: (jnp.log1p(-jnp.exp(o.logprobs)), b.mask))
    objective = lm.objectives.Objective(((1.0, certain),)) + extra + lm.objectives.kl("reference")
    roles = {"reference": Role(OTHER)}

    def loss(table):
        return evaluate(objective, POLICY, {"params": {"table": table}}, batch, roles=roles).loss

    value, gradient = jax.value_and_grad(loss)(table)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
    assert jnp.any(gradient != 0) and not jnp.any(gradient[batch.tokens[0, 0]])


LEAVES = st.sampled_from(
    ["o.logprobs", "o.entropy", "o.logsumexp", "o.sum_p2", "o.mean_logits", "r.logprobs", "b.mask", "b.positions"]
)
UNARY = st.sampled_from(["jnp.tanh({})", "jax.nn.softplus({})", "-({})", "jax.lax.stop_gradient({})", "jnp.sin({})"])
BINARY = st.sampled_from(["({} + {})", "({} * {})", "jnp.maximum({}, {})", "jnp.where(b.targets > 3, {}, {})"])
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(str.format, UNARY, inner), st.builds(str.format, BINARY, inner, inner)
    ),
    max_leaves=6,
)


@hypothesis.settings(
    max_examples=10, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate]
)
@hypothesis.given(EXPRESSIONS)
def test_random_tokenwise_terms(expression):
    function = eval(f"lambda o, b, r: 0.5 * o.logprobs + {expression}", {"jnp": jnp, "jax": jax})
    batch = _batch((3, 8))
    assert _sliceable(function, batch)
    assert_close(_evaluated(function, batch, 3), _reference(function, batch), rtol=1e-5)
