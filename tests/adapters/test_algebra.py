"""Sums of adapters are the sums of what they change: every kind against its dense change, in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import adapters
from lmjax.adapters import low_rank
from lmjax.adapters.targets import leaves, nested
from lmjax.batch import next_token_batch
from lmjax.errors import UserError
from lmjax.models import stack_layers, unstack_layers
from lmjax.modules.adapted import NAMES
from tests.models.small import FAMILIES, VOCAB, scanned, variables_of

CONFIG = FAMILIES["gpt2"]  # has biases
BASE = variables_of(CONFIG)
WEIGHTS = ((1.0, -1.0), (0.5, 0.5), (2.0, -1.0, 0.3))


def moved(method: Any, seed: int, base: Any = BASE) -> Any:
    """An adapter off its start, without the model."""
    random = np.random.RandomState(seed)
    made = adapters.adapters_of(method.init(jax.random.key(seed), base))
    draw = lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32)
    return nested({path: leaf if "constant" in path else draw(leaf) for path, leaf in leaves(made)})


LORAS = [
    moved(adapters.lora(3, alpha=5.0, targets=("attention/*", "up")), 0),
    moved(adapters.lora(4, alpha=3.0, rank_stabilized=True), 1),
    moved(adapters.lora(2, targets=("layer_1/*",), ranks={"down": 5}), 2),
]
IA3S = [
    moved(adapters.ia3(), 0),
    moved(adapters.ia3(("value", "attention/output"), ("down",)), 1),
    moved(adapters.ia3((), "down"), 2),
]
DELTAS = [moved(adapters.bitfit(), 0), moved(adapters.norm_tuning(), 1), moved(adapters.delta("layer_0/*"), 2)]


def wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64)


def dense(kind: str, own: Any) -> dict[str, np.ndarray]:
    """What an adapter adds to each parameter, in float64."""
    params = {"/".join(path): leaf for path, leaf in leaves(BASE["params"])}
    found: dict[str, np.ndarray] = {}
    if kind == "lora":
        for path, layer in low_rank.layers_of(own["lora"]).items():
            found[f"{path}/kernel"] = (wide(layer["a"]) * wide(layer["constant"]["scale"])) @ wide(layer["b"])
    elif kind == "ia3":
        for (*where, side), vector in leaves(own["ia3"]):
            path = "/".join(where)
            away = wide(vector) - 1
            kernel = wide(params[f"{path}/kernel"])
            found[f"{path}/kernel"] = kernel * (away[:, None] if side == "input" else away)
            if side == "output":
                found[f"{path}/bias"] = wide(params[f"{path}/bias"]) * away
    else:
        found = {"/".join(path): wide(leaf) for path, leaf in leaves(own["delta"])}
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("kind", "own"), [("lora", LORAS), ("ia3", IA3S), ("delta", DELTAS)])
def test_a_sum_changes_every_weight_by_the_sum_of_the_changes(kind, own, weights):
    own = own[: len(weights)]
    expected: dict[str, Any] = {}
    for w, tree in zip(weights, own):
        for path, change in dense(kind, tree).items():
            expected[path] = expected.get(path, 0) + w * change
    total = adapters.weighted_sum(own, weights)
    found = dense(kind, total)
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        np.testing.assert_allclose(found[path], change, rtol=0, atol=1e-6 * max(1, np.abs(change).max()))
    # And so does the model that it is folded into.
    merged = dict(leaves(adapters.merge(BASE | total)["params"]))
    for path, leaf in leaves(BASE["params"]):
        change = expected.get("/".join(path), 0)
        np.testing.assert_allclose(merged[path], wide(leaf) + change, rtol=0, atol=3e-6)


def test_products_of_strangers_are_not_in_it():
    """Sums of a and of b apart would give 4 a b for twice the same adapter, and w^2 a b for w times one."""
    zero = adapters.subtract(LORAS[0], LORAS[0])
    for change in dense("lora", zero).values():
        assert np.abs(change).max() < 1e-7
    for path, change in dense("lora", adapters.scale(LORAS[1], -2.0)).items():
        np.testing.assert_allclose(change, -2 * dense("lora", LORAS[1])[path], rtol=1e-6, atol=1e-7)
    double = dense("lora", adapters.add(LORAS[1], LORAS[1]))
    for path, change in dense("lora", LORAS[1]).items():
        np.testing.assert_allclose(double[path], 2 * change, rtol=1e-6, atol=1e-7)


def test_vectors_of_one_stay_one():
    one = adapters.adapters_of(adapters.ia3().init(None, BASE))
    for leaf in jax.tree.leaves(adapters.weighted_sum([one] * 3, (0.1, 0.7, 0.3))):
        np.testing.assert_array_equal(leaf, 1)


BOTTLENECKS = [
    moved(adapters.houlsby(4, "relu"), 0),
    moved(adapters.Bottleneck(("attention", "mlp"), "output", "relu", 8, 2.5), 1),
    moved(adapters.parallel(4), 2),
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bottlenecks_are_summed_where_they_add(weights):
    """A sublayer's bottlenecks read the same sources, so its output moves by the sum of what each adds."""
    total = adapters.weighted_sum(BOTTLENECKS[: len(weights)], weights)
    z = np.random.RandomState(5).standard_normal((6, 16))

    def added(tree: Any, layer: str, sublayer: str) -> dict[str, Any]:
        sums = {}
        for key, own in tree["bottleneck"][layer].get(sublayer, {}).items():
            inner = np.asarray(NAMES[key.split("_")[1]](z @ wide(own["down"]["kernel"]) + wide(own["down"]["bias"])))
            outer = inner @ wide(own["up"]["kernel"]) + wide(own["up"]["bias"])
            sums[key] = wide(own["constant"]["scale"]) * outer
        return sums

    for layer in ("layer_0", "layer_1"):
        for sublayer in ("attention", "mlp"):
            expected: dict[str, Any] = {}
            for w, tree in zip(weights, BOTTLENECKS):
                for key, part in added(tree, layer, sublayer).items():
                    expected[key] = expected.get(key, 0) + w * part
            found = added(total, layer, sublayer)
            assert found.keys() == expected.keys()
            for key, part in expected.items():
                np.testing.assert_allclose(found[key], part, rtol=0, atol=1e-6 * max(1, np.abs(part).max()))


def test_stacked_layers_sum_as_those_side_by_side():
    base = variables_of(scanned(CONFIG))
    loras = [moved(adapters.lora(rank, alpha=5.0, dropout=0.25, targets=targets), rank) for rank, targets in (
        (1, "up"), (3, ("up", "query")))]
    deltas = [moved(adapters.delta("mlp/*/bias"), 0), moved(adapters.delta("query/kernel"), 1)]
    for own in (loras, [moved(adapters.ia3(), seed) for seed in range(2)], BOTTLENECKS[:2], deltas):
        stacked = adapters.weighted_sum([base | stack_layers(tree) for tree in own], (2.0, -0.5))
        assert all(stacked["params"][name] is base["params"][name] for name in base["params"])
        expected = adapters.weighted_sum(own, (2.0, -0.5))
        found = unstack_layers(adapters.adapters_of(stacked))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_logits_of_the_sum_are_those_of_the_summed_weights():
    policy = lm.Policy(CONFIG)
    batch = next_token_batch(np.random.RandomState(0).randint(0, VOCAB, (2, 8)))
    weights = (2.0, -1.0, 0.3)
    merged = [adapters.merge(BASE | own) for own in LORAS]
    summed = adapters.weighted_sum([*merged, BASE], (*weights, 1 - sum(weights)))
    adapted = BASE | adapters.weighted_sum(LORAS, weights)
    run = jax.jit(lambda variables: policy(variables, batch).logits)
    np.testing.assert_allclose(run(adapted), run(summed), rtol=2e-4, atol=2e-4)


def test_variables_are_given_back_with_their_model():
    found = adapters.weighted_sum([BASE | LORAS[0], LORAS[1]], (1.0, 2.0))
    assert found["params"] is BASE["params"] and set(found) == {"params", "lora"}
    other = jax.tree.map(np.array, BASE)
    adapters.add(BASE | LORAS[0], other | LORAS[1])  # the same numbers
    other["params"]["layer_1"]["mlp"]["up"]["kernel"][0, 0] += 1
    with pytest.raises(UserError, match="differ at params/layer_1/mlp/up/kernel; merge each"):
        adapters.add(BASE | LORAS[0], other | LORAS[1])


def test_dropout_is_kept_where_it_is_one():
    rates = [moved(adapters.lora(1, dropout=rate, targets="up"), 0) for rate in (0.25, 0.25, 0.5, 0.0)]
    constant = lambda *own: adapters.weighted_sum(own, [1.0] * len(own))["lora"]["layer_0"]["mlp"]["up"]["constant"]
    assert float(constant(rates[0], rates[1])["dropout"]) == 0.25
    assert "dropout" not in constant(rates[0], rates[2]) and "dropout" not in constant(rates[0], rates[3])


def test_compressed_it_is_the_nearest_of_its_rank():
    one = moved(adapters.lora(4, alpha=3.0, targets=("up", "key")), 1)
    own = [moved(adapters.lora(3, targets="up"), 0), one, moved(adapters.lora(2, targets="layer_1/mlp/up"), 2)]
    total = adapters.weighted_sum(own, (2.0, -1.0, 0.3))
    short = adapters.weighted_sum(own, (2.0, -1.0, 0.3), rank=4)
    small, large = dense("lora", short), dense("lora", total)
    for path, layer in low_rank.layers_of(short["lora"]).items():
        full = large[f"{path}/kernel"]
        U, S, V = np.linalg.svd(full)
        assert layer["a"].shape[1] == min(4, low_rank.layers_of(total["lora"])[path]["a"].shape[1])
        best = (U[:, :4] * S[:4]) @ V[:4]
        np.testing.assert_allclose(small[f"{path}/kernel"], best, atol=3e-6 * S[0])
    # Nothing is lost where the rank suffices: two of the same have the rank of one.
    twice = dense("lora", adapters.compress(adapters.add(one, one), 4))
    for path, change in dense("lora", one).items():
        np.testing.assert_allclose(twice[path], 2 * change, atol=3e-6 * np.abs(change).max())
    found = unstack_layers(adapters.compress(stack_layers(one), 2))
    jax.tree.map(np.testing.assert_array_equal, found, adapters.compress(one, 2))


def test_weights_may_be_traced():
    found = jax.jit(lambda w: adapters.weighted_sum(LORAS[:2], w))(jnp.array([2.0, -1.0]))
    expected = adapters.weighted_sum(LORAS[:2], (2.0, -1.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


# Whole models.


def models(count: int) -> list[Any]:
    random = np.random.RandomState(7)
    return [
        jax.tree.map(lambda x: x + random.standard_normal(x.shape).astype(np.float32), BASE) for _ in range(count)
    ]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_models_are_summed_leaf_by_leaf(weights):
    given = models(len(weights))
    for found, *parts in zip(*map(jax.tree.leaves, (adapters.weighted_sum(given, weights), *given))):
        expected = sum(w * wide(part) for w, part in zip(weights, parts))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * max(1, np.abs(expected).max()))


def test_a_soup_is_the_mean_and_half_precision_is_summed_in_full():
    given = models(3)
    soup = adapters.weighted_sum(given, [1 / 3] * 3)
    mean = jax.tree.map(lambda *parts: np.mean([wide(part) for part in parts], axis=0), *given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), soup, mean)
    half = [{"params": {"w": jnp.asarray([x], jnp.bfloat16)}} for x in (1.0, 2.0**-9, 2.0**-9)]
    total = adapters.weighted_sum(half, [1.0, 1.0, 1.0])["params"]["w"]
    assert total.dtype == jnp.bfloat16 and float(total[0]) == 1  # 1 + 2^-8 lies half-way, and rounds to even
    # Rounded after every addition it would be 1 still.
    assert float(adapters.weighted_sum(half, [1.0, 2.0, 2.0])["params"]["w"][0]) == 1 + 2**-7


def test_what_is_no_float_must_be_the_same_and_stays():
    make = lambda step, mask: {"params": {"w": jnp.ones(2), "step": jnp.array(step), "mask": jnp.array([mask, True])}}
    found = adapters.weighted_sum([make(3, True), make(3, True)], (0.5, 2.0))["params"]
    assert found["step"].dtype == jnp.int32 and int(found["step"]) == 3 and found["mask"].dtype == jnp.bool_
    np.testing.assert_array_equal(found["w"], 2.5)
    for other, leaf in ((make(4, True), "params/step"), (make(3, False), "params/mask")):
        with pytest.raises(UserError, match=f"{leaf} holds .* that differ"):
            adapters.add(make(3, True), other)


def _quantized() -> Any:
    codes = {"layer_0": {"mlp": {"up": {"codes": jnp.zeros((4, 4), jnp.int8), "scales": jnp.ones(4)}}}}
    return BASE | {"int8": codes}


def _shorter() -> Any:
    return {"params": {name: tree for name, tree in BASE["params"].items() if name != "layer_1"}}


def _of(method: Any) -> Any:
    return method.init(jax.random.key(0), BASE)


POLICY = lm.Policy(CONFIG)
BAD = {
    "dora": (lambda: adapters.scale(_of(adapters.dora(1)), 2.0), "'dora' adapter brings the columns .* merge each"),
    "prefix": (lambda: adapters.scale(_of(adapters.prefix(POLICY, 2)), 2.0), "'prefix' adapter acts through a softmax"),
    "network": (
        lambda: adapters.scale(_of(adapters.prefix(POLICY, 2, network_width=2)), 2), "'prefix_network' .* softmax"),
    "prompt": (lambda: adapters.scale(_of(adapters.prompt(POLICY, 2)), 2.0), "'prompt' .* choose one for each row"),
    "ia3 over lora": (
        lambda: adapters.add(_of(adapters.lora(1, targets="down")), moved(adapters.ia3(), 0)),
        "mlp/down have an 'ia3' adapter that multiplies"),
    "ia3 on both sides": (
        lambda: adapters.add(moved(adapters.ia3("down", ()), 0), moved(adapters.ia3((), "down"), 0)),
        "mlp/down are scaled on both sides"),
    "another model's": (
        lambda: adapters.add(LORAS[1], moved(adapters.lora(1), 0, variables_of(FAMILIES["llama"]))),
        "layer_0/attention/key is .* take adapters of one model"),
    "adapters and a model": (lambda: adapters.add(BASE | LORAS[0], BASE), "number 1 has no adapter"),
    "chosen by row": (
        lambda: adapters.scale(adapters.choose(BASE, adapters.stack(IA3S[2:]), [0]), 2.0), "chosen row by row"),
    "nothing": (lambda: adapters.weighted_sum([], []), "nothing to sum"),
    "no list": (lambda: adapters.weighted_sum(BASE, [1.0]), "nothing to sum"),
    "too few weights": (lambda: adapters.weighted_sum(LORAS, [1.0]), "1 weights for 3"),
    "an infinite weight": (lambda: adapters.scale(LORAS[0], float("inf")), "a weight is inf"),
    "a rank of nothing": (lambda: adapters.compress(LORAS[0], 0), "at least 1"),
    "a rank for vectors": (lambda: adapters.weighted_sum(IA3S, [1.0] * 3, rank=2), "no 'lora' adapter"),
    "a rank for models": (lambda: adapters.weighted_sum([BASE], [1.0], rank=2), "whole models"),
    "a quantized model": (lambda: adapters.add(BASE, _quantized()), "model 1 holds quantized .*dequantize it first"),
    "two quantized": (lambda: adapters.add(_quantized(), _quantized()), "model 0 holds quantized"),
    "a shorter model": (lambda: adapters.add(BASE, _shorter()), "params/layer_1/.* is missing in model 1"),
    "a longer model": (lambda: adapters.add(_shorter(), BASE), "params/layer_1/.* is missing in model 0"),
    "another shape": (
        lambda: adapters.add({"params": {"w": jnp.ones(2)}}, {"params": {"w": jnp.ones(3)}}),
        r"params/w is float32 \[2\] in model 0 and float32 \[3\] in model 1"),
    "another kind": (
        lambda: adapters.add({"params": {"w": jnp.ones(2)}}, {"params": {"w": jnp.ones(2, jnp.int32)}}), "int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        make()


def test_adapters_over_one_quantized_model_are_summed():
    found = adapters.add(_quantized() | LORAS[0], LORAS[1])
    assert set(found) == {"params", "int8", "lora"}
