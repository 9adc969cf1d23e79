"""Objectives written as text, as a config holds them: sums of weighted terms by name, and nothing else of Python."""

from __future__ import annotations

import ast
import difflib
import operator
from typing import Any

from lmjax.errors import UserError
from lmjax.objectives.algebra import Objective

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def parse_objective(text: str) -> Objective:
    """The objective of an expression such as `dpo(beta=0.1) + 0.2 * chosen_nll() + cross_entropy().on("web")`.

    Names are those of `lmjax.objectives`; there are numbers, texts, tuples, calls with keywords, `+ - * /`, and the
    methods `.on(stream)` and `.named(name)`.

    Raises:
      UserError: anything else, a name that there is not, or options that a term does not take.

    >>> [(c, t.name, t.stream) for c, t in parse_objective("cross_entropy() + 0.1 * entropy().on('web')").terms]
    [(1.0, 'cross_entropy', None), (0.1, 'entropy', 'web')]
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise UserError(f"the objective {text!r} is no expression ({error.msg}); write a sum of terms.") from None
    found = _value(tree.body, text)
    if not isinstance(found, Objective):
        raise UserError(f"the objective {text!r} is no term; call one, such as cross_entropy().")
    return found


def _value(node: ast.AST, text: str) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(item, text) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, text)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        try:
            return _OPERATORS[type(node.op)](_value(node.left, text), _value(node.right, text))
        except TypeError as error:
            raise UserError(f"{ast.unparse(node)} in the objective cannot be computed: {error}.") from None
    if isinstance(node, ast.Call):
        return _call(node, text)
    raise UserError(f"{ast.unparse(node)} in the objective {text!r} is not understood; write a sum of terms.")


def _call(node: ast.Call, text: str) -> Any:
    if isinstance(node.func, ast.Name):
        function = _named(node.func.id)
    elif isinstance(node.func, ast.Attribute) and node.func.attr in ("on", "named"):
        function = getattr(_value(node.func.value, text), node.func.attr, None)
    else:
        function = None
    if function is None or any(keyword.arg is None for keyword in node.keywords):
        raise UserError(f"{ast.unparse(node)} in the objective {text!r} is not understood; call a term by its name.")
    arguments = [_value(argument, text) for argument in node.args]
    options = {str(keyword.arg): _value(keyword.value, text) for keyword in node.keywords}
    try:
        return function(*arguments, **options)
    except TypeError as error:
        raise UserError(f"{ast.unparse(node)} in the objective does not work: {error}.") from None


def _named(name: str) -> Any:
    import lmjax.objectives as known

    submodules = {"algebra", "evaluation", "expressions", "matching", "tracing"}
    names = [n for n in known.__all__ if n not in submodules and n not in ("evaluate", "finalize", "Objective", "Term")]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
        raise UserError(f"there is no term {name!r}; {hint}")
    return getattr(known, name)
