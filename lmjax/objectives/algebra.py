"""Terms, and the sums of weighted terms that objectives are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lmjax.errors import UserError
from lmjax.objectives.reducers import Reducer, token_mean

Coefficient = float | Callable[[jax.Array], jax.Array]  # a number, or a schedule of the step


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss over a policy's outputs.

    Attributes:
      name: what its metrics are called.
      function: `(outputs, batch, *outputs of each role) -> (values, mask)` or `(values, mask, metrics)`. Values and
        mask are [B, T] (tokens), [B] (rows) or [] (the batch); metrics map a name to such a pair. Nothing is reduced.
      reducer: turns values and mask into a total and a weight.
      roles: names of the roles whose outputs it takes besides the policy's.
      stream: the batch it is computed on; None: the one stream no other term names.
      couples_rows: its value is not a sum over rows, so a batch must not be split under it.
    """

    name: str
    function: Callable[..., Any]
    reducer: Reducer = token_mean
    roles: tuple[str, ...] = ()
    stream: str | None = None
    couples_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Objective:
    """A sum of weighted terms.

    >>> import lmjax as lm
    >>> objective = lm.objectives.cross_entropy() + 1e-4 * lm.objectives.z_loss().on("web")
    >>> [(c, t.name, t.stream) for c, t in objective.terms]
    [(1.0, 'cross_entropy', None), (0.0001, 'z_loss', 'web')]
    """

    terms: tuple[tuple[Coefficient, Term], ...]

    def __add__(self, other: Objective) -> Objective:
        if other == 0:  # so that sum() works
            return self
        if not isinstance(other, Objective):
            return NotImplemented
        return Objective(self.terms + other.terms)

    __radd__ = __add__

    def __mul__(self, coefficient: Coefficient) -> Objective:
        return Objective(tuple((_product(coefficient, own), term) for own, term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return -1.0 * self

    def __sub__(self, other: Objective) -> Objective:
        return self + -other

    def __truediv__(self, number: float) -> Objective:
        return self * (1.0 / number)

    def on(self, stream: str) -> Objective:
        """The same terms, computed on the sub-batch of that name."""
        return Objective(tuple((c, dataclasses.replace(term, stream=stream)) for c, term in self.terms))

    def named(self, name: str) -> Objective:
        """The same single term under another name in the metrics."""
        if len(self.terms) != 1:
            raise UserError(f"named({name!r}) takes a single term, not a sum of {len(self.terms)}; name each term.")
        ((coefficient, term),) = self.terms
        return Objective(((coefficient, dataclasses.replace(term, name=name)),))

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("an objective needs at least one term; start from lm.objectives.cross_entropy(), say.")

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of every role some term takes, besides the policy."""
        return tuple(sorted({role for _, term in self.terms for role in term.roles}))

    @property
    def labels(self) -> tuple[str, ...]:
        """What each term is called in the metrics: its name after its stream's, numbered where that repeats."""
        labels: list[str] = []
        for _, term in self.terms:
            label = term.name if term.stream is None else f"{term.stream}/{term.name}"
            repeats = sum(known == label or known.startswith(f"{label}#") for known in labels)
            labels.append(label if not repeats else f"{label}#{repeats + 1}")
        return tuple(labels)

    def streams(self, batches: dict[str, Any]) -> tuple[str, ...]:
        """The stream each term is computed on.

        Raises:
          UserError: a term names a stream the batches lack, or names none and several could be meant.
        """
        named = {term.stream for _, term in self.terms if term.stream is not None}
        if missing := named - set(batches):
            raise UserError(f"no batch is called {sorted(missing)[0]!r}; there are {', '.join(sorted(batches))}.")
        free = sorted(set(batches) - named) or sorted(batches)
        if len(free) > 1 and any(term.stream is None for _, term in self.terms):
            raise UserError(f"terms without a stream could be meant for {' or '.join(free)}; say which with .on(name).")
        return tuple(free[0] if term.stream is None else term.stream for _, term in self.terms)


def _product(a: Coefficient, b: Coefficient) -> Coefficient:
    if callable(a) or callable(b):
        return lambda step: coefficient_at(a, step) * coefficient_at(b, step)
    return float(a * b)


def coefficient_at(coefficient: Coefficient, step: jax.Array) -> Any:
    """The value of a coefficient at a step."""
    return coefficient(step) if callable(coefficient) else coefficient


def term(
    function: Callable[..., Any] | None = None,
    *,
    roles: tuple[str, ...] = (),
    reducer: Reducer = token_mean,
    couples_rows: bool = False,
) -> Any:
    """Makes an ordinary function a term: the decorated name builds an objective.

    The function takes `(outputs, batch, *outputs of each role, **options)` and returns `(values, mask)`, and a dict of
    metrics if it likes. Its options become those of the objective, besides `reducer`.

    >>> import jax.numpy as jnp
    >>> @term
    ... def focal(outputs, batch, gamma=2.0):
    ...     return -((1 - jnp.exp(outputs.logprobs)) ** gamma) * outputs.logprobs, batch.mask
    >>> focal(gamma=1.0).terms[0][1].name
    'focal'
    """
    if function is None:
        return functools.partial(term, roles=roles, reducer=reducer, couples_rows=couples_rows)
    default = reducer

    @functools.wraps(function)
    def build(*, reducer: Reducer = default, **options: Any) -> Objective:
        bound = functools.partial(function, **options) if options else function
        return Objective(((1.0, Term(function.__name__, bound, reducer, roles, None, couples_rows)),))

    return build


@dataclasses.dataclass(frozen=True)
class Role:
    """A model beside the policy: its variables, or how to get them from the policy's.

    Attributes:
      variables: a nested dict of arrays, or a function from the policy's current variables to such a dict. A function
        that only selects arrays shares them: no second copy exists.
      policy: the model they belong to; None: the same as the policy's.
      trained: the objective's gradient goes through it: it is part of what is trained, as a critic of its own is.
    """

    variables: Any
    policy: Any = None
    trained: bool = False
