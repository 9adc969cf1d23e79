"""Law 7, for losses: one log-probability, whoever asks, at whatever temperature and slice; the first ratio is 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import lmjax as lm
from lmjax.objectives import Objective, Role, Term, evaluate
from tests.laws.registry import MODELS, assert_close, random_batch

BATCH = random_batch(3, 7)
QUICK = ("bigram", "gpt2", "gemma2")


@pytest.mark.parametrize("model", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MODELS])
def test_logprobs_are_those_of_tempered_logits_in_any_slices(model):
    policy = lm.Policy(MODELS[model]())
    variables = policy.init(jax.random.key(0))
    cold = policy(variables, BATCH)
    untempered = lm.Batch(**vars(BATCH) | {"temperature": None})
    logits = policy(variables, untempered).logits / BATCH.temperature[:, None, None]
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH.targets[..., None], -1)[..., 0]
    assert_close(cold.logprobs, expected)
    assert_close(cold.logits, logits)
    for elements in (1, 3 * 16 * 2, 3 * 16 * 4):
        sliced = lm.Policy(policy.model, chunk_elements=elements)
        assert_close(sliced(variables, BATCH).logprobs, expected)


def test_the_first_importance_ratio_is_one():
    """Against a role that is a copy (another path through the code), and against log-probabilities stored before."""
    policy = lm.Policy(MODELS["small"](), chunk_elements=3 * 16 * 2)
    variables = policy.init(jax.random.key(0))
    stored = jax.jit(lambda v: lm.Policy(policy.model)(v, BATCH).logprobs)(variables)

    def ratio(outputs, batch, old):
        off = jnp.maximum(jnp.abs(outputs.logprobs - old.logprobs), jnp.abs(outputs.logprobs - stored))
        return jnp.exp(outputs.logprobs - old.logprobs), batch.mask, {"off": (off, batch.mask)}

    objective = Objective(((1.0, Term("ratio", ratio, roles=("old",))),))
    roles = {"old": Role(jax.tree.map(jnp.copy, variables))}
    found = jax.jit(lambda v: evaluate(objective, policy, v, BATCH, roles=roles).sums)(variables)
    mean = lambda name: float(found[name][0] / found[name][1])
    assert mean("off") < 1e-6
    assert abs(mean("loss/ratio") - 1) < 1e-6
