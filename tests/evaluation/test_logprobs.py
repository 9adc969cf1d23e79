"""Log-probabilities of a data set: the policy's own, computed once and read from disk after."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax.errors import UserError
from lmjax.evaluation import kept_on_disk, token_logprobs

POLICY = lm.Policy(lm.models.small(16, num_layers=1, embed_dim=16, num_heads=2))
BATCHES = [lm.batch.next_token_batch(np.random.RandomState(seed).randint(0, 16, (4, 7))) for seed in range(3)]


def test_they_are_the_policys_on_one_device_and_on_a_mesh(make_test_mesh):
    variables = POLICY.init(jax.random.key(0))
    expected = [POLICY(variables, batch).logprobs for batch in BATCHES]
    for mesh in (None, make_test_mesh((2, 1, 2))):
        found = list(token_logprobs(POLICY, variables, BATCHES, mesh=mesh))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_they_are_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        yield from (np.full((4, 3), n, np.float32) for n in range(3))

    path = tmp_path / "cache" / "reference.npy"
    first = kept_on_disk(path, (10, 3), compute)  # the last block has two rows too many
    again = kept_on_disk(path, (10, 3), compute)
    assert calls == [1] and np.array_equal(first, again)
    assert first[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    with pytest.raises(UserError, match=r"holds \(10, 3\) numbers and \(9, 3\) are wanted"):
        kept_on_disk(path, (9, 3), compute)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="damaged"):
        kept_on_disk(path, (10, 3), compute)


def test_an_interrupted_computation_leaves_nothing_that_looks_whole(tmp_path):
    def compute():
        yield np.zeros((4, 3), np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_on_disk(tmp_path / "reference.npy", (8, 3), compute)
    assert not (tmp_path / "reference.npy").exists()
