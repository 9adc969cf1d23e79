"""Rewards as a config names them: verifiers and penalties of `lmjax.rl`, and functions out of files."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmjax.errors import UserError


def open_rewards(texts: Sequence[str], timeout: float = 0.0) -> list[Any]:
    """The rewards that texts such as "0.5 * exact_number(field='answer')" or "rewards.py:function" name.

    Args:
      texts: each a reward, with a weight and "*" in front if that is not 1. Penalties that look at a reward take one:
        "without_end(exact_number(), 1.0)".
      timeout: seconds for functions of files, which then run in processes of their own; 0: they run here.

    Raises:
      UserError: there is no such verifier, penalty or function, or it does not take these options.
    """
    from lmjax.rl import Reward

    found: list[Any] = []
    for text in texts:
        weight, what = _weight(text.strip())
        if match := re.fullmatch(r"(.+\.py):(\w+)", what):
            name = match.group(2)
            apart = {"apart": True, "timeout": timeout} if timeout else {}
            reward = Reward(name, _function(Path(match.group(1)), name), weight, **apart)
        else:
            name, function = _named(what)
            reward = Reward(name, function, weight)
        if name in (known := [other.name for other in found]):
            raise UserError(f"two rewards are called {name!r} ({', '.join(known)}); give each once")
        found.append(reward)
    return found


def _weight(text: str) -> tuple[float, str]:
    match = re.match(r"([-+0-9.e]+)\s*\*\s*(.+)", text)
    if not match:
        return 1.0, text
    try:
        return float(match.group(1)), match.group(2)
    except ValueError:
        raise UserError(f"{match.group(1)!r} in the reward {text!r} is no weight; write a number") from None


def _function(path: Path, name: str) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path} to take the reward {name} from")
    folder = str(path.parent.absolute())
    if folder not in sys.path:
        sys.path.append(folder)  # so that processes of their own find the module too
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path} has no function {name}")
    return getattr(module, name)


def _named(text: str) -> tuple[str, Any]:
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        node = None
    function = _made(node, text)
    return text.partition("(")[0].strip(), function


def _made(node: ast.AST | None, text: str) -> Any:
    """What a maker gives with the options of a call; those that are calls themselves are made first."""
    from lmjax.rl import penalties, verifiers

    makers = {
        name: value
        for name, value in (vars(verifiers) | vars(penalties)).items()
        if callable(value) and getattr(value, "__annotations__", {}).get("return") in ("Verifier", "Penalty")
    }
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise UserError(f"the reward {text!r} is not understood; write name(options), or file.py:function")
    name = node.func.id
    if name not in makers:
        near = difflib.get_close_matches(name, makers, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(makers)}"
        raise UserError(f"there is no verifier or penalty {name!r}; {hint}")
    value = lambda own: _made(own, text) if isinstance(own, ast.Call) else ast.literal_eval(own)
    try:
        options = {str(keyword.arg): value(keyword.value) for keyword in node.keywords}
        return makers[name](*map(value, node.args), **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the reward {text!r} does not work: {error}") from None
