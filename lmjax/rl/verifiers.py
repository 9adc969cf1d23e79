"""Rewards that can be checked: right answers, formats, lengths. Each maker gives a function of a rollout, 1.0 or 0.0.

They read the rollout's text and, where there is a right answer, a field of its prompt's record. What they cannot read
counts as wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

from lmjax.errors import UserError
from lmjax.rl.arithmetic import evaluate, numbers_used
from lmjax.rl.rollouts import Rollout

Verifier = Callable[[Rollout], float]
_NUMBER = r"[-+−]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:/[0-9]+)?"
_NUMBERS = re.compile(rf"(?<![0-9.])(?=[-+−]?[0-9.])({_NUMBER})")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def read_number(text: Any) -> Fraction | None:
    r"""The number that a short text is, exactly: signs, thousands, decimals, fractions, currency and percent signs.

    >>> read_number("$1,234.50"), read_number(" 3/4. "), read_number(r"\frac{1}{2}"), read_number("12 apples")
    (Fraction(2469, 2), Fraction(3, 4), Fraction(1, 2), None)
    """
    if isinstance(text, bool) or text is None:
        return None
    if isinstance(text, int | float | Fraction):
        try:
            return Fraction(str(text))
        except ValueError:
            return None
    text = str(text)
    if len(text) > 200:
        return None
    text = _FRACTION.sub(r"\1/\2", text).replace("−", "-").replace("\\%", "").replace("\\$", "")
    text = text.lstrip("$€£*_`'\" \t\n").rstrip(".,;:!?%$€£*_`'\" \t\n")
    if not re.fullmatch(_NUMBER, text) or not re.search("[0-9]", text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def last_number(text: str) -> Fraction | None:
    """The last number in a text.

    >>> last_number("2 and 3 make 5, not 1,006.5!")
    Fraction(2013, 2)
    """
    found = [match.group(1) for match in _NUMBERS.finditer(text[-10_000:])]
    return next((number for number in map(read_number, reversed(found)) if number is not None), None)


Where = Literal["last", "whole", "boxed", "hash"]


def exact_number(field: str = "answer", where: Where = "last", mark: str = "") -> Verifier:
    r"""Whether a number of the text is the right one, exactly.

    Args:
      field: of the record; a number, or a text that is one.
      where: "last": the last number; "whole": the text is the number; "boxed": in the last \boxed{}; "hash": behind
        the last "####".
      mark: only what stands behind the last of these texts is read; without one the answer is wrong.
    """
    if where not in ("last", "whole", "boxed", "hash"):
        raise UserError(f"a number is not read from {where!r}; there are last, whole, boxed and hash.")

    def verify(rollout: Rollout) -> float:
        right = read_number(_field(rollout, field))
        if right is None:
            raise ValueError(f"{field} is {rollout.record[field]!r}, which is no number")
        text = rollout.text
        if mark:
            if mark not in text:
                return 0.0
            text = text.rpartition(mark)[2]
        if where == "boxed":
            boxes = _BOXED.findall(text[-10_000:])
            found = read_number(boxes[-1]) if boxes else None
        elif where == "hash":
            found = read_number(text.rpartition("####")[2].strip().split("\n")[0]) if "####" in text else None
        else:
            found = read_number(text) if where == "whole" else last_number(text)
        return float(found == right)

    return verify


def gsm8k(field: str = "answer", flexible: bool = False) -> Verifier:
    """GSM8K's check: the number behind "####" of text and answer alike; `flexible` takes the text's last number."""

    def verify(rollout: Rollout) -> float:
        answer = str(_field(rollout, field))
        right = read_number(answer.rpartition("####")[2].strip())
        if right is None:
            raise ValueError(f"{field} is {answer!r}, which ends in no number")
        if flexible:
            return float(last_number(rollout.text) == right)
        match = re.findall(r"####\s*([^\n]*)", rollout.text[-10_000:])
        return float(bool(match) and read_number(match[-1]) == right)

    return verify


def countdown(
    numbers: str = "numbers", target: str = "target", *, all_used: bool = False, mark: str = "", partial: float = 0.0
) -> Verifier:
    """Whether the text is an expression of + - * / over some given numbers, each at most once, that makes a target.

    Args:
      numbers, target: fields of the record: a list of numbers, and a number.
      all_used: each number must be used.
      mark: the expression is what stands behind the last of these texts; empty: the text itself. What follows "=" or
        stands on later lines is left out.
      partial: what a proper expression that misses the target is worth (TinyZero: 0.1).
    """

    def verify(rollout: Rollout) -> float:
        given = Counter(read_number(number) for number in _field(rollout, numbers))
        text = rollout.text
        if mark:
            if mark not in text:
                return 0.0
            text = text.rpartition(mark)[2]
        text = text.strip().split("\n")[0].partition("=")[0]
        used = numbers_used(text)
        if not used or any(count > given[number] for number, count in Counter(used).items()):
            return 0.0
        if all_used and Counter(used) != given:
            return 0.0
        if "%" in text or "//" in text:
            return 0.0
        value = evaluate(text, powers=False)
        if value is None:
            return 0.0
        return 1.0 if value == read_number(_field(rollout, target)) else partial

    return verify


def expression_equals(field: str = "answer") -> Verifier:
    """Whether the text is an arithmetic expression whose exact value is that of the field, itself a number or one."""

    def verify(rollout: Rollout) -> float:
        right = evaluate(str(_field(rollout, field)))
        if right is None:
            raise ValueError(f"{field} is {rollout.record[field]!r}, which is no expression")
        return float(evaluate(rollout.text) == right)

    return verify


def exact_match(field: str = "answer", *, case: bool = True) -> Verifier:
    """Whether the text, without white space around it, is the right one; `case=False` ignores capitals."""
    same = (lambda text: text.strip()) if case else (lambda text: text.strip().casefold())
    return lambda rollout: float(same(rollout.text) == same(str(_field(rollout, field))))


def contains(field: str = "answer") -> Verifier:
    """Whether the right answer occurs in the text."""
    return lambda rollout: float(str(_field(rollout, field)) in rollout.text)


def matches(pattern: str, *, whole: bool = True) -> Verifier:
    """Whether the text, all of it or some part, matches a regular expression (dots match line breaks).

    Write patterns that need no backtracking: a reward with one that does belongs `apart`, with a timeout.

    Raises:
      UserError: the pattern is none.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is no regular expression ({error}); mend it.") from None
    find = compiled.fullmatch if whole else compiled.search
    return lambda rollout: float(find(rollout.text) is not None)


def tagged(*tags: str) -> Verifier:
    """Whether the text is just `<tag>...</tag>` for each of these tags, in order, with nothing but space around them.

    >>> import numpy as np
    >>> nothing = np.zeros(0, np.float32)
    >>> said = lambda text: Rollout(nothing, nothing, 0, nothing, nothing, "eos", nothing == 0, text=text)
    >>> check = tagged("think", "answer")
    >>> check(said("<think>hm</think> <answer>4</answer>")), check(said("<answer>4</answer>"))
    (1.0, 0.0)
    """
    if not tags:
        raise UserError("there are no tags to look for; name at least one.")

    def verify(rollout: Rollout) -> float:
        rest = rollout.text.strip()
        for tag in tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if not rest.startswith(opening):
                return 0.0
            inside, found, rest = rest[len(opening) :].partition(closing)
            if not found or opening in inside:
                return 0.0
            rest = rest.lstrip()
        return float(not rest)

    return verify


def length_between(least: int, most: int) -> Verifier:
    """Whether the policy said that many tokens, its end included."""
    if not 0 <= least <= most:
        raise UserError(f"lengths from {least} to {most} cannot be; give 0 or more, the smaller first.")
    return lambda rollout: float(least <= int(rollout.own.sum()) <= most)


def ended() -> Verifier:
    """Whether the rollout came to its own end."""
    return lambda rollout: float(rollout.ended)


def step_rewards(
    function: Callable[[str, Any], Sequence[float]], separator: int, field: str | None = None
) -> Callable[[Rollout], list[tuple[int, float]]]:
    """Process rewards: steps end with a token, and at the rollout's end; a function of text and field judges them.

    Args:
      function: (text, field of the record or None) -> a number for each step, as many as there are.
      separator: the id of the token that ends a step.
      field: what else the function reads.
    """

    def reward(rollout: Rollout) -> list[tuple[int, float]]:
        ends = step_ends(rollout, separator)
        numbers = list(function(rollout.text, None if field is None else _field(rollout, field)))
        if len(numbers) != len(ends):
            raise ValueError(f"{len(numbers)} numbers for {len(ends)} steps")
        return list(zip(ends, numbers))

    return reward


def step_ends(rollout: Rollout, separator: int) -> list[int]:
    """The index of the last token of each step: a separator, or the end of the rollout."""
    ends = [i for i, token in enumerate(rollout.tokens.tolist()) if token == separator]
    last = len(rollout.tokens) - 1
    return ends if ends and ends[-1] == last else [*ends, last]


def _field(rollout: Rollout, name: str) -> Any:
    if name not in rollout.record:
        raise KeyError(f"the record has no field {name!r} (it has: {', '.join(rollout.record) or 'none'})")
    return rollout.record[name]
