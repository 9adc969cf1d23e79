"""Functions run in processes that can be ended: a pool for rewards that hang, crash or eat memory."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pickle
import queue
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
        self._idle: queue.Queue[Any] = queue.Queue()
        for _ in range(count):
            self._idle.put(None)
        self._threads = concurrent.futures.ThreadPoolExecutor(count, "reward-workers")

    def map(self, name: str, arguments: Sequence[Any], timeout: float | None) -> list[Any]:
        """The function of each argument, or a `Failure`. `timeout` is in seconds, for one."""
        return list(self._threads.map(lambda argument: self._run(name, argument, timeout), arguments))

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            _end(self._idle.get())

    def _run(self, name: str, argument: Any, timeout: float | None) -> Any:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start()
            _, pipe = worker
            pipe.send((name, argument))
            if not pipe.poll(timeout):
                _end(worker)
                worker = None
                return Failure("timed out", f"after {timeout} seconds")
            result = pipe.recv()
            return Failure(*result[1:]) if isinstance(result, tuple) and result and result[0] == _FAILED else result
        except (EOFError, OSError):
            _end(worker)
            worker = None
            return Failure("raised", "its process died")
        finally:
            self._idle.put(worker)

    def _start(self) -> Any:
        pipe, other = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(other, self._functions), daemon=True)
        process.start()
        other.close()
        pipe.recv()  # ready: the time a process takes to start is nobody's timeout
        return process, pipe


_FAILED = "__failed__"


def _end(worker: Any) -> None:
    if worker is not None:
        process, pipe = worker
        process.kill()
        process.join()
        pipe.close()


def _serve(pipe: Any, functions: bytes) -> None:
    """What a process does: waits for a name and an argument, answers."""
    known = pickle.loads(functions)
    pipe.send(None)
    while True:
        try:
            name, argument = pipe.recv()
        except EOFError:
            return
        try:
            result = known[name](argument)
            pickle.dumps(result)
        except BaseException as error:  # an exit of the function is no reason to end
            result = (_FAILED, "raised", f"{type(error).__name__}: {error}")
        pipe.send(result)
