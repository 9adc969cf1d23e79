"""Constrained decoding: which tokens may come next, as a mask that the jitted step takes as an input.

A grammar is compiled once (`grammars.json_schema`, `json_object`, `regex`, `lark`; `from_callable` here for a rule of
one's own), and each row of a batch follows it with a constraint of its own, from `fresh()`:

    grammar = json_schema(schema, tokenizer, vocab_size=V)
    rows = [grammar.fresh() for _ in range(B)]
    bits_BW = np.zeros((B, packed_width(V)), np.uint32)
    while not all(row.done for row in rows):
        fill_masks(rows, bits_BW)
        tokens_B = step(bits_BW)    # jitted: z_BV = jnp.where(unpack(bits_BW, V), z_BV, -jnp.inf), then the draw
        for row, token in zip(rows, tokens_B.tolist()):
            if not row.done:
                row.advance(token)

What this samples from. One masked step is exactly one step of rejection sampling: the allowed tokens keep their
relative probabilities, p(v) over the sum of p over the allowed. The whole output is *not* a sample of the language
model conditioned on the grammar: that would weigh each token by the probability that what follows it satisfies the
grammar, which one step of the model does not tell. Masking token by token prefers beginnings that are likely in
themselves, however unlikely each of their valid endings (Park et al. 2024, "Grammar-Aligned Decoding",
arXiv 2405.21047).
"""

from __future__ import annotations

import abc
import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError


@runtime_checkable
class Constraint(Protocol):
    """What one row may say. Anything with these three serves; those made here are `Row`s."""

    def mask(self) -> np.ndarray:
        """bool [V]: the ids that may come next. V is the model's vocabulary."""
        ...

    def advance(self, token: int) -> None:
        """The row said this token."""
        ...

    @property
    def done(self) -> bool:
        """The row is over: it said an eos (all that its mask leaves where nothing else can follow), or it has no eos
        and nothing can follow."""
        ...


class Row(abc.ABC):
    """A constraint that keeps what the row said, and the mask of its next token once asked for.

    Attributes:
      vocab_size: V of the model.
      eos: ids that end the row.
      said: the ids so far, without the prompt.
    """

    def __init__(self, vocab_size: int, eos: tuple[int, ...]):
        self.vocab_size, self.eos = vocab_size, eos
        self.said: list[int] = []
        self._bits: np.ndarray | None = None
        self._over = False

    @property
    def done(self) -> bool:
        return self._over

    @property
    def bits(self) -> np.ndarray:
        """uint32 [W]: the mask, id v in bit v % 32 of word v // 32."""
        if self._bits is None:
            self.compute([self])
        assert self._bits is not None
        return self._bits

    def mask(self) -> np.ndarray:
        """bool [V]: the ids that may come next; all of them once the row is over."""
        if self.done:
            return np.ones(self.vocab_size, bool)
        return np.unpackbits(self.bits.view(np.uint8), count=self.vocab_size, bitorder="little").view(bool)

    def advance(self, token: int) -> None:
        """The row said this token.

        Raises:
          UserError: the row is over, or the token is not allowed; the row stays as it was.
        """
        if self.done:
            raise UserError(f"token {token} came after its row had ended; leave out the rows that are done")
        token = int(token)
        if not 0 <= token < self.vocab_size or not self._accept(token):
            raise UserError(f"token {token} is not allowed here; apply the mask to the logits before the draw")
        self.said.append(token)
        self._bits = None
        self._over = token in self.eos

    def copy(self) -> Any:
        """The same place, to go on from separately: for a search that continues a row in several ways."""
        twin = copy.copy(self)
        twin.said = list(self.said)
        return twin

    @staticmethod
    @abc.abstractmethod
    def compute(rows: list[Any]) -> None:
        """Sets `_bits` of rows of this class."""

    @abc.abstractmethod
    def _accept(self, token: int) -> bool:
        """Moves on by the token, or says that it is not allowed."""


class Rule:
    """A callable as a constraint, shared by any number of rows: see `from_callable`."""

    def __init__(self, function: Callable[[list[int]], Any], vocab_size: int, eos: int | Sequence[int] | None):
        self.function, self.vocab_size, self.eos = function, vocab_size, eos_ids(eos, vocab_size)

    def fresh(self) -> RuleRow:
        """A constraint of a row that has said nothing yet."""
        return RuleRow(self)


class RuleRow(Row):
    """One row under a `Rule`."""

    def __init__(self, rule: Rule):
        super().__init__(rule.vocab_size, rule.eos)
        self._function = rule.function

    def _accept(self, token: int) -> bool:
        return bool(self.bits[token // 32] >> np.uint32(token % 32) & np.uint32(1))

    @staticmethod
    def compute(rows: list[RuleRow]) -> None:
        for row in rows:
            row._bits = pack(row._allowed())

    def _allowed(self) -> np.ndarray:
        """bool [V], what the callable gave."""
        given = self._function(list(self.said))
        given = given if isinstance(given, np.ndarray) else np.asarray(list(given))
        V = self.vocab_size
        if given.dtype == bool:
            if given.shape != (V,):
                raise UserError(f"the callable gave a mask of shape {list(given.shape)}; give one of [{V}]")
            mask = given
        else:
            if given.size and (given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= V):
                raise UserError(f"the callable gave {given[:5]}, not ids of the vocabulary; give 0 to {V - 1}")
            mask = np.zeros(V, bool)
            mask[given.astype(np.int64)] = True
        if not mask.any():
            raise UserError(f"the callable allows no token after {self.said[-20:]}; allow eos where a row may end")
        return mask


def from_callable(
    function: Callable[[list[int]], Iterable[int] | np.ndarray],
    vocab_size: int,
    *,
    eos: int | Sequence[int] | None = None,
) -> Rule:
    """A rule of one's own.

    Args:
      function: takes the ids that the row has said so far (without its prompt), gives the ids that may come next, or
        bool [V]. Called once a token. It allows the eos itself, where the row may end.
      vocab_size: V of the model.
      eos: id or ids that end a row; None: rows end by their budget alone.

    >>> alternate = from_callable(lambda said: [len(said) % 2], vocab_size=3)
    >>> alternate.fresh().mask().tolist()
    [True, False, False]
    """
    return Rule(function, vocab_size, eos)


def eos_ids(eos: int | Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a row, checked."""
    given = () if eos is None else (eos,) if isinstance(eos, int | np.integer) else eos
    ids = tuple(int(i) for i in given)
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"eos {i} is outside the model's vocabulary of {vocab_size}; name an id within it")
    return ids


def packed_width(vocab_size: int) -> int:
    """W: the 32-bit words that hold one bit an id."""
    return -(-vocab_size // 32)


def pack(mask: np.ndarray) -> np.ndarray:
    """bool [..., V] to uint32 [..., W]; id v is bit v % 32 of word v // 32."""
    spare = -mask.shape[-1] % 32
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, spare)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


@functools.partial(jax.jit, static_argnums=1)
def unpack(bits_BW: jax.Array, vocab_size: int) -> jax.Array:
    """uint32 [B, W] to bool [B, V], on the device: what is sent there is an eighth of the mask.

    >>> unpack(pack(np.array([[True, False, True]])), 3).tolist()
    [[True, False, True]]
    """
    bits_BW32 = (bits_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_BW32.reshape(bits_BW.shape[0], -1)[:, :vocab_size].astype(bool)


def fill_masks(constraints: Sequence[Constraint | None], out_BW: np.ndarray) -> None:
    """The packed masks of a batch; grammars are followed on several threads.

    Args:
      constraints: one of each row; None: the row may say anything.
      out_BW: uint32 [B, packed_width(V)], written in place. Rows that are done allow everything.

    Raises:
      UserError: rows share one constraint, a constraint is of another vocabulary, or a row has come to a dead end,
        where no token is allowed and the grammar may not end.
    """
    given = [constraint for constraint in constraints if constraint is not None]
    if len({id(constraint) for constraint in given}) < len(given):
        raise UserError("two rows share one constraint; call fresh() once for each row")
    if out_BW.dtype != np.uint32 or len(out_BW) != len(constraints):
        raise UserError(
            f"masks of {len(constraints)} rows do not go into {out_BW.dtype} {list(out_BW.shape)}; "
            "give uint32 [B, packed_width(V)]"
        )
    lacking = [row for row in given if isinstance(row, Row) and row._bits is None and not row._over]
    for kind in {type(row) for row in lacking}:
        kind.compute([row for row in lacking if type(row) is kind])
    for b, constraint in enumerate(constraints):
        if constraint is None or constraint.done:
            out_BW[b] = 0xFFFFFFFF
            continue
        bits = constraint.bits if isinstance(constraint, Row) else pack(constraint.mask())
        if bits.shape != out_BW.shape[1:]:
            raise UserError(
                f"the mask of row {b} has {bits.size} words and its place {out_BW.shape[1]}; "
                "make each constraint with the model's vocab_size"
            )
        out_BW[b] = bits
