"""Submodules and names that are imported when first used, so that `import lmjax` costs next to nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, submodules: Sequence[str] = (), names: Mapping[str, Sequence[str]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Builds `__getattr__`, `__dir__` and `__all__` for a package (PEP 562).

    Args:
      package: the package's `__name__`.
      submodules: names that resolve to `package.<name>` itself.
      names: for each submodule, the names it lends to the package.
    """
    home = {name: module for module, exported in (names or {}).items() for name in exported}
    everything = sorted({*submodules, *home})

    def __getattr__(name: str) -> Any:
        if name in home:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__, lambda: everything, everything
