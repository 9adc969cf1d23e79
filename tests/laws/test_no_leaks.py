"""Law 5: what must not matter does not, at the level of losses and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmjax.objectives import evaluate, finalize
from tests.laws.registry import VOCAB, everything, random_batch, tiny_policy, tiny_roles

BATCH = random_batch(4, 9)


@functools.cache
def _run(fused: bool):
    policy = tiny_policy(chunk_elements=2 * 4 * VOCAB)
    variables, roles = policy.init(jax.random.key(0)), tiny_roles(policy)
    objective = everything(fused=fused)

    @jax.jit
    def run(batch):
        def loss(variables):
            found = evaluate(objective, policy, variables, batch, roles=roles)
            return found.loss, finalize(found.sums)

        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(variables)
        return metrics, gradient

    return lambda batch: jax.device_get(run(batch))


def _changed(field, where, by=1):
    values = np.array(getattr(BATCH, field))
    values[where] = (values[where] + by) % VOCAB
    return dataclasses.replace(BATCH, **{field: values})


def _without_last_row():
    mask = BATCH.mask.copy()
    mask[-1] = 0
    return dataclasses.replace(BATCH, mask=mask)


PADDING = BATCH.segments == 0
UNWEIGHED = (BATCH.mask == 0) & ~PADDING
NOTHING_CHANGES = {
    "targets without weight": _changed("targets", UNWEIGHED),
    "tokens of padding": _changed("tokens", PADDING),
    "targets of padding": _changed("targets", PADDING),
    "positions of padding": _changed("positions", PADDING),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "general"])
@pytest.mark.parametrize("what", NOTHING_CHANGES)
def test_loss_and_gradients_do_not_see(what, fused):
    before, after = _run(fused)(BATCH), _run(fused)(NOTHING_CHANGES[what])
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))  # bit for bit: the same sums, the same zeros


@pytest.mark.parametrize("field", ["tokens", "targets"])
def test_a_row_without_weight_is_not_seen(field):
    batch = _without_last_row()
    values = getattr(batch, field).copy()
    values[-1] = (values[-1] + 3) % VOCAB
    before, after = _run(True)(batch), _run(True)(dataclasses.replace(batch, **{field: values}))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


@pytest.mark.parametrize("field", ["tokens", "targets"])
def test_what_has_weight_is_seen(field):
    """The tests above could not fail if nothing ever changed."""
    before, after = _run(True)(BATCH), _run(True)(_changed(field, BATCH.mask > 0))
    names = [name for name in before[0] if name.startswith("loss/") and (field == "tokens" or "entropy:" in name)]
    assert all(before[0][name] != after[0][name] for name in names if "cross_entropy" in name)
    assert not np.array_equal(*(g["params"]["embed"]["embedding"] for g in (before[1], after[1])))


def test_values_see_their_own_past_only():
    """Change one token: the log-probabilities that move are those of its segment from there on."""
    policy = tiny_policy()
    variables = policy.init(jax.random.key(0))
    logprobs = jax.jit(lambda batch: policy(variables, batch).logprobs)
    before = np.asarray(logprobs(BATCH))
    for row, time in ((0, 1), (0, 4), (2, 3), (3, 8)):
        after = np.asarray(logprobs(_changed("tokens", (row, time))))
        moved = before != after
        own = np.zeros_like(moved)
        own[row, time:] = BATCH.segments[row, time:] == BATCH.segments[row, time]
        assert moved[row, time] and not np.any(moved & ~own), (row, time)

