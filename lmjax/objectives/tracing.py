"""What a term reads, found by tracing it once on outputs that hold nothing.

Terms are ordinary Python; before a forward pass is built, each is traced with `Probe`s in place of outputs. The trace
says which statistics of which role are read (so one pass over the vocabulary serves every term), whether the term
treats tokens independently (so its gradient can be taken slice by slice), and whether its mask depends on the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.losses.vocabulary import STATISTICS
from lmjax.objectives.algebra import Term
from lmjax.policy import Request

Metrics = dict[str, tuple[jax.Array, jax.Array]]

# Operations that treat every element alike. Anything else makes a term take the general path.
ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p
    logistic lt max min mul ne neg nextafter not or pow real rem round rsqrt select_n sign sin sinh sqrt square
    stop_gradient sub tan tanh xor""".split()
)
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "custom_jvp_call"})


class View:
    """Outputs whose statistics are given arrays: what a term sees while it is traced, and slice by slice.

    Attributes:
      role: whose outputs these stand for.
      batch: the batch.
    """

    def __init__(self, role: str, batch: Batch, statistics: dict[str, jax.Array], probe: Probe | None = None):
        self.role = role
        self.batch = batch
        self._statistics = statistics
        self._probe = probe

    def __getattr__(self, name: str) -> Any:
        if name in STATISTICS:
            if self._probe is not None:
                self._probe.statistics.setdefault(self.role, set()).add(name)
            return self._statistics[name]
        if self._probe is None or name.startswith("_"):
            raise AttributeError(name)
        self._probe.other_fields.add((self.role, name))
        # Adding a traced zero makes whatever follows depend on the outputs, as it would with real ones.
        zero = self._statistics["logprobs"].reshape(-1)[0] * 0
        shapes = self._probe.shapes(self.role, name)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype) + zero.astype(s.dtype), shapes)

    def map_logits(self, function: Callable[..., jax.Array], *others: View) -> jax.Array:
        if self._probe is None:
            raise AttributeError("map_logits")
        self._probe.maps.setdefault(self.role, []).append((function, tuple(other.role for other in others)))
        for other in others:
            self._probe.statistics.setdefault(other.role, set())
        return self._statistics["logprobs"] * 1.0


@dataclasses.dataclass
class Probe:
    """Notes what one term reads.

    Attributes:
      shapes: (role, field) -> shapes of a field that is not a statistic.
      statistics: role -> names read.
      maps: role -> functions of rows of logits, with the roles they take.
      other_fields: (role, field) pairs read besides.
    """

    shapes: Callable[[str, str], Any]
    statistics: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    maps: dict[str, list[tuple[Callable[..., jax.Array], tuple[str, ...]]]] = dataclasses.field(default_factory=dict)
    other_fields: set[tuple[str, str]] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What is known of a term after tracing it.

    Attributes:
      probe: what it reads.
      tokenwise: values are [B, T] and each depends on its own token only.
      mask_depends_on_outputs: its weight is not known before the forward pass.
    """

    probe: Probe
    tokenwise: bool
    mask_depends_on_outputs: bool


def call(term: Term, views: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array, Metrics]:
    """Values, mask and metrics of a term.

    Raises:
      UserError: it returns something else, or values and mask of different shapes.
    """
    result = term.function(views["policy"], batch, *(views[role] for role in term.roles))
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise UserError(f"term {term.name!r} must return (values, mask) or (values, mask, metrics), each unreduced.")
    values, mask, metrics = result if len(result) == 3 else (*result, {})
    for name, (value, its_mask) in {"its values": (values, mask), **metrics}.items():
        if jnp.shape(value) != jnp.shape(its_mask):
            raise UserError(
                f"term {term.name!r}: {name} have shape {jnp.shape(value)} and their mask {jnp.shape(its_mask)}; "
                "give one weight for each value."
            )
    return values, mask, metrics


def trace(term: Term, batch: Batch, shapes: Callable[[str, str], Any]) -> Trace:
    """Traces a term on empty outputs. `batch` may hold arrays or tracers; only shapes are used."""
    probe = Probe(shapes)
    roles = ("policy", *term.roles)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), batch)
    B, T = batch.tokens.shape
    token = jax.ShapeDtypeStruct((B, T), jnp.float32)
    statistics = {role: {name: token for name in STATISTICS} for role in roles}

    def run(statistics: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        views = {role: View(role, batch, statistics[role], probe) for role in roles}
        values, mask, _ = call(term, views, batch)
        return jnp.asarray(values), jnp.asarray(mask)

    closed = jax.make_jaxpr(run)(statistics, abstract)
    value_shape = closed.jaxpr.outvars[0].aval.shape
    plain = not probe.maps and not probe.other_fields
    tokenwise = (
        plain
        and value_shape == (B, T)
        and all(jnp.ndim(const) == 0 for const in closed.consts)
        and all(
            leaf.ndim == 0 or leaf.shape == (B,) or leaf.shape[:2] == (B, T) for leaf in jax.tree.leaves(abstract)
        )
        and _is_tokenwise(_without_mask(closed.jaxpr), (B, T))
    )
    inputs = len(jax.tree.leaves(statistics))
    return Trace(probe, tokenwise, _depends(closed.jaxpr, closed.jaxpr.invars[:inputs], closed.jaxpr.outvars[1]))


def request(traces: list[Trace], role: str) -> Request:
    """Everything some terms read of one role."""
    statistics: set[str] = set()
    maps: list[Any] = []
    for found in traces:
        statistics |= found.probe.statistics.get(role, set())
        maps += found.probe.maps.get(role, [])
    return Request(frozenset(statistics), tuple(maps))


def _without_mask(jaxpr: jex.Jaxpr) -> list[Any]:
    """The equations that the values (the first output) depend on."""
    needed = {jaxpr.outvars[0]} if not isinstance(jaxpr.outvars[0], jex.Literal) else set()
    kept = []
    for equation in reversed(jaxpr.eqns):
        if any(out in needed for out in equation.outvars):
            kept.append(equation)
            needed |= {v for v in equation.invars if not isinstance(v, jex.Literal)}
    return kept[::-1]


def _is_tokenwise(equations: list[Any], shape_BT: tuple[int, int]) -> bool:
    """Whether running these on a slice of time gives that slice of the result."""
    for equation in equations:
        name = equation.primitive.name
        if name in ELEMENTWISE:
            continue
        if name == "broadcast_in_dim" and _keeps_time(equation, shape_BT):
            continue
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if name in CALLS and inner is not None:
            if _is_tokenwise(list(getattr(inner, "jaxpr", inner).eqns), shape_BT):
                continue
        return False
    return True


def _keeps_time(equation: Any, shape_BT: tuple[int, int]) -> bool:
    """A broadcast of a scalar, or of one value a row along time."""
    operand = equation.invars[0].aval.shape
    dimensions = equation.params["broadcast_dimensions"]
    if operand == ():
        return True
    time_from = [size for size, dimension in zip(operand, dimensions, strict=True) if dimension == 1]
    rows_from = [size for size, dimension in zip(operand, dimensions, strict=True) if dimension == 0]
    return rows_from == [shape_BT[0]] and time_from in ([], [1])


def _depends(jaxpr: jex.Jaxpr, sources: list[Any], target: Any) -> bool:
    tainted = set(sources)
    for equation in jaxpr.eqns:
        if any(v in tainted for v in equation.invars if not isinstance(v, jex.Literal)):
            tainted.update(equation.outvars)
    return not isinstance(target, jex.Literal) and target in tainted
