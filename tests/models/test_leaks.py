"""Law 5: an output depends on the tokens it may see, and on no other; law 1: packing changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from lmjax.batch import positions_within_segments
from tests.models.small import FAMILIES, VOCAB, assert_close, forward, random_tokens, variables_of

B, T = 2, 11
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1] * T], np.int32)  # two documents and padding; one long
POSITIONS = positions_within_segments(SEGMENTS)


def visible(config) -> np.ndarray:
    """Which output (b, t) may depend on which token (c, s), through all layers. bool [B*T, B*T]."""
    place = np.arange(B * T)
    row, step, segment = place // T, place % T, SEGMENTS.reshape(-1)
    ahead = step[:, None] - step[None, :]
    same = (row[:, None] == row[None, :]) & (segment[:, None] == segment[None, :]) & (ahead >= 0)
    windows = [config.window if config.windowed(i) else T for i in range(config.num_layers)]
    return same & (ahead <= sum(window - 1 for window in windows))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_output_depends_on_what_it_sees_and_on_nothing_else(name):
    config, tokens = FAMILIES[name], random_tokens(B, T)
    variables = variables_of(config)
    before = np.asarray(forward(config, variables, tokens, SEGMENTS, POSITIONS))
    assert np.isfinite(before).all()
    changed = np.zeros((B * T, B * T), bool)
    for place in range(B * T):
        other = tokens.copy()
        other[np.unravel_index(place, (B, T))] = (tokens.reshape(-1)[place] + 1) % VOCAB
        after = np.asarray(forward(config, variables, other, SEGMENTS, POSITIONS))
        changed[:, place] = (after != before).any(-1).reshape(-1)
    np.testing.assert_array_equal(changed, visible(config))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_padded_documents_are_the_documents_alone(name):
    config, tokens = FAMILIES[name], random_tokens(B, T)
    variables = variables_of(config)
    packed = forward(config, variables, tokens, SEGMENTS, POSITIONS)
    apart, segments = tokens.copy(), np.zeros((B, T), np.int32)
    for row, document in enumerate([slice(0, 4), slice(4, 9)]):
        length = document.stop - document.start
        apart[row, :length], segments[row, :length] = tokens[0, document], 1
    alone = forward(config, variables, apart, segments)
    assert_close(packed[0, :4], alone[0, :4])
    assert_close(packed[0, 4:9], alone[1, :5])


def test_a_padded_row_is_the_row_without_padding():
    config, tokens = FAMILIES["gemma3"], random_tokens(B, T)
    segments = np.where(np.arange(T) < 7, 1, 0).astype(np.int32) * np.ones((B, 1), np.int32)
    padded = forward(config, variables_of(config), tokens, segments)
    assert_close(padded[:, :7], forward(config, variables_of(config), tokens[:, :7]))


def test_a_row_of_nothing_but_padding_stays_finite():
    config = FAMILIES["llama"]
    empty = np.zeros((1, T), np.int32)
    assert np.isfinite(forward(config, variables_of(config), empty, empty, empty)).all()
