"""Functions run in processes that can be ended: a pool for rewards that hang, crash or eat memory."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import pickle
import queue
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.errors import UserError


class Failure(NamedTuple):
    """Why there is no number.

    Attributes:
      kind: "raised", "timed out" or "not a number".
      text: what was said.
    """

    kind: str
    text: str


class Workers:
    """Processes that run named functions. One that takes too long, or dies, is replaced.

    Args:
      functions: name -> function of one argument, of a module (so that another process can import it).
      count: how many processes; they are started when they are first needed.

    Raises:
      UserError: a function cannot be sent to a process.
    """

    def __init__(self, functions: Mapping[str, Callable[[Any], Any]], count: int):
        if count < 1:
            raise UserError(f"there are {count} processes for rewards; give at least 1.")
        try:
            self._functions = pickle.dumps(dict(functions))
        except Exception:
            names = ", ".join(functions)
            raise UserError(
                f"a function of {names} cannot be sent to another process, as lambdas and inner functions cannot; "
                "define it at the top of a module."
            ) from None
        self._context = multiprocessing.get_context("spawn")
        self._alive: set[Any] = set()
        self._closed = False
        self._idle: queue.Queue[Any] = queue.Queue()
        for _ in range(count):
            self._idle.put(None)
        self._threads = concurrent.futures.ThreadPoolExecutor(count, "reward-workers")

    def submit(
        self, name: str, arguments: Sequence[Any], timeout: float | None
    ) -> list[concurrent.futures.Future[Any]]:
        """Begins to work out the function of each argument; a result is a `Failure` where there is none.

        Args:
          name: of the function.
          arguments: what it is called with, one after the other.
          timeout: seconds for one of them; None for as long as it takes.
        """
        return [self._threads.submit(self._run, name, argument, timeout) for argument in arguments]

    def close(self) -> None:
        """Ends the processes, those that are at work too."""
        self._closed = True
        for process in list(self._alive):
            _kill(process)  # whoever waits for its answer hears that it died
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._end(self._idle.get())

    def _run(self, name: str, argument: Any, timeout: float | None) -> Any:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start()
                if isinstance(worker, Failure):
                    failure, worker = worker, None
                    return failure
            _, pipe = worker
            try:
                pipe.send((name, argument))
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                return Failure("raised", f"the rollout cannot be sent to another process: {error}")
            if not pipe.poll(timeout):
                worker = self._end(worker)
                return Failure("timed out", f"after {timeout} seconds")
            good, result = pipe.recv()
            return result if good else Failure("raised", result)
        except (EOFError, OSError):
            worker = self._end(worker)
            return Failure("raised", "its process died")
        except Exception as error:  # what it gave cannot be read here
            return Failure("raised", f"{type(error).__name__}: {error}")
        finally:
            self._idle.put(worker)

    def _start(self) -> Any:
        if self._closed:
            return Failure("raised", "the workers are closed")
        pipe, other = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(other, self._functions), daemon=True)
        process.start()
        self._alive.add(process)
        other.close()
        if self._closed:  # meanwhile; `close` may have missed it
            process.kill()
        try:
            failure = pipe.recv()  # ready: the time a process takes to start is nobody's timeout
        except EOFError:
            failure = "it died before it was ready"
        if failure is not None:
            self._end((process, pipe))
            return Failure("raised", f"no process could be started for it: {failure}")
        return process, pipe

    def _end(self, worker: Any) -> Any:
        """Ends a process, and gives what stands for none."""
        if worker is not None:
            process, pipe = worker
            _kill(process)
            process.join()
            pipe.close()
            self._alive.discard(process)
        return None


def _kill(process: Any) -> None:
    """Ends a process and what it started, such as a program that a reward tries out."""
    try:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own, see `_serve`
    except (AttributeError, OSError):  # where there are no groups, or it is gone
        process.kill()


def _serve(pipe: Any, functions: bytes) -> None:
    """What a process does: waits for a name and an argument, answers."""
    if hasattr(os, "setsid"):
        os.setsid()
    try:
        known = pickle.loads(functions)
        importlib.import_module("lmjax.rl.rollouts")  # or the first rollout would pay for it out of its time
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    while True:
        try:
            name, argument = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = True, known[name](argument)
            pickle.dumps(answer)
        except BaseException as error:  # an exit of the function is no reason to end
            answer = False, f"{type(error).__name__}: {error}"
        pipe.send(answer)
