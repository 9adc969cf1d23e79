"""An objective on held-out batches: the sums of its parts, wherever they lie."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax import UserError
from lmjax.evaluation import evaluate_batches, evaluate_objective
from lmjax.objectives import Role, evaluate
from tests.laws.registry import random_batch, tiny_policy

POLICY = tiny_policy()
VARIABLES = POLICY.init(jax.random.key(0))
TEACHER = lm.Policy(lm.models.bigram(16, init_std=1.0))
ROLES = {"teacher": Role(TEACHER.init(jax.random.key(1)), TEACHER)}
OBJECTIVE = lm.objectives.cross_entropy() + 3.0 * lm.objectives.distillation(beta=0.5) + lm.objectives.agreement()
BATCHES = [dataclasses.replace(random_batch(8, 6, seed), temperature=None) for seed in range(3)]


def test_sums_over_batches_are_those_of_one_batch_of_all():
    found = evaluate_objective(OBJECTIVE, POLICY, VARIABLES, BATCHES, roles=ROLES)
    whole = jax.tree.map(lambda *rows: np.concatenate(rows), *BATCHES)
    expected = evaluate(OBJECTIVE, POLICY, VARIABLES, whole, roles=ROLES).sums
    assert found.keys() == expected.keys() - {"loss"}
    assert {"loss/agreement_teacher", "accuracy", "loss/distillation_teacher"} <= found.keys()
    for name, pair in found.items():
        np.testing.assert_allclose(pair, expected[name], rtol=1e-5)
    score = evaluate_batches(POLICY, VARIABLES, BATCHES)
    assert found["loss/cross_entropy"] == pytest.approx((score.nats, score.tokens), rel=1e-6)


def test_a_mesh_changes_nothing(make_test_mesh):
    mesh = make_test_mesh((4, 2, 1))
    alone = evaluate_objective(OBJECTIVE, POLICY, VARIABLES, BATCHES, roles=ROLES)
    spread = evaluate_objective(OBJECTIVE, POLICY, VARIABLES, iter(BATCHES), roles=ROLES, mesh=mesh)
    for name, pair in spread.items():
        np.testing.assert_allclose(pair, alone[name], rtol=1e-5)


def test_a_role_that_is_missing():
    with pytest.raises(UserError, match="needs the role 'teacher'"):
        evaluate_objective(OBJECTIVE, POLICY, VARIABLES, BATCHES)
