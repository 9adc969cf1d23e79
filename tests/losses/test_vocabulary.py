"""The pass over the vocabulary against materialised log_softmax and its derivative by autodiff."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.losses import STATISTICS, Head, logits_of, map_vocabulary, token_loss, token_statistics
from lmjax.losses.slices import slice_length, slices
from tests.laws.registry import assert_close

B, T, D, V = 3, 7, 5, 11
key = jax.random.key(0)
HIDDEN = jax.random.normal(key, (B, T, D))
WEIGHT = jax.random.normal(jax.random.fold_in(key, 1), (V, D))
BIAS = jax.random.normal(jax.random.fold_in(key, 2), (V,))
TARGETS = jax.random.randint(jax.random.fold_in(key, 3), (B, T), 0, V - 1)
TEMPERATURE = jnp.array([0.5, 1.0, 1.7])
COTANGENTS = {
    name: jax.random.normal(jax.random.fold_in(key, 4 + number), (B, T)) for number, name in enumerate(STATISTICS)
}

HEADS = {
    "plain": Head(WEIGHT),
    "bias": Head(WEIGHT, BIAS),
    "softcap": Head(3 * WEIGHT, BIAS, softcap=4.0),
    "scale": Head(WEIGHT, BIAS, scale=0.3),
    "softcap and scale": Head(WEIGHT, None, softcap=2.0, scale=1.7),
    "banned token": Head(WEIGHT, BIAS.at[V - 1].set(-jnp.inf)),
}


def _reference(head, hidden, temperature):
    """The statistics from [B, T, V] logits, each by its own formula."""
    z = jnp.einsum("btd,vd->btv", hidden, head.weight) + (0.0 if head.bias is None else head.bias)
    z = z * head.scale
    z = z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)
    z = z if temperature is None else z / temperature[:, None, None]
    logp = jax.nn.log_softmax(z)
    p = jnp.exp(logp)
    target = jnp.take_along_axis(logp, TARGETS[..., None], -1)[..., 0]
    return {
        "logprobs": target,
        "logsumexp": jax.nn.logsumexp(z, axis=-1),
        "entropy": -jnp.sum(p * jnp.where(p > 0, logp, 0.0), -1),
        "sum_p2": jnp.sum(p * p, -1),
        "mean_logits": jnp.mean(z, -1),
        "correct": (target >= jnp.max(logp, -1)).astype(jnp.float32),
    }


def _loss_and_gradient(statistics, head, wanted):
    def loss(arrays, hidden):
        found = statistics(head.with_arrays(arrays), hidden)
        return sum(jnp.sum(COTANGENTS[name] * found[name]) for name in wanted), found

    (_, found), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(head.arrays, HIDDEN)
    return {name: found[name] for name in wanted}, gradients


@pytest.mark.parametrize("temperature", [None, TEMPERATURE], ids=["", "tempered"])
@pytest.mark.parametrize("name", HEADS)
def test_every_path_equals_the_reference(name, temperature):
    head = HEADS[name]
    # The mean of logits that hold -inf is -inf.
    wanted = tuple(s for s in STATISTICS if not (name == "banned token" and s == "mean_logits"))
    expected, expected_gradients = _loss_and_gradient(lambda h, x: _reference(h, x, temperature), head, wanted)
    elements = 3 * B * V  # 3 does not divide T = 7

    def by_statistics(h, x):
        return token_statistics(h, x, TARGETS, temperature_B=temperature, wanted=wanted, elements=elements)

    def by_map(h, x):
        operands = [(h, x, temperature)]
        return map_vocabulary([], operands, TARGETS, wanted=wanted, elements=elements)[0]

    for path in (by_statistics, by_map):
        found, gradients = _loss_and_gradient(path, head, wanted)
        assert_close(found, expected, rtol=1e-5)
        assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)

    def fused(arrays, hidden):
        def loss_of(statistics, cotangents):
            return sum(statistics[s] * cotangents[s] for s in wanted)

        loss, found = token_loss(
            head.with_arrays(arrays), hidden, TARGETS, loss_of, COTANGENTS,
            temperature_B=temperature, wanted=wanted, elements=elements,
        )  # fmt: skip
        return 2.5 * loss, found

    (loss, found), gradients = jax.value_and_grad(fused, (0, 1), has_aux=True)(head.arrays, HIDDEN)
    assert_close(found, expected, rtol=1e-5)
    assert_close(loss, 2.5 * sum(jnp.sum(COTANGENTS[s] * expected[s]) for s in wanted), rtol=1e-5)
    assert_close(gradients, jax.tree.map(lambda g: 2.5 * g, expected_gradients), rtol=1e-5, atol=1e-6)


def test_float64_agreement_and_finite_differences():
    """In double precision the derivative is that of the difference quotient, far below float32's noise."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        weight, hidden = rng.normal(size=(V, D)), rng.normal(size=(2, 3, D))
        targets = rng.integers(0, V, (2, 3))
        direction = rng.normal(size=hidden.shape)

        def loss(hidden):
            z = jnp.asarray(hidden) @ weight.T
            logp = jax.nn.log_softmax(2.0 * jnp.tanh(z / 2.0) / 0.7)
            return jnp.sum(jnp.take_along_axis(logp, jnp.asarray(targets)[..., None], -1))

        step = 1e-6
        quotient = (loss(hidden + step * direction) - loss(hidden - step * direction)) / (2 * step)
    head = Head(jnp.asarray(weight, jnp.float32), softcap=2.0)

    def ours(hidden):
        tempered = jnp.full(2, 0.7)
        return token_statistics(head, hidden, jnp.asarray(targets), temperature_B=tempered)["logprobs"].sum()

    gradient = jax.grad(ours)(jnp.asarray(hidden, jnp.float32))
    np.testing.assert_allclose(np.sum(gradient * direction), quotient, rtol=1e-5)


def test_hidden_states_that_are_logits_already():
    z = jax.random.normal(key, (B, T, V))
    found = token_statistics(Head(None), z, TARGETS, elements=1)
    logp = jnp.take_along_axis(jax.nn.log_softmax(z), TARGETS[..., None], -1)[..., 0]
    assert_close(found["logprobs"], logp)
    gradient = jax.grad(lambda z: token_statistics(Head(None), z, TARGETS, elements=1)["logprobs"].sum())(z)
    assert_close(gradient, jax.nn.one_hot(TARGETS, V) - jax.nn.softmax(z))


@pytest.mark.parametrize("elements", [1, B * V, 2 * B * V, 4 * B * V, 10**6])
def test_slices_change_nothing(elements):
    head = HEADS["softcap"]
    whole = token_statistics(head, HIDDEN, TARGETS, elements=10**6)
    assert_close(token_statistics(head, HIDDEN, TARGETS, elements=elements), whole)


def test_how_time_is_sliced():
    assert [slices((2, 10), 5, e) for e in (1, 10, 30, 99, 100, 1000)] == [10, 10, 4, 2, 1, 1]
    assert slice_length(Head(WEIGHT), HIDDEN, 3 * B * V) == 3  # 7 tokens in 3 slices of 3
    for count, length in itertools.product(range(1, 9), (7, 8)):
        t = slice_length(Head(None), jnp.zeros((1, length, V)), count * V)
        assert t <= count and t * slices((1, length), V, count * V) >= length


def test_frozen_arrays_get_no_gradient_and_cost_none():
    head = HEADS["bias"]

    def loss(hidden):
        return token_loss(head, hidden, TARGETS, lambda s, _: s["logprobs"])[0]

    expected = jax.grad(lambda h: jnp.sum(_reference(head, h, None)["logprobs"]))(HIDDEN)
    assert_close(jax.grad(loss)(HIDDEN), expected)
    products = str(jax.make_jaxpr(jax.grad(loss))(HIDDEN)).count("dot_general[")
    assert products == 2  # logits, d hidden


def test_extras_that_are_not_tokens_are_handed_over_whole():
    per_row, scalar = jnp.arange(1.0, B + 1), jnp.float32(0.5)
    extras = {"row": per_row, "scalar": scalar, "token": COTANGENTS["logprobs"]}

    def loss_of(s, e):
        return s["logprobs"] * e["row"][:, None] * e["scalar"] * e["token"]

    loss, _ = token_loss(Head(WEIGHT), HIDDEN, TARGETS, loss_of, extras, elements=3 * B * V)
    logprobs = _reference(Head(WEIGHT), HIDDEN, None)["logprobs"]
    assert_close(loss, jnp.sum(logprobs * per_row[:, None] * 0.5 * COTANGENTS["logprobs"]), rtol=1e-5)


def test_bfloat16_operands_sum_in_float32():
    head = Head(WEIGHT, dtype=jnp.bfloat16)
    rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    z = logits_of(head, HIDDEN)
    assert z.dtype == jnp.float32
    assert_close(z, jnp.einsum("btd,vd->btv", rounded(HIDDEN), rounded(WEIGHT)), rtol=1e-5)
    gradient = jax.grad(lambda w: token_loss(head._replace(weight=w), HIDDEN, TARGETS, lambda s, _: s["logprobs"])[0])
    exact = jax.grad(lambda w: jnp.sum(_reference(Head(w), HIDDEN, None)["logprobs"]))(WEIGHT)
    found = gradient(WEIGHT)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=0.02 * np.abs(exact).max())


def test_map_vocabulary_of_two_models():
    other = Head(jax.random.normal(jax.random.fold_in(key, 9), (V, D + 1)))
    other_hidden = jax.random.normal(jax.random.fold_in(key, 10), (B, T, D + 1))

    def mapped(weight, other_weight):
        operands = [(Head(weight), HIDDEN, TEMPERATURE), (Head(other_weight), other_hidden, None)]
        functions = [lambda a, b: jnp.sum(a * b, -1), lambda a, b: jnp.max(a - b, -1)]
        return map_vocabulary(functions, operands, TARGETS, elements=3 * B * V)[1]

    def materialised(weight, other_weight):
        a = HIDDEN @ weight.T / TEMPERATURE[:, None, None]
        b = other_hidden @ other_weight.T
        return [jnp.sum(a * b, -1), jnp.max(a - b, -1)]

    def total(function):
        return jax.grad(lambda *w: jnp.sum(jnp.stack(function(*w)) * COTANGENTS["logprobs"]), (0, 1))

    weights = WEIGHT, other.weight
    assert_close(mapped(*weights), materialised(*weights), rtol=1e-5)
    assert_close(total(mapped)(*weights), total(materialised)(*weights), rtol=1e-5)


def test_correct_counts_ties_and_has_no_gradient():
    z = jnp.array([[[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]])
    statistics = lambda z: token_statistics(Head(None), z, jnp.array([[1, 2]]), wanted=["correct"])["correct"]
    assert statistics(z).tolist() == [[1.0, 0.0]]
    assert not jnp.any(jax.grad(lambda z: statistics(z).sum())(z))
