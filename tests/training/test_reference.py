"""References that follow the policy: a second copy of what is trained only, moved when it should be."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax.data import Together
from lmjax.errors import UserError
from lmjax.training import Following, reference_of, with_reference

POLICY = lm.Policy(lm.models.small(16, num_layers=1, embed_dim=16, num_heads=2))
BATCH = lm.batch.next_token_batch(np.random.RandomState(0).randint(0, 16, (4, 7)))
LORA = lm.adapters.lora(2)


def _run(every, rate, steps, mesh=None):
    variables = with_reference(LORA.init(jax.random.key(1), POLICY.init(jax.random.key(0))), LORA.trainable)
    options = dict(trainable=LORA.trainable, mesh=mesh)
    state = lm.training.init_state(POLICY, optax.sgd(0.5), jax.random.key(0), variables=variables, **options)
    objective = lm.objectives.cross_entropy() + 0.1 * lm.objectives.kl("reference", estimator="k2")
    inner = lm.training.make_step(POLICY, objective, optax.sgd(0.5), roles={"reference": reference_of}, **options)
    step, history = Following(inner, every, rate), []
    for _ in range(steps):
        state, metrics = step(state, BATCH)
        found = state.variables["lora"], state.variables["reference"], metrics["loss/kl_reference"]
        history.append(jax.device_get(found))
    return variables, history


def _b(tree):
    return tree["layer_0"]["mlp"]["up"]["b"]


def test_it_is_a_copy_of_the_adapter_and_moves_every_so_often():
    variables, history = _run(every=2, rate=0.5, steps=4)
    assert list(variables["reference"]) == ["lora"]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["reference"])) == lm.adapters.count(variables)
    references = [_b(reference["lora"]) for _, reference, _ in history]
    policies = [_b(lora) for lora, _, _ in history]
    assert not references[0].any()
    np.testing.assert_allclose(references[1], policies[1] / 2, rtol=1e-6)
    np.testing.assert_array_equal(references[2], references[1])
    np.testing.assert_allclose(references[3], (policies[3] + references[2]) / 2, rtol=1e-6)


def test_at_a_rate_of_one_every_step_the_policy_is_its_own_reference():
    _, history = _run(every=1, rate=1.0, steps=3)
    for lora, reference, kl in history:
        np.testing.assert_array_equal(_b(lora), _b(reference["lora"]))
        assert abs(float(kl)) < 1e-7


def test_on_a_mesh_as_on_one_device(make_test_mesh):
    (_, alone), (_, spread) = _run(2, 0.5, 3), _run(2, 0.5, 3, make_test_mesh((2, 2, 2)))
    for own, other in zip(alone, spread, strict=True):
        np.testing.assert_allclose(_b(own[1]["lora"]), _b(other[1]["lora"]), rtol=1e-4, atol=1e-7)


def test_bad_options():
    with pytest.raises(UserError, match="give 1 or more"):
        Following(None, 0)


def test_streams_together_end_with_the_first_and_go_on_where_they_were():
    class Counting:
        def __init__(self, end):
            self.at, self.end = 0, end

        def __next__(self):
            if self.at == self.end:
                raise StopIteration
            self.at += 1
            return self.at

        def get_state(self):
            return {"at": self.at}

        def set_state(self, state):
            self.at = state["at"]

    both = Together({"pairs": Counting(5), "pretrain": Counting(3)})
    next(both)
    other = Together({"pairs": Counting(5), "pretrain": Counting(3)})
    other.set_state(both.get_state())
    assert list(other) == list(both) == [{"pairs": 2, "pretrain": 2}, {"pairs": 3, "pretrain": 3}]
