"""What the benchmarks share: the machine they ran on, and where their results go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")


def machine() -> dict[str, Any]:
    """Processor, cores, and versions of what is installed."""
    info = Path("/proc/cpuinfo")
    model = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of a benchmark, its docstring as help."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--run-dir", type=Path, help="write DIR/results.jsonl in place of docs/benchmarks")
    return found


def report(result: dict[str, Any], name: str, run_dir: Path | None) -> None:
    """Prints one result as a JSON line and appends it to the benchmark's file."""
    line = json.dumps(result | {"machine": machine(), "date": time.strftime("%Y-%m-%d")})
    print(line, flush=True)
    path = Path("docs/benchmarks") / f"{name}.jsonl" if run_dir is None else run_dir / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")
