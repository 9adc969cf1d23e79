"""Config files: Python with a module-level `config`, read with clear errors, written to be read back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from lmjax.errors import UserError

Config = TypeVar("Config")


def load_config(path: str | os.PathLike[str], kind: type[Config] | None = None) -> Config:
    """The `config` of a Python config file.

    Args:
      path: the file. While it runs, the current directory is importable, so that it may import its neighbours
        as `configs.<...>`.
      kind: the class that the config must be of, or None for any dataclass.

    Raises:
      UserError: no such file; a mistake in it, with its line; a field that its class does not have, with the
        nearest one that it has; a value that is not of its field's type; no `config`, or another class.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"there is no config file {path}{suggest(str(path), siblings)}")
    with _importable(os.getcwd()):
        try:
            names = runpy.run_path(str(path), run_name="lmjax_config_file")
        except Exception as error:
            raise UserError(_mistake(path, error)) from error
    config = names.get("config")
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        given = "has no `config`" if config is None else f"has a `config` of type {type(config).__name__}"
        raise UserError(
            f"{path} {given}; assign an instance of {kind.__name__ if kind else 'a config dataclass'}"
        )
    if kind is not None and not isinstance(config, kind):
        raise UserError(f"{path} holds a {type(config).__name__}, this experiment takes a {kind.__name__}")
    try:
        check_types(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config  # type: ignore[return-value]


def check_types(config: Any, where: str = "config") -> None:
    """Checks each field of nested dataclasses against its annotation, which Python itself does not.

    Raises:
      UserError: the first value that is not of its type, by the name of its field.

    >>> from lmjax.sharding.config import MeshShape
    >>> check_types(MeshShape(data=2))
    >>> check_types(MeshShape(data=2.0))
    Traceback (most recent call last):
    lmjax.errors.UserError: config.data is 2.0, it takes int
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _matches(value, hint):
            written = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise UserError(f"{where}.{field.name} is {value!r}, it takes {written}")
        members = value if isinstance(value, (tuple, list)) else (value,)
        for index, member in enumerate(members):
            if dataclasses.is_dataclass(member) and not isinstance(member, type):
                check_types(member, f"{where}.{field.name}" + (f"[{index}]" if members is value else ""))


def _matches(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _matches(value, inner[0])
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in inner)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(_matches(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(_matches(item, kind) for item, kind in zip(value, inner))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def format_config(config: Any) -> str:
    """A config as the text of a config file: running it gives an equal config.

    Raises:
      UserError: a value that cannot be written as Python (a function, an array), by the name of its field.
    """
    imports: dict[type, str] = {}
    body = _source(config, "config", 0, imports)
    modules: dict[str, list[str]] = {}
    for kind, name in imports.items():
        renamed = "" if name == kind.__name__ else f" as {name}"
        modules.setdefault(_module(kind), []).append(kind.__name__ + renamed)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(modules.items())]
    return "\n".join([*lines, "", f"config = {body}"]) + "\n"


def _source(value: Any, where: str, depth: int, imports: dict[type, str]) -> str:
    indent, close = "    " * (depth + 1), "    " * depth
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        if kind.__qualname__ != kind.__name__:
            mend = "which is not at the top of a module and cannot be imported"
            raise UserError(f"{where} is of the class {kind.__qualname__}, {mend}")
        name = _import_name(kind, imports)
        fields = [field for field in dataclasses.fields(value) if field.init]
        inner = [
            f"{indent}{field.name}="
            + _source(getattr(value, field.name), f"{where}.{field.name}", depth + 1, imports)
            for field in fields
        ]
        return f"{name}(\n" + ",\n".join(inner) + f",\n{close})" if inner else f"{name}()"
    if type(value) in (tuple, list):
        items = [_source(item, f"{where}[{i}]", depth + 1, imports) for i, item in enumerate(value)]
        opening, closing = ("(", ")") if isinstance(value, tuple) else ("[", "]")
        if any("\n" in item for item in items):
            return f"{opening}\n" + "".join(f"{indent}{item},\n" for item in items) + f"{close}{closing}"
        last = "," if isinstance(value, tuple) and len(items) == 1 else ""
        return opening + ", ".join(items) + last + closing
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return f'float("{value}")'
    if isinstance(value, Path):
        return f"{_import_name(Path, imports)}({str(value)!r})"
    if type(value) is str:
        text = repr(value)
        return f'"{text[1:-1]}"' if '"' not in text else text
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    raise UserError(f"{where} is a {type(value).__name__}, which a config file cannot hold; use plain values")


def _import_name(kind: type, imports: dict[type, str]) -> str:
    """The name of a class in the printed file; a second class of the same name gets a number."""
    if kind not in imports:
        taken, name, number = set(imports.values()), kind.__name__, 2
        while name in taken:
            name, number = f"{kind.__name__}{number}", number + 1
        imports[kind] = name
    return imports[kind]


def _module(kind: type) -> str:
    """The module to import a class from; that of a script run with `-m` by its real name."""
    if kind is Path:
        return "pathlib"
    if kind.__module__ == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        return spec.name if spec is not None else "__main__"
    return kind.__module__


def suggest(word: str, known: Sequence[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near and "." not in word:  # a field named without its group
        near = [option for option in known if option.split(".")[-1] == word.removeprefix("--")][:1]
    return f"; did you mean {near[0]}?" if near else (f"; {otherwise}" if otherwise else "")


def _mistake(path: Path, error: Exception) -> str:
    """What went wrong in a config file, with its line, in one sentence."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}: {error.msg}"
    # The last frame in a config file, not in the dataclasses or the library that it called.
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if _is_config(frame.filename, path)
    ]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else str(path)
    text = str(error)
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if isinstance(error, TypeError) and unknown:
        kind, field = unknown.groups()
        fields = _fields_of(kind)
        return f"{where}: {kind} has no field {field}{suggest(field, fields, 'it has ' + ', '.join(fields))}"
    missing = re.search(r"(\w+)\.__init__\(\) missing \d+ required .*arguments?: (.*)", text)
    if isinstance(error, TypeError) and missing:
        return f"{where}: {missing.group(1)} needs a value for {missing.group(2)}"
    if isinstance(error, UserError):
        return f"{where}: {error}"
    return f"{where}: {type(error).__name__}: {text}"


def _is_config(filename: str, path: Path) -> bool:
    file = Path(filename)
    return file == path or ("configs" in file.parts and file.suffix == ".py")


def _fields_of(name: str) -> list[str]:
    """The fields of the dataclass of that name. Python's message gives the name only."""
    waiting: list[type] = [object]
    while waiting:
        kind = waiting.pop()
        if kind.__qualname__.split(".")[-1] == name and dataclasses.is_dataclass(kind):
            return [field.name for field in dataclasses.fields(kind) if field.init]
        if kind is not type:
            waiting.extend(kind.__subclasses__())
    return []


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Makes a folder importable for a while, as `python -m` does."""
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
