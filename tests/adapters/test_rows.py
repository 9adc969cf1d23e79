"""Adapters chosen by row: each row of a batch is what it is alone with its adapter, and -1 is the model itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import adapters
from lmjax.adapters.targets import leaves, nested
from lmjax.batch import next_token_batch
from lmjax.errors import UserError
from lmjax.models import stack_layers
from tests.models.small import FAMILIES, VOCAB, scanned, variables_of

TOKENS = np.random.RandomState(0).randint(0, VOCAB, (4, 7))
CHOICES = ([0, 1, -1, 2], [2, 2, 0, -1], [-1, -1, -1, -1])


def moved(variables: Any, seed: int) -> Any:
    """The adapters of variables, off their start."""
    random = np.random.RandomState(seed)
    own = {
        path: leaf if "constant" in path else leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in leaves(adapters.adapters_of(variables))
    }
    return nested(own)


def three(kind: str, policy: lm.Policy, base: Any) -> list[Any]:
    """Three adapters of different ranks, lengths and layers."""
    if kind == "lora":
        methods = [
            adapters.lora(2, 5.0, targets=("query", "mlp/*")),
            adapters.lora(3, 2.0, rank_stabilized=True, dropout=0.3),
            adapters.lora(1, targets=("attention/*",)),
        ]
    elif kind == "ia3":
        methods = [adapters.ia3(), adapters.ia3(("value", "query"), ()), adapters.ia3((), ("down", "attention/output"))]
    elif kind in ("prefix", "prompt"):
        make = getattr(adapters, kind)
        methods = [make(policy, 2), make(policy, 5), make(policy, 3)]
    else:
        methods = [adapters.lora(2), adapters.ia3(), adapters.prefix(policy, 4)]
    return [moved(m.init(jax.random.key(i), base), i) for i, m in enumerate(methods)]


def batch_of(tokens: np.ndarray) -> Any:
    return next_token_batch(np.pad(tokens, ((0, 0), (0, 1))))


def logits(policy: lm.Policy, variables: Any, tokens: np.ndarray = TOKENS) -> Any:
    return policy(variables, batch_of(tokens)).logits


MODELS = {name: FAMILIES[name] for name in ("gpt2", "llama", "gemma3")}
MODELS["scanned"] = scanned(FAMILIES["llama"])
KINDS = ("lora", "ia3", "prefix", "prompt", "all")
QUICK = [("lora", "gpt2"), ("prompt", "llama"), ("all", "scanned")]
CASES = QUICK + [
    pytest.param(kind, model, marks=pytest.mark.slow)
    for kind in KINDS
    for model in MODELS
    if (kind, model) not in QUICK
]


@pytest.mark.parametrize(("kind", "model"), CASES)
def test_each_row_is_as_alone_in_one_program(kind, model):
    config = MODELS[model]
    policy, base = lm.Policy(config), variables_of(config)
    single = three(kind, policy, base)
    bank = adapters.stack(single)
    traced = []

    @jax.jit
    def run(base: Any, bank: Any, index_B: Any, batch: Any) -> Any:
        traced.append(1)
        return policy(adapters.choose(base, bank, index_B), batch).logits

    # Long enough for XLA to sum in parts, where positions are not learned.
    long = np.random.RandomState(1).randint(0, VOCAB, (4, 40))
    batch = batch_of(TOKENS if config.position == "learned" else long)
    alone = jax.jit(lambda variables, batch: policy(variables, batch).logits)
    expected = [np.asarray(alone(base | own, batch)) for own in (*single, {})]
    for choice in CHOICES:
        found = np.asarray(run(base, bank, jnp.array(choice), batch))
        for row, number in enumerate(choice):
            if number < 0:
                np.testing.assert_array_equal(found[row], expected[-1][row])
            else:
                assert np.abs(expected[number][row] - expected[-1][row]).max() > 0.05
                np.testing.assert_allclose(found[row], expected[number][row], rtol=1e-5, atol=2e-5)
    assert len(traced) == 1
    # A number that there is not chooses nothing, where nobody can be told.
    np.testing.assert_array_equal(run(base, bank, jnp.array([3, -2, 9, -7]), batch), expected[-1])


def test_padding_of_a_prompt_is_seen_by_nothing():
    """Whatever stands behind the virtual tokens of a short prompt, the row is what it was."""
    policy, base = lm.Policy(MODELS["gpt2"]), variables_of(MODELS["gpt2"])
    variables = adapters.choose(base, adapters.stack(three("prompt", policy, base)), [0, 1, -1, 2])
    run = jax.jit(lambda variables: logits(policy, variables))
    own = variables["prompt"]
    hidden = ~own["constant"]["visible"][..., None]
    noisy = own | {"embedding": jnp.where(hidden, 7.0, own["embedding"])}
    assert np.any(hidden)
    np.testing.assert_array_equal(run(variables | {"prompt": noisy}), run(variables))


def test_gradients_reach_the_adapters_that_were_chosen_only():
    policy, base = lm.Policy(MODELS["llama"]), variables_of(MODELS["llama"])
    bank = adapters.stack(three("lora", policy, base))

    def loss(b: Any) -> Any:
        own = bank.collections["lora"]["layer_0"]["attention"]["query"] | {"b": b}
        changed = nested(dict(leaves(bank.collections)) | {
            ("lora", "layer_0", "attention", "query", "b"): own["b"]})
        chosen = adapters.choose(base, type(bank)(changed, bank.count), [1, 1, -1, 1])
        return jnp.sum(logits(policy, chosen) ** 2)

    gradient = jax.jit(jax.grad(loss))(bank.collections["lora"]["layer_0"]["attention"]["query"]["b"])
    touched = np.any(np.asarray(gradient) != 0, axis=1)
    assert touched.tolist() == [False] * 2 + [True] * 3 + [False]


PROMPTS = [[1, 2, 3], [4, 5], [6], [3, 2, 1, 7]]


def test_generation_with_a_choice_for_each_prompt():
    """Its log-probabilities are those of the whole texts, read with the same choice."""
    policy, base = lm.Policy(MODELS["scanned"]), variables_of(MODELS["scanned"])
    variables = adapters.choose(base, adapters.stack(three("all", policy, base)), CHOICES[0])
    found = lm.generation.generate(policy, variables, PROMPTS, jax.random.key(0), max_new_tokens=6)
    texts, segments = np.zeros((2, 4, 10), np.int32)
    for row, prompt in enumerate(PROMPTS):
        texts[row, : len(prompt) + 6], segments[row, : len(prompt) + 6] = [*prompt, *found.tokens[row]], 1
    logprobs = np.asarray(jax.jit(lambda v: policy(v, next_token_batch(texts, segments)).logprobs)(variables))
    for row, prompt in enumerate(PROMPTS):
        expected = logprobs[row, len(prompt) - 1 : len(prompt) + 5]
        np.testing.assert_allclose(found.logprobs[row], expected, rtol=1e-4, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), [("all", "gpt2"), ("all", "scanned"), ("prefix", "scanned")])
def test_generation_is_what_it_is_alone(kind, model):
    config = MODELS[model]
    policy, base = lm.Policy(config), variables_of(config)
    single = three(kind, policy, base)
    bank = adapters.stack(single)
    prompts, generate = PROMPTS, lm.generation.generate
    options = dict(max_new_tokens=6, temperature=0.0)
    together = generate(policy, adapters.choose(base, bank, CHOICES[0]), prompts, jax.random.key(0), **options)
    for row, number in enumerate(CHOICES[0]):
        variables = base if number < 0 else base | single[number]
        alone = generate(policy, variables, [prompts[row]], jax.random.key(0), **options)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.logprobs[row], alone.logprobs[0], rtol=1e-4, atol=2e-5)


def test_rows_that_do_not_fit_the_choice_are_refused():
    policy, base = lm.Policy(MODELS["gpt2"]), variables_of(MODELS["gpt2"])
    for kind in ("lora", "ia3", "prefix", "prompt"):
        for stacked in (False, True):
            single = [stack_layers(own) if stacked else own for own in three(kind, policy, base)[:1]]
            variables = adapters.choose(stack_layers(base) if stacked else base, adapters.stack(single), [0, -1])
            run = lm.Policy(scanned(MODELS["gpt2"])) if stacked else policy
            for options in (dict(prompts=[[1]]), dict(samples=2), dict(guidance=1.5)):
                arguments = dict(prompts=[[1], [2]]) | options
                with pytest.raises(UserError, match="chosen for 2 rows"):
                    lm.generation.generate(run, variables, key=jax.random.key(0), max_new_tokens=2, **arguments)
            with pytest.raises(UserError, match="one adapter for all rows"):
                lm.generation.beam_search(run, variables, [[1], [2]], max_new_tokens=2, beams=2)
    with pytest.raises(UserError, match="chosen row by row"):
        adapters.merge(adapters.choose(base, adapters.stack(three("ia3", policy, base)), [0]))


def test_a_bank_kept_the_other_way_is_turned_around():
    config = MODELS["llama"]
    policy, base = lm.Policy(config), variables_of(config)
    method = adapters.lora(2)
    bank = adapters.stack([moved(method.init(jax.random.key(0), base), 0)])
    stacked = adapters.choose(stack_layers(base), bank, [0, -1, 0, 0])
    found = logits(lm.Policy(MODELS["scanned"]), stacked)
    beside = adapters.choose(base, adapters.stack([stack_layers(own) for own in [moved(
        method.init(jax.random.key(0), base), 0)]]), [0, -1, 0, 0])
    np.testing.assert_allclose(found, logits(policy, beside), rtol=1e-5, atol=2e-5)


def _choice(index: Any) -> Any:
    base = variables_of(MODELS["llama"])
    return adapters.choose(base, adapters.stack([adapters.lora(1).init(jax.random.key(0), base)]), index)


def _stacked(*methods: Any) -> Any:
    base = variables_of(MODELS["llama"])
    return adapters.stack([method.init(jax.random.key(0), base) for method in methods])


POLICY = lm.Policy(MODELS["llama"])
BAD = {
    "dora": (lambda: _stacked(adapters.dora(1)), "'dora', which cannot be chosen by row: it changes the whole weight"),
    "bottlenecks": (lambda: _stacked(adapters.lora(1), adapters.pfeiffer(4)), "adapter 1 is 'bottleneck'"),
    "deltas": (lambda: _stacked(adapters.full()), "'delta', which cannot"),
    "a network": (lambda: _stacked(adapters.prefix(POLICY, 2, network_width=3)), "lmjax.adapters.flatten"),
    "prefixes and prompts": (lambda: _stacked(adapters.prefix(POLICY, 2), adapters.prompt(POLICY, 2)), "one kind"),
    "no adapters": (lambda: adapters.stack([]), "nothing to choose from"),
    "one that is none": (lambda: adapters.stack([variables_of(MODELS["llama"])]), "number 0 has no adapter"),
    "another model's": (
        lambda: adapters.stack([adapters.lora(1).init(jax.random.key(0), variables_of(MODELS[name])) for name in (
            "llama", "gpt2")]), "in one adapter and .* in another"),
    "too high a number": (lambda: _choice([0, 1]), "numbers from 0 to 0, or -1"),
    "too low a number": (lambda: _choice([-2]), "numbers from 0 to 0, or -1"),
    "no whole numbers": (lambda: _choice([0.0]), "one whole number a row"),
    "one for all": (lambda: _choice(0), "one whole number a row"),
    "no bank": (lambda: adapters.choose(variables_of(MODELS["llama"]), {}, [0]), "stack the adapters first"),
    "a second adapter": (
        lambda: adapters.choose(
            adapters.ia3().init(None, variables_of(MODELS["llama"])), _stacked(adapters.ia3()), [0]),
        "have a 'ia3' adapter already"),
    "a choice to choose from": (lambda: adapters.stack([_choice([0])]), "chosen row by row already"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        make()
