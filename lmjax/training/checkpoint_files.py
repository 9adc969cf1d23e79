"""What lies in a folder of checkpoints, read without Orbax: names, completeness, metadata, retention.

A checkpoint is a folder `step_00001000` that Orbax writes under another name and renames when everything is
in it.
Inside: `state` (arrays), `data/metadata` (JSON, the position in the data), `meta/metadata` (JSON, see
  `read_metadata`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.errors import UserError

_NAME = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"step_\d+\.(orbax-checkpoint-tmp.*|deleting)")


def step_folder(directory: Path | str, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return Path(directory) / f"step_{step:08d}"


def steps(directory: Path | str) -> list[int]:
    """The steps of the complete checkpoints in a folder, in order; [] if there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = (_NAME.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def read_json(directory: Path | str, step: int, item: str) -> Any:
    """An item `data` or `meta` of a checkpoint. Raises OSError or ValueError if missing or damaged."""
    return json.loads((step_folder(directory, step) / item / "metadata").read_text())


def pick_step(directory: Path | str, step: int | str | None = None) -> int:
    """A step among the complete checkpoints: the newest for None, the best by its metric for "best".

    Raises:
      UserError: if there is no such checkpoint.
    """
    present = steps(directory)
    if not present:
        raise UserError(f"there is no checkpoint in {directory}: give the folder of a run that has saved one")
    if step is None:
        return present[-1]
    if step == "best":
        ranked = by_metric(directory, present)
        if not ranked:
            raise UserError(f"no checkpoint in {directory} has a metric to be best by: ask for a step instead")
        return ranked[0]
    if step not in present:
        have = ", ".join(map(str, present))
        raise UserError(f"there is no checkpoint of step {step} in {directory}: choose one of {have}")
    return int(step)


def read_metadata(directory: Path | str, step: int | str | None = None) -> dict[str, Any]:
    """What a checkpoint says of itself, without reading its arrays or importing jax.

    Args:
      directory: the folder that holds the checkpoints.
      step: None for the newest, "best", or a step.

    Returns:
      step; config (what the run was given); metric and best_mode; lmjax (version); leaves, a dict from the
      path of each leaf, such as "variables/params/embed/embedding", to [dtype, shape].

    Raises:
      UserError: if there is no such checkpoint, or its metadata cannot be read.
    """
    step = pick_step(directory, step)
    try:
        return read_json(directory, step, "meta")
    except (OSError, ValueError) as error:
        folder = step_folder(directory, step)
        raise UserError(f"checkpoint {folder} is damaged ({error}): remove it to use an earlier one") from error


def by_metric(directory: Path | str, among: list[int]) -> list[int]:
    """Those of the steps that have a metric, best first, the newer first among equals."""
    scored = []
    for step in among:
        try:
            meta = read_json(directory, step, "meta")
        except (OSError, ValueError):
            continue
        if meta.get("metric") is not None:
            scored.append((meta["metric"] * (1 if meta["best_mode"] == "min" else -1), -step))
    return [-negative for _, negative in sorted(scored)]


def prune(directory: Path | str, keep_last: int, keep_best: int) -> list[int]:
    """Removes all but the newest `keep_last` and the best `keep_best`; returns the steps removed."""
    present = steps(directory)
    keep = {*present[-keep_last:], *by_metric(directory, present)[:keep_best]}
    removed = [step for step in present if step not in keep]
    for step in removed:
        folder = step_folder(directory, step)
        # First out of sight in one operation: a checkpoint half removed must not look like a whole one.
        doomed = folder.rename(folder.with_name(folder.name + ".deleting"))
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def remove_leftovers(directory: Path | str) -> None:
    """Removes what a killed process left behind: checkpoints half written or half removed."""
    for entry in Path(directory).iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def compare_leaves(there: Mapping[str, Any], here: Mapping[str, Any], name: str) -> None:
    """Refuses a checkpoint whose leaves are not those of the run that wants to read it.

    Args:
      there: path -> [dtype, shape] of the checkpoint.
      here: the same of this run.
      name: the checkpoint, for the message.

    Raises:
      UserError: naming the first leaf that differs, what it is there and here, and the mend.
    """
    paths = [*here, *(path for path in there if path not in here)]
    for path in sorted(paths, key=lambda path: not path.startswith("variables")):  # the model first
        old, new = there.get(path), here.get(path)
        if old is not None and new is not None and [old[0], list(old[1])] == [new[0], list(new[1])]:
            continue
        kind = {"opt_state": "optimizer", "ema": "moving average"}.get(path.split("/")[0], "model")
        raise UserError(
            f"checkpoint {name} is of another {kind}: leaf {path} is {_describe(old)} there and "
            f"{_describe(new)} here; start in a new run directory, or use the {kind} configuration that the "
            "checkpoint was made with"
        )


def _describe(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf[0]}[{','.join(map(str, leaf[1]))}]"
