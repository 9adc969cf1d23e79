"""Penalties: rewards for how a rollout was said, not what. No end, too long, the same again, short where right."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import numpy as np

from lmjax.errors import UserError
from lmjax.rl.rollouts import Rollout

Penalty = Callable[[Rollout], Any]  # a number, None where it does not apply, or a promise of either
MissingEnd = Literal["subtract", "replace"]


def without_end(function: Callable[[Rollout], Any], penalty: float, how: MissingEnd = "subtract") -> Penalty:
    """A reward less a penalty where a rollout has no end ("subtract": TRL), or -penalty in its place ("replace": N+).

    Args:
      function: rollout -> number, or None where it does not apply; it may be async.
      penalty: not negative.
      how: "subtract" or "replace".
    """
    if penalty < 0 or how not in ("subtract", "replace"):
        raise UserError(f"the penalty is {penalty} and the rule {how!r}; give 0 or more, and subtract or replace.")
    return functools.partial(_without_end, function, penalty, how)


def overlong(limit: int, buffer: int, factor: float = 1.0) -> Penalty:
    """DAPO's soft penalty (arXiv:2503.14476), in tokens: 0 up to limit - buffer, then down to -factor at the limit.

    >>> nothing = np.zeros(9, np.float32)
    >>> overlong(10, 4)(Rollout(np.array([1]), np.arange(9), 0, nothing, nothing, "eos", nothing == 0))
    -0.75
    """
    if not 0 < buffer <= limit:
        raise UserError(f"the buffer is {buffer} and the limit {limit}; give a buffer from 1 up to the limit.")

    return functools.partial(_overlong, limit, buffer, factor)


def repetition(length: int = 3, penalty: float = 1.0) -> Penalty:
    """A penalty for saying the same again: the share of n-grams of tokens that are repeats (arXiv:2502.03373, C.2).

    `-penalty (1 - different / all)`; 0 for a rollout that is shorter than one n-gram.

    Args:
      length: n, of the n-grams.
      penalty: what a rollout that only repeats itself comes close to.
    """
    if length < 1 or penalty < 0:
        raise UserError(f"the length is {length} and the penalty {penalty}; give at least 1, and 0 or more.")
    return functools.partial(_repetition, length, penalty)


RIGHT, WRONG = (1.0, 0.5), (-1.0, -0.5)


def cosine_length(
    function: Callable[[Rollout], float | None],
    limit: int,
    right: tuple[float, float] = RIGHT,
    wrong: tuple[float, float] = WRONG,
) -> Penalty:
    """A verifier's verdict by length, along half a cosine: right ones better short, wrong ones better long.

    `b + (a - b) / 2 (1 + cos(pi min(n / limit, 1)))`, n the policy's tokens, (a, b) what a rollout is worth without
    length and at the limit (Yeo et al., arXiv:2502.03373, C.1).

    Args:
      function: a verifier: 1 or more is right, less is wrong, None does not apply.
      limit: tokens, from which length changes nothing.
      right, wrong: the (a, b) of either.

    >>> nothing = np.zeros(5, np.float32)
    >>> said = Rollout(np.array([1]), np.arange(5), 0, nothing, nothing, "eos", nothing == 0)
    >>> cosine_length(lambda rollout: 1.0, 10)(said), cosine_length(lambda rollout: 0.0, 10)(said)
    (0.75, -0.75)
    """
    if limit < 1 or not np.isfinite([*right, *wrong]).all():
        raise UserError(f"the limit is {limit}, right {right}, wrong {wrong}; give at least 1, and finite numbers.")
    return functools.partial(_cosine_length, function, limit, right, wrong)


# Below are functions of modules, so that processes can be sent what the makers above give.


def _without_end(function: Callable[[Rollout], Any], penalty: float, how: MissingEnd, rollout: Rollout) -> Any:
    if rollout.ended:
        return function(rollout)
    if how == "replace":
        return -penalty
    found = function(rollout)
    if inspect.isawaitable(found):
        return _less(found, penalty)
    return None if found is None else found - penalty


async def _less(promise: Awaitable[Any], penalty: float) -> Any:
    found = await promise
    return None if found is None else found - penalty


def _overlong(limit: int, buffer: int, factor: float, rollout: Rollout) -> float:
    beyond = int(rollout.own.sum()) - (limit - buffer)
    return -factor * min(max(beyond / buffer, 0.0), 1.0)


def _repetition(length: int, penalty: float, rollout: Rollout) -> float:
    ids = rollout.tokens[rollout.own].tolist()
    grams = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return -penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def _cosine_length(
    function: Callable[[Rollout], float | None],
    limit: int,
    right: tuple[float, float],
    wrong: tuple[float, float],
    rollout: Rollout,
) -> float | None:
    verdict = function(rollout)
    if verdict is None:
        return None
    first, last = right if verdict >= 1 else wrong
    share = min(int(rollout.own.sum()) / limit, 1.0)
    return last + (first - last) / 2 * (1 + math.cos(math.pi * share))
