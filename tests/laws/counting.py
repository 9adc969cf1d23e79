"""What a jaxpr does, counted: the laws about work done once are not believed but read off the program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core as jex


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, through jit, scan, custom derivatives and checkpoints; bodies of loops once."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, list | tuple) else [parameter]:
                if isinstance(inner, jex.Jaxpr | jex.ClosedJaxpr):
                    yield from equations(inner)


def _shapes(equation: Any) -> list[tuple[int, ...]]:
    return [getattr(v.aval, "shape", ()) for v in (*equation.invars, *equation.outvars)]


def vocabulary_products(jaxpr: Any, vocab_size: int) -> int:
    """Matrix products with a vocabulary axis."""
    return sum(
        equation.primitive.name == "dot_general" and any(vocab_size in shape for shape in _shapes(equation))
        for equation in equations(jaxpr)
    )


def forwards(jaxpr: Any, table: tuple[int, int]) -> int:
    """How often tokens are looked up in an embedding table of this shape."""
    return sum(
        equation.primitive.name == "gather" and equation.invars[0].aval.shape == table
        for equation in equations(jaxpr)
    )


def largest(jaxpr: Any, but: set[tuple[int, ...]] = frozenset()) -> int:  # type: ignore[assignment]
    """Elements of the largest array, those of some shapes left out."""
    return max(math.prod(shape) for equation in equations(jaxpr) for shape in _shapes(equation) if shape not in but)


def primitives(jaxpr: Any) -> set[str]:
    return {equation.primitive.name for equation in equations(jaxpr)}


def product_flops(jaxpr: Any) -> int:
    """Operations of all matrix products, 2 M N K each; bodies of loops once."""
    total = 0
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    return total
