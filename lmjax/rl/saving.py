"""Rollouts and batches as text, for checkpoints: arrays in NumPy's own format, all else as JSON values."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.batch import Fork, RolloutBatch
from lmjax.errors import UserError
from lmjax.rl.rollouts import Rollout

_ARRAYS = ("prompt", "tokens", "logprobs", "sampling_logprobs", "own")
_APART = (*_ARRAYS, "likeliest")


def pack_batch(batch: RolloutBatch) -> dict[str, Any]:
    """A batch on the host as JSON values."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    fork, coefficients = fields.pop("fork"), fields.pop("coefficients")
    arrays = {name: value for name, value in fields.items() if value is not None}
    arrays |= {f"coefficients/{name}": value for name, value in coefficients.items()}
    return {"fork": None if fork is None else list(fork), "arrays": _packed(arrays)}


def unpack_batch(packed: dict[str, Any]) -> RolloutBatch:
    """The inverse of `pack_batch`."""
    arrays = _unpacked(packed["arrays"])
    names = [name for name in arrays if name.startswith("coefficients/")]
    coefficients = {name.partition("/")[2]: arrays.pop(name) for name in names}
    fork = None if packed["fork"] is None else Fork(*packed["fork"])
    return RolloutBatch(**arrays, fork=fork, coefficients=coefficients)


def pack_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rollouts as JSON values.

    Raises:
      UserError: a record holds something that JSON does not.
    """
    arrays = {f"{i}/{name}": getattr(rollout, name) for i, rollout in enumerate(rollouts) for name in _ARRAYS}
    others = {id(own): own for rollout in rollouts if (own := rollout.likeliest) is not None}  # each once
    place = {key: n for n, key in enumerate(others)}
    rest = [
        {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout) if f.name not in _APART}
        | {"likeliest": place.get(id(rollout.likeliest))}
        for rollout in rollouts
    ]
    try:
        text = json.dumps(rest)
    except TypeError as error:
        raise UserError(f"records of prompts must be JSON values, for checkpoints keep them ({error}).") from None
    found = {"arrays": _packed(arrays), "rest": text}
    return found | {"likeliest": pack_rollouts(list(others.values()))} if others else found


def unpack_rollouts(packed: dict[str, Any]) -> list[Rollout]:
    """The inverse of `pack_rollouts`."""
    arrays: dict[str, Any] = _unpacked(packed["arrays"])
    others = unpack_rollouts(packed["likeliest"]) if "likeliest" in packed else []
    found = []
    for i, rest in enumerate(json.loads(packed["rest"])):
        place = rest.pop("likeliest", None)
        own = {name: arrays[f"{i}/{name}"] for name in _ARRAYS}
        found.append(Rollout(**rest, **own, likeliest=None if place is None else others[place]))
    return found


def _packed(arrays: dict[str, Any]) -> str:
    file = io.BytesIO()
    named: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez_compressed(file, **named)
    return base64.b64encode(file.getvalue()).decode()


def _unpacked(text: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as found:
        return dict(found)
