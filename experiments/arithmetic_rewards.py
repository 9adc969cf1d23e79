"""Rewards of made-up arithmetic step by step: `--rewards experiments/arithmetic_rewards.py:steps`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from experiments import arithmetic
from lmjax.rl import verifiers
from lmjax.rl.rollouts import Rollout
from lmjax.tokenizers import ByteTokenizer

STEPS = 3  # of a right solution: two sums, and the answer
_QUESTION = re.compile(r"Q: (\d+)([-+])(\d+)([-+])(\d+)=\?\n")
_BYTES = ByteTokenizer("<s>", "</s>", "<pad>")  # special tokens of whatever model: their ids follow those of bytes


def steps(rollout: Rollout) -> Sequence[tuple[int, float]]:
    """A reward for each step of a rollout of bytes: steps end with "," and "=>", and at the end of the rollout.

    Each is worth 1 where it is right and in its place, and 0 otherwise: the first sum, the second with what the first
    step said, so that one mistake is counted once, and the answer.
    """
    match = _QUESTION.match(rollout.record["prompt"])
    if match is None:
        raise ValueError(f"the prompt {rollout.record['prompt']!r} is no question of made-up arithmetic")
    a, first, b, second, c = match.groups()
    asked = arithmetic.Question(int(a), first, int(b), second, int(c))
    return list(zip(*judged(rollout, asked)))


def judged(rollout: Rollout, asked: arithmetic.Question) -> tuple[list[int], list[float]]:
    """The index of each step's last token, and what the step is worth."""
    tokens = rollout.tokens.tolist()
    marks = {end: mark for mark in (",", arithmetic.MARK) for end in verifiers.text_ends(tokens, mark, _BYTES)}
    ends = sorted({*marks, len(tokens) - 1}) if tokens else []
    found, begins, said = [], 0, None
    for number, end in enumerate(ends):
        mark = marks.get(end, "")
        text = _BYTES.decode([token for token in tokens[begins : end + 1] if token < 256]).removesuffix(mark).strip()
        begins = end + 1
        if number == 0 and mark == ",":
            left, _, value = text.partition("=")
            said = _whole(value)
            found.append(float(left == f"{asked.a}{asked.first}{asked.b}" and said == asked.middle))
        elif number == 1 and mark == arithmetic.MARK and said is not None:
            left, _, value = text.partition("=")
            right = left == f"{said}{asked.second}{asked.c}" and _whole(value) == arithmetic.apply(
                said, asked.second, asked.c
            )
            found.append(float(right))
        else:
            last = mark == "" and number > 0 and marks[ends[number - 1]] == arithmetic.MARK
            found.append(float(last and _whole(text) == asked.answer))
    return ends, found


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else None
