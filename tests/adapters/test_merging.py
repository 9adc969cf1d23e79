"""Task vectors, TIES, DARE and SLERP: their laws, NumPy written out, and PEFT where it is right."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lmjax import adapters
from lmjax.errors import UserError
from lmjax.models import stack_layers, unstack_layers
from tests.adapters.make_merging_fixtures import DENSITIES, FIXTURES, WEIGHTS, of_peft, tensors

# No difference of two of them needs more bits than float64 has.
FLOATS = st.floats(-8, 8, width=32).map(lambda x: x if abs(x) > 2**-20 else 0.0)
quick = settings(max_examples=20, deadline=None)


def arrays(count: int, size: int = 6) -> Any:
    return hnp.arrays(np.float32, (count, size), elements=FLOATS)


def vectors(rows: np.ndarray) -> list[Any]:
    return [{"w": jnp.asarray(row)} for row in rows]


def model(seed: int, spread: float = 1.0, dtype: Any = jnp.float32) -> Any:
    random = np.random.RandomState(seed)
    draw = lambda *shape: jnp.asarray(spread * random.standard_normal(shape), dtype)
    layers = {f"layer_{i}": {"mlp": {"kernel": draw(4, 3), "bias": draw(3)}} for i in range(2)}
    return {"params": {"embed": draw(5, 4), "steps": jnp.array([1, 2]), "mask": jnp.array([True, False])} | layers}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# Task vectors.


@quick
@given(arrays(2))
def test_a_vector_of_weight_one_gives_the_fine_tuned_model(pair):
    base, tuned = ({"w": jnp.asarray(row)} for row in pair)
    vector = adapters.task_vector(tuned, base)
    found = np.asarray(adapters.apply_vectors(base, [vector])["w"], np.float64)
    a, b = pair.astype(np.float64)
    exact = np.asarray(vector["w"], np.float64) == b - a
    np.testing.assert_array_equal(found[exact], b[exact])
    near = (b * a >= 0) & (np.abs(a) / 2 <= np.abs(b)) & (np.abs(b) <= 2 * np.abs(a))
    assert np.all(exact[near])  # Sterbenz
    assert np.all(np.abs(found - b) <= np.spacing(np.abs(pair).sum(0)))


def test_in_sixteen_bits_it_is_exact():
    base, tuned = model(0, dtype=jnp.bfloat16), model(1, dtype=jnp.bfloat16)
    assert bits(adapters.apply_vectors(base, [adapters.task_vector(tuned, base)])) == bits(tuned)


def test_weights_of_zero_give_the_base_bit_for_bit():
    base, tuned = model(0), model(1)
    base["params"]["embed"] = base["params"]["embed"].at[0, 0].set(-0.0)
    vector = adapters.task_vector(tuned, base)
    assert bits(adapters.apply_vectors(base, [vector, vector], [0.0, 0.0])) == bits(base)
    np.testing.assert_allclose(  # added and forgotten
        adapters.apply_vectors(adapters.apply_vectors(base, [vector]), [vector], [-1.0])["params"]["embed"],
        base["params"]["embed"], atol=1e-6)


def test_what_is_no_float_is_untouched():
    base, tuned = model(0), model(1)
    tuned["params"] |= {"steps": jnp.array([7, 7]), "mask": jnp.array([False, False])}
    vector = adapters.task_vector(tuned, base)
    assert not {"steps", "mask"} & set(vector["params"])
    found = adapters.apply_vectors(base, [vector], [3.0])["params"]
    assert found["steps"] is base["params"]["steps"] and found["mask"] is base["params"]["mask"]


def test_vectors_add_up():
    base, one, two = model(0), model(1), model(2)
    given_vectors = [adapters.task_vector(tuned, base) for tuned in (one, two)]
    found = adapters.apply_vectors(base, given_vectors, [0.4, -0.7])["params"]["embed"]
    b, x, y = (np.asarray(m["params"]["embed"], np.float64) for m in (base, one, two))
    np.testing.assert_allclose(found, b + 0.4 * (x - b) - 0.7 * (y - b), atol=1e-6)


# TIES.


def ties_by_hand(rows: np.ndarray, weights: Any, density: float) -> np.ndarray:
    rows, weights = rows.astype(np.float64), np.asarray(weights, np.float64)
    kept = np.zeros_like(rows)
    for i, row in enumerate(rows):
        chosen = np.argsort(-np.abs(row), kind="stable")[: int(density * row.size)]
        kept[i, chosen] = row[chosen]
    found = np.zeros(rows.shape[1])
    for j in range(rows.shape[1]):
        votes = [(w * x, abs(w)) for w, x in zip(weights, kept[:, j])]
        sign = 1 if sum(v for v, _ in votes) >= 0 else -1
        agreeing = [(v, w) for v, w in votes if v * sign > 0]
        if agreeing:
            found[j] = sum(v for v, _ in agreeing) / sum(w for _, w in agreeing)
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 0.2, 1.0), (1.0, -2.0, 0.5)])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
def test_ties_is_what_the_paper_says(density, weights):
    rows = np.random.RandomState(1).standard_normal((3, 40)).astype(np.float32)
    found = adapters.ties(vectors(rows), weights, density=density)["w"]
    np.testing.assert_allclose(found, ties_by_hand(rows, weights, density), atol=1e-6)


def test_the_sign_is_elected_by_weighted_mass():
    pair = vectors(np.array([[1.0], [-2.0]], np.float32))
    assert adapters.ties(pair, [10.0, 1.0], density=1.0)["w"].tolist() == [1.0]
    assert adapters.ties(pair, [1.0, 1.0], density=1.0)["w"].tolist() == [-2.0]
    assert np.load(FIXTURES)["elected unweighted"].tolist() == [-2.0]  # what PEFT makes of the first


@quick
@given(arrays(3), st.permutations(range(3)), st.sampled_from([(1.0, 1.0, 1.0), (0.1, 0.2, 0.3), (5.0, -1.0, 2.0)]))
def test_the_order_of_the_vectors_changes_nothing(rows, order, weights):
    merge = lambda picked: adapters.ties(vectors(rows[picked]), np.asarray(weights)[picked], density=0.5)
    assert bits(merge(list(order))) == bits(merge([0, 1, 2]))


@quick
@given(arrays(3), st.lists(st.floats(0.125, 4), min_size=3, max_size=3))
def test_where_signs_agree_and_nothing_is_trimmed_it_is_the_mean(rows, weights):
    rows = np.where(np.arange(6) % 2, 1, -1) * (np.abs(rows) + 0.01).astype(np.float32)
    found = adapters.ties(vectors(rows), weights, density=1.0)["w"]
    np.testing.assert_allclose(found, np.average(rows.astype(np.float64), axis=0, weights=weights), rtol=1e-5)


def test_trimming_ranks_within_a_leaf_or_in_the_model():
    vector = {"a": jnp.array([1.0, -2.0, 3.0, -4.0]), "b": jnp.array([[10.0, 20.0], [-30.0, 0.5]])}
    found = adapters.trim(vector, 0.5)
    assert found["a"].tolist() == [0, 0, 3, -4] and found["b"].tolist() == [[0, 20], [-30, 0]]
    found = adapters.trim(vector, 0.5, across="model")
    assert found["a"].tolist() == [0, 0, 0, -4] and found["b"].tolist() == [[10, 20], [-30, 0]]
    ties = adapters.trim({"a": jnp.ones(6)}, 0.5)["a"]
    assert float(ties.sum()) == 3  # so many and no more, though all are equal


# DARE.


def test_dare_keeps_the_mean():
    rows = np.random.RandomState(2).standard_normal((2, 8)).astype(np.float32)
    weights, density, masks = np.array([0.7, -1.2]), 0.3, 4000
    merged = jax.jit(jax.vmap(lambda key: adapters.dare(key, vectors(rows), list(weights), density=density)["w"]))
    found = np.asarray(merged(jax.random.split(jax.random.key(0), masks)), np.float64)
    error = np.sqrt((weights[:, None] ** 2 * rows**2).sum(0) * (1 - density) / density / masks)
    assert np.all(np.abs(found.mean(0) - weights @ rows) < 4 * error)
    single = np.asarray(jax.vmap(lambda key: adapters.drop(key, {"w": rows[0]}, density)["w"])(
        jax.random.split(jax.random.key(1), masks)))
    np.testing.assert_allclose((single != 0).mean(), density, atol=0.01)
    kept = single[single != 0]
    allowed = rows[0] / np.float32(density)
    assert np.all(np.abs(kept[:, None] - allowed).min(1) < 1e-6)


def test_dare_of_everything_is_the_sum_and_with_an_election_it_is_ties():
    rows = tensors().reshape(3, -1)
    key = jax.random.key(0)
    np.testing.assert_allclose(
        adapters.dare(key, vectors(rows), WEIGHTS, density=1.0)["w"], np.asarray(WEIGHTS) @ rows, atol=1e-6)
    assert bits(adapters.dare_ties(key, vectors(rows), WEIGHTS, density=1.0)) == bits(
        adapters.ties(vectors(rows), WEIGHTS, density=1.0))
    dropped = [adapters.drop(jax.random.fold_in(key, i), v, 0.5) for i, v in enumerate(vectors(rows))]
    assert bits(adapters.dare_ties(key, vectors(rows), WEIGHTS, density=0.5)) == bits(adapters.elect(dropped, WEIGHTS))
    assert not np.array_equal(dropped[0]["w"] == 0, dropped[1]["w"] == 0)


# SLERP.


@quick
@given(arrays(2), st.floats(0, 1, width=32))
def test_slerp_is_the_arc(pair, t):
    a, b = pair.astype(np.float64)
    found = np.asarray(adapters.slerp({"w": pair[0]}, {"w": pair[1]}, t)["w"])
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if min(lengths) > 1e-3:
        unit = a / lengths[0], b / lengths[1]
        angle = 2 * np.arctan2(np.linalg.norm(unit[0] - unit[1]), np.linalg.norm(unit[0] + unit[1]))
        if 1e-3 < angle < np.pi - 1e-2:
            expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
            np.testing.assert_allclose(found, expected, atol=1e-3 * max(lengths), rtol=1e-4)
        elif angle < 1e-5:
            np.testing.assert_allclose(found, (1 - t) * a + t * b, atol=1e-5 * max(lengths))


def test_both_ends_of_slerp_are_exact_and_unit_vectors_stay_so():
    first, second = model(0), model(1)
    first["params"]["embed"] = first["params"]["embed"].at[0].set(-0.0)
    assert bits(adapters.slerp(first, second, 0.0)) == bits(first)
    assert bits(adapters.slerp(first, second, 1.0)) == bits(second)
    x = np.random.RandomState(3).standard_normal((2, 50))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for t in (0.1, 0.5, 0.8):
        between = adapters.slerp({"w": jnp.asarray(x[0], jnp.float32)}, {"w": jnp.asarray(x[1], jnp.float32)}, t)["w"]
        np.testing.assert_allclose(np.linalg.norm(between), 1, rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, 1 + 1e-7, 0.0])
def test_slerp_goes_straight_where_there_is_no_arc(factor):
    a = np.random.RandomState(4).standard_normal(9).astype(np.float32)
    found = adapters.slerp({"w": a}, {"w": np.float32(factor) * a}, 0.25)["w"]
    np.testing.assert_allclose(found, a * (0.75 + 0.25 * factor), rtol=1e-5, atol=1e-6)


# All of them.


def test_layers_kept_the_other_way_give_the_same():
    base, *tuned = (model(seed) for seed in range(3))
    for made in (
        lambda m: adapters.ties([adapters.task_vector(m(t), m(base)) for t in tuned], density=0.4),
        lambda m: adapters.ties([adapters.task_vector(m(t), m(base)) for t in tuned], density=0.4, across="model"),
        lambda m: adapters.dare(
            jax.random.key(0), [adapters.task_vector(m(t), m(base)) for t in tuned], [1.0, -1.0], density=0.4),
        lambda m: adapters.slerp(m(base), m(tuned[0]), 0.3),
    ):
        found, expected = unstack_layers(made(stack_layers)), made(lambda x: x)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def check_peft(theirs: Any) -> None:
    rows = tensors()
    given_vectors = vectors(rows)
    zero = {"w": jnp.zeros(rows.shape[1:])}
    np.testing.assert_allclose(
        adapters.apply_vectors(zero, given_vectors, WEIGHTS)["w"], theirs["arithmetic"], atol=1e-6)
    for density in DENSITIES:
        trimmed = np.stack([adapters.trim(v, density)["w"] for v in given_vectors])
        np.testing.assert_array_equal(trimmed, theirs[f"trim {density}"])
        found = adapters.ties(given_vectors, density=density)["w"]
        np.testing.assert_allclose(found, theirs[f"ties {density}"], atol=1e-6)


def test_as_peft_where_it_is_right():
    check_peft(np.load(FIXTURES))


@pytest.mark.reference
def test_as_peft_live():
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    check_peft(of_peft())


ONE = [{"w": jnp.ones(2)}]
BAD = {
    "no vectors": (lambda: adapters.ties([], density=1.0), "no task vectors"),
    "no list": (lambda: adapters.apply_vectors(model(0), model(0)), "no task vectors"),
    "too few weights": (lambda: adapters.ties(ONE * 2, [1.0], density=1.0), "1 weights for 2"),
    "too high a density": (lambda: adapters.ties(ONE, density=1.5), "density is 1.5"),
    "nothing kept": (lambda: adapters.dare(jax.random.key(0), ONE, density=0.0), "above 0"),
    "an unknown ranking": (lambda: adapters.trim(ONE[0], 0.5, across="layer"), "choose leaf or model"),
    "another model's": (lambda: adapters.task_vector({"w": jnp.ones(2)}, {"w": jnp.ones(3)}), "w is .* one shape"),
    "a strange leaf": (lambda: adapters.apply_vectors({"v": jnp.ones(2)}, ONE), "changes w, which the base has not"),
    "a strange shape": (lambda: adapters.apply_vectors({"w": jnp.ones(3)}, ONE), r"\[3\] in the base and \[2\]"),
    "quantized": (lambda: adapters.task_vector(*[{"params": {}, "nf4": {}}] * 2), "dequantize it first"),
    "no middle": (lambda: adapters.slerp({"n": jnp.array(1)}, {"n": jnp.array(2)}, 0.5), "n differs .* no middle"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        make()
