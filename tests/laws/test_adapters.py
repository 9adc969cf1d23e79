"""The laws of adapters: nothing changes at first, folding in changes nothing after, only the adapter gets gradients.

A new method is one line in `METHODS`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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
from lmjax.models import Decoder, stack_layers
from tests.models.small import FAMILIES, VOCAB, scanned, variables_of

METHODS: dict[str, Any] = {
    "lora": lambda policy: adapters.lora(rank=3, alpha=5.0),
    "rslora": lambda policy: adapters.lora(rank=4, alpha=3.0, rank_stabilized=True, targets=("attention/*", "down")),
    "dora": lambda policy: adapters.dora(rank=2, alpha=3.0),
    "ia3": lambda policy: adapters.ia3(),
    "houlsby": lambda policy: adapters.houlsby(reduction=4),
    "pfeiffer": lambda policy: adapters.pfeiffer(reduction=4),
    "parallel": lambda policy: adapters.parallel(reduction=4),
    "delta": lambda policy: adapters.delta(("query/*", "*norm/*", "embed/*")),
    "bitfit": lambda policy: adapters.bitfit(),
    "norm_tuning": lambda policy: adapters.norm_tuning(),
    "full": lambda policy: adapters.full(),
    "prefix": lambda policy: adapters.prefix(policy, 3),
    "prefix_network": lambda policy: adapters.prefix(policy, 3, network_width=5),
    "prompt": lambda policy: adapters.prompt(policy, 3),
}
BESIDE = ("prefix", "prefix_network", "prompt")  # take part from the start
FOLDABLE = ("lora", "rslora", "dora", "ia3", "delta", "bitfit", "norm_tuning", "full")
MODELS = {name: FAMILIES[name] for name in ("gpt2", "llama", "gemma3")}
MODELS["scanned"] = scanned(FAMILIES["llama"])
CASES = [
    (method, model)
    for method in METHODS
    for model in MODELS
    if not (method == "bitfit" and model != "gpt2")  # the others have no biases
]
TOKENS = np.random.RandomState(0).randint(0, VOCAB, (2, 7))


def _logits(config, variables, tokens=TOKENS, segments=None, **options):
    policy = lm.Policy(config)
    batch = next_token_batch(np.pad(tokens, ((0, 0), (0, 1))), None if segments is None else np.pad(
        segments, ((0, 0), (0, 1)), mode="edge"))
    return np.asarray(jax.jit(lambda v: policy(v, batch, **options).logits)(variables))


def _noisy(variables: Any, scale: float = 0.2) -> Any:
    """The variables with their adapters moved off their start."""
    random = np.random.RandomState(2)
    own = {
        path: leaf if "constant" in path else leaf + scale * random.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in leaves(adapters.adapters_of(variables))
    }
    return variables | nested(own)


def _adapted(method: str, config: Any) -> tuple[Any, Any]:
    made = METHODS[method](lm.Policy(config))
    return made, made.init(jax.random.key(3), variables_of(config))


@pytest.mark.parametrize(("method", "model"), [case for case in CASES if case[0] not in BESIDE])
def test_nothing_changes_at_first(method, model):
    config = MODELS[model]
    _, variables = _adapted(method, config)
    np.testing.assert_array_equal(_logits(config, variables), _logits(config, variables_of(config)))


@pytest.mark.parametrize(("method", "model"), CASES)
def test_left_out_it_is_gone_and_the_arrays_are_shared(method, model):
    _, variables = _adapted(method, MODELS[model])
    assert adapters.count(variables) > 0
    rest, base = adapters.without(variables), variables_of(MODELS[model])
    assert jax.tree.structure(rest) == jax.tree.structure(base)
    assert all(a is b for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(base), strict=True))


@pytest.mark.parametrize(("method", "model"), [case for case in CASES if case[0] in FOLDABLE])
def test_folded_in_it_gives_the_same_and_can_be_taken_out(method, model):
    config = MODELS[model]
    variables = _noisy(_adapted(method, config)[1])
    adapted, base = _logits(config, variables), _logits(config, variables_of(config))
    assert np.abs(adapted - base).max() > 1e-2
    merged = adapters.merge(variables)
    assert not adapters.adapters_of(merged)
    np.testing.assert_allclose(_logits(config, merged), adapted, rtol=1e-5, atol=1e-5)
    back = adapters.unmerge(merged, variables)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    for (path, leaf), (_, other) in zip(sorted(leaves(back)), sorted(leaves(variables)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=2e-5, atol=2e-6, err_msg="/".join(path))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in FOLDABLE])
def test_what_is_no_change_of_weights_is_not_folded_in(method):
    _, variables = _adapted(method, MODELS["llama"])
    with pytest.raises(UserError, match="no change of weights"):
        adapters.merge(variables)


@pytest.mark.parametrize(("method", "model"), CASES)
def test_only_the_adapter_is_trained_and_all_of_it(method, model):
    config = MODELS[model]
    made, variables = _adapted(method, config)
    variables = _noisy(variables)
    policy, optimizer = lm.Policy(config), optax.sgd(0.1)
    batch = next_token_batch(np.pad(TOKENS, ((0, 0), (0, 1))))
    state = lm.training.init_state(
        policy, optimizer, jax.random.key(0), variables=jax.tree.map(jnp.asarray, variables), trainable=made.trainable
    )
    step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer, trainable=made.trainable)
    after, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    moved = {path: bool(np.any(np.asarray(leaf) != np.asarray(old))) for (path, leaf), (_, old) in zip(
        sorted(leaves(after.variables)), sorted(leaves(variables)), strict=True)}
    for path, is_moved in moved.items():
        trained = path[0] in made.trainable and "constant" not in path
        # A key's bias shifts all scores of a query alike, which softmax does not see.
        unseen = path[-3:] == ("attention", "key", "bias")
        assert is_moved == trained or (trained and unseen), path


@pytest.mark.parametrize("method", METHODS)
def test_layers_side_by_side_and_stacked_are_adapted_alike(method):
    if method == "bitfit":
        pytest.skip("needs biases")
    _, variables = _adapted(method, MODELS["llama"])
    variables = _noisy(variables)
    stacked = stack_layers(variables)
    np.testing.assert_allclose(
        _logits(MODELS["scanned"], stacked), _logits(MODELS["llama"], variables), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_tokens_decoded_through_a_cache_see_the_adapter(method):
    """Law 4 with adapters: prefill and decode give the full forward's logits."""
    config = MODELS["gpt2"]
    variables = _noisy(_adapted(method, config)[1])
    model = Decoder(config)
    resolved = model.resolve(variables)
    cache = model.init_cache(2, 7)
    hidden = []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        positions = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        out = jax.jit(model.apply)(
            resolved | {"cache": cache}, TOKENS[:, start:stop], np.ones_like(positions), positions
        )
        cache, hidden = out.cache, [*hidden, out.hidden]
    full = lm.Policy(config)(variables, next_token_batch(np.pad(TOKENS, ((0, 0), (0, 1)))))
    np.testing.assert_allclose(np.concatenate(hidden, 1), full.hidden, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_packed_documents_are_as_alone(method):
    config = MODELS["gpt2"]
    variables = _noisy(_adapted(method, config)[1])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2]] * 2)
    packed = _logits(config, variables, segments=segments)
    alone = [_logits(config, variables, TOKENS[:, part]) for part in (slice(0, 3), slice(3, 7))]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_started_from_real_tokens_it_is_those_tokens(kind, model):
    config = dataclasses.replace(MODELS[model], window=None) if MODELS[model].window else MODELS[model]
    policy = lm.Policy(config)
    base = variables_of(MODELS[model])
    first = np.array([5, 1, 8])
    make = adapters.prefix if kind == "prefix" else adapters.prompt
    variables = make(policy, tokens=first).init(jax.random.key(0), base)
    spoken = np.concatenate([np.tile(first, (2, 1)), TOKENS], axis=1)
    np.testing.assert_allclose(_logits(config, variables), _logits(config, base, spoken)[:, 3:], rtol=1e-5, atol=2e-5)
    flat = adapters.flatten(policy, variables)
    np.testing.assert_allclose(_logits(config, flat), _logits(config, variables), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_is_on_in_training_only(method):
    config = MODELS["llama"]
    make = getattr(adapters, method)
    variables = _noisy(make(rank=2, dropout=0.5).init(jax.random.key(0), variables_of(config)))
    plain = _noisy(make(rank=2).init(jax.random.key(0), variables_of(config)))
    np.testing.assert_array_equal(_logits(config, variables), _logits(config, plain))
    first, again, other = (
        _logits(config, variables, rng=jax.random.key(seed), train=True) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    with pytest.raises(UserError, match="needs an rng"):
        _logits(config, variables, train=True)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_mesh_it_trains_as_on_one_device(method, make_test_mesh):
    config = dataclasses.replace(MODELS["gpt2"], vocab_size=VOCAB + 1)  # an even vocabulary
    policy, batch = lm.Policy(config), next_token_batch(np.pad(np.tile(TOKENS, (2, 1)), ((0, 0), (0, 1))))
    made, variables = _adapted(method, config)
    variables = jax.tree.map(jnp.asarray, _noisy(variables))
    results = []
    for mesh in (None, make_test_mesh((2, 2, 2))):
        options = dict(mesh=mesh, trainable=made.trainable)
        state = lm.training.init_state(policy, optax.adam(0.01), jax.random.key(0), variables=variables, **options)
        step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optax.adam(0.01), **options)
        results.append([float(step_metrics["loss"]) for state, step_metrics in _steps(step, state, batch)])
    np.testing.assert_allclose(results[1], results[0], rtol=2e-5)


def _steps(step: Any, state: Any, batch: Any) -> Any:
    for _ in range(3):
        state, metrics = step(state, batch)
        yield state, metrics


def test_every_method_is_here():
    made = {type(METHODS[name](lm.Policy(MODELS["llama"]))) for name in METHODS}
    exported = {value for name in adapters.__all__ if isinstance(value := getattr(adapters, name), type)}
    assert exported == made


BAD = {
    "a target that matches nothing": (lambda p: adapters.lora(targets="attention/quary"), "quary.*matches no"),
    "too high a rank": (lambda p: adapters.lora(rank=17), "rank 17 exceeds the width of layer_0/attention/key"),
    "a rank of nothing": (lambda p: adapters.lora(rank=0), "give at least 1"),
    "ranks of nothing": (lambda p: adapters.lora(2, ranks={"layer_7/*": 4}), "layer_7.*matches none"),
    "no biases": (lambda p: adapters.bitfit(), "'bias' matches no parameter"),
    "no width left": (lambda p: adapters.houlsby(reduction=100), "leaves nothing of the width 16"),
    "an unknown activation": (lambda p: adapters.houlsby(activation="silu"), "choose one of relu, swish"),
    "no length": (lambda p: adapters.prefix(p), "give at least 1, or tokens"),
    "ids of another vocabulary": (lambda p: adapters.prompt(p, tokens=[99]), "ids from 0 to 18"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    config = MODELS["llama"]
    with pytest.raises(UserError, match=message):
        make(lm.Policy(config)).init(jax.random.key(0), variables_of(config))


def test_a_second_adapter_of_a_kind_is_refused():
    _, variables = _adapted("lora", MODELS["llama"])
    with pytest.raises(UserError, match="have a 'lora' adapter already"):
        adapters.dora().init(jax.random.key(0), variables)


def test_ranks_differ_by_layer_side_by_side_only():
    method = adapters.lora(2, ranks={"layer_1/*": 4})
    variables = method.init(jax.random.key(0), variables_of(MODELS["llama"]))
    assert variables["lora"]["layer_1"]["mlp"]["up"]["a"].shape == (16, 4)
    assert variables["lora"]["layer_0"]["mlp"]["up"]["a"].shape == (16, 2)
    with pytest.raises(UserError, match="differs from layer to layer"):
        method.init(jax.random.key(0), variables_of(MODELS["scanned"]))


@pytest.mark.parametrize("method", ["delta", "prefix_network", "prompt"])
def test_what_is_worked_out_is_worked_out_once_for_decoding(method):
    config = MODELS["gpt2"]
    variables = _noisy(_adapted(method, config)[1])
    model = lm.generation.decoding.prepare(lm.Policy(config), variables)
    assert not {"delta", "prefix_network", "prompt"} & set(model.variables)
    prompts, key = [TOKENS[0, :5], TOKENS[1, :3]], jax.random.key(0)
    found = lm.generation.generate(lm.Policy(config), variables, prompts, key, max_new_tokens=4, temperature=0.0)
    said = [np.concatenate([prompt, row]) for prompt, row in zip(prompts, found.tokens, strict=True)]
    for prompt, row in zip(prompts, said, strict=True):
        logits = _logits(config, variables, row[None])
        np.testing.assert_array_equal(logits[0, len(prompt) - 1 : -1].argmax(-1), row[len(prompt) :])
