"""Patterns that choose layers by their path."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

Patterns = str | Sequence[str]


def matches(path: str, patterns: Patterns) -> bool:
    """Whether a path, or its end, matches one of the patterns of `fnmatch`.

    >>> [matches("layer_3/attention/query", p) for p in ("query", "attention/*", "layer_3/*", "layer_[0-2]/*")]
    [True, True, True, False]
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(path, f"*/{p}") for p in patterns)
