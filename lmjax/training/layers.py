"""Which axes of a parameter are its own, and which number the layers.

Layers are stored one by one (`params/layer_3/mlp/up/kernel`, [in, out]) or stacked for a scan
(`params/layers/mlp/up/kernel`, [L, in, out]). Optimizers must do the same to both, so every rule about
"matrices" goes through these functions rather than through `ndim`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

STACK = "layers"  # the key under which leaves carry a leading layer axis
TABLE = "embedding"  # the last key of embedding tables, learned positions and heads


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A key path of `jax.tree_util` as strings.

    >>> tree = {"params": {"layers": {"kernel": 0.0}}}
    >>> [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    [('params', 'layers', 'kernel')]
    """
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def is_stacked(path: tuple[Any, ...]) -> bool:
    """True if the leaf at `path` has a leading layer axis."""
    return STACK in names(path)


def own_ndim(path: tuple[Any, ...], leaf: Any) -> int:
    """The number of axes besides the layer axis: 1 for a stacked bias [L, D], 2 for a kernel [L, in, out]."""
    return leaf.ndim - is_stacked(path)


def is_table(path: tuple[Any, ...]) -> bool:
    """True for embedding tables, learned positions and untied heads."""
    return names(path)[-1] == TABLE


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """True for the matrices inside the network: at least two axes of their own, and not a table."""
    return own_ndim(path, leaf) >= 2 and not is_table(path)


def decay_mask(decay_embeddings: bool = False) -> Callable[[Any], Any]:
    """The mask for weight decay: True for matrices, for tables if asked, not for biases and norm scales."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        return own_ndim(path, leaf) >= 2 and (decay_embeddings or not is_table(path))

    return lambda params: jax.tree_util.tree_map_with_path(decays, params)
