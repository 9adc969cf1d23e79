"""Law 1: the same loss, metrics and gradients under padding, packing, microbatches and device meshes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax.objectives import evaluate, finalize
from lmjax.sharding import shard_batch
from lmjax.training.state import init_state
from lmjax.training.step import make_step
from tests.laws.registry import (
    MESHES,
    MODELS,
    REDUCERS,
    TERMS,
    assert_close,
    documents,
    everything,
    lay_out,
    random_batch,
    tiny_policy,
    tiny_roles,
)

DOCS = documents((4, 3, 6, 2, 5, 1))
SEPARATE = lay_out(DOCS, [[0], [1], [2], [3], [4], [5]], 6)
LAYOUTS = {
    "padded": lay_out(DOCS, [[0], [], [1], [2], [3], [], [4], [5]], 9, seed=2),
    "packed": lay_out(DOCS, [[2, 0], [4, 3, 1], [5]], 11, seed=4),
}


@functools.cache
def _setting():
    policy = tiny_policy(chunk_elements=3 * 16 * 8)
    return policy, policy.init(jax.random.key(0)), tiny_roles(policy)


@functools.cache
def _compiled(fused: bool, product: bool):
    policy, _, roles = _setting()
    objective = everything(fused=fused, product=product)

    @jax.jit
    def run(variables, batch):
        def loss(variables):
            found = evaluate(objective, policy, variables, batch, roles=roles)
            return found.loss, finalize(found.sums)

        return jax.value_and_grad(loss, has_aux=True)(variables)

    return run


@functools.cache
def _separate(fused: bool, product: bool):
    return jax.device_get(_compiled(fused, product)(_setting()[1], SEPARATE))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "general"])
def test_padding_and_packing(layout, fused):
    found = _compiled(fused, False)(_setting()[1], LAYOUTS[layout])
    assert_close(found, _separate(fused, False))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "general"])
def test_padding_and_packing_of_every_term_with_every_reducer(layout, fused):
    found = _compiled(fused, True)(_setting()[1], LAYOUTS[layout])
    assert_close(found, _separate(fused, True))


def test_every_term_and_every_reducer_was_there_and_no_two_losses_agree():
    losses = {}
    for fused in (True, False):
        (_, metrics), _ = _separate(fused, False)
        losses |= {name.removeprefix("loss/"): float(v) for name, v in metrics.items() if name.startswith("loss/")}
    assert {name.split(":")[0] for name in losses} == {name for name, case in TERMS.items() if case.splits}
    assert {name.split(":")[1] for name in losses} == set(REDUCERS)
    assert len({f"{value:.5f}" for value in losses.values()}) == len(losses)
    assert all(abs(value) > 1e-3 for value in losses.values())


def test_the_fused_and_the_general_path_agree():
    (_, fused), _ = _separate(True, False)
    (_, general), _ = _separate(False, False)
    shared = [name for name in fused if name in general and name != "loss"]
    assert {"loss/cross_entropy:token_mean", "accuracy"} <= set(shared)
    assert_close({name: general[name] for name in shared}, {name: fused[name] for name in shared})


QUICK = ("bigram", "gpt2", "gemma3")  # between them: learned and rotary positions, windows, softcaps, both norms


@pytest.mark.parametrize("model", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MODELS])
def test_packing_of_every_model(model):
    policy = lm.Policy(MODELS[model]())
    variables = policy.init(jax.random.key(0))
    objective = lm.objectives.cross_entropy() + 0.1 * lm.objectives.z_loss()

    @jax.jit
    def run(batch):
        return jax.value_and_grad(lambda v: evaluate(objective, policy, v, batch).loss)(variables)

    assert_close(run(LAYOUTS["packed"]), run(SEPARATE), rtol=1e-4)


ROWS = random_batch(8, 6)


def _step(fused, *, microbatches=1, mesh=None):
    """Loss, metrics and parameters after one step of plain gradient descent."""
    policy, _, roles = _setting()
    optimizer = optax.sgd(0.1)
    state = init_state(policy, optimizer, jax.random.key(0), mesh=mesh)
    step = make_step(policy, everything(fused=fused), optimizer, roles=roles, mesh=mesh, microbatches=microbatches)
    batch = ROWS if mesh is None else shard_batch(ROWS, mesh)
    state, metrics = step(state, batch)
    return jax.device_get((state.variables, metrics))


@functools.cache
def _whole(fused):
    return _step(fused)


@pytest.mark.parametrize(("microbatches", "fused"), [(2, True), (4, True), (4, False)])
def test_microbatches(microbatches, fused):
    assert_close(_step(fused, microbatches=microbatches), _whole(fused), rtol=5e-5)


PLACES = [(shape, True) for shape in MESHES] + [((2, 2, 2), False)]


@pytest.mark.parametrize(("shape", "fused"), PLACES, ids=lambda value: str(value))
def test_meshes(shape, fused, make_test_mesh):
    found = _step(fused, mesh=make_test_mesh(shape))
    assert_close(found, _whole(fused), rtol=5e-5)


def test_microbatches_on_a_mesh(make_test_mesh):
    policy, _, _ = _setting()
    optimizer, mesh = optax.sgd(0.1), make_test_mesh((2, 1, 2))
    objective = lm.objectives.cross_entropy(reducer=lm.objectives.sequence_mean)
    results = []
    for options in ({}, {"mesh": mesh, "microbatches": 2}):
        state = init_state(policy, optimizer, jax.random.key(0), mesh=options.get("mesh"))
        state, metrics = make_step(policy, objective, optimizer, **options)(state, ROWS)
        results.append(jax.device_get((state.variables, metrics)))
    assert_close(*results, rtol=5e-5)


def test_the_law_would_notice():
    """Averages of averages, the classic mistake, are far outside the tolerances used here."""
    policy, variables, _ = _setting()
    run = jax.jit(lambda batch: evaluate(lm.objectives.cross_entropy(), policy, variables, batch).loss)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], ROWS) for i in (0, 1)]
    naive = np.mean([float(run(half)) for half in halves])
    assert abs(naive - float(run(ROWS))) > 5e-4
