"""What a term reads, found by tracing it once on outputs that hold nothing.

Terms are ordinary Python; before a forward pass is built, each is traced with `Probe`s in place of outputs. The trace
says which statistics of which role are read (so one pass over the vocabulary serves every term), what it does to each
token if it treats tokens independently (so its gradient can be taken slice by slice), and whether its mask depends on
the outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.losses.logits import STATISTICS
from lmjax.models.config import DecoderConfig, ModelConfig
from lmjax.objectives.algebra import Term
from lmjax.policy import Outputs, Request

Metrics = dict[str, tuple[jax.Array, jax.Array]]

# Operations that treat every element alike. Anything else makes a term take the general path.
ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
    imag integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul ne neg nextafter not
    one_minus_square or polygamma polynomial pow real rem round rsqrt select_n sign sin sinh sqrt square
    stop_gradient sub tan tanh xor""".split()
)
# In a derivative, a custom rule is only left where nothing is differentiated; elsewhere stands what it says.
CALLS = frozenset(
    ["jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"]
)
LAYOUT = frozenset({"shape", "sharding", "out_sharding"})  # parameters that follow from the operands

Program = tuple[Any, ...]


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
        return self._empty(self._probe.shapes(self.role, name))

    def _empty(self, shapes: Any) -> Any:
        """Zeros of some shapes. They are made so that whatever follows depends on the outputs, as it would."""
        zero = self._statistics["logprobs"].reshape(-1)[0] * 0
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype) + zero.astype(s.dtype), shapes)

    def _whole(self, field: str) -> tuple[Probe, Outputs]:
        """The probe, and the outputs that are stood for, where what is read of them is more than a slice holds."""
        if self._probe is None or self.role not in self._probe.outputs:
            raise AttributeError(field)
        return self._probe, self._probe.outputs[self.role]

    @property
    def config(self) -> ModelConfig:
        return self._whole("config")[1].config

    def check_layer(self, number: int, attention: bool = False) -> None:
        self._whole("check_layer")[1].check_layer(number, attention)

    def layer(self, number: int) -> jax.Array:
        probe, outputs = self._whole("layer")
        outputs.check_layer(number)
        probe.layers.add((self.role, "layers", number))
        return self._empty(probe.shapes(self.role, "hidden"))

    def attention(self, number: int) -> jax.Array:
        probe, outputs = self._whole("attention")
        outputs.check_layer(number, attention=True)
        probe.layers.add((self.role, "attentions", number))
        config, (B, T) = outputs.config, self.batch.tokens.shape
        assert isinstance(config, DecoderConfig)  # as was checked
        return self._empty(jax.ShapeDtypeStruct((B, config.num_heads, T, T), jnp.float32))

    def collection(self, name: str) -> Any:
        probe, outputs = self._whole("collection")
        probe.other_fields.add((self.role, name))
        return self._empty(outputs.collection(name))

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
      outputs: role -> the outputs that are stood for, of which nothing is computed.
      layers: (role, "layers" or "attentions", number) of the single layers read.
    """

    shapes: Callable[[str, str], Any]
    statistics: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    maps: dict[str, list[tuple[Callable[..., jax.Array], tuple[str, ...]]]] = dataclasses.field(default_factory=dict)
    other_fields: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    outputs: Mapping[str, Outputs] = dataclasses.field(default_factory=dict)
    layers: set[tuple[str, str, int]] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What is known of a term after tracing it.

    Attributes:
      probe: what it reads.
      program: what it does to each token, or None; see `token_program`.
      mask_depends_on_outputs: its weight is not known before the forward pass.
      scalar: it has one value for the whole batch.
    """

    probe: Probe
    program: Program | None
    mask_depends_on_outputs: bool
    scalar: bool

    @property
    def tokenwise(self) -> bool:
        """Values are [B, T], each depends on its own token only, and the weights are known beforehand."""
        return self.program is not None and not self.mask_depends_on_outputs


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


def trace(
    term: Term, batch: Batch, shapes: Callable[[str, str], Any], outputs: Mapping[str, Outputs] | None = None
) -> Trace:
    """Traces a term on empty outputs. `batch` may hold arrays or tracers; only shapes are used."""
    probe = Probe(shapes, outputs=outputs or {})
    statistics = _empty(term, batch.tokens.shape)

    def run(statistics: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        views = {role: View(role, batch, own, probe) for role, own in statistics.items()}
        values, mask, _ = call(term, views, batch)
        return jnp.asarray(values), jnp.asarray(mask)

    closed = jax.make_jaxpr(run)(statistics, _abstract(batch))
    inputs = len(jax.tree.leaves(statistics))
    plain = not (probe.maps or probe.other_fields or probe.layers)
    return Trace(
        probe,
        token_program(term, batch) if plain else None,
        _depends(closed.jaxpr, closed.jaxpr.invars[:inputs], closed.jaxpr.outvars[1]),
        closed.jaxpr.outvars[0].aval.shape == (),
    )


def token_program(term: Term, batch: Batch, length: int | None = None) -> Program | None:
    """What a term does to each token of a slice of `length` (None: all of time), as comparable data.

    It covers values and derivatives, since a custom derivative may mix tokens where its function does not. A
    term can be taken slice by slice if its program on a slice equals that on the whole: what was computed in
    Python from the length of time, or written down for one length, shows as a difference.

    Returns:
      None if the term mixes tokens, or holds arrays of its own that would have to be cut along.
    """
    B, T = batch.tokens.shape
    t = T if length is None else length
    abstract = _abstract(batch)
    if any(leaf.shape not in ((), (B,)) and leaf.shape[:2] != (B, T) for leaf in jax.tree.leaves(abstract)):
        return None
    piece = jax.tree.map(
        lambda leaf: leaf.update(shape=(B, t, *leaf.shape[2:])) if leaf.shape[:2] == (B, T) else leaf,
        abstract,
    )

    def run(statistics: Any, batch: Batch, cotangent: jax.Array) -> Any:
        def values(own: Any) -> jax.Array:
            views = {role: View(role, batch, its) for role, its in (statistics | {"policy": own}).items()}
            return jnp.asarray(call(term, views, batch)[0])

        result, pull = jax.vjp(values, statistics["policy"])
        return result, pull(cotangent.astype(result.dtype))

    try:
        cotangent = jax.ShapeDtypeStruct((B, t), jnp.float32)
        closed = jax.make_jaxpr(run)(_empty(term, (B, t)), piece, cotangent)
    except Exception:  # not made for slices; if it is wrong altogether, the general path says so
        return None
    if closed.jaxpr.outvars[0].aval.shape != (B, t):
        return None
    return _program(closed, (B, t))


def _empty(term: Term, shape_BT: tuple[int, int]) -> dict[str, Any]:
    token = jax.ShapeDtypeStruct(shape_BT, jnp.float32)
    return {role: dict.fromkeys(STATISTICS, token) for role in ("policy", *term.roles)}


def _abstract(batch: Batch) -> Any:
    batch = dataclasses.replace(batch, scored=None)  # of no concern to a term
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), batch)


def request(traces: list[Trace], role: str) -> Request:
    """Everything some terms read of one role."""
    statistics: set[str] = set()
    maps: list[Any] = []
    for found in traces:
        statistics |= found.probe.statistics.get(role, set())
        maps += found.probe.maps.get(role, [])
    logits = any((role, "logits") in found.probe.other_fields for found in traces)
    single = {
        kind: frozenset(n for found in traces for whose, what, n in found.probe.layers if (whose, what) == (role, kind))
        for kind in ("layers", "attentions")
    }
    return Request(frozenset(statistics), tuple(maps), logits, **single)


def _program(closed: Any, shape_BT: tuple[int, int]) -> Program | None:
    """The operations the outputs depend on, less the length of time; None if one of them mixes tokens."""
    jaxpr = closed.jaxpr
    named: dict[Any, Any] = {}

    def operand(v: Any) -> Any:
        return _constant(v.val) if isinstance(v, jex.Literal) else named[v]

    for number, v in enumerate(jaxpr.invars):
        named[v] = ("input", number)
    for v, value in zip(jaxpr.constvars, closed.consts, strict=True):
        named[v] = _constant(value)
    program = []
    for equation in _needed(jaxpr):
        name, parameters = equation.primitive.name, equation.params
        inner = parameters.get("jaxpr") or parameters.get("call_jaxpr")
        if name in CALLS and inner is not None:
            inner = inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ())
            detail = _program(inner, shape_BT)
        elif _is_elementwise(equation) or (name == "broadcast_in_dim" and _keeps_time(equation, shape_BT)):
            detail = tuple((k, repr(v)) for k, v in sorted(parameters.items()) if k not in LAYOUT)
        else:
            return None
        operands = [operand(v) for v in equation.invars]
        if detail is None or None in operands:
            return None
        program.append((name, detail, operands))
        for number, out in enumerate(equation.outvars):
            named[out] = ("result", len(program), number)
    results = [operand(v) for v in jaxpr.outvars]
    return None if None in results else (tuple(map(repr, program)), repr(results))


def _needed(jaxpr: jex.Jaxpr) -> list[Any]:
    """The equations that the outputs depend on."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if any(out in needed for out in equation.outvars):
            kept.append(equation)
            needed |= {v for v in equation.invars if not isinstance(v, jex.Literal)}
    return kept[::-1]


def _constant(value: Any) -> Any:
    """A scalar as data: its value, or which tracer it is; None for an array."""
    if jnp.ndim(value) != 0:
        return None
    if isinstance(value, jax.core.Tracer):
        return ("tracer", id(value))
    return ("scalar", str(jnp.result_type(value)), np.asarray(value).item())


def _is_elementwise(equation: Any) -> bool:
    """Shapes count too: a bitcast to a narrower type adds an axis."""
    shapes = [v.aval.shape for v in equation.invars]
    return equation.primitive.name in ELEMENTWISE and equation.outvars[0].aval.shape in shapes


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
