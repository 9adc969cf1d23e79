"""What comparisons share: a line in a file for each run, means over seeds with their intervals, tables, pictures.

A comparison that was interrupted goes on where it stopped: runs whose line is there are not made again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmjax.errors import UserError

T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom, from 0

Trial = dict[str, Any]
Line = dict[str, Any]


class Trials:
    """The runs of a comparison, a line each in the `trials.jsonl` of its folder; to be used in a `with`.

    Args:
      run_dir: the folder; None: a new one in `runs`.
      name: of the comparison, for that.
      config: of the comparison, a dataclass; it is written as `config.json`.

    Raises:
      UserError: the folder cannot be made, or holds a comparison with other settings.
    """

    def __init__(self, run_dir: str | None, name: str, config: Any):
        self.folder = Path(run_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}): choose another --run-dir") from error
        said, lines = self.folder / "config.json", self.folder / "trials.jsonl"
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        if said.exists() and said.read_text() != text:
            raise UserError(f"{self.folder} holds a comparison with other settings; choose another --run-dir")
        said.write_text(text)
        self._known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        self._file = lines.open("a")
        self._began = time.monotonic()

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    @property
    def took(self) -> float:
        """Seconds since it was opened."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        """Prints a line, with the seconds that have gone by."""
        print(f"{self.took:6.0f}s  {text}", flush=True)

    def ask(self, label: Mapping[str, Any], make: Callable[[], Trial], told: bool = True) -> Trial:
        """The trial of a label, made and written down where it is not known; its `seconds` are those of making it.

        Args:
          label: what tells it from all others.
          make: gives its numbers.
          told: its numbers are printed when they are made.
        """
        known = next((old for old in self._known if all(old.get(key) == label[key] for key in label)), None)
        if known is not None:
            return known
        began = time.monotonic()
        trial = dict(label) | make()
        trial["seconds"] = round(time.monotonic() - began, 2)
        self._file.write(json.dumps(trial) + "\n")
        self._file.flush()
        self._known.append(trial)
        if told:
            numbers = "  ".join(f"{k} {v:.3f}" for k, v in trial.items() if isinstance(v, float) and k not in label)
            self.say(f"{' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in label.values())}: {numbers}")
        return trial


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean of some runs and half the width of its 95 % interval (Student's t); NaN of a single run.

    >>> mean, half = mean_and_half([2.0, 3.0, 4.0])
    >>> mean, round(half, 3)
    (3.0, 2.484)
    """
    count = len(values)
    spread = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return statistics.mean(values), T_95[min(count, 10) - 1] * spread


def summary(trials: Sequence[Trial], by: Sequence[str] = ("task", "method", "strength")) -> list[Line]:
    """A line for each group of trials that differ in their seed alone: of every number the mean, and as
    `<name>_interval` half its 95 % interval.

    >>> runs = [dict(method="m", seed=s, reward=2.0 + s, curve=[1, 2]) for s in range(3)]
    >>> summary(runs, by=("method",))
    [{'method': 'm', 'seeds': 3, 'reward': 3.0, 'reward_interval': 2.484...}]
    """
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial[name] for name in by), []).append(trial)
    lines = []
    for label, members in groups.items():
        line: Line = dict(zip(by, label)) | {"seeds": len(members)}
        for name, value in members[0].items():
            if name not in (*by, "seed") and isinstance(value, int | float):
                line[name], line[f"{name}_interval"] = mean_and_half([trial[name] for trial in members])
        lines.append(line)
    return lines


def cell(line: Line, name: str, digits: int = 3) -> str:
    """A number of a line and half its interval, where there is one, as a table shows them.

    >>> cell({"kl": 2.0, "kl_interval": 0.25}, "kl", 2), cell({"kl": 2.0, "kl_interval": math.nan}, "kl", 2)
    ('2.00 ± 0.25', '2.00')
    """
    half = line[f"{name}_interval"]
    return f"{line[name]:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def half(line: Line, name: str) -> float:
    """Half the interval of a number; 0 of a single run, as error bars want it."""
    width: float = line[f"{name}_interval"]
    return width if math.isfinite(width) else 0.0


def points(axes: Any, lines: Sequence[Line], x: str, y: str, **style: Any) -> None:
    """Draws numbers of lines against others, both with their intervals, joined in the order of the lines."""
    style = {"markersize": 5, "capsize": 2, "linewidth": 1.2, "elinewidth": 0.8} | style
    axes.errorbar(
        [line[x] for line in lines],
        [line[y] for line in lines],
        xerr=[half(line, x) for line in lines],
        yerr=[half(line, y) for line in lines],
        **style,
    )


def new_figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure, and its panels beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(1, panels, squeeze=False)[0]
    for axes in found:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, found


def saved(figure: Any, path: Path) -> Path:
    """Writes a figure, and says where."""
    figure.savefig(path, dpi=130)
    return path
