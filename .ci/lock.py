"""Writes requirements.lock: what a fresh install of `.[test]` resolves to, on each of the Pythons given.

  python .ci/lock.py python3.11 python3.13

The first interpreter stands for Python < 3.12, where jax ends at 0.10.2; the second for every later one. Only
names and versions are written, no hosts and no hashes, so the lock serves behind any package index.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLD, NEW = 'python_version < "3.12"', 'python_version >= "3.12"'


def frozen(python: str) -> dict[str, str]:
    """The versions that a fresh environment gets, by package name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own = f"{folder}/bin/python"
        subprocess.run([own, "-m", "pip", "install", "--quiet", "-e", ".[test]"], cwd=ROOT, check=True)
        freeze = [
            own,
            "-m",
            "pip",
            "freeze",
            "--exclude-editable",
            "--exclude",
            "setuptools",
            "--exclude",
            "pip",
        ]
        lines = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout.split()
    pins = dict(line.split("==") for line in lines)
    # A local part (2.0+cpu) names a build, which another index need not have.
    return {name: version.split("+")[0] for name, version in pins.items()}


def merge(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """One line a pin, with a marker where the two environments differ."""
    lines = []
    for name in sorted(old.keys() | new.keys(), key=str.lower):
        if old.get(name) == new.get(name):
            lines.append(f"{name}=={old[name]}")
            continue
        lines += [
            f"{name}=={pins[name]} ; {marker}" for pins, marker in ((old, OLD), (new, NEW)) if name in pins
        ]
    return lines


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    pins = merge(frozen(sys.argv[1]), frozen(sys.argv[2]))
    header = ["# Made by .ci/lock.py. Constraints: pip install -c requirements.lock -e '.[test]'"]
    (ROOT / "requirements.lock").write_text("\n".join(header + pins) + "\n")


if __name__ == "__main__":
    main()
