"""Constraints of one's own, packed masks, and the filling of a batch of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.generation import constraints
from lmjax.generation.constraints import fill_masks, from_callable, pack, packed_width, unpack


@pytest.mark.parametrize("V", [1, 31, 32, 33, 100])
def test_unpack_undoes_pack(V: int) -> None:
    mask_BV = np.random.default_rng(V).random((5, V)) < 0.5
    bits_BW = pack(mask_BV)
    assert bits_BW.dtype == np.uint32 and bits_BW.shape == (5, packed_width(V))
    np.testing.assert_array_equal(unpack(bits_BW, V), mask_BV)
    for v in range(V):  # the documented place of each id
        np.testing.assert_array_equal(bits_BW[:, v // 32] >> np.uint32(v % 32) & 1, mask_BV[:, v])


def test_a_callable_sees_what_its_row_said() -> None:
    seen: list[list[int]] = []

    def rising(said: list[int]) -> range:
        seen.append(said)
        return range(said[-1] + 1 if said else 0, 5)

    rule = from_callable(rising, 5, eos=4)
    row, other = rule.fresh(), rule.fresh()
    assert row.mask().tolist() == [True] * 5
    row.advance(2)
    assert row.mask().tolist() == [False, False, False, True, True]
    assert row.mask().tolist() == [False, False, False, True, True]
    with pytest.raises(UserError, match="token 1 is not allowed here"):
        row.advance(1)
    assert not row.done and row.said == [2]
    row.advance(4)
    assert row.done and row.mask().all()
    assert seen == [[], [2]]  # once a token, and of this row alone
    assert other.mask().all() and other.said == []
    with pytest.raises(UserError, match="after its row had ended"):
        row.advance(4)


def test_a_callable_may_give_a_mask() -> None:
    row = from_callable(lambda said: np.arange(40) % 3 == len(said), 40).fresh()
    np.testing.assert_array_equal(np.flatnonzero(row.mask()), np.arange(0, 40, 3))
    row.advance(39)
    np.testing.assert_array_equal(np.flatnonzero(row.mask()), np.arange(1, 40, 3))
    assert not row.done


def test_copies_go_their_own_way() -> None:
    row = from_callable(lambda said: [sum(said) + 1], 10).fresh()
    row.advance(1)
    twin = row.copy()
    twin.advance(2)
    assert np.flatnonzero(row.mask()) == [2] and np.flatnonzero(twin.mask()) == [4]
    assert row.said == [1] and twin.said == [1, 2]


@pytest.mark.parametrize(
    "given, message",
    [
        ([], r"allows no token after \[\]; allow eos"),
        ([3, 5], "not ids of the vocabulary; give 0 to 4"),
        ([-1], "not ids of the vocabulary; give 0 to 4"),
        ([0.5], "not ids of the vocabulary; give 0 to 4"),
        (np.ones(4, bool), r"a mask of shape \[4\]; give one of \[5\]"),
        (np.zeros(5, bool), r"allows no token after \[\]"),
    ],
)
def test_what_a_callable_may_not_give(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_callable(lambda said: given, 5).fresh().mask()


def test_eos_is_an_id_of_the_model() -> None:
    with pytest.raises(UserError, match="eos 5 is outside the model's vocabulary of 5"):
        from_callable(lambda said: [0], 5, eos=[1, 5])
    row = from_callable(lambda said: [0, 1, 2], 5, eos=(1, 2)).fresh()
    row.advance(0)
    assert not row.done
    row.advance(2)
    assert row.done


class Countdown:
    """A constraint that knows nothing of this library: n, n - 1, ..., 0."""

    def __init__(self, n: int, V: int):
        self.n, self.V = n, V

    def mask(self) -> np.ndarray:
        return np.arange(self.V) == self.n

    def advance(self, token: int) -> None:
        assert token == self.n
        self.n -= 1

    @property
    def done(self) -> bool:
        return self.n < 0


def test_a_batch_of_any_constraints_drives_a_jitted_step() -> None:
    V, B = 40, 4
    assert isinstance(Countdown(1, V), constraints.Constraint)
    even = from_callable(lambda said: range(0, V, 2), V, eos=38)
    rows = [Countdown(2, V), even.fresh(), even.fresh(), None]
    bits_BW = np.zeros((B, packed_width(V)), np.uint32)

    @jax.jit
    def step(bits_BW: jax.Array, key: jax.Array) -> jax.Array:
        z_BV = jax.random.normal(key, (B, V)).at[3, 37].set(100.0)
        return jax.random.categorical(key, jnp.where(unpack(bits_BW, V), z_BV, -jnp.inf))

    said: list[list[int]] = []
    for n in range(60):
        fill_masks(rows, bits_BW)
        said.append(step(bits_BW, jax.random.key(n)).tolist())
        for row, token in zip(rows, said[-1], strict=True):
            if row is not None and not row.done:
                row.advance(token)
    assert [tokens[0] for tokens in said[:3]] == [2, 1, 0] and rows[0].done
    for b in (1, 2):
        assert all(token % 2 == 0 for token in rows[b].said) and rows[b].said.index(38) == len(rows[b].said) - 1
    assert rows[1].said != rows[2].said
    assert all(tokens[3] == 37 for tokens in said)
    fill_masks([None, *rows[:3]], bits_BW)
    assert np.all(bits_BW == 0xFFFFFFFF)  # free, or over


def test_a_batch_is_checked() -> None:
    rule = from_callable(lambda said: [0], 40)
    row = rule.fresh()
    bits_BW = np.zeros((2, 2), np.uint32)
    with pytest.raises(UserError, match="two rows share one constraint"):
        fill_masks([row, row], bits_BW)
    with pytest.raises(UserError, match="masks of 1 rows do not go into uint32"):
        fill_masks([row], bits_BW)
    with pytest.raises(UserError, match=r"give uint32 \[B, packed_width\(V\)\]"):
        fill_masks([row, None], bits_BW.astype(np.int64))
    with pytest.raises(UserError, match="the mask of row 1 has 2 words and its place 3"):
        fill_masks([None, row], np.zeros((2, 3), np.uint32))
