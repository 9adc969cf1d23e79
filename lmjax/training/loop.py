"""The training loop: a plain loop over steps, with hooks at intervals, whatever the step computes.

Exit codes of a run: 0 when it ended, 143 when SIGTERM and 130 when SIGINT asked it to stop and it saved a
checkpoint at the next step boundary. Started again, it goes on from there. A second signal ends it at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lmjax.errors import UserError
from lmjax.training.checkpoint import Checkpointer
from lmjax.training.config import LoopConfig
from lmjax.training.flops import peak_flops
from lmjax.training.metrics import Writer
from lmjax.training.prefetch import Feed
from lmjax.training.progress import Progress
from lmjax.training.recording import Recorder
from lmjax.training.run_directory import RunDirectory

_PLOT_SECONDS = 60.0  # curves are drawn at evaluations, at most this often, and at the end
_COLLECT_STEPS = 5000  # garbage is collected at hooks, and this often without any


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something to do every so many steps.

    Attributes:
      every: steps between calls.
      call: (step, state) -> metrics to record, or None. It must not keep the state, which the next step
        donates.
    """

    every: int
    call: Callable[[int, Any], dict[str, float] | None]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      state: the last state.
      step: steps made since the beginning of the run.
      interrupted: "SIGTERM" or "SIGINT" if the run was asked to stop, None if it ended.
      metrics: the latest value of each metric, "validation/..." included.
    """

    state: Any
    step: int
    interrupted: str | None
    metrics: dict[str, float]

    @property
    def exit_code(self) -> int:
        """0, or 128 plus the number of the signal as shells have it."""
        return 0 if self.interrupted is None else 128 + int(signal.Signals[self.interrupted])


def resume(
    checkpointer: Checkpointer, state: Any, batches: Any, run_directory: RunDirectory | None = None
) -> tuple[Any, int]:
    """Goes on from the newest checkpoint if there is one: state, position in the data, records.

    Args:
      checkpointer: where to look.
      state: a fresh state; the structure and shardings to read into, and what is returned if there is no
        checkpoint.
      batches: an iterator; its `set_state` is called with what its `get_state` had returned.
      run_directory: its records after the checkpoint are dropped, so that no step appears twice.

    Returns:
      The state to start from, and the steps made so far.

    Raises:
      UserError: if the checkpoint is of another model, or no checkpoint can be read.
    """
    restored = checkpointer.restore(state)
    step = int(state.step) if restored is None else restored.step
    if run_directory is not None:
        run_directory.truncate(step)
    if restored is None:
        return state, step
    if restored.data_state is not None:
        if not hasattr(batches, "set_state"):
            raise UserError(
                f"the checkpoint of step {step} holds a position in the data and these batches have no "
                "set_state to go there: resume with the data the run began with"
            )
        batches.set_state(restored.data_state)
    return restored.state, step


def run(
    step_fn: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    state: Any,
    batches: Iterator[Any],
    *,
    config: LoopConfig,
    start: int | None = None,
    checkpointer: Checkpointer | None = None,
    run_directory: RunDirectory | None = None,
    writers: Sequence[Writer] = (),
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    sample: Callable[[Any], str] | None = None,
    hooks: Sequence[Hook] = (),
    sharding: Any = None,
    tokens_per_step: float | None = None,
    flops_per_token: float | None = None,
    run_config: Any = None,
    progress: bool = True,
) -> RunResult:
    """Trains to `config.steps`.

    At a step where several things are due they happen in this order: record, evaluation, sample, hooks,
    checkpoint. Metrics are read one step late; nothing waits for the device in between.

    Args:
      step_fn: (state, batch) -> (state, metrics), with metrics a flat dict of scalars on the device. It may
        donate the state. "nonfinite/<term>" > 0 says that the update was skipped because of that term.
      state: the state to start from; it is used up.
      batches: an iterator of batches; `get_state()` and `set_state()` if it can be resumed.
      config: how long, and how often.
      start: steps made so far; default `state.step`.
      checkpointer: saves at its configured interval, at the end and on a signal.
      run_directory: gets records, samples and plots.
      writers: further places for records.
      evaluate: state -> metrics, recorded as "validation/<name>"; called every `eval_every` steps, at the
        end, and at checkpoints that are ranked by a validation metric.
      sample: state -> text, called every `sample_every` steps and at the end.
      hooks: further things to do.
      sharding: where each batch goes, a `Sharding` or a function of the batch; None leaves that to the step.
      tokens_per_step: tokens in a batch, for the throughput; default the metric "tokens".
      flops_per_token: for the MFU.
      run_config: kept in each checkpoint, as JSON values; default that of the run directory.
      progress: show a bar, or lines.

    Raises:
      UserError: after `max_skipped` skipped updates in a row, or if a checkpoint cannot be written.
    """
    start = int(state.step) if start is None else start
    if run_config is None and run_directory is not None:
        run_config = run_directory.config
    peak = peak_flops()
    shown = Progress(config.steps, start, known_hardware=peak is not None) if progress else None
    everywhere: list[Writer] = [*([run_directory] if run_directory is not None else []), *writers]

    def record(step: int, values: dict[str, float]) -> None:
        for writer in everywhere:
            writer.write(step, values)

    def emit(step: int, values: dict[str, float]) -> None:
        record(step, values)
        if shown is not None:
            shown.update(step, values)

    def say(text: str) -> None:
        if shown is not None:
            shown.say(text)

    recorder = Recorder(
        emit,
        start=start,
        log_every=config.log_every,
        max_skipped=config.max_skipped,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_token,
        peak=None if peak is None else peak * jax.device_count(),
    )

    def do_evaluate(step: int, recorded: bool = True) -> None:
        assert evaluate is not None
        values = {f"validation/{name}": float(value) for name, value in evaluate(state).items()}
        recorder.latest.update(values)
        if recorded:
            record(step, values)
        say(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def do_sample(step: int) -> None:
        assert sample is not None
        text = sample(state)
        if run_directory is not None:
            run_directory.write_sample(step, text)

    def do_save(step: int, evaluated: bool) -> None:
        assert checkpointer is not None
        wanted = checkpointer.config.best_metric if checkpointer.config.keep_best and evaluated else None
        if wanted is not None and wanted not in recorder.latest:
            have = ", ".join(sorted(recorder.latest))
            raise UserError(f"checkpoint best_metric {wanted!r} is not among the metrics of this run: {have}")
        metric = None if wanted is None else recorder.latest[wanted]
        position = data_state() if callable(data_state) else data_state
        checkpointer.save(step, state, position, metric=metric, config=run_config)

    def due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    ranked = checkpointer is not None and checkpointer.config.keep_best > 0
    save_every = checkpointer.config.every if checkpointer is not None else 0
    step, saved, data_state, plotted = start, start, None, time.monotonic()
    with contextlib.ExitStack() as stack:
        if shown is not None:
            stack.callback(shown.close)
        if start >= config.steps:
            say(f"nothing to do: the run is at step {start} of {config.steps}")
            if evaluate is not None:
                do_evaluate(start, recorded=False)
            return RunResult(state, start, None, dict(recorder.latest))
        asked = stack.enter_context(_signals())
        stack.enter_context(_quiet_garbage_collector())
        feed = Feed(batches, config.prefetch, sharding)
        stack.callback(feed.close)
        while step < config.steps and not asked:
            item = next(feed, None)
            if item is None:
                say(f"the data ended after step {step} of {config.steps}")
                break
            batch, data_state = item
            state, metrics = step_fn(state, batch)
            step += 1
            last = step == config.steps
            recorder.add(step, metrics, last)
            if shown is not None:
                shown.advance(step)
            saving = due(save_every, step) and not last
            evaluating = evaluate is not None and (due(config.eval_every, step) or last or (saving and ranked))
            sampling = sample is not None and (due(config.sample_every, step) or last)
            calling = [hook for hook in hooks if due(hook.every, step)]
            if not (saving or evaluating or sampling or calling or last):
                if step % _COLLECT_STEPS == 0:
                    gc.collect()
                continue
            jax.block_until_ready(metrics)  # the clock of the steps stops here
            recorder.flush()
            if evaluating:
                do_evaluate(step)
            if sampling:
                do_sample(step)
            for hook in calling:
                if values := hook.call(step, state):
                    recorder.latest.update(values)
                    record(step, values)
            if checkpointer is not None and (saving or last):
                do_save(step, evaluating)
                saved = step
            if run_directory is not None and evaluating and time.monotonic() - plotted > _PLOT_SECONDS:
                run_directory.plot()
                plotted = time.monotonic()
            gc.collect()
            recorder.resume(step)
        recorder.flush()
        interrupted = asked[0] if asked and step < config.steps else None
        if interrupted:
            say(f"{interrupted}: stopping after step {step}" + (", saving" if checkpointer is not None else ""))
        if checkpointer is not None:
            if saved < step:
                do_save(step, evaluated=False)
            checkpointer.wait()
        if run_directory is not None:
            run_directory.plot()
    return RunResult(state, step, interrupted, dict(recorder.latest))


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """A list that gets the name of the first SIGTERM or SIGINT; the next one acts as it did before."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread is told of signals
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def handle(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        for kind in kinds:
            signal.signal(kind, before[kind])

    for kind in kinds:
        signal.signal(kind, handle)
    try:
        yield received
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


@contextlib.contextmanager
def _quiet_garbage_collector() -> Iterator[None]:
    """Keeps Python's collector from walking all of jax in the middle of a step: pauses of half a second."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
