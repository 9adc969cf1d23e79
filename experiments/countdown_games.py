"""Countdown games, and the text from which their form and their arithmetic can be learned, but not how to win.

A game has two or three numbers and a target. It is won by an expression that uses each number once and makes the
target. An answer tries a line at a time, one step after the other, says whether that is the target, and ends with an
expression:

    8 3 5 -> 19
    8+3=11 11-5=6 no
    8*3=24 24-5=19 yes
    => (8*3)-5
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from lmjax.errors import UserError

MARK = "=>"  # the expression stands behind it
REWARD = f"countdown(all_used=True, mark='{MARK}')"
SIGNS = ("+", "-", "*")
WORDS = {2: "two", 3: "three"}
HIGHEST = 99  # of targets and of what comes of any step


@dataclasses.dataclass(frozen=True)
class Game:
    """Numbers, in the order in which they are said, and what is to be made of them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def key(self) -> Key:
        """What makes it this game and no other, in whatever order its numbers are said."""
        return tuple(sorted(self.numbers)), self.target

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} -> {self.target}\n"

    def record(self) -> dict[str, Any]:
        """As a rung reads it."""
        return {"prompt": self.prompt, "numbers": list(self.numbers), "target": self.target}


Key = tuple[tuple[int, ...], int]


@dataclasses.dataclass(frozen=True)
class Try:
    """One way to use every number.

    Attributes:
      steps: such as "8*3=24 24-5=19".
      expression: such as "(8*3)-5".
      value: what it makes.
    """

    steps: str
    expression: str
    value: int


def _steps(a: int, b: int) -> list[tuple[str, int]]:
    """Signs that may stand between two numbers, in this order, and what comes of each, from 1 to the highest."""
    found = [("+", a + b), ("-", a - b), ("*", a * b)]
    return [(sign, value) for sign, value in found if 1 <= value <= HIGHEST]


@functools.cache
def tries(numbers: tuple[int, ...]) -> tuple[Try, ...]:
    """Every way to use two or three numbers, each once.

    >>> [(found.expression, found.value) for found in tries((2, 5))]
    [('2+5', 7), ('2*5', 10), ('5+2', 7), ('5-2', 3), ('5*2', 10)]
    """
    found: dict[Try, None] = {}
    for first, second, *others in itertools.permutations(numbers):
        for sign, value in _steps(first, second):
            inner, step = f"{first}{sign}{second}", f"{first}{sign}{second}={value}"
            if not others:
                found[Try(step, inner, value)] = None
                continue
            (third,) = others
            for after, whole in _steps(value, third):
                found[Try(f"{step} {value}{after}{third}={whole}", f"({inner}){after}{third}", whole)] = None
            if third - value >= 1:  # sums and products are said in one order
                whole = third - value
                found[Try(f"{step} {third}-{value}={whole}", f"{third}-({inner})", whole)] = None
    return tuple(found)


def all_games(count: int, largest: int) -> list[Key]:
    """Every game of so many numbers from 1 to `largest` that can be won."""
    hands = itertools.combinations_with_replacement(range(1, largest + 1), count)
    return [(hand, target) for hand in hands for target in sorted({found.value for found in tries(hand)})]


def split(random: np.random.Generator, largest: int, held_out: int, two: float) -> tuple[list[Game], list[Game]]:
    """Games that are held out, a share `two` of them with two numbers, and all others.

    Raises:
      UserError: there are hardly any others.
    """
    counts = {2: round(held_out * two), 3: held_out - round(held_out * two)}
    kept: list[Game] = []
    rest: list[Game] = []
    for numbers, count in counts.items():
        games = [_said(random, key) for key in all_games(numbers, largest)]
        if count > len(games) // 2:
            raise UserError(
                f"{count} games with {WORDS[numbers]} numbers are to be held out, of {len(games)} up to {largest}; "
                "hold out fewer, at most half, or raise largest"
            )
        order = random.permutation(len(games))
        kept += [games[i] for i in order[:count]]
        rest += [games[i] for i in order[count:]]
    return [kept[i] for i in random.permutation(len(kept))], rest


def draw(random: np.random.Generator, games: Collection[Game], count: int, two: float) -> list[Game]:
    """So many of some games, a share `two` of them with two numbers; a game may come again, said in another order."""
    pools = {n: [game for game in games if len(game.numbers) == n] for n in (2, 3)}
    sizes = np.where(random.random(count) < two, 2, 3).tolist()
    return [_said(random, pools[n][int(random.integers(len(pools[n])))].key) for n in sizes]


def _said(random: np.random.Generator, key: Key) -> Game:
    return Game(tuple(random.permutation(key[0]).tolist()), key[1])


def attempt(random: np.random.Generator, game: Game, most: int) -> str:
    """An answer that tries from one to `most` ways at random and ends with the last, which is right by chance only."""
    ways = tries(tuple(sorted(game.numbers)))
    chosen = [ways[i] for i in random.permutation(len(ways))[: int(random.integers(1, most + 1))]]
    lines = [f"{way.steps} {_verdict(way.value, game.target)}" for way in chosen]
    return "\n".join([*lines, f"{MARK} {chosen[-1].expression}"])


def _verdict(value: int, target: int) -> str:
    return "yes" if value == target else "no"


def checks(random: np.random.Generator, largest: int, lines: int) -> str:
    """Single steps compared with a number, which half of them make: no game, since no numbers are given for it."""
    target = int(random.integers(1, HIGHEST + 1))
    found = [f"-> {target}"]
    while len(found) <= lines:
        a, b = int(random.integers(1, HIGHEST + 1)), int(random.integers(1, largest + 1))
        sign = str(random.choice(SIGNS))
        if random.random() < 0.5:  # a step that makes the number, backwards
            a = {"+": target - b, "-": target + b, "*": target // b}[sign]
        elif random.random() < 0.3:  # a near miss
            a = max(1, target + int(random.integers(-12, 13)))
        a, b = (b, a) if random.random() < 0.2 else (a, b)
        value = dict(_steps(a, b)).get(sign) if min(a, b) >= 1 and max(a, b) <= HIGHEST else None
        if value is not None:
            found.append(f"{a}{sign}{b}={value} {_verdict(value, target)}")
    return "\n".join(found) + "\n"


def texts(
    random: np.random.Generator, games: Iterable[Game], largest: int, most: int, lines: int = 8
) -> Iterable[dict[str, str]]:
    """Documents to pretrain on: each game with a random attempt, and after every other one some checks."""
    for number, game in enumerate(games):
        yield {"text": game.prompt + attempt(random, game, most)}
        if number % 2 == 0:
            yield {"text": checks(random, largest, lines)}
