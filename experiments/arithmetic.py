"""Made-up arithmetic: text and code to pretrain on, worked solutions, preferences between solutions, questions.

A question has three numbers and two signs; a solution takes one step at a time:

    Q: 3+8-5=?
    A: 3+8=11, 11-5=6 => 6
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

MARK = "=>"  # the answer stands behind it
REWARD = f"exact_number(where='whole', mark='{MARK}')"


@dataclasses.dataclass(frozen=True)
class Question:
    """`a first b second c`, each sign + or -."""

    a: int
    first: str
    b: int
    second: str
    c: int

    @property
    def middle(self) -> int:
        """What comes of the first step."""
        return apply(self.a, self.first, self.b)

    @property
    def answer(self) -> int:
        """What comes of both."""
        return apply(self.middle, self.second, self.c)

    @property
    def prompt(self) -> str:
        return f"Q: {self.a}{self.first}{self.b}{self.second}{self.c}=?\nA: "

    def solution(self, middle: int | None = None, answer: int | None = None) -> str:
        """The steps and the answer; with other numbers in their place, a wrong one.

        >>> Question(3, "+", 8, "-", 5).solution()
        '3+8=11, 11-5=6 => 6'
        """
        middle = self.middle if middle is None else middle
        answer = apply(middle, self.second, self.c) if answer is None else answer
        return f"{self.a}{self.first}{self.b}={middle}, {middle}{self.second}{self.c}={answer} {MARK} {answer}"


def apply(a: int, sign: str, b: int) -> int:
    """a + b or a - b."""
    return a + b if sign == "+" else a - b


def question(random: np.random.Generator, largest: int) -> Question:
    """A question about numbers from 1 to `largest`."""
    a, b, c = random.integers(1, largest + 1, 3).tolist()
    first, second = random.choice(["+", "-"], 2).tolist()
    return Question(a, first, b, second, c)


def questions(random: np.random.Generator, count: int, largest: int, but: Iterable[Question] = ()) -> list[Question]:
    """Different questions, none of them among others."""
    found: dict[Question, None] = {}
    others = set(but)
    while len(found) < count:
        new = question(random, largest)
        if new not in others:
            found[new] = None
    return list(found)


def text(random: np.random.Generator, largest: int, lines: int, wrong: float) -> str:
    """Sums and differences as they stand in text and in code, some share of them wrong, and things said twice."""
    found = []
    for _ in range(lines):
        if random.random() < 0.25:
            said = question(random, largest)
            words = f"{said.a}{said.first}{said.b}{said.second}{said.c}"
            found.append(f"echo {words}\n{words}")
            continue
        a, b = int(random.integers(-largest, 2 * largest + 1)), int(random.integers(1, largest + 1))
        sign = str(random.choice(["+", "-"]))
        value = apply(a, sign, b) + (int(random.integers(-3, 4)) if random.random() < wrong else 0)
        if random.random() < 0.7:
            found.append(f"{a}{sign}{b}={value}")
        else:
            found.append(f"x = {a} {sign} {b}\nprint(x)  # {value}")
    return "\n".join(found) + "\n"


def preference(random: np.random.Generator, asked: Question) -> dict[str, Any]:
    """A right solution, and one with a wrong step."""
    off = int(random.choice([-3, -2, -1, 1, 2, 3]))
    middle, answer = asked.middle, asked.answer
    wrong = asked.solution(middle + off) if random.random() < 0.5 else asked.solution(middle, answer + off)
    return {"prompt": asked.prompt, "chosen": asked.solution(), "rejected": wrong}


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> str:
    """Writes JSON lines, and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)
