"""Law 10: training ends where theory says it must."""

from __future__ import annotations

import jax
import numpy as np
import optax

import lmjax as lm
from lmjax.training.state import init_state
from lmjax.training.step import make_step


def _train(policy, optimizer, batch, steps):
    state = init_state(policy, optimizer, jax.random.key(0))
    step = make_step(policy, lm.objectives.cross_entropy(), optimizer)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return np.asarray(jax.device_get(losses)), state


def test_a_bigram_table_reaches_the_conditional_entropy_of_its_data():
    V = 6
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(V, 0.4), V)
    ids = np.zeros((8, 65), np.int32)
    for time in range(1, 65):
        ids[:, time] = [rng.choice(V, p=chain[previous]) for previous in ids[:, time - 1]]
    counts = np.zeros((V, V))
    np.add.at(counts, (ids[:, :-1].ravel(), ids[:, 1:].ravel()), 1)
    conditional = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    floor = -np.sum(counts * np.log(np.where(counts > 0, conditional, 1))) / counts.sum()

    policy = lm.Policy(lm.models.bigram(V))
    losses, state = _train(policy, optax.adam(0.1), lm.batch.next_token_batch(ids), 400)
    assert abs(losses[0] - np.log(V)) < 1e-5
    assert floor - 1e-5 < losses[-1] < floor + 5e-3
    learned = np.asarray(jax.nn.softmax(state.variables["params"]["table"]))
    seen = counts.sum(1) > 0
    np.testing.assert_allclose(learned[seen], conditional[seen], atol=0.02)


def test_a_tiny_decoder_learns_a_sequence_that_no_bigram_can():
    """Each symbol is followed now by one, now by another: the table's floor is log 2, attention gets below."""
    pattern = np.array([0, 1, 0, 2, 3, 1, 3, 2])
    ids = np.stack([np.roll(np.tile(pattern, 3), -shift)[:17] for shift in range(4)])
    policy = lm.Policy(
        lm.models.small(5, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, max_length=32, init_std=0.1)
    )
    losses, _ = _train(policy, optax.adam(0.02), lm.batch.next_token_batch(ids), 150)
    assert losses[0] > 1.4
    assert losses[-1] < 0.25  # the first token of a row is all that is left to guess
