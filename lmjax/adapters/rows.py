"""Several adapters loaded at once, and one of them chosen for each row of a batch, in one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.adapters import low_rank
from lmjax.adapters.algebra import check_shapes, layer_by_layer
from lmjax.adapters.folding import adapters_of
from lmjax.adapters.targets import Variables, leaves, nested
from lmjax.errors import UserError
from lmjax.models.adapted import chosen_rows
from lmjax.models.layout import STACKED, stack_adapter, unstack_layers
from lmjax.modules.adapted import CONSTANT

_REFUSED = {
    "dora": "it changes the whole weight, which the rows of a batch share; run it alone, or train LoRA instead",
    "bottleneck": "its width is that of the whole batch; run it alone, or train LoRA instead",
    "delta": "it changes the whole weight, which the rows of a batch share; run it alone, or train LoRA instead",
    "prefix_network": "it makes keys for every row; make it a plain prefix with lmjax.adapters.flatten",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """Adapters side by side. From `stack`; `choose` makes variables of it.

    Attributes:
      collections: "lora" holds the directions of all, with `owner`, int32 [R], whose each is. "ia3", "prefix" and
        "prompt" have an axis of the adapters before those of one, with what changes nothing as its last entry.
      count: N, how many there are; static.
    """

    collections: Variables
    count: int = dataclasses.field(metadata={"static": True})


def stack(adapters: Sequence[Variables]) -> Bank:
    """Puts adapters of one model side by side, of any ranks, lengths and layers, for `choose`.

    One may have several kinds, such as LoRA and a prefix, and need not have those of the others. LoRA's dropout is left
    out. A row pays for the ranks of all adapters together, and for the longest prefix.

    Args:
      adapters: at least one; variables, of which the model is not looked at, or collections: "lora", "ia3", "prefix",
        "prompt".

    Raises:
      UserError: kinds that change what the rows of a batch share, or adapters of different models.
    """
    if isinstance(adapters, dict) or not len(adapters):
        raise UserError("there is nothing to choose from; give a list of adapters.")
    trees = [adapters_of(tree) for tree in adapters]
    for number, tree in enumerate(trees):
        if not tree:
            raise UserError(f"number {number} has no adapter; leave it out, and choose -1 where a row is to have none.")
        for kind in tree:
            if kind in _REFUSED:
                raise UserError(f"adapter {number} is {kind!r}, which cannot be chosen by row: {_REFUSED[kind]}.")
        if chosen_rows(tree) is not None:
            raise UserError(f"adapter {number} was chosen row by row already; give the adapters themselves.")
    kinds = {kind for tree in trees for kind in tree}
    if {"prefix", "prompt"} <= kinds:
        raise UserError(
            "there are prefixes and prompts, and a row holds one kind; "
            "make the prompts plain prefixes with lmjax.adapters.flatten."
        )
    return Bank(layer_by_layer(_side_by_side, trees), len(trees))


def choose(variables: Variables, bank: Bank, index_B: Any) -> Variables:
    """The variables with an adapter for each row of a batch.

    A row gives what it would give alone with its adapter; where it has none, what the model gives, and its positions
    are not shifted. One compilation serves all choices where `index_B` is an argument of the compiled function.

    Args:
      variables: of the model, without adapters.
      bank: from `stack`.
      index_B: int [B], the number of each row's adapter; -1 for none, as is any other number that there is not where
        the choice is traced.

    Raises:
      UserError: the variables have adapters, or a number is not one of the bank's.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.llama(vocab_size=32, num_layers=1, embed_dim=16, num_heads=2))
    >>> base = policy.init(jax.random.key(0))
    >>> bank = stack([lm.adapters.lora(rank=rank).init(jax.random.key(rank), base) for rank in (1, 2)])
    >>> own = choose(base, bank, [1, -1])["lora"]["layer_0"]["mlp"]["up"]
    >>> own["a"].shape, own["constant"]["rows"].tolist()
    ((16, 3), [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    """
    if not isinstance(bank, Bank):
        raise UserError("choose takes what lmjax.adapters.stack returned; stack the adapters first.")
    if own := adapters_of(variables):
        raise UserError(
            f"these variables have a {next(iter(own))!r} adapter already; merge it, or stack it with the others."
        )
    if not isinstance(index_B, jax.core.Tracer):
        index_B = np.asarray(index_B)
        if index_B.size and (index_B.min() < -1 or index_B.max() >= bank.count):
            raise UserError(
                f"the adapters chosen are {index_B.tolist()}; give numbers from 0 to {bank.count - 1}, or -1 for none."
            )
    if index_B.ndim != 1 or not jnp.issubdtype(index_B.dtype, jnp.integer):
        raise UserError(f"the choice is {index_B.dtype} {list(index_B.shape)}; give one whole number a row.")
    index_B = jnp.where((index_B < 0) | (index_B >= bank.count), bank.count, index_B)
    flat: dict[tuple[str, ...], Any] = {}
    for path, leaf in leaves(_kept_as(variables, bank.collections)):
        if path[-1] == "owner":
            flat[*path[:-1], "rows"] = (leaf[..., None, :] == index_B[:, None]).astype(jnp.float32)
        elif path[0] == "lora":
            flat[path] = leaf
        else:
            flat[path] = jnp.take(leaf, index_B, axis=-_DIMENSIONS[path[-1]])
    return variables | nested(flat)


# Dimensions of a leaf with the adapters in front, without stacked layers.
_DIMENSIONS = {"input": 2, "output": 2, "keys": 4, "values": 4, "embedding": 3, "visible": 2}


def _kept_as(variables: Variables, collections: Variables) -> Variables:
    """Collections with their layers kept as the model's are."""
    params = variables.get("params", {})
    if STACKED in params:
        count = jax.tree.leaves(params[STACKED])[0].shape[0]
        return {name: stack_adapter(name, tree, count) for name, tree in collections.items()}
    return unstack_layers(collections)


def _side_by_side(trees: Sequence[Variables]) -> Variables:
    makers = {"lora": _low_rank, "ia3": _vectors, "prefix": _prefixes, "prompt": _prompts}
    return {
        kind: make([tree.get(kind, {}) for tree in trees])
        for kind, make in makers.items()
        if any(kind in tree for tree in trees)
    }


def _low_rank(trees: Sequence[Variables]) -> Variables:
    owners = [low_rank.layers_of(tree) for tree in trees]
    flat: dict[tuple[str, ...], Any] = {}
    for path in dict.fromkeys(path for own in owners for path in own):
        parts = [(number, own[path]) for number, own in enumerate(owners) if path in own]
        where = tuple(path.split("/"))
        check_shapes(where, [(own["a"].shape[0], own["b"].shape[1]) for _, own in parts])
        flat[*where, "a"] = jnp.concatenate([own["a"] for _, own in parts], axis=1)
        flat[*where, "b"] = jnp.concatenate([own["b"] for _, own in parts], axis=0)
        flat[*where, CONSTANT, "scale"] = jnp.concatenate([own[CONSTANT]["scale"] for _, own in parts])
        ranks = [own["a"].shape[1] for _, own in parts]
        flat[*where, CONSTANT, "owner"] = jnp.repeat(jnp.asarray([number for number, _ in parts]), np.asarray(ranks))
    return nested(flat)


def _vectors(trees: Sequence[Variables]) -> Variables:
    flat = {}
    owners = [dict(leaves(tree)) for tree in trees]
    for path in dict.fromkeys(path for own in owners for path in own):
        check_shapes(path, [own[path].shape for own in owners if path in own])
        one = jnp.ones_like(next(own[path] for own in owners if path in own))
        flat[path] = jnp.stack([own.get(path, one) for own in owners] + [one])
    return nested(flat)


def _prefixes(trees: Sequence[Variables]) -> Variables:
    lengths = [jax.tree.leaves(tree)[0].shape[1] if tree else 0 for tree in trees]
    owners = [dict(leaves(tree)) for tree in trees]
    flat: dict[tuple[str, ...], Any] = {}
    for path in dict.fromkeys(path for own in owners for path in own):
        if any(own and path not in own for own in owners):
            raise UserError(f"one prefix has {'/'.join(path)} and another has not; take adapters of one model.")
        flat[path] = _padded(path, [own.get(path) for own in owners], axis=1)
        flat[*path[:-1], CONSTANT, "visible"] = _visible(lengths)
    return nested(flat)


def _prompts(trees: Sequence[Variables]) -> Variables:
    # The padding is behind, where causal attention lets no virtual token see it, and no text does.
    rows = [tree.get("embedding") for tree in trees]
    lengths = [0 if own is None else own.shape[0] for own in rows]
    return {"embedding": _padded(("prompt", "embedding"), rows, axis=0), CONSTANT: {"visible": _visible(lengths)}}


def _padded(path: Sequence[str], parts: Sequence[Any], axis: int) -> jax.Array:
    """Arrays [N + 1, ...], zeros behind the shorter ones along an axis, in place of None, and as the last entry."""
    known = [part for part in parts if part is not None]
    check_shapes(path, [(*part.shape[:axis], *part.shape[axis + 1 :]) for part in known])
    longest = max(part.shape[axis] for part in known)
    widths = lambda part: [(0, longest - part.shape[axis] if at == axis else 0) for at in range(part.ndim)]
    like = jnp.pad(known[0], widths(known[0]))
    full = [jnp.zeros_like(like) if part is None else jnp.pad(part, widths(part)) for part in (*parts, None)]
    return jnp.stack(full)


def _visible(lengths: Sequence[int]) -> jax.Array:
    """bool [N + 1, P]."""
    return jnp.arange(max(lengths)) < jnp.asarray([*lengths, 0])[:, None]
