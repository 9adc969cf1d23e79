"""Rewards that can be checked: right answers, formats, lengths. Each maker gives a function of a rollout, 1.0 or 0.0.

They read the rollout's text and, where there is a right answer, a field of its prompt's record. What they cannot read
counts as wrong.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

from lmjax.errors import UserError
from lmjax.rl.arithmetic import evaluate, numbers_used
from lmjax.rl.rollouts import Rollout
from lmjax.tokenizers.base import Tokenizer

Verifier = Callable[[Rollout], float]
_NUMBER = r"[-+−]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?(?:/[0-9]+)?"
_NUMBERS = re.compile(rf"(?<![0-9.])(?=[-+−]?[0-9.])({_NUMBER})")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_HASH = re.compile(r"####[ \t]*([-+−]?[$€£]?[0-9][0-9.,]*)")
_READ = 10_000  # characters of a text, from its end, that numbers are looked for in


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
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    text = re.sub(r"^\s*([-+])\s*[$€£]", r"\1", text)
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
    text = re.sub(r"\.{2,}", " ", text[-_READ:])  # an ellipsis is no decimal point
    found = [match.group(1) for match in _NUMBERS.finditer(text)]
    return next((number for number in map(read_number, reversed(found)) if number is not None), None)


Where = Literal["last", "whole", "boxed", "hash"]


def exact_number(field: str = "answer", where: Where = "last", mark: str = "") -> Verifier:
    r"""Whether a number of the text is the right one, exactly.

    Args:
      field: of the record; a number, or a text that is one.
      where: "last": the last number; "whole": the text is the number; "boxed": in the last \boxed{}; "hash": behind
        the last "####".
      mark: only what stands behind the last of these texts is read; without one the answer is wrong. Of a mark such
        as "<answer>", only what stands before "</answer>".
    """
    if where not in ("last", "whole", "boxed", "hash"):
        raise UserError(f"a number is not read from {where!r}; there are last, whole, boxed and hash.")
    return functools.partial(_exact_number, field, where, mark)


def gsm8k(field: str = "answer", flexible: bool = False) -> Verifier:
    """GSM8K's check: the number behind the last "####" of text and answer alike, whatever follows it.

    `flexible` takes the text's last number. Numbers are compared as such: "42.0" is 42, where harnesses compare texts.

    Args:
      field: of the record: a worked solution with "####", or the number alone.
      flexible: whether the text needs no "####".
    """
    return functools.partial(_gsm8k, field, flexible)


def countdown(
    numbers: str = "numbers", target: str = "target", *, all_used: bool = False, mark: str = "", partial: float = 0.0
) -> Verifier:
    """Whether the text is an expression of + - * / over some given numbers, each at most once, that makes a target.

    Args:
      numbers, target: fields of the record: a list of numbers, and a number.
      all_used: each number must be used.
      mark: as in `exact_number`; empty: the expression is the text itself. What follows "=" or stands on later lines is
        left out.
      partial: what a proper expression that misses the target is worth (TinyZero: 0.1).
    """
    return functools.partial(_countdown, numbers, target, all_used, mark, partial)


def expression_equals(field: str = "answer", mark: str = "") -> Verifier:
    """Whether the text is an arithmetic expression whose exact value is that of the field, itself a number or one.

    Args:
      field: of the record.
      mark: as in `exact_number`.
    """
    return functools.partial(_expression_equals, field, mark)


def exact_match(field: str = "answer", *, case: bool = True) -> Verifier:
    """Whether the text, without white space around it, is the right one; `case=False` ignores capitals."""
    return functools.partial(_exact_match, field, case)


def contains(field: str = "answer") -> Verifier:
    """Whether the right answer occurs in the text."""
    return functools.partial(_contains, field)


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
    return functools.partial(_matches, compiled, whole)


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
    return functools.partial(_tagged, tags)


def length_between(least: int, most: int) -> Verifier:
    """Whether the policy said that many tokens, its end included."""
    if not 0 <= least <= most:
        raise UserError(f"lengths from {least} to {most} cannot be; give 0 or more, the smaller first.")
    return functools.partial(_length_between, least, most)


def ended() -> Verifier:
    """Whether the rollout came to its own end."""
    return _ended


def step_rewards(
    function: Callable[..., Sequence[float]],
    separator: int | str,
    field: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Callable[[Rollout], list[tuple[int, float]]]:
    """Process rewards: steps end with a token or text, and at the rollout's end; a function judges them.

    Args:
      function: (text) or, with a field, (text, field of the record) -> a number for each step, as many as there are.
      separator, tokenizer: as in `step_ends`.
      field: what else the function reads.
    """
    if isinstance(separator, str) and (not separator or tokenizer is None):
        raise UserError(f"the separator is the text {separator!r}; give one that is not empty, and the tokenizer.")
    return functools.partial(_step_rewards, function, separator, field, tokenizer)


def step_ends(rollout: Rollout, separator: int | str, tokenizer: Tokenizer | None = None) -> list[int]:
    """The index of the last token of each step: where a separator ends, or the end of the rollout.

    Args:
      rollout: of which.
      separator: the id of a token, or a text, which may begin and end within tokens.
      tokenizer: what the rollout's ids mean, for a text.
    """
    tokens = rollout.tokens.tolist()
    if isinstance(separator, str):
        assert tokenizer is not None, "a text is found with its tokenizer"
        ends = text_ends(tokens, separator, tokenizer)
    else:
        ends = [i for i, token in enumerate(tokens) if token == separator]
    last = len(tokens) - 1
    return ends if last < 0 or (ends and ends[-1] == last) else [*ends, last]


def text_ends(tokens: Sequence[int], wanted: str, tokenizer: Tokenizer) -> list[int]:
    """The indices of tokens with which a text ends, each as soon as the tokens up to it spell the text out."""
    found: list[int] = []
    text, at = tokenizer.decode(list(tokens)), 0
    while (at := text.find(wanted, at)) >= 0:
        at += len(wanted)
        end = at  # a name for the function below
        index = bisect_left(range(len(tokens)), True, key=lambda n: len(tokenizer.decode(list(tokens[: n + 1]))) >= end)
        if not found or index > found[-1]:
            found.append(index)
    return found


# Below are functions of modules, so that processes can be sent what the makers above give.


def _field(rollout: Rollout, name: str) -> Any:
    if name not in rollout.record:
        raise KeyError(f"the record has no field {name!r} (it has: {', '.join(rollout.record) or 'none'})")
    return rollout.record[name]


def _behind(text: str, mark: str) -> str:
    """What stands behind the last mark, and in tags up to the closing one; nothing where there is none."""
    if not mark:
        return text
    _, found, text = text.rpartition(mark)
    if found and re.fullmatch(r"<[^<>/]+>", mark):
        text, found, _ = text.partition("</" + mark[1:])
    return text if found else ""


def _exact_number(field: str, where: Where, mark: str, rollout: Rollout) -> float:
    right = read_number(_field(rollout, field))
    if right is None:
        raise ValueError(f"{field} is {rollout.record[field]!r}, which is no number")
    text = _behind(rollout.text, mark)
    if where == "boxed":
        boxes = _BOXED.findall(text[-_READ:])
        found = read_number(boxes[-1]) if boxes else None
    elif where == "hash":
        found = read_number(text.rpartition("####")[2].strip().split("\n")[0]) if "####" in text else None
    else:
        found = read_number(text) if where == "whole" else last_number(text)
    return float(found == right)


def _gsm8k(field: str, flexible: bool, rollout: Rollout) -> float:
    answer = str(_field(rollout, field))
    right = read_number(answer.rpartition("####")[2].strip())
    if right is None:
        raise ValueError(f"{field} is {answer!r}, which ends in no number")
    if flexible:
        return float(last_number(rollout.text) == right)
    found = _HASH.findall(rollout.text[-_READ:])
    return float(bool(found) and read_number(found[-1]) == right)


def _countdown(numbers: str, target: str, all_used: bool, mark: str, partial: float, rollout: Rollout) -> float:
    given = Counter(read_number(number) for number in _field(rollout, numbers))
    wanted = read_number(_field(rollout, target))
    if None in given or wanted is None:
        raise ValueError(f"the numbers {rollout.record[numbers]!r} or the target {rollout.record[target]!r} are none")
    text = _behind(rollout.text, mark).strip().split("\n")[0].partition("=")[0]
    used = numbers_used(text)
    if not used or any(count > given[number] for number, count in Counter(used).items()):
        return 0.0
    if "%" in text or "//" in text or (all_used and Counter(used) != given):
        return 0.0
    value = evaluate(text, powers=False)
    if value is None:
        return 0.0
    return 1.0 if value == wanted else partial


def _expression_equals(field: str, mark: str, rollout: Rollout) -> float:
    right = evaluate(str(_field(rollout, field)))
    if right is None:
        raise ValueError(f"{field} is {rollout.record[field]!r}, which is no expression")
    return float(evaluate(_behind(rollout.text, mark)) == right)


def _exact_match(field: str, case: bool, rollout: Rollout) -> float:
    said, right = rollout.text.strip(), str(_field(rollout, field)).strip()
    return float(said == right if case else said.casefold() == right.casefold())


def _contains(field: str, rollout: Rollout) -> float:
    return float(str(_field(rollout, field)) in rollout.text)


def _matches(pattern: re.Pattern[str], whole: bool, rollout: Rollout) -> float:
    return float((pattern.fullmatch if whole else pattern.search)(rollout.text) is not None)


def _tagged(tags: tuple[str, ...], rollout: Rollout) -> float:
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


def _length_between(least: int, most: int, rollout: Rollout) -> float:
    return float(least <= int(rollout.own.sum()) <= most)


def _ended(rollout: Rollout) -> float:
    return float(rollout.ended)


def _step_rewards(
    function: Callable[..., Sequence[float]],
    separator: int | str,
    field: str | None,
    tokenizer: Tokenizer | None,
    rollout: Rollout,
) -> list[tuple[int, float]]:
    ends = step_ends(rollout, separator, tokenizer)
    numbers = list(function(rollout.text, *([] if field is None else [_field(rollout, field)])))
    if len(numbers) != len(ends):
        raise ValueError(f"{len(numbers)} numbers for {len(ends)} steps")
    return list(zip(ends, numbers))
