"""ROME: what its update promises, its parts by hand, and an edit of a tiny model that has learned facts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import adapters
from lmjax.adapters import editing
from lmjax.batch import next_token_batch
from lmjax.errors import UserError
from lmjax.models import stack_layers, unstack_layers
from lmjax.modules.mlp import ACTIVATIONS
from tests.models.small import FAMILIES, VOCAB, scanned, variables_of

TOKENS = np.random.RandomState(0).randint(0, VOCAB, (3, 9))


# The update.


def problem(seed: int = 0, F: int = 12, D: int = 5) -> tuple[np.ndarray, ...]:
    random = np.random.RandomState(seed)
    keys = random.standard_normal((200, F)) @ random.standard_normal((F, F)) + 0.5
    C = (keys.T @ keys / len(keys)).astype(np.float32)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    return draw(F, D), draw(F), draw(D), C


@pytest.mark.parametrize("seed", range(3))
def test_the_update_keeps_its_promises(seed):
    W, k, v, C = problem(seed)
    after = np.asarray(adapters.insert(W, k, v, C))
    np.testing.assert_allclose(k @ after, v, atol=1e-5)
    u = np.linalg.solve(C.astype(np.float64), k)
    change = after.astype(np.float64) - W
    np.testing.assert_allclose(change, np.outer(u, v - k @ W) / (u @ k), atol=1e-4 * np.abs(change).max())
    assert np.linalg.svd(change, compute_uv=False)[1] < 1e-5 * np.linalg.svd(change, compute_uv=False)[0]
    others = np.random.RandomState(9).standard_normal((20, len(k)))
    others -= np.outer(others @ u, u) / (u @ u)
    np.testing.assert_allclose(others @ after, others @ W, atol=1e-4)
    # Of all W with k W = v, it moves the keys behind C least (Lagrange).
    moved = lambda change: np.trace(change.T @ C @ change)
    for _ in range(5):
        other = change + np.random.RandomState(_).standard_normal(W.shape) * 0.1
        other -= np.outer(k, k @ other - (v - k @ W)) / (k @ k)
        assert moved(change) < moved(other)


def test_nothing_changes_where_the_value_is_there_already():
    W, k, _, C = problem()
    np.testing.assert_allclose(adapters.insert(W, k, k @ W, C), W, atol=1e-6)


def test_a_covariance_of_too_few_keys():
    W, k, v, _ = problem()
    with pytest.raises(UserError, match="not positive definite; take it of more tokens, or give a damping"):
        adapters.insert(W, k, v, np.zeros((12, 12), np.float32))
    np.testing.assert_allclose(k @ adapters.insert(W, k, v, np.outer(k, k), damping=1e-3), v, atol=1e-4)


# Its parts.


def by_hand(config: Any, variables: Any, tokens: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs of `mlp/down`, from the residual streams around the layer and the layer's own weights."""
    policy = lm.Policy(config)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    zero = jax.tree.map(jnp.zeros_like, variables["params"][f"layer_{layer}"]["mlp"]["down"])
    own = variables["params"] | {}
    own[f"layer_{layer}"] = own[f"layer_{layer}"] | {"mlp": own[f"layer_{layer}"]["mlp"] | {"down": zero}}
    streams = jax.jit(lambda params: policy.model.apply(
        {"params": params}, tokens, np.ones_like(tokens), positions, collect=(layer + 1,)).layers[layer + 1])
    between, after = streams(own), streams(variables["params"])
    params = variables["params"][f"layer_{layer}"]
    norm = lm.modules.norms.Norm(config.norm, config.norm_eps, config.norm_bias, config.norm_unit_offset)
    z = norm.apply({"params": params["mlp_norm"]}, between)
    act = ACTIVATIONS[config.activation]
    hidden = z @ params["mlp"]["up"]["kernel"] + params["mlp"]["up"].get("bias", 0)
    hidden = act(z @ params["mlp"]["gate"]["kernel"]) * hidden if config.gated else act(hidden)
    return np.asarray(hidden), np.asarray(after - between)


@pytest.mark.parametrize(("family", "layer"), [("gpt2", 1), ("llama", 0)])
def test_keys_are_what_the_layer_reads(family, layer):
    config, variables = FAMILIES[family], variables_of(FAMILIES[family])
    policy, prefixes = lm.Policy(config), [[3, 1], [7]]
    keys, _ = by_hand(config, variables, TOKENS, layer)
    batch = next_token_batch(np.pad(TOKENS, ((0, 0), (0, 1))), np.pad(np.arange(9) < 7, (0, 1))[None].repeat(3, 0))
    C = adapters.key_covariance(policy, variables, [batch, batch], layer)
    real = keys[:, :7].reshape(21, -1)
    np.testing.assert_allclose(C, real.T @ real / 21, rtol=1e-4, atol=1e-5)
    texts = [np.array([[*prefix, *TOKENS[0]]]) for prefix in ([], *prefixes)]
    alone = [by_hand(config, variables, text, layer)[0][0, -9 + 4] for text in texts]
    key = adapters.fact_key(policy, variables, TOKENS[0], 4, layer=layer, prefixes=prefixes)
    np.testing.assert_allclose(key, np.mean(alone, axis=0), rtol=1e-4, atol=1e-5)


def test_no_step_leaves_the_value_that_is_there():
    config, variables = FAMILIES["gpt2"], variables_of(FAMILIES["gpt2"])
    _, values = by_hand(config, variables, TOKENS[:1], 1)
    found = adapters.fact_value(
        lm.Policy(config), variables, TOKENS[0], -5, [1], layer=1, prefixes=[[2, 2]], steps=0)
    np.testing.assert_allclose(found, values[0, 4], rtol=1e-4, atol=1e-5)
    # So that the edit with the key of the prompt alone, which finds it already, changes nothing.
    key = adapters.fact_key(lm.Policy(config), variables, TOKENS[0], 4, layer=1)
    down = variables["params"]["layer_1"]["mlp"]["down"]
    after = adapters.insert(down["kernel"], key, found - down["bias"], jnp.eye(len(key)))
    np.testing.assert_allclose(after, down["kernel"], atol=1e-5)


def test_each_part_of_the_loss_pulls_its_way():
    policy, variables = lm.Policy(FAMILIES["llama"]), variables_of(FAMILIES["llama"])
    value = functools.partial(adapters.fact_value, policy, variables, TOKENS[0], 4, [1, 2], layer=0)
    start = value(steps=0)
    away = lambda **options: float(jnp.linalg.norm(value(**options) - start))
    free = dict(kl=0.0, weight_decay=0.0, enough=0.0)
    far = away(**free)
    assert far > 0.5
    assert away(**free, clamp=0.1) == pytest.approx(0.1 * float(jnp.linalg.norm(start)), rel=1e-4)
    assert away(**free | dict(weight_decay=50.0)) < 0.5 * far
    assert away(**free | dict(enough=100.0)) == 0  # what is enough at first is left
    assert not np.allclose(value(**free | dict(kl=5.0)), value(**free))
    assert not np.allclose(value(**free | dict(kl=5.0), essence=[1, 2, 3, 4, 5]), value(**free | dict(kl=5.0)))
    assert away(**free, steps=3) < far
    assert away(**free, learning_rate=0.01) < far


# A model that knows something: a text "first last of" goes on with a name that both first and last decide.
# A query sees itself and the token before, so that the first reaches "of" through the last token of the subject alone.

PAIRS = [(first, last) for first in range(4) for last in range(4, 8)]
OF, FILLERS = 8, (9, 10, 11)
NAMES = 12 + np.random.RandomState(1).permutation(16) % 8
CONFIG = lm.models.llama(
    vocab_size=20, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=48, window=2, layers="unrolled"
)


@functools.cache
def trained() -> Any:
    """A policy that has learned sixteen facts, behind fillers of several lengths; its variables; what it learned on."""
    policy, random = lm.Policy(CONFIG), np.random.RandomState(0)
    rows, segments, mask = np.zeros((3, 16 * len(PAIRS), 8), np.int32)
    for row, (pair, name) in enumerate(list(zip(PAIRS, NAMES)) * 16):
        text = [*random.choice(FILLERS, random.randint(0, 5)), *pair, OF, name]
        rows[row, : len(text)], segments[row, : len(text)], mask[row, len(text) - 1] = text, 1, 1
    batch = next_token_batch(rows, segments, mask)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(variables: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            variables, state = carry
            loss = lambda v: -jnp.sum(policy(v, batch).logprobs * batch.mask) / batch.mask.sum()
            value, gradient = jax.value_and_grad(loss)(variables)
            update, state = optimizer.update(gradient, state)
            return (optax.apply_updates(variables, update), state), value

        return jax.lax.scan(step, (variables, optimizer.init(variables)), None, 120)

    (variables, _), losses = train(policy.init(jax.random.key(0)))
    assert losses[-1] < 0.05
    return policy, variables, batch


def chances(policy: Any, variables: Any, filler: tuple[int, ...] = ()) -> np.ndarray:
    """[pair, token], what follows each subject's text."""
    prompts = np.array([[*filler, *pair, OF, 0] for pair in PAIRS])
    return np.asarray(jax.nn.softmax(policy(variables, next_token_batch(prompts)).logits[:, -1]))


def test_an_edited_fact_is_told_and_the_others_hold():
    policy, variables, batch = trained()
    before, numbers = chances(policy, variables), np.arange(16)
    assert before[numbers, NAMES].min() > 0.9
    C = adapters.key_covariance(policy, variables, [batch], 0)
    # The layer says little (|v0| is 0.5), so that the usual decay, divided by |v0|^2, would hold the value fast.
    options: Any = dict(layer=0, prefixes=[[9], [10, 11], [11, 10, 9]])
    new = {6: 12 + (NAMES[6] - 9) % 8, 13: 12 + (NAMES[13] - 7) % 8}
    told = [number for number in numbers if number not in new]
    kernel = lambda v: np.asarray(v["params"]["layer_0"]["mlp"]["down"]["kernel"], np.float64)
    edited = variables
    for done, (fact, name) in enumerate(new.items(), 1):
        about = ([*PAIRS[fact], OF], 1)
        key = adapters.fact_key(policy, edited, *about, **options)
        value = adapters.fact_value(policy, edited, *about, [name], weight_decay=0.01, **options)
        last = edited
        edited = adapters.rome(
            policy, last, *about, [name], covariance=C, damping=1e-3, weight_decay=0.01, **options)
        after, behind = chances(policy, edited), chances(policy, edited, (10, 9))
        assert before[fact, name] < 0.01 and min(after[fact, name], behind[fact, name]) > 0.6
        assert after[told, NAMES[told]].min() > 0.7 and np.median(after[told, NAMES[told]]) > 0.95
        assert all(after[number, new[number]] > 0.5 for number in list(new)[:done])
        # The averaged key finds the value, for it is in the numerator and the denominator alike.
        np.testing.assert_allclose(key @ kernel(edited), value, rtol=1e-5, atol=1e-5)
        singular = np.linalg.svd(kernel(edited) - kernel(last), compute_uv=False)
        assert singular[1] < 1e-5 * singular[0]
    replaced = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(edited), jax.tree.leaves(variables))
        if leaf is not other
    ]
    assert replaced == ["params/layer_0/mlp/down/kernel"]


def test_stacked_layers_are_edited_as_those_side_by_side():
    config, variables = FAMILIES["gpt2"], variables_of(FAMILIES["gpt2"])
    arguments = (TOKENS[0], 4, [1, 2])
    options = dict(layer=1, covariance=jnp.eye(24), prefixes=[[3]], steps=2)
    stacked = adapters.rome(lm.Policy(scanned(config)), stack_layers(variables), *arguments, **options)
    expected = adapters.rome(lm.Policy(config), variables, *arguments, **options)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), expected)
    after, before = (v["params"]["layer_1"]["mlp"]["down"]["kernel"] for v in (expected, variables))
    assert not np.allclose(after, before)


POLICY, MODEL = lm.Policy(FAMILIES["gpt2"]), variables_of(FAMILIES["gpt2"])


def rome(prompt=(1, 2), subject=0, target=(3,), layer=0, variables=MODEL, policy=POLICY, **options):
    return adapters.rome(policy, variables, prompt, subject, target, layer=layer, covariance=jnp.eye(24), **options)


BAD = {
    "no such layer": (lambda: rome(layer=2), "no layer 2; give a number from 0 to 1"),
    "no such place": (lambda: rome(subject=2), "subject is at 2 of a prompt of 2"),
    "no target": (lambda: rome(target=()), "the target must be ids"),
    "a strange prompt": (lambda: rome(prompt=(1, 99)), "the prompt must be ids from 0 to 18"),
    "a strange prefix": (lambda: rome(prefixes=[[]]), "a prefix must be ids"),
    "a strange essence": (lambda: rome(essence=[-1]), "the essence must be ids"),
    "an adapter": (lambda: rome(variables=adapters.ia3().init(None, MODEL)), "'ia3' adapter; fold it in"),
    "quantized": (lambda: rome(variables=adapters.quantize(MODEL, "int8")), "kept quantized; dequantize"),
    "no decoder": (
        lambda: rome(policy=lm.Policy(lm.models.bigram(4)), variables={"params": {"table": jnp.eye(4)}}), "no MLP"),
    "no tokens": (lambda: adapters.key_covariance(POLICY, MODEL, [], 0), "at least one batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        make()


def test_edits_of_one_shape_share_a_program():
    before = editing._optimized._cache_size()
    rome(steps=2)
    once = editing._optimized._cache_size()
    rome(prompt=(4, 5), target=(6,), steps=2, learning_rate=0.1, clamp=1.0)
    assert editing._optimized._cache_size() == once == before + 1
