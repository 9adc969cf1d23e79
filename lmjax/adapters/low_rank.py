"""LoRA and DoRA: a product of two thin matrices beside a weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.adapters.targets import (
    Patterns,
    Variables,
    column_norms,
    leaves,
    matches,
    nested,
    refuse_second,
    select,
    unstacked,
)
from lmjax.adapters.weights import kernel_of, replaced
from lmjax.errors import UserError
from lmjax.modules.adapted import CONSTANT


@dataclasses.dataclass(frozen=True)
class LowRank:
    """`W + scale a b`, with a [in, R] drawn and b [R, out] zero at first. See `lora` and `dora`.

    Attributes:
      rank: R.
      alpha: the numerator of the scale; None for the rank itself, a scale of 1.
      rank_stabilized: divide by sqrt(R) instead of R (rsLoRA, arXiv:2312.03732).
      dropout: share of the input that is dropped in training.
      targets: patterns of the layers' paths, such as "query", "mlp/*" or "layer_1[0-1]/*".
      ranks: other ranks for the layers that match a pattern; the last that matches counts.
      kind: "lora" or "dora".
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    targets: Patterns = "*"
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kind: str = "lora"

    def __post_init__(self) -> None:
        if min((self.rank, *self.ranks.values())) < 1:
            raise UserError(f"the rank is {min((self.rank, *self.ranks.values()))}; give at least 1.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; give a number from 0 up to, not including, 1.")

    @property
    def trainable(self) -> tuple[str, ...]:
        """What `make_step` is to train."""
        return (self.kind,)

    def scale(self, rank: int) -> float:
        """What the product is multiplied by."""
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def init(self, key: jax.Array, variables: Variables) -> Variables:
        """The variables with the adapter beside them; the model's outputs are what they were, to the bit.

        `a` is uniform in +-1/sqrt(in), as PEFT draws it.

        Raises:
          UserError: a target matches nothing, a rank exceeds its layer's width, or there is such an adapter already.
        """
        return _init((self, key), variables)

    def _rank(self, path: str) -> int:
        rank = self.rank
        for pattern, other in self.ranks.items():
            rank = other if matches(path, pattern) else rank
        return rank


@unstacked
def _init(how: Any, variables: Variables) -> Variables:
    method, key = how
    refuse_second(variables, "lora", "dora")
    chosen = select(variables, method.targets)
    for pattern in method.ranks:
        if not any(matches(path, pattern) for path in chosen):
            raise UserError(f"ranks names {pattern!r}, which matches none of the adapted layers.")
    flat: dict[tuple[str, ...], Any] = {}
    for number, (path, (into, out)) in enumerate(chosen.items()):
        rank = method._rank(path)
        if rank > min(into, out):
            raise UserError(f"rank {rank} exceeds the width of {path}, {into} x {out}; lower it there through `ranks`.")
        draw = jax.random.uniform(jax.random.fold_in(key, number), (into, rank), jnp.float32, -1, 1)
        where = tuple(path.split("/"))
        flat[*where, "a"] = draw / math.sqrt(into)
        flat[*where, "b"] = jnp.zeros((rank, out))
        flat[*where, CONSTANT, "scale"] = jnp.full((rank,), method.scale(rank))
        if method.dropout:
            flat[*where, CONSTANT, "dropout"] = jnp.asarray(method.dropout)
        if method.kind == "dora":
            flat[*where, "magnitude"] = column_norms(kernel_of(variables, path))
            flat[*where, CONSTANT, "norm"] = flat[*where, "magnitude"].copy()
    return variables | {method.kind: nested(flat)}


def lora(
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: Patterns = "*",
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    ranks: Mapping[str, int] | None = None,
) -> LowRank:
    """LoRA (Hu et al., arXiv:2106.09685): `x W + (alpha / rank) x a b`. The arguments are those of `LowRank`.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.llama(vocab_size=32, num_layers=2, embed_dim=16, num_heads=2))
    >>> variables = lora(rank=4, targets="attention/*").init(jax.random.key(1), policy.init(jax.random.key(0)))
    >>> variables["lora"]["layer_0"]["attention"]["query"]["a"].shape
    (16, 4)
    """
    return LowRank(rank, alpha, rank_stabilized, dropout, targets, dict(ranks or {}))


def dora(
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: Patterns = "*",
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    ranks: Mapping[str, int] | None = None,
) -> LowRank:
    """DoRA (Liu et al., arXiv:2402.09353): LoRA gives each column its direction, a vector its length.

    With `dropout`, only the product with a and b sees the dropped input; PEFT drops it for the correction of the
    weight's own product too.
    """
    return LowRank(rank, alpha, rank_stabilized, dropout, targets, dict(ranks or {}), "dora")


def product(own: Variables) -> jax.Array:
    """`a scale b`, float32 [in, out], summed in the highest precision."""
    a, b, scale = own["a"].astype(jnp.float32), own["b"].astype(jnp.float32), own[CONSTANT]["scale"]
    return jnp.matmul(a * scale, b, precision="highest")


def layers_of(tree: Variables) -> dict[str, Variables]:
    """The layers of a "lora" or "dora" collection, path -> {"a", "b", ...}."""
    paths = {path[:-1] for path, _ in leaves(tree) if path[-1] == "a"}
    found = {}
    for path in sorted(paths):
        node = tree
        for name in path:
            node = node[name]
        found["/".join(path)] = node
    return found


def fold(variables: Variables, kind: str, sign: int = 1) -> Variables:
    """Weights with a "lora" or "dora" collection folded in (sign 1) or taken out again (-1). Unstacked variables."""
    changes = {}
    for path, own in layers_of(variables[kind]).items():
        kernel = kernel_of(variables, path)
        weight, update = kernel.astype(jnp.float32), product(own)
        if kind == "lora":
            weight = weight + sign * update
        elif sign > 0:
            weight = weight + update
            weight = weight * (own["magnitude"] / column_norms(weight))
        else:
            # The length of W + a s b follows from |W|, which is kept: it is what scales the columns back.
            weight = weight * (_length(weight, update, own) / own["magnitude"]) - update
        changes[path] = {"kernel": weight.astype(kernel.dtype)}
    return replaced(variables, changes)


def _length(merged: jax.Array, update: jax.Array, own: Variables) -> jax.Array:
    """|W + u| of each column from the merged column, which points the same way, and |W|: a quadratic equation."""
    direction = merged / jnp.linalg.norm(merged, axis=0)
    along = jnp.sum(direction * update, axis=0)
    rest = jnp.square(own[CONSTANT]["norm"]) - (jnp.sum(jnp.square(update), axis=0) - jnp.square(along))
    return along + jnp.sqrt(jnp.maximum(rest, 0))
