"""Every ```python block of README and docs/ runs, in order, one namespace a file; so do all doctests."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
WITH_DOCTESTS = sorted(path for path in (ROOT / "lmjax").rglob("*.py") if ">>> " in path.read_text())
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def _blocks(text: str) -> list[tuple[str, str, int]]:
    """The language, the code and the line number of each fenced block."""
    return [(m[1].strip(), m[2], text[: m.start(2)].count("\n")) for m in FENCE.finditer(text)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__document__"}
    for language, code, line in _blocks(document.read_text()):
        # A tag such as `python no-run` would be a way around this test.
        assert not language.startswith("python") or language == "python", f"line {line}: tag {language!r}"
        if language == "python":
            exec(compile("\n" * line + code, str(document), "exec"), namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_hold(document):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_doctests(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0, "see the captured output"
    assert result.attempted > 0


def test_every_public_docstring_example_is_collected():
    # A `>>>` in a comment would be taken for an example; this keeps the filter honest.
    for path in WITH_DOCTESTS:
        tree = ast.parse(path.read_text())
        kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        assert any(">>> " in (ast.get_docstring(node) or "") for node in nodes), path
