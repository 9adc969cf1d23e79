"""Sums of adapters, and of whole models: exact in the weights that they stand for.

Averaging the weights of models that were fine-tuned from one base makes a model soup (arXiv:2203.05482):
`weighted_sum(models, [1 / n] * n)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.adapters import low_rank
from lmjax.adapters.folding import COLLECTIONS, adapters_of, without
from lmjax.adapters.targets import Variables, leaves, nested
from lmjax.errors import UserError
from lmjax.models.adapted import chosen_rows
from lmjax.models.layout import STACKED, stack_adapter, unstack_layers
from lmjax.modules.adapted import CONSTANT
from lmjax.modules.quantized import KINDS

_REFUSED = {
    "dora": "brings the columns of the weight to learned lengths, so that a sum of two is no adapter of its kind; "
    "merge each into its model with lmjax.adapters.merge, and sum those models",
    "prefix": "acts through a softmax, so that a sum of keys is no sum of effects; "
    "keep the adapters apart and choose one for each row with lmjax.adapters.stack and choose",
}
_REFUSED |= dict.fromkeys(("prefix_network", "prompt"), _REFUSED["prefix"])


def weighted_sum(adapters: Sequence[Variables], weights: Any, *, rank: int | None = None) -> Variables:
    """The adapter, or the model, that changes every weight by the weighted sum of what the given ones change.

    LoRA: the directions of all are put side by side, and each weight goes into their scales, so that
    `a scale b = sum_i w_i a_i scale_i b_i` for any ranks, scales and sets of layers. Summing the a and the b apart
    gives products of strangers instead. IA3: `1 + sum_i w_i (l_i - 1)`. Delta: `sum_i w_i delta_i`. Bottlenecks: the
    widths of all are put side by side. A layer that an adapter leaves alone counts as unchanged.

    Without adapters the variables are whole models, summed leaf by leaf in float32 at the least. Leaves that are no
    floats must be the same in all.

    Args:
      adapters: at least one, all alike: variables with adapters, collections without their model
        (`lmjax.adapters.adapters_of`), or variables of whole models. A model under adapters must be the same
        everywhere, and is handed on.
      weights: a number for each, of either sign.
      rank: bring LoRA down to this rank, where the sum has more. That is an approximation: see `compress`.

    Returns:
      What was given, of the same collections. LoRA's dropout is kept where all share one rate, else left out.

    Raises:
      UserError: DoRA, prefixes and prompts; quantized models; adapters of different models; kinds that multiply each
        other on one layer.

    >>> one = {"ia3": {"layer_0": {"mlp": {"down": {"input": jnp.array([2.0, 1.0])}}}}}
    >>> print(weighted_sum([one, one], [0.5, 2.0])["ia3"]["layer_0"]["mlp"]["down"]["input"])
    [3.5 1. ]
    """
    weights = _checked(adapters, weights)
    if not any(adapters_of(tree) for tree in adapters):
        if rank is not None:
            raise UserError("rank is given, but these are whole models; only LoRA can be brought to a rank.")
        return _sum_of_models(adapters, weights)
    found = layer_by_layer(_sum_of_adapters, [adapters_of(tree) for tree in adapters], weights)
    model = _model_of(adapters)
    return model | (found if rank is None else compress(found, rank))


def scale(adapter: Variables, weight: Any) -> Variables:
    """The adapter, or the model, times a number. As `weighted_sum` of one."""
    return weighted_sum([adapter], [weight])


def add(first: Variables, second: Variables) -> Variables:
    """The sum of two adapters, or models. As `weighted_sum` with weights (1, 1)."""
    return weighted_sum([first, second], [1.0, 1.0])


def subtract(first: Variables, second: Variables) -> Variables:
    """What the first adapter, or model, has beyond the second. As `weighted_sum` with weights (1, -1)."""
    return weighted_sum([first, second], [1.0, -1.0])


def compress(adapter: Variables, rank: int) -> Variables:
    """LoRA brought down to a rank, by singular value decomposition. An approximation.

    Of all updates of this rank it is the nearest in the Frobenius norm (Eckart and Young); what is lost is the length
    of the singular values that are cut, and nothing where there are none. The scales become 1, and the singular values
    go in equal parts into a and b. Layers of no more than this rank stay as they are.

    Args:
      adapter: variables or collections with a "lora" adapter.
      rank: at least 1.
    """
    if "lora" not in adapter:
        raise UserError("there is no 'lora' adapter to bring to a rank; leave out `rank`.")
    if rank < 1:
        raise UserError(f"the rank is {rank}; give at least 1.")
    return adapter | layer_by_layer(lambda trees: _compressed(trees[0], rank), [{"lora": adapter["lora"]}])


def _compressed(tree: Variables, rank: int) -> Variables:
    flat: dict[tuple[str, ...], Any] = {}
    for path, own in low_rank.layers_of(tree["lora"]).items():
        for name, leaf in leaves(_nearest(own, rank) if own["a"].shape[1] > rank else own):
            flat[(*path.split("/"), *name)] = leaf
    return {"lora": nested(flat)}


def _nearest(own: Variables, rank: int) -> Variables:
    f32 = jnp.float32
    Qa, Ra = jnp.linalg.qr(own["a"].astype(f32))
    Qb, Rb = jnp.linalg.qr((own["b"].astype(f32) * own[CONSTANT]["scale"][:, None]).T)
    U, S, V = jnp.linalg.svd(jnp.matmul(Ra, Rb.T, precision="highest"), full_matrices=False)
    root = jnp.sqrt(S[:rank])
    a = jnp.matmul(Qa, U[:, :rank] * root, precision="highest").astype(own["a"].dtype)
    b = jnp.matmul(root[:, None] * V[:rank], Qb.T, precision="highest").astype(own["b"].dtype)
    return {"a": a, "b": b, CONSTANT: own[CONSTANT] | {"scale": jnp.ones((a.shape[1],))}}


def _checked(trees: Sequence[Variables], weights: Any) -> list[Any]:
    if isinstance(trees, dict) or not len(trees):
        raise UserError("there is nothing to sum; give a list of adapters, or of models.")
    weights = list(weights)
    if len(weights) != len(trees):
        raise UserError(f"there are {len(weights)} weights for {len(trees)} adapters or models; give one for each.")
    for weight in weights:
        if not isinstance(weight, jax.core.Tracer) and not np.isfinite(weight):
            raise UserError(f"a weight is {weight}; give finite numbers.")
    return weights


def layer_by_layer(function: Any, trees: Sequence[Variables], *arguments: Any) -> Variables:
    """A function of several sets of collections that sees layers side by side, whichever way they are kept."""
    stacked = [tree[STACKED] for collections in trees for tree in collections.values() if STACKED in tree]
    if not stacked:
        return function(trees, *arguments)
    count = jax.tree.leaves(stacked[0])[0].shape[0]
    found = function([unstack_layers(tree) for tree in trees], *arguments)
    return {name: stack_adapter(name, tree, count) for name, tree in found.items()}


def _sum_of_adapters(trees: Sequence[Variables], weights: Sequence[Any]) -> Variables:
    kinds = [name for name in COLLECTIONS if any(name in tree for tree in trees)]
    for kind in kinds:
        if kind in _REFUSED:
            raise UserError(f"a {kind!r} adapter {_REFUSED[kind]}.")
    for number, tree in enumerate(trees):
        if not tree:
            raise UserError(f"number {number} has no adapter and others have; give adapters or whole models, not both.")
        if chosen_rows(tree) is not None:
            raise UserError(f"the adapters of number {number} were chosen row by row; sum them before that.")
    _refuse_products(trees)
    return {kind: _SUMS[kind]([tree.get(kind, {}) for tree in trees], weights) for kind in kinds}


def _refuse_products(trees: Sequence[Variables]) -> None:
    """Raises a UserError if a weight would be changed by two factors, whose product no sum of adapters gives back."""
    factors = {path for tree in trees for path, _ in leaves(tree.get("ia3", {}))}
    for path in sorted(factors):
        *layer, side = path
        if side == "input" and (*layer, "output") in factors:
            both = "are scaled on both sides"
        elif any(
            other[: len(layer)] == tuple(layer)
            for tree in trees
            for kind in ("lora", "delta")
            for other, _ in leaves(tree.get(kind, {}))
        ):
            both = "have an 'ia3' adapter that multiplies what another adapter adds"
        else:
            continue
        raise UserError(
            f"the weights of {'/'.join(layer)} {both}, which no sum of adapters gives back; "
            "merge each into its model with lmjax.adapters.merge, and sum those models."
        )


def _sum_of_low_rank(trees: Sequence[Variables], weights: Sequence[Any]) -> Variables:
    flat: dict[tuple[str, ...], Any] = {}
    for path, parts in _by_path([low_rank.layers_of(tree) for tree in trees], weights).items():
        where = tuple(path.split("/"))
        check_shapes(where, [(own["a"].shape[0], own["b"].shape[1]) for own, _ in parts])
        flat[*where, "a"] = jnp.concatenate([own["a"] for own, _ in parts], axis=1)
        flat[*where, "b"] = jnp.concatenate([own["b"] for own, _ in parts], axis=0)
        flat[*where, CONSTANT, "scale"] = jnp.concatenate([own[CONSTANT]["scale"] * weight for own, weight in parts])
        rates = [own[CONSTANT].get("dropout") for own, _ in parts]
        if all(rate is not None and not isinstance(rate, jax.core.Tracer) and same(rate, rates[0]) for rate in rates):
            flat[*where, CONSTANT, "dropout"] = rates[0]
    return nested(flat)


def _sum_of_vectors(trees: Sequence[Variables], weights: Sequence[Any]) -> Variables:
    away = [nested({path: leaf - 1 for path, leaf in leaves(tree)}) for tree in trees]
    return nested({path: 1 + leaf for path, leaf in leaves(_sum_of_deltas(away, weights))})


def _sum_of_deltas(trees: Sequence[Variables], weights: Sequence[Any]) -> Variables:
    flat = {}
    for path, parts in _by_path([dict(leaves(tree)) for tree in trees], weights).items():
        check_shapes(path, [leaf.shape for leaf, _ in parts])
        flat[path] = _total([leaf for leaf, _ in parts], [weight for _, weight in parts])
    return nested(flat)


def _sum_of_bottlenecks(trees: Sequence[Variables], weights: Sequence[Any]) -> Variables:
    """All bottlenecks of a sublayer read the same source and are added, so that widths side by side are their sum."""
    owners = [{path[:-1]: tree for path, _ in leaves(tree) if path[-2:] == (CONSTANT, "scale")} for tree in trees]
    flat: dict[tuple[str, ...], Any] = {}
    for where, parts in _by_path(owners, weights).items():
        *place, _ = where
        found = []
        for tree, weight in parts:
            node = tree
            for name in place:
                node = node[name]
            found.append((node, node[CONSTANT]["scale"] * weight))
        check_shapes((*place, "up", "bias"), [own["up"]["bias"].shape for own, _ in found])
        flat[*place, "down", "kernel"] = jnp.concatenate([own["down"]["kernel"] for own, _ in found], axis=1)
        flat[*place, "down", "bias"] = jnp.concatenate([own["down"]["bias"] for own, _ in found])
        flat[*place, "up", "kernel"] = jnp.concatenate([factor * own["up"]["kernel"] for own, factor in found])
        flat[*place, "up", "bias"] = sum(factor * own["up"]["bias"] for own, factor in found)
        flat[*place, CONSTANT, "scale"] = jnp.asarray(1.0)
    return nested(flat)


_SUMS = {
    "lora": _sum_of_low_rank,
    "ia3": _sum_of_vectors,
    "delta": _sum_of_deltas,
    "bottleneck": _sum_of_bottlenecks,
}


def _by_path(owners: Sequence[dict[Any, Any]], weights: Sequence[Any]) -> dict[Any, list[tuple[Any, Any]]]:
    """Path -> (what an adapter has there, its weight), of those that have something."""
    paths = dict.fromkeys(path for own in owners for path in own)
    return {path: [(own[path], w) for own, w in zip(owners, weights) if path in own] for path in paths}


def check_shapes(path: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
    """Raises a UserError if adapters differ in the shape of what is at a path."""
    if len(set(map(tuple, shapes))) > 1:
        a, b = sorted(set(map(tuple, shapes)))[:2]
        raise UserError(
            f"{'/'.join(path)} is {list(a)} in one adapter and {list(b)} in another; take adapters of one model."
        )


def _total(parts: Sequence[Any], weights: Sequence[Any]) -> jax.Array:
    """Weighted sum of floats of any precision, in float32 at the least, in the type of the first."""
    first = jnp.asarray(parts[0])
    wide = jnp.promote_types(first.dtype, jnp.float32)
    total = sum(jnp.asarray(leaf, wide) * jnp.asarray(weight, wide) for leaf, weight in zip(parts, weights))
    return jnp.asarray(total, first.dtype)


def _model_of(trees: Sequence[Variables]) -> Variables:
    """The model under the adapters, which must be one."""
    models = [model for tree in trees if (model := without(tree))]
    for other in models[1:]:
        for path, (leaf, mine) in aligned([other, models[0]], quantized=True).items():
            if not same(leaf, mine):
                raise UserError(
                    f"the models under the adapters differ at {'/'.join(path)}; merge each adapter into its model with "
                    "lmjax.adapters.merge, and sum those models."
                )
    return models[0] if models else {}


def _sum_of_models(trees: Sequence[Variables], weights: Sequence[Any]) -> Variables:
    flat = {}
    for path, parts in aligned(trees).items():
        flat[path] = _total(parts, weights) if is_float(parts[0]) else parts[0]
        if not is_float(parts[0]) and not all(same(leaf, parts[0]) for leaf in parts):
            raise UserError(
                f"{'/'.join(path)} holds {jnp.result_type(parts[0])} numbers that differ between the models, which "
                "cannot be summed; make them the same."
            )
    return nested(flat)


def aligned(trees: Sequence[Variables], quantized: bool = False) -> dict[tuple[str, ...], list[Any]]:
    """Path -> that leaf of every model.

    Args:
      trees: models, or their "params" alone.
      quantized: whether they may hold quantized weights.

    Raises:
      UserError: the trees, their shapes or their kinds of numbers differ, or there are quantized weights.
    """
    for number, tree in enumerate(trees):
        for kind in KINDS:
            if kind in tree and not quantized:
                raise UserError(
                    f"model {number} holds quantized weights ({kind!r}), whose codes cannot be summed; "
                    "dequantize it first with lmjax.adapters.dequantize."
                )
    flat = [dict(leaves(tree)) for tree in trees]
    for number, other in enumerate(flat):
        for path in (*flat[0], *other):
            if path not in other or path not in flat[0]:
                lacking = number if path not in other else 0
                raise UserError(
                    f"{'/'.join(path)} is missing in model {lacking}; give models of one shape, their layers kept the "
                    "same way."
                )
            mine, its = flat[0][path], other[path]
            if np.shape(mine) != np.shape(its) or is_float(mine) != is_float(its):
                describe = lambda leaf: f"{jnp.result_type(leaf)} {list(np.shape(leaf))}"
                raise UserError(
                    f"{'/'.join(path)} is {describe(mine)} in model 0 and {describe(its)} in model {number}; "
                    "give models of one shape."
                )
    return {path: [own[path] for own in flat] for path in flat[0]}


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def same(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same numbers; while a function is traced, whether they have the same shape."""
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return np.shape(a) == np.shape(b)
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))
