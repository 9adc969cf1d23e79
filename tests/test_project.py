"""The lock, the Makefile and the package: what a fresh machine meets first."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r'([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)(?: ; python_version (<|>=) "3\.12")?')


def _name(text: str) -> str:
    return re.split(r"[\[<>=!~; ]", text)[0].lower().replace("_", "-").replace(".", "-")


def _pins() -> dict[str, dict[str, str]]:
    """Package -> {"<" or ">=" or "": version}."""
    pins: dict[str, dict[str, str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line.startswith("#"):
            continue
        found = PIN.fullmatch(line)
        # Anything else would be a host, a hash or a path: the lock must serve behind any index.
        assert found, line
        pins.setdefault(_name(found[1]), {})[found[3] or ""] = found[2]
    return pins


@pytest.mark.parametrize("side", ["<", ">="])
def test_the_lock_pins_every_direct_dependency_on_both_sides(side):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = _pins()
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        versions = pins[_name(requirement)]
        assert "" in versions or side in versions, requirement


def test_the_lock_holds_both_ends_of_the_range():
    pins = _pins()
    assert pins["jax"]["<"] == "0.10.2" and pins["flax"]["<"] == "0.12.8"
    assert pins["jax"][">="].startswith("0.12.") and pins["flax"][">="] == "0.12.12"
    assert pins["jax"].keys() == pins["jaxlib"].keys() == {"<", ">="}


def _make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def _python(path: Path, version: str) -> Path:
    """A stand-in interpreter that answers every question with a version, and fails every check."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\nexit 1\n")
    path.chmod(0o755)
    return path


def test_an_environment_of_another_python_is_refused(tmp_path):
    before = _python(tmp_path / "venv" / "bin" / "python", "3.9.9").read_text()
    done = _make("lint", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}")
    version = "{}.{}.{}".format(*sys.version_info[:3])
    assert done.returncode == 2
    assert f"is an environment of Python 3.9.9, not of {version}" in done.stderr
    assert (tmp_path / "venv" / "bin" / "python").read_text() == before


@pytest.mark.parametrize("python", ["old", "absent"])
def test_a_python_that_will_not_do_is_named(tmp_path, python):
    path = _python(tmp_path / "old", "3.9.9") if python == "old" else tmp_path / "absent"
    done = _make("lint", f"VENV={tmp_path / 'venv'}", f"PYTHON={path}")
    assert done.returncode == 2
    assert f"PYTHON={path} is not Python 3.11 or later" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_help_lists_every_target():
    done = _make("help")
    for target in ("quickstart", "test", "lint", "typecheck", "clean"):
        assert f"make {target} " in done.stdout
