"""Bottleneck adapters compute what the `adapters` library computes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax.adapters.targets import leaves, nested
from lmjax.batch import next_token_batch
from tests.adapters import bottleneck_cases as cases
from tests.interop.cases import write_directory

CASES = [(family, method) for family in cases.FAMILIES for method in cases.METHODS]


@functools.cache
def _base(family):
    about = cases.about(family)
    with tempfile.TemporaryDirectory() as folder:
        config, variables = lm.interop.load_huggingface(write_directory(Path(folder), about["config"], about["shapes"]))
    policy = lm.Policy(config)
    return policy, variables, _logits(policy, variables)


def _adapted(family, method):
    """A policy and its variables, with the adapter's weights drawn as they were for the library."""
    policy, variables, _ = _base(family)
    _, changes, name = cases.METHODS[method]
    ours = {"non_linearity": "activation", "scaling": "scale"}
    make = getattr(lm.adapters, name)
    made = make(reduction=cases.REDUCTION, **{ours[key]: value for key, value in changes.items()})
    variables = made.init(jax.random.key(0), variables)
    drawn = {
        path: leaf
        if "constant" in path
        else jnp.asarray(cases.adapter_weight(int(path[1].removeprefix("layer_")), path[2], *path[-2:]))
        for path, leaf in leaves({"bottleneck": variables["bottleneck"]})
    }
    return policy, variables | nested(drawn)


def _logits(policy, variables):
    batch = next_token_batch(np.pad(cases.TOKENS, ((0, 0), (0, 1))))
    return np.asarray(jax.jit(lambda variables: policy(variables, batch).logits)(variables))


@pytest.mark.parametrize(("family", "method"), CASES)
def test_logits_are_those_of_the_adapters_library(family, method):
    policy, variables = _adapted(family, method)
    with np.load(cases.FIXTURES) as stored:
        expected = stored[f"{family}/{method}"]
    found = _logits(policy, variables)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - _base(family)[2]).max() > 0.1  # it does take part


@pytest.mark.reference
@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_stored_logits_are_what_the_library_computes(family, method):
    pytest.importorskip("adapters")
    with np.load(cases.FIXTURES) as stored:
        np.testing.assert_allclose(cases.library_logits(family, method), stored[f"{family}/{method}"], atol=1e-5)
