"""What every logits processor is made of: the history it reads, its parameters, and the pytree it is."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError

CUSTOM = 17  # the place of a person's own functions
FOREVER = np.iinfo(np.int32).max  # the end of a ban without one
TEMPERATURE = 18  # the place where logits are divided by the temperature; what stands behind it serves sampling only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What each row has said so far.

    Attributes:
      tokens: int32 [B, S], row b's prompt and then its new tokens, from column 0 and without padding between them;
        columns from `length[b]` on hold anything.
      length: int32 [B], tokens of the prompt and new ones.
      prompt_length: int32 [B].
    """

    tokens: Any
    length: Any
    prompt_length: Any

    @property
    def generated(self) -> Any:
        """int32 [B], how many new tokens there are."""
        return self.length - self.prompt_length


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is known of a processor's parameter before its value: see `parameter`."""

    neutral: Any
    ndim: int
    dtype: Any
    ids: bool
    valid: Callable[[np.ndarray], Any] | None
    mend: str


def parameter(
    neutral: Any,
    mend: str,
    valid: Callable[[np.ndarray], Any] | None = None,
    *,
    ndim: int = 0,
    dtype: Any = np.float32,
    ids: bool = False,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A field of a processor that is a leaf of its pytree. Fields made otherwise are static.

    Args:
      neutral: the value that leaves a row as it is.
      mend: ends the sentence about a bad value: "give a number above 0".
      valid: maps values to booleans.
      ndim: axes of one row's value; one more, in front, is an axis of rows.
      dtype: what values are converted to.
      ids: whether values are token ids, of which -1 stands for none.
      default: the value where none is given.
    """
    spec = Parameter(neutral, ndim, np.int32 if ids else dtype, ids, (lambda x: x >= -1) if ids else valid, mend)
    return dataclasses.field(default=default, metadata={"parameter": spec})


class Ban(NamedTuple):
    """Ids that are ruled out at some places of the output, whatever was said before.

    Attributes:
      ids: int32 [..., N]; -1 stands for none.
      first, end: int32 [...], the places among the new tokens, from first up to, not including, end.
    """

    ids: np.ndarray
    first: np.ndarray
    end: np.ndarray


class Processor(abc.ABC):
    """A map of logits. Subclasses are frozen dataclasses with an `order`, a `name` and a `process`.

    >>> @dataclasses.dataclass(frozen=True, eq=False)
    ... class Shift(Processor):
    ...     order, name = CUSTOM, "shift"
    ...     by: Any = parameter(0.0, "give a number")
    ...     def process(self, z_BV, history):
    ...         return z_BV + self.by[:, None]
    >>> history = History(jnp.zeros((2, 1), int), jnp.ones(2, int), jnp.ones(2, int))
    >>> Shift([1.0, 2.0])(jnp.zeros((2, 3)), history).tolist()
    [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """

    order: ClassVar[float]
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        # Not `register_dataclass`: it would run `__post_init__`, and its checks, on whatever a tree.map puts in.
        jax.tree_util.register_pytree_with_keys(cls, _with_keys, functools.partial(_unflatten, cls), _flatten)

    def __post_init__(self) -> None:
        for i, (field, spec) in enumerate(parameters(type(self))):
            label = self.name if i == 0 else f"{self.name}'s {field}"
            object.__setattr__(self, field, _converted(getattr(self, field), spec, label))

    def __call__(self, z_BV: jax.Array, history: History) -> jax.Array:
        """The logits float32 [B, V] after this processor; -inf rules a token out."""
        return self.per_row(z_BV.shape[0]).process(z_BV, history)

    @abc.abstractmethod
    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        """The rule, with every parameter's leading axis B in place."""

    def per_row(self, batch_size: int) -> Any:
        """The same with one value a row of every parameter."""
        changes = {}
        for field, spec in parameters(type(self)):
            value = jnp.asarray(getattr(self, field))
            if value.ndim == spec.ndim:
                value = jnp.broadcast_to(value, (batch_size, *value.shape))
            elif value.shape[0] != batch_size:
                raise UserError(
                    f"{self.name} has {value.shape[0]} values of {field} for {batch_size} rows; "
                    "give one value, or one for each row."
                )
            changes[field] = value
        return replaced(self, **changes)

    @property
    def kind(self) -> Any:
        """A chain has at most one processor of a kind."""
        return type(self)

    def resolved(self, vocab_size: int, max_new_tokens: Any) -> Processor:
        """The same, with all that waits for these numbers filled in; raises where they do not fit."""
        return self

    def banned(self) -> Ban | None:
        """What is never drawn whatever was said before, so far as it is known."""
        return None

    def conflict(self, other: Processor) -> str | None:
        """A sentence if the two cannot both be met."""
        return None


def parameters(kind: type) -> Iterator[tuple[str, Parameter]]:
    """The names of a kind's leaves, in order, and what is known of each."""
    for field in dataclasses.fields(kind):
        if "parameter" in field.metadata:
            yield field.name, field.metadata["parameter"]


def concrete(value: Any) -> np.ndarray | None:
    """The value on the host, or None while it is traced."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def static_fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if "parameter" not in field.metadata]


def _flatten(processor: Any) -> tuple[list[Any], tuple[Any, ...]]:
    kind = type(processor)
    leaves = [getattr(processor, field) for field, _ in parameters(kind)]
    return leaves, tuple(getattr(processor, field) for field in static_fields(kind))


def _with_keys(processor: Any) -> tuple[list[Any], tuple[Any, ...]]:
    leaves, static = _flatten(processor)
    keys = (jax.tree_util.GetAttrKey(field) for field, _ in parameters(type(processor)))
    return list(zip(keys, leaves)), static


def _unflatten(kind: type, static: Iterable[Any], leaves: Iterable[Any]) -> Any:
    new: Any = object.__new__(kind)
    for field, value in zip((*static_fields(kind), *(field for field, _ in parameters(kind))), (*static, *leaves)):
        object.__setattr__(new, field, value)
    return new


def replaced(processor: Any, **changes: Any) -> Any:
    """`dataclasses.replace`, without the checks."""
    kind = type(processor)
    value = lambda field: changes.get(field, getattr(processor, field))
    return _unflatten(kind, map(value, static_fields(kind)), (value(field) for field, _ in parameters(kind)))


def _converted(value: Any, spec: Parameter, label: str) -> Any:
    """The value as an array of the parameter's type: NumPy's, so that making a processor moves nothing to a device."""
    if isinstance(value, jax.Array):
        value = jnp.asarray(value, spec.dtype)
    elif value is None:
        raise UserError(f"{label} is missing; {spec.mend}.")
    else:
        try:
            given = np.asarray(value)
        except ValueError as error:  # rows of different lengths
            raise UserError(f"{label} is {value!r}; {spec.mend}.") from error
        if given.size > 0 and given.dtype.kind not in ("biu" if np.dtype(spec.dtype).kind == "i" else "biuf"):
            raise UserError(f"{label} is {value!r}; {spec.mend}.")
        value = given.astype(spec.dtype)
    if spec.ids and value.ndim == 0 and spec.ndim == 1:
        value = value[None]
    if value.ndim not in (spec.ndim, spec.ndim + 1) or value.size == 0:
        raise UserError(f"{label} has shape {value.shape}; {spec.mend}, or as much for each row.")
    known = concrete(value)
    if known is not None and spec.valid is not None and not np.all(spec.valid(known)):
        raise UserError(f"{label} is {known[~np.asarray(spec.valid(known))].flat[0]}; {spec.mend}.")
    return value


def put(z_BV: jax.Array, ids_BN: jax.Array, chosen_BN: jax.Array, value: Any) -> jax.Array:
    """Logits with `value` (a number, or [B, N]) at each row's chosen ids; any outside the vocabulary is passed over."""
    B, V = z_BV.shape
    at_BN = jnp.where(chosen_BN & (ids_BN >= 0), ids_BN, V)
    return z_BV.at[jnp.arange(B)[:, None], at_BN].set(value, mode="drop")


@dataclasses.dataclass(frozen=True, eq=False)
class Custom(Processor):
    """Your own function, at place 17: after the penalties and bans, before temperature and truncation.

    Args:
      function: maps logits [B, V] and a History to logits [B, V], traced once. Define it once: another function, even
        a lambda of the same text, compiles anew.
      active: bool, or bool [B]: the rows it is for.
    """

    order, name = CUSTOM, "custom"
    function: Callable[[jax.Array, History], jax.Array]
    active: Any = parameter(False, "give True or False", ndim=0, dtype=bool, default=True)

    @property
    def kind(self) -> Any:
        return self.function

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return jnp.where(self.active[:, None], self.function(z_BV, history), z_BV)


custom = Custom
