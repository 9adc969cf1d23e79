"""Rewards: functions of rollouts, each with a weight, judged beside the device's work. Failures are counted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.errors import UserError
from lmjax.rl.rollouts import Rollout
from lmjax.rl.workers import Failure, Workers

RAISED, TIMED_OUT, NOT_A_NUMBER = "raised", "timed out", "not a number"
# How a rollout ends whose environment broke, and where in its record the reason is: no reward judges it.
FAILED, FAILURE = "failed", "environment_failure"


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward.

    Attributes:
      name: what its numbers are called.
      function: `rollout -> number`, or None where it does not apply, or a sequence of `(end, number)` for rewards of
        steps, `end` being the index of a step's last token. It may be `async`. With `together` it is
        `rollouts -> numbers`.
      weight: of its numbers in the sum.
      timeout: seconds for a rollout; of an async function, or with `apart`.
      apart: in processes of their own, which are ended when they take too long (functions of modules only).
      together: all rollouts at once, as a reward model wants them.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    timeout: float | None = None
    apart: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"the reward {self.name!r} has the weight {self.weight}; give a finite number.")
        if self.timeout is not None and self.timeout <= 0:
            raise UserError(f"the reward {self.name!r} has a timeout of {self.timeout} seconds; give more than 0.")
        waits = _is_async(self.function)
        if self.timeout is not None and not self.apart and not waits:
            raise UserError(f"the reward {self.name!r} cannot be ended within this process; set apart=True.")
        if self.together and (self.apart or waits):
            raise UserError(f"the reward {self.name!r} takes all rollouts together, so it runs here, and not async.")
        if self.apart and waits:
            raise UserError(f"the reward {self.name!r} is async, so it needs no process of its own; set apart=False.")


class Missing(NamedTuple):
    """A number that is not there, though it should be.

    Attributes:
      rollout: its place among the rollouts.
      reward: whose number; "environment" where none was asked.
      kind: "raised", "timed out", "not a number", or "failed" for an environment.
      text: what was said.
    """

    rollout: int
    reward: str
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """What rollouts were found to be worth.

    Attributes:
      names, weights: of the K rewards.
      values: float64 [K, N]; NaN where a reward does not apply or failed. Rewards of steps count by their sum.
      steps: of each rollout, the (end, weighted number) of its steps, in order.
      missing: every number that is not there because something failed. That of a likeliest answer is told once, at the
        first of its rollouts, as the reward "name/likeliest".
      given: float64 [N], what each rollout is compared with: the total of the likeliest answer to its prompt (NaN where
        there is none); None where no rollout has one.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    values: np.ndarray
    steps: tuple[tuple[tuple[int, float], ...], ...]
    missing: tuple[Missing, ...] = ()
    given: np.ndarray | None = None

    @property
    def failures(self) -> dict[tuple[str, str], tuple[int, str]]:
        """(reward, kind) -> how many, and what the first one said."""
        found: dict[tuple[str, str], tuple[int, str]] = {}
        for one in self.missing:
            count, first = found.get((one.reward, one.kind), (0, one.text))
            found[one.reward, one.kind] = count + 1, first
        return found

    @property
    def total(self) -> np.ndarray:
        """float64 [N], the weighted sum of the rewards that apply; NaN where none does."""
        weighted = np.asarray(self.weights)[:, None] * self.values
        found = np.nansum(weighted, axis=0)
        return np.where(np.isnan(self.values).all(axis=0), np.nan, found)

    def take(self, index: Sequence[int]) -> Scores:
        """Those of some rollouts, in that order."""
        missing = tuple(
            one._replace(rollout=n) for n, i in enumerate(index) for one in self.missing if one.rollout == i
        )
        steps = tuple(self.steps[i] for i in index)
        given = None if self.given is None else self.given[list(index)]
        return Scores(self.names, self.weights, self.values[:, list(index)], steps, missing, given)

    def metrics(self) -> dict[str, float]:
        """Mean and spread of the sum and of each reward, by the names that practitioners expect."""
        found = {}
        for name, values in (("reward", self.total), *zip((f"rewards/{n}" for n in self.names), self.values)):
            there = values[np.isfinite(values)]
            mean, spread = ("reward", "reward_std") if name == "reward" else (f"{name}/mean", f"{name}/std")
            found[mean] = float(there.mean()) if len(there) else 0.0
            found[spread] = float(there.std(ddof=1)) if len(there) > 1 else 0.0
        for (name, kind), (count, _) in self.failures.items():
            found[f"rewards/{name}/{kind.replace(' ', '_')}"] = float(count)
        return found

    def report(self) -> list[str]:
        """A sentence for each kind of failure."""
        found, number = [], self.values.shape[1]
        for (name, kind), (count, text) in self.failures.items():
            if kind == FAILED:
                found.append(f"the environment of {count} of {number} rollouts failed, the first: {text}")
            else:
                found.append(
                    f"the reward {name!r} of {count} of {number} rollouts is missing ({kind}), the first: {text}"
                )
        return found


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several lots of rollouts by the same rewards, one lot after the other.

    Raises:
      UserError: nothing to join, or lots that were scored by different rewards.
    """
    if len({(part.names, part.weights) for part in parts}) != 1:
        raise UserError(f"{len(parts)} lots of scores are to be joined; give at least 1, all by the same rewards.")
    missing: list[Missing] = []
    before = 0
    for part in parts:
        missing += [one._replace(rollout=before + one.rollout) for one in part.missing]
        before += part.values.shape[1]
    values = np.concatenate([part.values for part in parts], axis=1)
    steps = tuple(own for part in parts for own in part.steps)
    given = None
    if any(part.given is not None for part in parts):
        none = lambda part: np.full(part.values.shape[1], np.nan)
        given = np.concatenate([none(part) if part.given is None else part.given for part in parts])
    return Scores(parts[0].names, parts[0].weights, values, steps, tuple(missing), given)


class Judge:
    """Scores rollouts in a thread, and where rewards ask for it in processes. Close it, or use it in a `with`.

    What goes wrong is counted and told (`Scores.missing`), and the run goes on. Episodes whose environment failed are
    judged by nothing. Likeliest answers (`Rollout.likeliest`) are judged beside the rollouts.

    Args:
      rewards: at least one, of different names.
      workers: processes for rewards that are `apart`.

    Raises:
      UserError: no rewards, two of one name, or a function that cannot be sent to another process.

    >>> shorter = Reward("shorter", lambda rollout: -len(rollout.tokens))
    >>> nothing = np.zeros(2, np.float32)
    >>> said = Rollout(np.array([1]), np.array([2, 3]), 0, nothing, nothing, "eos", nothing == 0)
    >>> with Judge([shorter]) as judge:
    ...     print(judge([said])().total)
    [-2.]
    """

    def __init__(self, rewards: Sequence[Reward], workers: int = 2):
        if not rewards:
            raise UserError("there is no reward to judge rollouts by; give at least one.")
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise UserError(f"two rewards have one name among {', '.join(names)}; name each differently.")
        self.rewards = tuple(rewards)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "rewards")
        apart = {reward.name: reward.function for reward in rewards if reward.apart}
        self._workers = Workers(apart, workers) if apart else None

    def __call__(self, rollouts: Sequence[Rollout]) -> Callable[[], Scores]:
        """Begins to score; the function that is returned waits for the scores and gives them."""
        return self._thread.submit(self._compare, list(rollouts)).result

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread and the processes. What runs in a process is cut off; what runs here is waited for."""
        if self._workers is not None:
            self._workers.close()
        self._thread.shutdown(cancel_futures=True)

    def _compare(self, rollouts: list[Rollout]) -> Scores:
        """The scores of rollouts, and of the likeliest answers that they are compared with."""
        answers: dict[int, tuple[int, Rollout]] = {}  # each once, with the first of its rollouts
        for i, rollout in enumerate(rollouts):
            if rollout.likeliest is not None:
                answers.setdefault(id(rollout.likeliest), (i, rollout.likeliest))
        count, places = len(rollouts), [i for i, _ in answers.values()]
        both = self._score([*rollouts, *(answer for _, answer in answers.values())])
        if not answers:
            return both
        own, others = both.take(range(count)), both.take(range(count, count + len(answers)))
        told = (one._replace(rollout=places[one.rollout], reward=f"{one.reward}/likeliest") for one in others.missing)
        totals = dict(zip(answers, others.total))
        given = np.array([totals.get(id(rollout.likeliest), np.nan) for rollout in rollouts])
        return dataclasses.replace(own, missing=(*own.missing, *told), given=given)

    def _score(self, rollouts: list[Rollout]) -> Scores:
        values = np.full((len(self.rewards), len(rollouts)), np.nan)
        steps: list[list[tuple[int, float]]] = [[] for _ in rollouts]
        whole = [i for i, rollout in enumerate(rollouts) if rollout.finish != FAILED]
        missing = [
            Missing(i, "environment", FAILED, str(rollout.record.get(FAILURE, "it does not say why")))
            for i, rollout in enumerate(rollouts)
            if rollout.finish == FAILED
        ]
        for k, (reward, results) in enumerate(zip(self.rewards, self._results([rollouts[i] for i in whole]))):
            for i, found in zip(whole, results):
                result = _checked(found, len(rollouts[i].tokens))
                if isinstance(result, Failure):
                    missing.append(Missing(i, reward.name, *result))
                elif isinstance(result, float):
                    values[k, i] = result
                elif result is not None:
                    values[k, i] = math.fsum(number for _, number in result)
                    steps[i] += [(end, reward.weight * number) for end, number in result]
        names, weights = zip(*((reward.name, reward.weight) for reward in self.rewards))
        return Scores(names, weights, values, tuple(tuple(sorted(own)) for own in steps), tuple(missing))

    def _results(self, rollouts: list[Rollout]) -> list[list[Any]]:
        """What each reward gave for each rollout, or a failure. Processes work while the others run here."""
        found: list[list[Any]] = []
        for reward in self.rewards:
            if reward.apart:
                assert self._workers is not None
                found.append(self._workers.submit(reward.name, rollouts, reward.timeout))
            else:
                found.append([])
        for reward, results in zip(self.rewards, found):
            if reward.together:
                results += _together(reward.function, rollouts) if rollouts else []
            elif not reward.apart:
                results += [_tried(reward.function, rollout) for rollout in rollouts]
        # Async functions have only given a promise so far; all of them are waited for at once.
        waiting = [
            (results, i, reward)
            for reward, results in zip(self.rewards, found)
            for i, result in enumerate(results)
            if inspect.isawaitable(result)
        ]
        if waiting:
            promises = [(results[i], reward.timeout) for results, i, reward in waiting]
            for (results, i, _), result in zip(waiting, asyncio.run(_gathered(promises))):
                results[i] = result
        return [
            [one.result() if reward.apart else one for one in results] for reward, results in zip(self.rewards, found)
        ]


async def _gathered(promises: list[tuple[Awaitable[Any], float | None]]) -> list[Any]:
    async def one(promise: Awaitable[Any], timeout: float | None) -> Any:
        task = asyncio.ensure_future(promise)
        done, _ = await asyncio.wait([task], timeout=timeout)
        if not done:
            task.cancel()
            return Failure(TIMED_OUT, f"after {timeout} seconds")
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        return task.result() if error is None else Failure(RAISED, f"{type(error).__name__}: {error}")

    return list(await asyncio.gather(*(one(*promise) for promise in promises)))


def _is_async(function: Any) -> bool:
    """Whether it is, or wraps as `of_text` does, an async function."""
    if isinstance(function, functools.partial):
        return any(_is_async(part) for part in (function.func, *function.args))
    call = getattr(function, "__call__", None)  # noqa: B004 - an object's own is asked for
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _together(function: Callable[..., Any], rollouts: list[Rollout]) -> list[Any]:
    found = _tried(lambda given: list(function(given)), rollouts)
    if not isinstance(found, Failure) and len(found) != len(rollouts):
        found = Failure(RAISED, f"it gave {len(found)} numbers for {len(rollouts)} rollouts")
    return [found] * len(rollouts) if isinstance(found, Failure) else found


def _tried(function: Callable[..., Any], argument: Any) -> Any:
    try:
        return function(argument)
    except (Exception, SystemExit) as error:
        return Failure(RAISED, f"{type(error).__name__}: {error}")


def _checked(result: Any, length: int) -> Any:
    """A float, steps, None or a failure of what a function gave."""
    if result is None or isinstance(result, Failure):
        return result
    try:
        if np.ndim(result) == 0:
            return float(result) if math.isfinite(result) else Failure(NOT_A_NUMBER, str(result))
        steps = [(operator.index(end), float(number)) for end, number in result]
    except (TypeError, ValueError, OverflowError):
        return Failure(NOT_A_NUMBER, f"{result!r}"[:200])
    if any(not math.isfinite(number) for _, number in steps):
        return Failure(NOT_A_NUMBER, f"{steps}"[:200])
    if any(not 0 <= end < length for end, _ in steps):
        return Failure(NOT_A_NUMBER, f"a step ends outside the rollout's {length} tokens: {steps}"[:200])
    return steps


def of_text(function: Callable[..., Any], *fields: str) -> Callable[[Rollout], Any]:
    """A reward's function from one of the text, and of fields of the prompt's record.

    >>> right = of_text(lambda text, answer: float(text == answer), "answer")
    """
    return functools.partial(_of_text, function, fields)


def of_reward_model(judge: Callable[[list[np.ndarray], list[np.ndarray]], Any]) -> Callable[[Sequence[Rollout]], Any]:
    """A reward's function, `together`, from a judge of prompts and answers, as `evaluation.reward_judge` gives it."""
    return lambda rollouts: np.asarray(judge([r.prompt for r in rollouts], [r.tokens for r in rollouts]))


def _of_text(function: Callable[..., Any], fields: tuple[str, ...], rollout: Rollout) -> Any:
    return function(rollout.text, *(rollout.record[field] for field in fields))
