"""The folder of a run: everything needed to know what was run, how it went, and to go on with it.

config.json        the configuration; config.py beside it if the run was given its text
environment.jsonl  a line for each start: versions, devices, git commit, command line
metrics.jsonl      a line for each record
plots/             curves, as PNG
samples/           what the model wrote, a text file a step
checkpoints/       see `lmjax.training.checkpoint`
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.errors import UserError
from lmjax.training.metrics import JsonlWriter, read_metrics, truncate_metrics

_PACKAGES = ("lmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


class RunDirectory:
    """The folder of a run, held by one process at a time. Make it with `RunDirectory.open`.

    Attributes:
      path: the folder.
      config: the configuration, as JSON values.
    """

    def __init__(self, path: Path, config: Any, lock: Any) -> None:
        self.path, self.config, self._lock = path, config, lock
        self._metrics = JsonlWriter(self.metrics_file)

    @classmethod
    def open(cls, path: Path | str, config: Any = None, config_text: str | None = None) -> RunDirectory:
        """Makes the folder, or goes on with it, and takes hold of it.

        An earlier configuration that differs is kept beside the new one as `config-1.json`, `config-2.json`,
        ...

        Args:
          path: the folder.
          config: a dataclass or JSON values.
          config_text: the text of the configuration file, kept as `config.py`.

        Raises:
          UserError: if the folder cannot be written to, or another process holds it.
        """
        path = Path(path).absolute()
        values = to_json(config)
        try:
            for folder in (path, path / "plots", path / "samples"):
                folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path / "lock")
            _write_keeping(path / "config.json", json.dumps(values, indent=2) + "\n")
            if config_text is not None:
                _write_keeping(path / "config.py", config_text)
            with open(path / "environment.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(environment()) + "\n")
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot write to the run directory {path} ({reason}): choose another") from error
        return cls(path, values, lock)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a record to `metrics.jsonl`."""
        self._metrics.write(step, values)

    def records(self) -> list[dict[str, Any]]:
        """The records written so far, by earlier processes too."""
        return read_metrics(self.metrics_file)

    def truncate(self, step: int) -> None:
        """Drops the records and samples after `step`: the run goes on from there."""
        self._metrics.close()
        truncate_metrics(self.metrics_file, step)
        for sample in (self.path / "samples").glob("step_*.txt"):
            if sample.stem[5:].isdigit() and int(sample.stem[5:]) > step:
                sample.unlink()

    def write_sample(self, step: int, text: str) -> Path:
        """Writes what the model wrote at a step; returns the file."""
        path = self.path / "samples" / f"step_{step:08d}.txt"
        path.write_text(text, encoding="utf-8")
        return path

    def plot(self) -> list[Path]:
        """Draws the curves of the records so far; returns the files."""
        from lmjax.training.plots import plot_run

        return plot_run(self.records(), self.path / "plots", title=self.path.name)

    def close(self) -> None:
        """Ends the hold on the folder."""
        self._metrics.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def to_json(value: Any) -> Any:
    """Dataclasses, tuples, paths, sets and NumPy scalars as JSON values; anything else as its text.

    A dataclass says its class, so that a configuration that was a choice between several can be read back.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(to_json(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return str(value)


def environment() -> dict[str, Any]:
    """What a run ran on: time, command line, versions, devices, and the git commit of the code."""
    import jax

    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": git_commit(),
    }


def git_commit(folder: Path | str | None = None) -> str | None:
    """The commit of a folder (default: this package), with "+changes" if files differ; None outside git."""
    folder = Path(folder) if folder else Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A folder that another repository merely contains, such as an installed package, has no commit of ours.
    if not git("ls-files", "--", "."):
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_keeping(path: Path, text: str) -> None:
    """Writes a file; an earlier one with another content gets a number."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (old := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(old)
    path.write_text(text, encoding="utf-8")


def take_lock(path: Path) -> Any:
    """Holds the file until it is closed or the process ends, however it ends; None without locks."""
    try:
        import fcntl
    except ImportError:
        return None
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"the run directory {path.parent} is in use by process {holder}: wait for it or choose another"
        ) from None
    except OSError:
        return file  # a file system without locks
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
