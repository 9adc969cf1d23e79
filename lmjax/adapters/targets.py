"""Which layers an adapter sits on, and walks over them. Layers that are stacked are taken apart and put back."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.models.layout import STACKED, stack_adapter, unstack_layers
from lmjax.models.patterns import Patterns, matches
from lmjax.modules.quantized import KINDS

Variables = dict[str, Any]
WEIGHTS = ("params", *KINDS)  # where the weight of a linear layer may be


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and leaves of nested dicts."""
    if isinstance(tree, dict):
        for name, sub in tree.items():
            yield from leaves(sub, (*path, name))
    else:
        yield path, tree


def nested(flat: Mapping[tuple[str, ...], Any]) -> Variables:
    """The inverse of `leaves`.

    >>> nested({("a", "b"): 1, ("a", "c"): 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: Variables = {}
    for path, leaf in flat.items():
        functools.reduce(lambda node, name: node.setdefault(name, {}), path[:-1], tree)[path[-1]] = leaf
    return tree


def at(tree: Any, path: Sequence[str]) -> Any:
    """The node at a path, None where there is none."""
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return tree


def linear_layers(variables: Variables) -> dict[str, tuple[int, int]]:
    """The linear layers of unstacked variables, path -> (in, out), layer by layer."""
    found: dict[str, tuple[int, int]] = {}
    for kind in WEIGHTS:
        for path, leaf in leaves(variables.get(kind, {})):
            name = "/".join(path[:-1])
            if kind == "params" and path[-1] == "kernel":
                found[name] = (leaf.shape[0], leaf.shape[1])
            elif kind != "params" and path[-1] == "codes":
                out, packed = leaf.shape
                found[name] = (packed * (2 if kind == "nf4" else 1), out)
    number = lambda path: int(match[1]) if (match := re.match(r"layer_(\d+)/", path)) else -1
    return {path: found[path] for path in sorted(found, key=lambda path: (number(path), path))}


def select(variables: Variables, targets: Patterns) -> dict[str, tuple[int, int]]:
    """The linear layers that match.

    Raises:
      UserError: a pattern matches none of them.
    """
    known = linear_layers(variables)
    if not known:
        raise UserError("these variables have no linear layers to adapt.")
    for pattern in [targets] if isinstance(targets, str) else targets:
        if not any(matches(path, pattern) for path in known):
            names = sorted({re.sub(r"^layer_\d+/", "", path) for path in known})
            raise UserError(f"the target {pattern!r} matches no linear layer; there are {', '.join(names)}.")
    return {path: shape for path, shape in known.items() if matches(path, targets)}


def unstacked(function: Callable[..., Variables]) -> Callable[..., Variables]:
    """A function of variables (its last argument) that sees layers side by side, whichever way they are kept."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Variables:
        *before, variables = arguments
        if not any(STACKED in tree for tree in variables.values() if isinstance(tree, dict)):
            return function(*before, variables)
        apart = unstack_layers(variables)
        found = function(*before, apart)
        kept = {name: tree for name, tree in variables.items() if name in found and found[name] is apart[name]}
        count = next(jax.tree.leaves(tree[STACKED])[0].shape[0] for tree in variables.values() if STACKED in tree)
        return {name: stack_adapter(name, tree, count) for name, tree in found.items() if name not in kept} | kept

    return call


def refuse_second(variables: Variables, *kinds: str) -> None:
    """Raises a UserError if the variables have an adapter of one of these kinds."""
    for kind in kinds:
        if kind in variables:
            raise UserError(
                f"these variables have a {kind!r} adapter already; merge it, leave it out with "
                "lmjax.adapters.without, or add up two adapters with lmjax.adapters.weighted_sum."
            )


def column_norms(kernel: jax.Array) -> jax.Array:
    """Length of each column of [in, out], float32 [out]."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=0)
