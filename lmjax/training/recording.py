"""Reads the metrics of a step without holding up the next, and watches for values that are not finite."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lmjax.errors import UserError

NONFINITE = "nonfinite/"


class Recorder:
    """Turns the device arrays of each step into records of floats, one step late.

    When the metrics of step k are read, step k + 1 has been dispatched already, so that the device never
    waits for the host. Speeds are measured between such moments, without the time between `pause` and
    `resume`.

    Args:
      emit: called with (step, values) for each record.
      start: the step the run starts at.
      log_every: steps between records.
      max_skipped: updates in a row that may be skipped, 0 for any number.
      tokens_per_step: tokens of a batch; None reads the metric "tokens".
      flops_per_token: for the MFU; None leaves it out.
      peak: operations a second of all devices together; None leaves the MFU out.
    """

    def __init__(
        self,
        emit: Callable[[int, dict[str, float]], None],
        *,
        start: int,
        log_every: int,
        max_skipped: int,
        tokens_per_step: float | None = None,
        flops_per_token: float | None = None,
        peak: float | None = None,
    ) -> None:
        self._emit = emit
        self._log_every, self._max_skipped = log_every, max_skipped
        self._check_every = min(log_every, max_skipped or log_every)
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._flags: list[tuple[int, dict[str, Any]]] = []
        self._in_a_row = 0
        self._mark: tuple[int, float] | None = None  # a step that had ended, and when; none before the first compile
        self._first = start + 1
        self.skipped = 0
        self.latest: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, Any], last: bool = False) -> None:
        """Takes the metrics of a step just dispatched."""
        if self._pending is not None:
            self._read_pending()
        if self._flags and step % self._check_every == 0:
            self._check_flags()
        flags = {name[len(NONFINITE) :]: value for name, value in metrics.items() if name.startswith(NONFINITE)}
        if flags:
            self._flags.append((step, flags))
        if step % self._log_every == 0 or step == 1 or last:
            self._pending = (step, metrics)
        if step == self._first:
            # The step that compiles: nothing is gained by running ahead of it, and speeds count from its end.
            jax.block_until_ready(metrics)
            self.flush()
            self._mark = (step, time.perf_counter())

    def flush(self) -> None:
        """Reads what is still to be read, waiting for it."""
        if self._pending is not None:
            self._read_pending()
        if self._flags:
            self._check_flags()

    def resume(self, step: int) -> None:
        """Starts the clock again at the end of something that was not training."""
        self._mark = (step, time.perf_counter())

    def _read_pending(self) -> None:
        assert self._pending is not None
        step, metrics = self._pending
        self._pending = None
        fetched = jax.device_get(dict(metrics))
        values = {name: float(value) for name, value in fetched.items() if not name.startswith(NONFINITE)}
        now = time.perf_counter()
        if self._mark is not None and step > self._mark[0]:
            values["step_seconds"] = (now - self._mark[1]) / (step - self._mark[0])
            tokens = self._tokens if self._tokens is not None else values.get("tokens")
            if tokens is not None:
                values["tokens_per_second"] = tokens / values["step_seconds"]
                if self._flops is not None and self._peak is not None:
                    values["mfu"] = values["tokens_per_second"] * self._flops / self._peak
            self._mark = (step, now)
        if self.skipped:
            values["skipped"] = float(self.skipped)
        self.latest.update(values)
        self._emit(step, values)

    def _check_flags(self) -> None:
        flags, self._flags = self._flags, []
        for (step, _), values in zip(flags, jax.device_get([names for _, names in flags]), strict=True):
            bad = sorted(name for name, value in values.items() if value > 0)
            if not bad:
                self._in_a_row = 0
                continue
            self.skipped += 1
            self._in_a_row += 1
            terms = " and ".join(bad)
            if self._in_a_row == 1:
                warnings.warn(
                    f"step {step} was skipped: {terms} or its gradient was not finite",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if self._max_skipped and self._in_a_row >= self._max_skipped:
                raise UserError(
                    f"{self._in_a_row} updates in a row up to step {step} were skipped because {terms} or "
                    "its gradient was not finite: lower the learning rate, clip gradients or look at the data"
                )
