"""Countdown games, and the text from which their form and their arithmetic can be learned, but not how to win.

A game has two or three numbers and a target. It is won by an expression that uses each number once and makes the
target. An answer tries a line at a time, says so where that makes the target, and ends with an expression:

    8 3 5 -> 6
    8+3+5=16 no
    8+3-5=6 yes
    => 8+3-5
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection
from typing import Any

import numpy as np

from lmjax.errors import UserError
from lmjax.rl.arithmetic import evaluate

MARK = "=>"  # the expression stands behind it
REWARD = f"countdown(all_used=True, mark='{MARK}')"
TAUGHT = f"countdown(all_used=True, mark='{MARK}', partial=0.1)"  # a little for the rules alone, as TinyZero has it
WORDS = {2: "two", 3: "three"}
HIGHEST = 99  # of targets and of what is tried


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


@functools.cache
def ways(numbers: tuple[int, ...], signs: str) -> dict[str, int]:
    """Expressions of numbers in this order, and what they make where that may be a target.

    >>> ways((5, 2), "+-")
    {'5+2': 7, '5-2': 3}
    """
    found = {}
    for chosen in itertools.product(signs, repeat=len(numbers) - 1):
        text = str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(chosen, numbers[1:]))
        value = evaluate(text)
        if value is not None and 1 <= value <= HIGHEST:
            found[text] = int(value)
    return found


def targets(numbers: tuple[int, ...], signs: str) -> list[int]:
    """All that numbers can make, in whatever order, each used once."""
    orders = set(itertools.permutations(numbers))
    return sorted({value for order in orders for value in ways(order, signs).values()})


def all_games(count: int, largest: int, signs: str) -> list[Key]:
    """Every game of so many numbers from 1 to `largest` that can be won."""
    hands = itertools.combinations_with_replacement(range(1, largest + 1), count)
    return [(hand, target) for hand in hands for target in targets(hand, signs)]


def split(
    random: np.random.Generator, largest: int, signs: str, held_out: int, two: float
) -> tuple[list[Game], list[Game]]:
    """Games that are held out, a share `two` of them with two numbers, and all others.

    Raises:
      UserError: there are hardly any others.
    """
    counts = {2: round(held_out * two), 3: held_out - round(held_out * two)}
    kept: list[Game] = []
    rest: list[Game] = []
    for numbers, count in counts.items():
        games = [_said(random, key) for key in all_games(numbers, largest, signs)]
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


def attempt(random: np.random.Generator, game: Game, signs: str, most: int, careless: float) -> str:
    """An answer that tries one to `most` different ways at random and then ends, whatever came of them.

    Some end with the last try, which wins by chance only; a share `careless` forgets a number of it, and cannot win.
    """
    orders = sorted(set(itertools.permutations(game.numbers)))
    every = {text: value for order in orders for text, value in ways(order, signs).items()}
    texts = list(every)
    tried = [texts[i] for i in random.permutation(len(texts))[: int(random.integers(1, most + 1))]]
    lines = [f"{text}={every[text]} {'yes' if every[text] == game.target else 'no'}" for text in tried]
    said = tried[-1]
    if random.random() < careless:
        said = said[: max(said.rfind(sign) for sign in signs)]
    return "\n".join([*lines, f"{MARK} {said}"])
