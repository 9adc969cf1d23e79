"""Where numbers go: `metrics.jsonl`, and TensorBoard or Weights & Biases when they are installed.

A writer has `write(step, values)` with a flat dict of floats, and `close()`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lmjax.errors import UserError


class Writer(Protocol):
    """What the loop asks of a place for metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line: {"step": 10, "loss": 2.5, ...}. A number that is not finite is written as null.

    Each line is handed to the operating system at once, so that a killed process loses none.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        clean = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardWriter:
    """Scalars for TensorBoard, through tensorboardX.

    Raises:
      UserError: if tensorboardX is not installed.
    """

    def __init__(self, directory: Path | str) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError("TensorBoard needs tensorboardX: install it with `pip install lmjax[tracking]`") from error
        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Scalars for Weights & Biases.

    Args:
      project: the project to log to.
      directory: where its local files go.
      config: the configuration of the run, as JSON values.
      name: the name of the run.

    Raises:
      UserError: if wandb is not installed.
    """

    def __init__(self, project: str, directory: Path | str, config: Any = None, name: str | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("Weights & Biases needs wandb: install it with `pip install lmjax[tracking]`") from error
        self._run = wandb.init(project=project, dir=str(directory), config=config, name=name, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order, without a last line cut short by a kill."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def truncate_metrics(path: Path | str, step: int) -> None:
    """Drops the records after `step`, so that a run resumed there writes none of them twice. Atomic."""
    path = Path(path)
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
    fresh = path.with_name(path.name + ".new")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, path)
