"""Models of different depth: which layers stand beside each other, and a model made of some layers of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lmjax.errors import UserError
from lmjax.models import layout
from lmjax.modules.config import DecoderConfig


def uniform_layers(own: int, other: int) -> tuple[tuple[int, int], ...]:
    """Pairs (m, g(m)) that spread `own` layers evenly over `other`, `g(m) = round(m * other / own)`, from (0, 0) on.

    TinyBERT's map (arXiv:1909.10351). Layers count from 1; 0 stands for the embeddings.

    >>> uniform_layers(4, 12)
    ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))
    """
    return tuple((m, round(m * other / own)) for m in range(own + 1))


def spread_layers(count: int, depth: int) -> tuple[int, ...]:
    """The indices, from 0, of `count` of `depth` layers, evenly spread from the first to the last.

    6 of 12 are those that DistilBERT starts from.

    >>> spread_layers(6, 12)
    (0, 2, 4, 7, 9, 11)
    """
    if not 1 <= count <= depth:
        raise UserError(f"{count} layers cannot be taken out of {depth}; give a number from 1 to {depth}.")
    return tuple(round(i * (depth - 1) / max(count - 1, 1)) for i in range(count))


def take_layers(
    config: DecoderConfig, variables: dict[str, Any], indices: Sequence[int]
) -> tuple[DecoderConfig, dict[str, Any]]:
    """A shallower model of some layers of another, whose arrays are the other's.

    Its config says `layers` as the other's does; whether they are scanned may differ, as the depth does.

    Raises:
      UserError: there is no such layer, or the layers taken do not follow the model's pattern of windows.
    """
    if bad := [index for index in indices if not 0 <= index < config.num_layers]:
        raise UserError(f"there is no layer {bad[0]} to take; the model has 0 to {config.num_layers - 1}.")
    if [config.windowed(index) for index in indices] != [config.windowed(i) for i in range(len(indices))]:
        raise UserError(
            f"layers {', '.join(map(str, indices))} do not alternate between window and none as the model's own "
            "first ones do; take others."
        )
    shallow = dataclasses.replace(config, num_layers=len(indices))
    kept: dict[str, Any] = {}
    for collection, tree in layout.unstack_layers(variables).items():
        kept[collection] = {name: sub for name, sub in tree.items() if not name.startswith("layer_")}
        for new, old in enumerate(indices):
            if layout.layer_name(old) in tree:
                kept[collection][layout.layer_name(new)] = tree[layout.layer_name(old)]
    return shallow, layout.stack_layers(kept) if shallow.scanned else kept
