"""Rotary positions in `config.json`: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmjax.errors import UserError
from lmjax.modules.config import DecoderConfig, RopeScaling

if TYPE_CHECKING:
    from lmjax.interop.huggingface_config import Fields

# Kind -> (name there, name here, required there).
_ORIGINAL = ("original_max_position_embeddings", "original_length", False)
_FACTOR = ("factor", "factor", True)
SCALINGS: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "linear": (_FACTOR,),
    "llama3": (
        _FACTOR,
        ("low_freq_factor", "low_frequency_factor", True),
        ("high_freq_factor", "high_frequency_factor", True),
        _ORIGINAL,
    ),
    "yarn": (
        ("factor", "factor", False),
        _ORIGINAL,
        ("beta_fast", "beta_fast", False),
        ("beta_slow", "beta_slow", False),
        ("attention_factor", "attention_factor", False),
        ("mscale", "mscale", False),
        ("mscale_all_dim", "mscale_all_dim", False),
        ("truncate", "truncate", False),
    ),
}


def scaling_from_parameters(
    parameters: Mapping[str, Any], theta: float, max_length: int, original_length: int | None = None
) -> tuple[float, RopeScaling | None]:
    """Base and scaling from one dict of RoPE parameters.

    Args:
      parameters: `{"rope_type": ..., "rope_theta": ..., "factor": ...}`; older files say `type`.
      theta: the base where the dict has none.
      max_length: the original length where neither the dict nor `original_length` gives one.

    Raises:
      UserError: a kind or a parameter that lmjax has not, or one that is missing.
    """
    left = {name: value for name, value in parameters.items() if value is not None}
    legacy = left.pop("type", "default")
    kind = left.pop("rope_type", legacy)
    theta = float(left.pop("rope_theta", theta))
    if left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor: rotating a part of each head is not supported.")
    if kind == "default":
        table: tuple[tuple[str, str, bool], ...] = ()
    elif kind in SCALINGS:
        table = SCALINGS[kind]
    else:
        raise UserError(
            f"config.json: RoPE type {kind!r} is not supported; lmjax has default, {', '.join(SCALINGS)}."
        )
    if original_length is not None:
        left["original_max_position_embeddings"] = original_length
    found: dict[str, Any] = {}
    for theirs, ours, required in table:
        if theirs in left:
            found[ours] = left.pop(theirs)
        elif required:
            raise UserError(f"config.json: RoPE type {kind!r} needs {theirs}, which is missing.")
    left.pop("original_max_position_embeddings", None)  # kinds that do not use it
    if left:
        raise UserError(f"config.json: RoPE type {kind!r} has no parameter {min(left)!r}; remove it.")
    if kind == "default":
        return theta, None
    if kind != "linear":
        found.setdefault("original_length", max_length)
        found["original_length"] = int(found["original_length"])
    if kind == "yarn":
        found.setdefault("factor", max_length / found["original_length"])
        found = {
            k: v for k, v in found.items() if v or k not in ("beta_fast", "beta_slow")
        }  # 0 stands for the default
    found = {k: v if k in ("original_length", "truncate") else float(v) for k, v in found.items()}
    return theta, RopeScaling(kind, **found)


def read_rope(fields: Fields) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a family whose layers all rotate alike."""
    fields.refuse("partial_rotary_factor", 1.0, "rotating a part of each head is not supported")
    # A file with both has the older one filled in by hand; transformers lets it win.
    parameters = fields.get("rope_parameters") or {}
    parameters = fields.get("rope_scaling") or parameters
    original = fields.get("original_max_position_embeddings")
    theta, scaling = scaling_from_parameters(
        parameters, fields.number("rope_theta", 1e4), fields.integer("max_position_embeddings"), original
    )
    return dict(rope_theta=theta, rope_scaling=scaling)


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """`rope_parameters`, with every parameter of the kind that has a value."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        parameters["rope_type"] = scaling.kind
        values = {theirs: getattr(scaling, ours) for theirs, ours, _ in SCALINGS[scaling.kind]}
        parameters |= {name: value for name, value in values.items() if value is not None}
    return {"rope_parameters": parameters}


def canonical_scaling(scaling: RopeScaling | None) -> RopeScaling | None:
    """The same scaling with every parameter that its kind does not use at its default."""
    if scaling is None:
        return None
    used = [ours for _, ours, _ in SCALINGS[scaling.kind]]
    return RopeScaling(scaling.kind, **{name: getattr(scaling, name) for name in used})
