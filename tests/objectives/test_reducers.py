"""Reducers by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.objectives import constant_horizon, sequence_mean, sequence_sum_mean, token_mean, token_sum

# Row 0: a sequence of two, one of three of which one has no weight; row 1: one without any weight, then padding.
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
MASK = np.array([[1.0, 0.5, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
VALUES = np.array([[2.0, 4.0, 100.0, 3.0, 5.0], [7.0, 7.0, 7.0, 7.0, 7.0]], np.float32)

# (2 + 0.5 * 4) = 4 over weight 1.5; (2 * 3 + 2 * 5) = 16 over weight 4
BY_HAND = {
    token_mean: 20 / 5.5,
    token_sum: 20.0,
    sequence_mean: (4 / 1.5 + 16 / 4) / 2,
    sequence_sum_mean: (4 + 16) / 2,
    constant_horizon(10): 20 / (3 * 10),  # the sequence without weight counts, the padding does not
}


def _reduce(reducer, values, mask, segments):
    coefficients, weight = reducer.coefficients(jnp.asarray(mask), jnp.asarray(segments))
    return float(jnp.sum(coefficients * values) / weight)


@pytest.mark.parametrize("reducer", BY_HAND, ids=lambda reducer: reducer.name)
def test_by_hand(reducer):
    assert _reduce(reducer, VALUES, MASK, SEGMENTS) == pytest.approx(BY_HAND[reducer], rel=1e-6)


@pytest.mark.parametrize("reducer", BY_HAND, ids=lambda reducer: reducer.name)
def test_no_weight_anywhere_gives_no_coefficient(reducer):
    coefficients, weight = reducer.coefficients(jnp.zeros((2, 5)), jnp.asarray(SEGMENTS))
    assert not np.any(coefficients) and np.isfinite(weight)


@pytest.mark.parametrize("reducer", BY_HAND, ids=lambda reducer: reducer.name)
def test_values_of_rows_and_of_the_batch(reducer):
    rows, weight = reducer.coefficients(jnp.array([1.0, 3.0]), jnp.asarray(SEGMENTS))
    assert rows.tolist() == [1.0, 3.0]
    assert float(weight) == (1.0 if reducer is token_sum else 4.0)
    one, weight = reducer.coefficients(jnp.ones(()), jnp.asarray(SEGMENTS))
    assert float(one) == float(weight) == 1.0


def test_boolean_masks_count_as_ones():
    assert _reduce(token_mean, VALUES, MASK > 0, SEGMENTS) == pytest.approx((2 + 4 + 3 + 5) / 4)
