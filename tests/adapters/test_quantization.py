"""A base in 4 and 8 bits: the bits are bitsandbytes', the bytes are what the plan says, and adapters train over it."""

from __future__ import annotations

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import adapters
from lmjax.adapters.targets import leaves, nested
from lmjax.batch import next_token_batch
from lmjax.errors import UserError
from lmjax.generation import generate
from lmjax.models import stack_layers
from lmjax.models.quantization import quantized_variable_shapes
from lmjax.modules import quantizers
from lmjax.modules.quantized import KINDS, NF4_CODE, multiply
from lmjax.modules.quantizers import quantize_weight, quantized_shapes
from tests.adapters import quantization_cases as cases

VOCAB = 20
CONFIG = lm.models.llama(
    VOCAB, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=128, layers="unrolled", init_std=0.1
)
POLICY = lm.Policy(CONFIG)
SCANNED = lm.Policy(dataclasses.replace(CONFIG, layers="scanned"))
TOKENS = np.random.RandomState(0).randint(0, VOCAB, (4, 9))
BATCH = next_token_batch(TOKENS)
FULL = jax.tree.map(np.asarray, jax.jit(POLICY.init)(jax.random.key(0)))
BASES = {kind: adapters.quantize(FULL, kind) for kind in KINDS}
WEIGHTS = cases.weights()
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # tests compile with less


def _logits(policy, variables):
    return np.asarray(jax.jit(lambda variables: policy(variables, BATCH).logits)(variables))


def _noisy(variables):
    random = np.random.RandomState(2)
    own = {
        path: leaf if "constant" in path else leaf + 0.1 * random.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in leaves(adapters.adapters_of(variables))
    }
    return variables | nested(own)


# One weight ---------------------------------------------------------------------------------------


def _our_bits(weight):
    found = {}
    for kind in KINDS:
        quantized = quantize_weight(weight, kind)
        parts = quantized._asdict() | {"dense": quantized.dense(jnp.dtype("float32"))}
        found |= {f"{kind}/{name}": np.asarray(part).reshape(-1) for name, part in parts.items()}
    return found


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_bits_are_those_of_bitsandbytes(name):
    with np.load(cases.FIXTURES) as stored:
        for part, bits in _our_bits(WEIGHTS[name]).items():
            np.testing.assert_array_equal(cases.digest(bits), stored[f"{name}/{part}"], err_msg=part)


@pytest.mark.reference
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_stored_bits_are_what_the_library_computes(name):
    pytest.importorskip("bitsandbytes")
    expected = cases.library_bits(WEIGHTS[name])
    for part, bits in _our_bits(WEIGHTS[name]).items():
        np.testing.assert_array_equal(bits, expected[part], err_msg=part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["normal", "scales far apart"])
def test_the_bits_stay_when_compiled_with_all_optimizations(name, kind):
    """A fused multiply and add rounds otherwise: without care, a third of the scales differ in their last bit."""
    quantized = jax.tree.map(jnp.asarray, quantize_weight(WEIGHTS[name], kind))
    dense = jax.jit(lambda weight: weight.dense(jnp.dtype("float32"))).lower(quantized).compile(OPTIMIZED)
    with np.load(cases.FIXTURES) as stored:
        np.testing.assert_array_equal(cases.digest(dense(quantized)), stored[f"{name}/{kind}/dense"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_weight_of_16_bits_is_quantized_as_the_same_numbers_in_32(dtype):
    weight = WEIGHTS["normal"].astype(jnp.dtype(dtype))
    for kind in KINDS:
        for found, expected in zip(quantize_weight(weight, kind), quantize_weight(weight.astype(np.float32), kind)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.reference
def test_qwix_chooses_the_same_numbers():
    """qwix has no double quantization; the codes, which do not depend on it, are the same."""
    qwix = pytest.importorskip("qwix")
    weight = WEIGHTS["normal"]
    theirs = qwix.quantize(jnp.asarray(weight), "nf4", channelwise_axes=[0], tiled_axes={1: 64})
    codes = quantize_weight(weight, "nf4").codes
    ours = np.stack([codes >> 4, codes & 15], axis=-1).reshape(weight.shape)
    np.testing.assert_array_equal(np.asarray(theirs.qvalue).astype(np.uint8), ours)


def test_errors_are_no_larger_than_the_numbers_are_apart():
    weight = WEIGHTS["normal"]
    largest = np.abs(weight).reshape(-1, 64).max(axis=1)[:, None]
    error = np.abs(quantize_weight(weight, "nf4").dense(jnp.dtype("float32")) - weight).reshape(-1, 64)
    assert (error <= largest * np.diff(NF4_CODE).max() / 2 * 1.05).all()
    error = np.abs(quantize_weight(weight, "int8").dense(jnp.dtype("float32")) - weight)
    assert (error <= np.abs(weight).max(axis=1, keepdims=True) / 127 / 2 * 1.001).all()


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.13), ("int8", 8.13)])
def test_bits_for_each_weight(kind, bits):
    random = np.random.RandomState(0)
    variables = {"params": {"layer_0": {"up": {"kernel": random.standard_normal((256, 512)).astype(np.float32)}}}}
    quantized = adapters.quantize(variables, kind)
    assert adapters.bits_per_parameter(variables) == 32
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    assert adapters.bits_per_parameter(quantized) == 8 * size / (256 * 512)
    assert bits - 0.13 < adapters.bits_per_parameter(quantized) <= bits


# A model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_with_the_dequantized_weights(kind):
    back = adapters.dequantize(BASES[kind])
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, FULL)
    found = _logits(POLICY, BASES[kind])
    np.testing.assert_allclose(found, _logits(POLICY, back), rtol=1e-5, atol=1e-5)
    full = _logits(POLICY, FULL)
    assert 1e-4 < np.std(found - full) / np.std(full) < (0.3 if kind == "nf4" else 0.02)
    assert "kernel" not in {path[-1] for path, _ in leaves(BASES[kind])}
    assert (adapters.kind_of(BASES[kind]), adapters.kind_of(back)) == (kind, "float")


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_are_quantized_alike(kind):
    found = adapters.quantize(stack_layers(FULL), kind)
    expected = stack_layers(BASES[kind])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_allclose(_logits(SCANNED, found), _logits(POLICY, BASES[kind]), rtol=1e-5, atol=1e-5)
    back = stack_layers(adapters.dequantize(BASES[kind]))
    jax.tree.map(np.testing.assert_array_equal, adapters.dequantize(found), back)


def test_layers_may_be_of_different_kinds():
    mixed = adapters.quantize(adapters.quantize(FULL, "nf4", "mlp/*"), "int8", ("query", "key"))
    assert set(mixed["nf4"]["layer_1"]["mlp"]) == {"gate", "up", "down"}
    assert set(mixed["int8"]["layer_0"]["attention"]) == {"query", "key"}
    assert set(mixed["params"]["layer_0"]["attention"]) == {"value", "output"}
    assert adapters.kind_of(mixed) == "mixed"
    rest = adapters.quantize(mixed, "int8")  # what is left
    assert set(rest["int8"]["layer_0"]["attention"]) == {"query", "key", "value", "output"}
    np.testing.assert_allclose(_logits(POLICY, rest), _logits(POLICY, adapters.dequantize(rest)), rtol=1e-5, atol=1e-5)


BAD = {
    "an unknown kind": (lambda: adapters.quantize(FULL, "fp4"), "'fp4'; choose one of nf4, int8"),
    "a pattern of nothing": (lambda: adapters.quantize(FULL, targets="quary"), "'quary' matches no.*query"),
    "all done": (lambda: adapters.quantize(BASES["nf4"]), "all are quantized already"),
    "some of stacked layers": (lambda: adapters.quantize(stack_layers(FULL), targets="layer_0/*"), "quantized alike"),
    "a width of no blocks": (
        lambda: adapters.quantize({"params": {"layer_0": {"up": {"kernel": np.ones((96, 8))}}}}),
        "layer_0/up has 96 inputs, no multiple of the 64",
    ),
    "a changed kernel": (
        lambda: adapters.quantize(adapters.delta("query/*").init(None, FULL)), "delta.*layer_0/attention/query; fold it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        make()


# Adapters over it ---------------------------------------------------------------------------------

METHODS = {
    "lora": lambda: adapters.lora(rank=3, alpha=5.0),
    "dora": lambda: adapters.dora(rank=3, alpha=5.0),
    "ia3": lambda: adapters.ia3(),
}
OVER = [("lora", "nf4"), ("lora", "int8"), ("dora", "nf4"), ("ia3", "int8")]


@pytest.mark.parametrize(("method", "kind"), OVER)
def test_nothing_changes_at_first_and_folding_in_changes_nothing(method, kind):
    base = BASES[kind]
    variables = METHODS[method]().init(jax.random.key(3), base)
    np.testing.assert_array_equal(_logits(POLICY, variables), _logits(POLICY, base))
    variables = _noisy(variables)
    merged = adapters.merge(variables)
    adapted = _logits(POLICY, variables)
    np.testing.assert_allclose(_logits(POLICY, merged), adapted, rtol=1e-5, atol=1e-5 * np.abs(adapted).max())
    assert np.abs(adapted - _logits(POLICY, base)).max() > 1e-2
    folded = set(KINDS) & set(merged)
    assert folded == (set() if method != "ia3" else {kind})  # ia3 leaves most layers as they were


@pytest.mark.parametrize(("method", "kind"), OVER)
def test_only_the_adapter_is_trained(method, kind):
    made = METHODS[method]()
    variables = jax.tree.map(jnp.array, _noisy(made.init(jax.random.key(3), BASES[kind])))
    state = lm.training.new_state(variables, optax.sgd(0.1), jax.random.key(0), trainable=made.trainable)
    step = lm.training.make_step(POLICY, lm.objectives.cross_entropy(), optax.sgd(0.1), trainable=made.trainable)
    before = jax.tree.map(np.array, variables)
    after, metrics = step(state, BATCH)
    assert np.isfinite(metrics["loss"])
    for (path, leaf), (_, old) in zip(leaves(after.variables), leaves(before), strict=True):
        assert np.any(np.asarray(leaf) != old) == (path[0] == method and "constant" not in path), path


def test_the_gradient_is_that_over_the_dequantized_weights():
    variables = _noisy(adapters.lora(3).init(jax.random.key(3), BASES["nf4"]))

    def gradient(base):
        def loss(own):
            return -jnp.sum(POLICY(base | {"lora": own}, BATCH).logprobs)

        return jax.jit(jax.grad(loss))(variables["lora"])

    found, expected = gradient(BASES["nf4"]), gradient(adapters.dequantize(BASES["nf4"]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max()), found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_the_backward_pass_is_packed(kind):
    weight = jax.tree.map(jnp.asarray, quantize_weight(WEIGHTS["normal"], kind))
    _, backward = jax.vjp(lambda x: multiply(x, weight), jnp.ones((3, 256)))
    kept = jax.tree.leaves(backward)
    assert sum(leaf.nbytes for leaf in kept) <= sum(leaf.nbytes for leaf in weight) + 8
    assert not any(leaf.dtype == jnp.float32 and leaf.size >= 96 * 256 for leaf in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_unpacks_one_weight_at_a_time(kind):
    """In the compiled program: left alone, the compiler would unpack every weight first, and keep them all."""
    count, shape = 12, (256, 256)

    def loss(x, weights):
        for weight in weights:
            x = jnp.sin(multiply(x, weight))
        return jnp.sum(x)

    random = np.random.RandomState(0).standard_normal((count, *shape)).astype(np.float32)
    packed = [jax.tree.map(jnp.asarray, quantize_weight(weight, kind)) for weight in random]
    whole = 4 * shape[0] * shape[1]
    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((4, 256)), packed).compile(OPTIMIZED)
    assert compiled.memory_analysis().temp_size_in_bytes <= 2.5 * whole < count * whole / 4


def test_it_generates_as_its_dequantized_weights_do():
    variables = _noisy(adapters.lora(2).init(jax.random.key(0), BASES["nf4"]))
    whole = adapters.dequantize(BASES["nf4"]) | {"lora": variables["lora"]}
    models = ((POLICY, variables), (POLICY, whole), (SCANNED, stack_layers(variables)))
    first, *others = [
        generate(policy, own, [[1, 2, 3], [4]], jax.random.key(1), max_new_tokens=6) for policy, own in models
    ]
    for other in others:
        np.testing.assert_array_equal(other.tokens, first.tokens)


# Devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_on_a_mesh_it_trains_as_on_one_device(kind, make_test_mesh):
    variables = jax.tree.map(jnp.asarray, _noisy(adapters.lora(4).init(jax.random.key(0), BASES[kind])))
    losses = []
    for mesh in (None, make_test_mesh((2, 2, 2))):
        options = dict(mesh=mesh, trainable=("lora",))
        state = lm.training.init_state(POLICY, optax.adam(0.01), jax.random.key(0), variables=variables, **options)
        step = lm.training.make_step(POLICY, lm.objectives.cross_entropy(), optax.adam(0.01), **options)
        losses.append([])
        for _ in range(3):
            state, metrics = step(state, BATCH)
            losses[-1].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
    codes = state.variables[kind]["layer_0"]["mlp"]["up"]["codes"]
    assert codes.addressable_shards[0].data.size == codes.size // 4  # fsdp and tensor


def test_the_plan_counts_weights_and_the_bytes_they_take(make_test_mesh):
    plan = lm.training.state.variables_plan(POLICY, BASES["nf4"], make_test_mesh((2, 2, 2)))
    assert plan.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(FULL))
    assert plan.total_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(BASES["nf4"]))
    of_nf4 = {"nf4": BASES["nf4"]["nf4"]}
    assert f"nf4: {2 * 36864:,} values in" in plan.table()
    assert f"{adapters.bits_per_parameter(of_nf4):.3f} bits a value" in plan.table()
    assert f"{adapters.bits_per_parameter(BASES['nf4']):.3f} bits a value" in plan.table()
    assert "bits a value" not in lm.training.state.variables_plan(POLICY, FULL, make_test_mesh((2, 2, 2))).table()


# Files --------------------------------------------------------------------------------------------

GPT2 = dataclasses.replace(
    lm.models.gpt2(VOCAB, num_layers=2, embed_dim=64, num_heads=2, mlp_dim=128, max_length=16), layers="unrolled"
)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["llama", "gpt2"])
def test_a_directory_is_read_quantized(config, layers, tmp_path):
    lm.interop.save_huggingface(tmp_path, config, lm.Policy(config).init(jax.random.key(0)), dtype="bfloat16")
    _, full = lm.interop.load_huggingface(tmp_path, layers=layers)
    for kind in KINDS:
        _, found = lm.interop.load_huggingface(tmp_path, layers=layers, quantize=kind, targets=("mlp/*", "query"))
        expected = adapters.quantize(full, kind, ("mlp/*", "query"))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(UserError, match="'down/x' matches no linear layer"):
        lm.interop.load_huggingface(tmp_path, quantize="nf4", targets="down/x")


def test_it_is_read_onto_a_mesh(make_test_mesh, tmp_path):
    lm.interop.save_huggingface(tmp_path, CONFIG, FULL)
    shapes = quantized_variable_shapes(jax.eval_shape(POLICY.init, jax.random.key(0)), "nf4")
    places = lm.training.state.variables_plan(POLICY, shapes, make_test_mesh((2, 2, 2))).shardings
    _, found = lm.interop.load_huggingface(tmp_path, layers="unrolled", quantize="nf4", shardings=places)
    jax.tree.map(np.testing.assert_array_equal, found, BASES["nf4"])
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == places


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_reading_holds_one_tensor_besides_the_result(layers, tmp_path, monkeypatch):
    """NumPy reports what it allocates; arrays on devices are kept out of it by a copy that it does not see."""
    config = dataclasses.replace(CONFIG, num_layers=3, embed_dim=256, mlp_dim=2048)
    lm.interop.save_huggingface(tmp_path, config, jax.jit(lm.Policy(config).init)(jax.random.key(0)))
    monkeypatch.setattr(jax, "device_put", lambda array: jnp.array(array, copy=True))
    tensor, peaks = 256 * 2048 * 4, {}
    packed = sum(leaf.size * leaf.dtype.itemsize for leaf in quantized_shapes(256, 2048, "nf4"))
    for quantize in ("nf4", None):
        lm.interop.load_huggingface(tmp_path, layers=layers, quantize=quantize)  # what is made once
        tracemalloc.start()
        lm.interop.load_huggingface(tmp_path, layers=layers, quantize=quantize)
        peaks[quantize] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    results = packed * (1 if layers == "unrolled" else 1 + config.num_layers)
    blocks = 20 * quantizers._CHUNK  # bytes of what is worked on together
    assert peaks["nf4"] <= 1.1 * tensor + results + blocks < 2 * tensor + results
    assert peaks[None] >= (1 if layers == "unrolled" else config.num_layers) * tensor  # it does see what is held


# It learns ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lora_over_4_bits_learns_as_over_32():
    """A model of one Markov chain learns another by LoRA: over NF4 the loss ends where it ends over float32."""
    config = dataclasses.replace(CONFIG, vocab_size=32, init_std=None)
    policy, random = lm.Policy(config), np.random.RandomState(0)
    chains = [np.array([random.permutation(32)[:4] for _ in range(32)]) for _ in range(2)]

    def batch(chain, seed):
        random, rows = np.random.RandomState(seed), np.empty((16, 33), np.int64)
        rows[:, 0] = random.randint(0, 32, 16)
        for t in range(32):
            rows[:, t + 1] = chain[rows[:, t], random.randint(0, 4, 16)]
        return next_token_batch(rows)

    def train(variables, chain, steps, rate, trainable):
        optimizer = optax.adam(rate)
        variables = jax.tree.map(jnp.array, variables)
        state = lm.training.new_state(variables, optimizer, jax.random.key(0), trainable=trainable)
        step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer, trainable=trainable)
        losses = []
        for number in range(steps):
            state, metrics = step(state, batch(chain, number))
            losses.append(float(metrics["loss"]))
        return state.variables, np.array(losses)

    base, losses = train(policy.init(jax.random.key(0)), chains[0], 400, 3e-3, ("params",))
    assert losses[-20:].mean() < np.log(4) + 0.1
    ends = {"float": [], "nf4": []}
    for seed in range(3):
        for kind, start in (("float", base), ("nf4", adapters.quantize(base))):
            adapted = adapters.lora(8).init(jax.random.key(seed), start)
            _, losses = train(adapted, chains[1], 300, 1e-2, ("lora",))
            assert losses[0] > losses[-1] + 1
            ends[kind].append(losses[-50:].mean())
    noise = np.std(ends["float"], ddof=1) + np.std(ends["nf4"], ddof=1)
    assert abs(np.mean(ends["float"]) - np.mean(ends["nf4"])) < max(2 * noise, 0.01), ends
