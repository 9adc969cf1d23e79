"""The policy and its lazy outputs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import UserError
from lmjax.losses import STATISTICS
from lmjax.policy import Request, add_value_head, count_parameters
from tests.laws.counting import forwards, primitives, vocabulary_products
from tests.laws.registry import assert_close, random_batch, tiny_policy

V = 19  # no other axis is so long
POLICY = tiny_policy(vocab_size=V)
VARIABLES = POLICY.init(jax.random.key(0))
BATCH = random_batch(2, 5)


def test_nothing_is_computed_before_it_is_read():
    def shape(read):
        return jax.make_jaxpr(lambda variables: read(POLICY(variables, BATCH)))(VARIABLES)

    assert not shape(lambda outputs: 0).eqns
    hidden = shape(lambda outputs: outputs.hidden)
    assert forwards(hidden, (V, 16)) == 1 and vocabulary_products(hidden, V) == 0
    several = shape(lambda outputs: (outputs.logprobs, outputs.entropy, outputs.logsumexp, outputs.hidden, outputs.aux))
    assert forwards(several, (V, 16)) == 1 and vocabulary_products(several, V) == 1
    assert "tanh" in primitives(several)  # the softcap


def test_statistics_agree_with_logits():
    outputs = POLICY(VARIABLES, BATCH)
    logp = jax.nn.log_softmax(outputs.logits)
    assert outputs.logits.shape == (2, 5, V) and outputs.logits.dtype == jnp.float32
    assert_close(outputs.logprobs, jnp.take_along_axis(logp, BATCH.targets[..., None], -1)[..., 0])
    assert_close(outputs.entropy, -jnp.sum(jnp.exp(logp) * logp, -1))
    assert_close(outputs.sum_p2, jnp.sum(jnp.exp(2 * logp), -1))
    assert_close(outputs.map_logits(lambda z: jnp.max(z, -1)), outputs.logits.max(-1))
    assert all(getattr(outputs, name).shape == (2, 5) for name in STATISTICS)


def test_only_what_is_expected_is_there():
    outputs = POLICY(VARIABLES, BATCH).expecting(Request(frozenset({"logprobs"})), {})
    assert outputs.logprobs.shape == (2, 5)
    with pytest.raises(RuntimeError, match="entropy was read, but not when the objective was traced"):
        _ = outputs.entropy
    with pytest.raises(AttributeError, match="Outputs has no 'perplexity'"):
        _ = outputs.perplexity


def test_temperature_divides_logits_everywhere():
    cold = dataclasses.replace(BATCH, temperature=np.array([0.5, 2.0], np.float32))
    plain = dataclasses.replace(BATCH, temperature=None)
    logits = POLICY(VARIABLES, plain).logits
    assert_close(POLICY(VARIABLES, cold).logits, logits / cold.temperature[:, None, None])
    logp = jax.nn.log_softmax(logits / cold.temperature[:, None, None])
    assert_close(POLICY(VARIABLES, cold).entropy, -jnp.sum(jnp.exp(logp) * logp, -1))


def test_value_head():
    with pytest.raises(UserError, match=r"no value head; add one with lmjax\.policy\.add_value_head"):
        _ = POLICY(VARIABLES, BATCH).values
    zero = POLICY(add_value_head(VARIABLES), BATCH).values
    assert zero.shape == (2, 5) and not np.any(zero)
    variables = add_value_head(VARIABLES, jax.random.key(1), std=1.0)
    outputs = POLICY(variables, BATCH)
    assert_close(outputs.values, (outputs.hidden @ variables["value"]["kernel"])[..., 0])
    assert "value" not in VARIABLES


def test_counting_parameters():
    table = lm.Policy(lm.models.bigram(7)).init(jax.random.key(0))
    assert count_parameters(table) == 49
    assert count_parameters(add_value_head(table), ("params", "value")) == 49 + 7 + 1
    assert count_parameters(jax.eval_shape(POLICY.init, jax.random.key(0))) == count_parameters(VARIABLES)


def test_a_policy_takes_a_config_or_a_model():
    config = lm.models.bigram(5, init_std=1.0)
    by_config, by_model = lm.Policy(config), lm.Policy(lm.Policy(config).model)
    assert by_config.config == by_model.config == config
    assert_close(by_config.init(jax.random.key(0)), by_model.init(jax.random.key(0)))


def test_dropout_needs_a_key():
    policy = tiny_policy(vocab_size=V, dropout=0.5)
    with pytest.raises(UserError, match="training needs an rng"):
        _ = policy(VARIABLES, BATCH, train=True).hidden
    dropped = [policy(VARIABLES, BATCH, rng=jax.random.key(seed), train=True).logprobs for seed in (0, 0, 1)]
    assert np.array_equal(dropped[0], dropped[1]) and not np.array_equal(dropped[0], dropped[2])
    assert_close(policy(VARIABLES, BATCH, rng=jax.random.key(0)).logprobs, POLICY(VARIABLES, BATCH).logprobs)


def test_next_token_batch():
    batch = lm.batch.next_token_batch(
        np.array([[3, 4, 5, 6, 7, 0]]), np.array([[1, 1, 1, 2, 2, 0]]), np.array([[9.0, 1.0, 0.5, 1.0, 2.0, 1.0]])
    )
    assert batch.tokens.tolist() == [[3, 4, 5, 6, 7]] and batch.targets.tolist() == [[4, 5, 6, 7, 0]]
    assert batch.mask.tolist() == [[1.0, 0.5, 0.0, 2.0, 0.0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(batch)} == {"int32", "float32"}
