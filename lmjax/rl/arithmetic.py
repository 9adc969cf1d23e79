"""Arithmetic out of a text, exactly and safely: nothing is evaluated by Python, and nothing can grow without bound."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST, DEEPEST, LARGEST_BITS, LARGEST_EXPONENT = 1000, 50, 4096, 64

_BINARY: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_SIGNS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"}


def evaluate(text: str, powers: bool = True) -> Fraction | None:
    """The exact value of an expression of numbers, `+ - * / // % **` and parentheses; None if it is anything else.

    Also None: more than 1,000 characters, more than 50 levels, a division by zero, exponents that are no whole numbers
    up to 64, and values of more than 4,096 bits. There are no names, calls or comparisons.

    Args:
      text: the expression.
      powers: whether `**` is allowed.

    >>> evaluate("(1 + 2) * 3 / 4"), evaluate("9**9**9"), evaluate("__import__('os')"), evaluate("1/0")
    (Fraction(9, 4), None, None, None)
    """
    found = _parsed(text)
    try:
        return None if found is None else _value(found, powers, 0)
    except (_NotArithmetic, ZeroDivisionError, RecursionError):
        return None


def numbers_used(text: str) -> list[Fraction] | None:
    """Every number that an expression is written with, in order; None if it is no expression.

    >>> numbers_used("3 * (4 - 3)")
    [Fraction(3, 1), Fraction(4, 1), Fraction(3, 1)]
    """
    found = _parsed(text)
    if found is None:
        return None
    constants = [node for node in ast.walk(found) if isinstance(node, ast.Constant)]
    constants.sort(key=lambda node: node.col_offset)
    return [_number(node) for node in constants]


class _NotArithmetic(Exception):
    pass


def _parsed(text: str) -> ast.expr | None:
    text = text.strip()
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    # Digits of other scripts, underscores and letters are numbers to Python, or names; here they are nothing.
    if not text or len(text) > LONGEST or not re.fullmatch(r"[0-9.+\-*/%() \t]+", text):
        return None
    if max(_depths(text)) > DEEPEST:
        return None
    try:
        found = ast.parse(text, mode="eval").body
        for node in ast.walk(found):
            if isinstance(node, ast.Constant):  # as it is written: Python would round decimals
                node.value = Fraction(text[node.col_offset : node.end_col_offset])  # type: ignore[assignment]
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return found


def _depths(text: str) -> list[int]:
    depth, found = 0, [0]
    for character in text:
        depth += (character == "(") - (character == ")")
        found.append(depth)
    return found


def _number(node: ast.Constant) -> Fraction:
    return Fraction(str(node.value))


def _value(node: ast.expr, powers: bool, depth: int) -> Fraction:
    if depth > 4 * DEEPEST:
        raise _NotArithmetic
    if isinstance(node, ast.Constant):
        return _number(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, powers, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise _NotArithmetic
    left, right = (_value(side, powers, depth + 1) for side in (node.left, node.right))
    if isinstance(node.op, ast.Pow) and powers:
        if right.denominator != 1 or abs(right) > LARGEST_EXPONENT or _bits(left) * abs(right) > LARGEST_BITS:
            raise _NotArithmetic
        return Fraction(left ** int(right))
    if type(node.op) not in _BINARY:
        raise _NotArithmetic
    found = Fraction(_BINARY[type(node.op)](left, right))
    if _bits(found) > LARGEST_BITS:
        raise _NotArithmetic
    return found


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
