"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Shows how far it is, loss, tokens/s, MFU and the time left.

    Args:
      steps: the last step.
      start: the step the run starts or resumes at.
      stream: where to write; a bar if it is a terminal, a line every ten seconds if not. Default: standard
        error.
      known_hardware: False has "MFU unknown hardware" said.
      unit: what is counted.
    """

    def __init__(
        self, steps: int, start: int = 0, *, stream: Any = None, known_hardware: bool = False, unit: str = "step"
    ) -> None:
        self._steps, self._start, self._known, self._unit = steps, start, known_hardware, unit
        self._stream = sys.stderr if stream is None else stream
        self._began = time.monotonic()
        self._last_line = -_EVERY
        self._bar: Any = None
        if self._stream.isatty():
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn(self._unit),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(file=self._stream),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("train", total=self._steps, completed=self._start, text="compiling")
        self._bar.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values of a step that was recorded."""
        text = describe(values, self._known)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last_line < _EVERY and step < self._steps:
            return
        self._last_line = now
        speed = (now - self._began) / max(step - self._start, 1)
        left = duration(speed * (self._steps - step)) if step > self._start else "-:--"
        self._print(f"{self._unit} {step}/{self._steps}  {text}  left {left}")

    def advance(self, step: int) -> None:
        """Moves the bar between records, ten times a second at most: this is called every step."""
        if self._bar is not None and time.monotonic() - self._last_line > 0.1:
            self._last_line = time.monotonic()
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def describe(values: Mapping[str, float], known_hardware: bool = True) -> str:
    """The numbers of a record that a person watches.

    >>> describe({"loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.4})
    'loss 2.5000  12,346 tokens/s  MFU 40.0 %'
    """
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in values:
            parts.append(f"MFU {100 * values['mfu']:.1f} %")
        elif not known_hardware:
            parts.append("MFU unknown hardware")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3.2), duration(75), duration(3725)
    ('0:03', '1:15', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
