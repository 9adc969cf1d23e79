"""NEFTune: noise of the right size on the embeddings, in training only."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax.models.noise import neftune
from tests.models.small import FAMILIES, VOCAB, random_tokens, variables_of

ALPHA = 5.0


def test_it_is_uniform_and_as_large_as_its_segment_says():
    D = 4000
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0], [1] * 11])
    noise = np.asarray(neftune(jax.random.key(0), jnp.zeros((2, 11, D)), jnp.asarray(segments), ALPHA))
    for row, own, length in ((0, slice(0, 3), 3), (0, slice(3, 9), 6), (1, slice(0, 11), 11)):
        values, reach = noise[row, own], ALPHA / math.sqrt(length * D)
        assert 0.999 * reach < np.abs(values).max() <= reach
        assert values.std() == pytest.approx(reach / math.sqrt(3), rel=0.02) and abs(values.mean()) < 0.02 * reach


def test_it_keeps_the_type_of_the_embeddings():
    found = neftune(jax.random.key(0), jnp.ones((1, 2, 4), jnp.bfloat16), jnp.ones((1, 2), jnp.int32), ALPHA)
    assert found.dtype == jnp.bfloat16 and np.any(np.asarray(found) != 1)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_it_is_added_to_what_comes_out_of_the_table(name):
    config = FAMILIES[name]
    model, variables, tokens = lm.models.Decoder(config), variables_of(config), random_tokens(2, 7)
    segments, positions = np.ones_like(tokens), np.tile(np.arange(7), (2, 1))

    def stream(**options):
        found = model.apply(variables, tokens, segments, positions, collect=(0,), **options)
        return np.asarray(found.layers[0]) / config.embed_scale

    noise = stream(train=True, rng=jax.random.key(1), embedding_noise=ALPHA) - stream()
    reach = ALPHA / math.sqrt(7 * config.embed_dim)
    assert 0.9 * reach < np.abs(noise).max() <= reach * 1.0001


def test_it_is_on_in_training_only_and_follows_the_key():
    config = FAMILIES["llama"]
    plain, noisy = lm.Policy(config), lm.Policy(config, embedding_noise=ALPHA)
    variables, batch = variables_of(config), lm.batch.next_token_batch(random_tokens(2, 8))
    read = lambda policy, **options: np.asarray(policy(variables, batch, **options).logprobs)
    np.testing.assert_array_equal(read(noisy), read(plain))
    np.testing.assert_array_equal(read(noisy, rng=jax.random.key(0)), read(plain))
    first, again, other = (read(noisy, rng=jax.random.key(seed), train=True) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 < np.abs(first - read(plain)).max()


def test_steps_train_with_it_and_evaluation_is_without():
    config = FAMILIES["llama"]
    batch = lm.batch.next_token_batch(random_tokens(4, 9))
    losses = {}
    for alpha in (0.0, ALPHA):
        policy = dataclasses.replace(lm.Policy(config), embedding_noise=alpha)
        state = lm.training.init_state(
            policy, optax.sgd(0.0), jax.random.key(0), variables=jax.tree.map(jnp.asarray, variables_of(config))
        )
        step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optax.sgd(0.0))
        evaluated = lm.evaluation.evaluate_batches(policy, state.variables, [batch]).loss
        found = []
        for _ in range(2):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
        losses[alpha] = (evaluated, *found)
    assert losses[0.0][1] == losses[0.0][2] == pytest.approx(losses[0.0][0], rel=1e-6)
    assert losses[ALPHA][0] == losses[0.0][0]
    assert len({round(loss, 5) for loss in (*losses[ALPHA], losses[0.0][1])}) == 3  # another noise each step


def test_bad_input():
    config = FAMILIES["llama"]
    with pytest.raises(lm.UserError, match="needs an rng"):
        _ = lm.Policy(config, embedding_noise=1.0)(
            variables_of(config), lm.batch.next_token_batch(random_tokens(1, 4)), train=True
        ).hidden
    for model, alpha in ((config, -1.0), (lm.models.bigram(VOCAB), 1.0)):
        with pytest.raises(lm.UserError, match="embedding_noise is"):
            lm.Policy(model, embedding_noise=alpha)


@pytest.mark.reference
def test_a_row_without_padding_gets_what_transformers_gives_it():
    torch = pytest.importorskip("torch")
    integration = pytest.importorskip("transformers.integrations.neftune")
    B, T, D = 3, 50, 400
    module = torch.nn.Embedding(2, D).train()
    module.neftune_noise_alpha = ALPHA
    theirs = integration.neftune_post_forward_hook(module, (), torch.zeros(B, T, D)).numpy()
    ours = np.asarray(neftune(jax.random.key(0), jnp.zeros((B, T, D)), jnp.ones((B, T), jnp.int32), ALPHA))
    assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=1e-3)
    quantiles = np.linspace(0, 1, 21)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(theirs, quantiles), atol=8e-4)
