"""Several fine-tuned models made into one: task vectors, TIES, DARE, SLERP. Soups are `algebra.weighted_sum`.

Models and vectors are nested dicts of arrays, whole variables or "params" alone. Layers are looked at one by one,
whichever way they are kept, so that the result does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.adapters.algebra import aligned, is_float, same
from lmjax.adapters.targets import Variables, leaves, nested
from lmjax.errors import UserError
from lmjax.models.layout import STACKED, stack_layers, unstack_layers


def task_vector(finetuned: Variables, base: Variables) -> Variables:
    """`finetuned - base`, what training has changed (Ilharco et al., arXiv:2212.04089), in float32 at the least.

    Only leaves of floats are in it.

    Raises:
      UserError: the models are not of one shape, or quantized.
    """
    pairs = aligned([base, finetuned])
    return nested({path: _wide(new) - _wide(old) for path, (old, new) in pairs.items() if is_float(old)})


def apply_vectors(base: Variables, vectors: Sequence[Variables], weights: Any = None) -> Variables:
    """`base + sum_i w_i vector_i`. A negative weight forgets.

    Weights of 0 give the base bit for bit. One vector at a weight of 1 gives the fine-tuned model, exactly where
    `finetuned - base` is a float: for each number that lies between half and double that of the base (Sterbenz), and
    nearly always where the model is in 16 bits, for vectors are in 32. Elsewhere it is rounded twice. Leaves that are
    no floats, and those no vector has, are the base's own.

    Args:
      base: the model.
      vectors: from `task_vector`, `ties`, `dare` or `dare_ties`.
      weights: a number for each; all 1 if None.

    Raises:
      UserError: a vector has leaves that the base lacks, or of another shape.
    """
    weights = _weights(vectors, weights)
    flat = dict(leaves(base))
    for path in dict.fromkeys(path for vector in vectors for path, _ in leaves(vector)):
        if path not in flat:
            raise UserError(f"a vector changes {'/'.join(path)}, which the base has not; give vectors of this model.")
    owners = [dict(leaves(vector)) for vector in vectors]
    for path, old in flat.items():
        parts = [(own[path], w) for own, w in zip(owners, weights) if path in own]
        for leaf, _ in parts:
            if jnp.shape(leaf) != jnp.shape(old):
                raise UserError(
                    f"{'/'.join(path)} is {list(jnp.shape(old))} in the base and {list(jnp.shape(leaf))} in a vector; "
                    "give vectors of this model."
                )
        if parts:
            change = sum(_wide(leaf) * w for leaf, w in parts)
            # Adding 0 would turn -0 into 0.
            flat[path] = jnp.where(change == 0, old, (_wide(old) + change).astype(jnp.result_type(old)))
    return nested(flat)


def trim(vector: Variables, density: float, across: str = "leaf") -> Variables:
    """The share `density` of the numbers that are largest, rounded down, and 0 for the rest: TIES' first step.

    Args:
      vector: a task vector.
      density: from 0 to 1.
      across: whether numbers are ranked within each "leaf", as PEFT and mergekit do, or in the whole "model", as the
        paper does.
    """
    if not 0 <= density <= 1:
        raise UserError(f"the density is {density}; give the share of numbers to keep, from 0 to 1.")
    if across not in ("leaf", "model"):
        raise UserError(f"across is {across!r}; choose leaf or model.")
    return _by_layers(lambda apart: _trimmed(apart, density, across), vector)


def elect(vectors: Sequence[Variables], weights: Any = None) -> Variables:
    """TIES' second and third step: where vectors disagree about a sign, the one of more weighted mass wins.

    `sign = sign(sum_i w_i v_i)`, and the result is the weighted mean of the `w_i v_i` of that sign, over the sum of
    their `|w_i|`; a tie goes to the positive ones. Zeros have no vote. The order of the vectors changes nothing, not by
    a bit.

    PEFT elects the sign before it weights, so that of (1, -2) with weights (10, 1) the -2 wins.

    >>> vectors = [{"w": jnp.array([1.0, 3.0])}, {"w": jnp.array([-2.0, 1.0])}]
    >>> print(elect(vectors, [10, 1])["w"], elect(vectors)["w"])
    [1.        2.8181818] [-2.  2.]
    """
    weights = _weights(vectors, weights)
    flat = {}
    for path, parts in aligned(vectors).items():
        weighted = jnp.stack([_wide(leaf) * w for leaf, w in zip(parts, weights)])
        mass = jnp.reshape(jnp.abs(jnp.asarray(weights, weighted.dtype)), (-1,) + (1,) * (weighted.ndim - 1))
        sign = jnp.where(_sum(weighted) >= 0, 1.0, -1.0)
        agree = jnp.sign(weighted) == sign
        total, count = _sum(jnp.where(agree, weighted, 0)), _sum(jnp.where(agree, mass, 0))
        flat[path] = jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
    return nested(flat)


def ties(vectors: Sequence[Variables], weights: Any = None, *, density: float, across: str = "leaf") -> Variables:
    """TIES (Yadav et al., arXiv:2306.01708): trim each task vector, elect a sign, take the mean of what agrees.

    The result is a task vector; the paper's lambda is its weight in `apply_vectors`.

    Args:
      vectors: task vectors.
      weights: a number for each; all 1 if None.
      density, across: see `trim`.
    """
    _weights(vectors, weights)
    return elect([trim(vector, density, across) for vector in vectors], weights)


def drop(key: jax.Array, vector: Variables, density: float) -> Variables:
    """DARE's step: each number is kept with probability `density`, and divided by it; the mean is what it was."""
    if not 0 < density <= 1:
        raise UserError(f"the density is {density}; give the share of numbers to keep, above 0 and up to 1.")

    def each(apart: Variables) -> Variables:
        flat = {}
        for number, (path, leaf) in enumerate(sorted(leaves(apart), key=lambda item: item[0])):
            keep = jax.random.bernoulli(jax.random.fold_in(key, number), density, jnp.shape(leaf))
            flat[path] = jnp.where(keep, _wide(leaf) / density, 0)
        return nested(flat)

    return _by_layers(each, vector)


def dare(key: jax.Array, vectors: Sequence[Variables], weights: Any = None, *, density: float) -> Variables:
    """DARE (Yu et al., arXiv:2311.03099): `sum_i w_i drop(vector_i)`, a task vector.

    Args:
      key: seeds what is dropped.
      vectors: task vectors.
      weights: a number for each; all 1 if None.
      density: the share that is kept, above 0 and up to 1.
    """
    weights = _weights(vectors, weights)
    dropped = aligned(_dropped(key, vectors, density))
    return nested({path: sum(leaf * w for leaf, w in zip(parts, weights)) for path, parts in dropped.items()})


def dare_ties(key: jax.Array, vectors: Sequence[Variables], weights: Any = None, *, density: float) -> Variables:
    """DARE with TIES' election of signs in place of the sum. Arguments as in `dare`."""
    _weights(vectors, weights)
    return elect(_dropped(key, vectors, density), weights)


def slerp(first: Variables, second: Variables, t: Any) -> Variables:
    """The way from one model to another along an arc, leaf by leaf: `(sin((1-t) o) a + sin(t o) b) / sin(o)`.

    o is the angle between the leaves a and b of one layer (Shoemake 1985). Where they nearly share a direction, or
    point against each other (sin o < 1e-4), it is the straight way. Leaves that are no floats must be the same.

    Args:
      first, second: models or task vectors.
      t: 0 gives the first, 1 the second, bit for bit.

    >>> print(slerp({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}, 0.5)["w"])
    [0.70710677 0.70710677]
    """
    stacked, (first, second) = _apart([first, second])
    flat = {}
    for path, (a, b) in aligned([first, second]).items():
        if is_float(a):
            flat[path] = _arc(a, b, t)
        elif same(a, b):
            flat[path] = a
        else:
            raise UserError(f"{'/'.join(path)} differs between the models and has no middle; make it the same in both.")
    return stack_layers(nested(flat)) if stacked else nested(flat)


def _arc(a: Any, b: Any, t: Any) -> jax.Array:
    u, v = _wide(a), _wide(b)
    length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
    unit = lambda x: x / jnp.maximum(length(x), jnp.finfo(x.dtype).tiny)
    # Kahan's form: exact for small angles, where the arccosine of a dot product is not.
    angle = 2 * jnp.arctan2(length(unit(u) - unit(v)), length(unit(u) + unit(v)))
    bent = (jnp.sin(angle) >= 1e-4) & (length(u) > 0) & (length(v) > 0)
    sine = jnp.where(bent, jnp.sin(angle), 1)
    from_a = jnp.where(bent, jnp.sin((1 - t) * angle) / sine, 1 - t)
    from_b = jnp.where(bent, jnp.sin(t * angle) / sine, t)
    dtype = jnp.result_type(a)
    between = (from_a * u + from_b * v).astype(dtype)
    return jnp.where(jnp.equal(t, 0), a, jnp.where(jnp.equal(t, 1), jnp.asarray(b, dtype), between))


def _trimmed(apart: Variables, density: float, across: str) -> Variables:
    flat = dict(leaves(apart))
    if across == "leaf":
        return nested({path: _largest(_wide(leaf), density) for path, leaf in flat.items()})
    sizes = [int(np.prod(jnp.shape(leaf))) for leaf in flat.values()]
    whole = _largest(jnp.concatenate([jnp.ravel(_wide(leaf)) for leaf in flat.values()]), density)
    parts = jnp.split(whole, np.cumsum(sizes)[:-1])
    return nested({path: part.reshape(jnp.shape(leaf)) for (path, leaf), part in zip(flat.items(), parts)})


def _largest(x: jax.Array, density: float) -> jax.Array:
    row = jnp.ravel(x)
    _, index = jax.lax.top_k(jnp.abs(row), int(density * row.size))
    return jnp.zeros_like(row).at[index].set(row[index]).reshape(x.shape)


def _dropped(key: jax.Array, vectors: Sequence[Variables], density: float) -> list[Variables]:
    return [drop(jax.random.fold_in(key, number), vector, density) for number, vector in enumerate(vectors)]


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the first axis, the same to the bit in whatever order its entries come."""
    return jnp.sum(jnp.sort(x, axis=0), axis=0)


def _wide(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))


def _weights(vectors: Sequence[Variables], weights: Any) -> list[Any]:
    if isinstance(vectors, dict) or not len(vectors):
        raise UserError("there are no task vectors; give a list of them.")
    weights = [1.0] * len(vectors) if weights is None else list(weights)
    if len(weights) != len(vectors):
        raise UserError(f"there are {len(weights)} weights for {len(vectors)} task vectors; give one for each.")
    return weights


def _apart(trees: Sequence[Variables]) -> tuple[bool, list[Variables]]:
    stacked = any(STACKED in path for tree in trees for path, _ in leaves(tree))
    return stacked, [unstack_layers(tree) for tree in trees] if stacked else list(trees)


def _by_layers(function: Callable[[Variables], Variables], tree: Variables) -> Variables:
    """A function of a tree that sees layers side by side, whichever way they are kept."""
    stacked, (apart,) = _apart([tree])
    return stack_layers(function(apart)) if stacked else function(apart)
