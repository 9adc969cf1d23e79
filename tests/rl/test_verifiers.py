"""Verifiers: what counts as right, and texts made to break them."""

from __future__ import annotations

import dataclasses
import pickle
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmjax import rl
from lmjax.errors import UserError
from lmjax.rl import verifiers as V
from lmjax.rl.arithmetic import evaluate, numbers_used
from lmjax.tokenizers import ByteTokenizer
from tests.rl.test_rewards import said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42), ("+42.", 42), ("-1,234.50", Fraction(-2469, 2)), ("$3", 3), ("7%", 7), (" 3/4 ", Fraction(3, 4)),
        (r"\frac{1}{2}", Fraction(1, 2)), (r"-\dfrac{1}{4}", Fraction(-1, 4)), (".5", Fraction(1, 2)), ("−3", -3),
        ("-$5", -5), ("1{,}200", 1200), ("**7**", 7),
        ("1_000", None), ("12,34", None), ("1e5", None), ("٣", None), ("", None), ("--5", None), ("1/0", None),
        ("4 apples", None), ("nan", None), ("1" * 300, None), (3, 3), (0.1, Fraction(1, 10)), (None, None),
        (True, None),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert V.read_number(text) == value


def test_the_last_number():
    assert V.last_number("3 + 4 = 7.") == 7
    assert V.last_number("costs $1,000, or 2.50") == Fraction(5, 2)
    assert V.last_number("no") is None and V.last_number("...") is None
    assert V.last_number("it is...5") == 5 and V.last_number("1,2345") == 2345
    assert V.last_number("5-3") in (-3, 3)
    assert V.last_number("9" * 100_000) is None  # no digits are read for ever


@pytest.mark.parametrize(
    ("options", "text", "right"),
    [
        ({}, "so it is 12", 1.0), ({}, "12 or 13", 0.0), ({}, "", 0.0), ({"where": "whole"}, " 12.0 ", 1.0),
        ({"where": "whole"}, "it is 12", 0.0), ({"where": "boxed"}, r"\boxed{3} and \boxed{\frac{24}{2}}", 1.0),
        ({"where": "boxed"}, "12", 0.0), ({"where": "hash"}, "13\n#### 12\nbye", 1.0), ({"where": "hash"}, "12", 0.0),
        ({"mark": "A:"}, "12 A: 12", 1.0), ({"mark": "A:"}, "12", 0.0), ({"mark": "A:"}, "12 A: no", 0.0),
    ],
)  # fmt: skip
def test_exact_numbers(options, text, right):
    assert V.exact_number(**options)(said(text, answer="12")) == right


# Texts whose right answer is 1200: what verl's strict and flexible checks give, and lmjax too.
HARNESS = {
    "5 * 240\n#### 1200": (1.0, 1.0), "#### 1,200 dollars": (1.0, 0.0), "#### 1,200": (1.0, 0.0),
    "it is 1200": (0.0, 1.0),
    "#### -1200": (0.0, 0.0), "1200 or 12": (0.0, 0.0), "": (0.0, 0.0), "#### ": (0.0, 0.0), "####1200": (0.0, 1.0),
    "#### 12\n#### 1200": (1.0, 1.0), "#### 1200\n#### 12": (0.0, 0.0), "so . 1200 .": (0.0, 1.0),
}  # fmt: skip
# Where lmjax reads numbers that verl compares as texts, or asks for less white space.
READ_AS_NUMBERS = {("#### 1,200 dollars", 1), ("#### 1,200", 1), ("####1200", 0)}


@pytest.mark.parametrize("text", HARNESS)
def test_gsm8k_as_in_the_harness(text):
    for kind, flexible in enumerate((False, True)):
        found = V.gsm8k(flexible=flexible)(said(text, answer="...\n#### 1200"))
        assert found == (1.0 if (text, kind) in READ_AS_NUMBERS else HARNESS[text][kind])


@pytest.mark.reference
def test_the_harness():
    harness = pytest.importorskip("verl.utils.reward_score.gsm8k", reason="verl is not installed")
    for text, expected in HARNESS.items():
        found = tuple(float(harness.compute_score(text, "1200", method)) for method in ("strict", "flexible"))
        assert found == expected, text


@pytest.mark.reference
def test_penalties_beside_trl():
    trl = pytest.importorskip("trl.rewards", reason="TRL is not installed")
    lengths = range(1, 16)
    expected = trl.get_soft_overlong_punishment(10, 4)([[1] * n for n in lengths])
    assert [rl.overlong(10, 4)(said(tokens=n)) for n in lengths] == pytest.approx(expected)
    texts = ["<think>a</think> b", "b", "<think>a", "<think>a</think>", "<think>a<think>b</think>c", " <think></think>"]
    theirs = trl.think_format_reward([[{"content": text}] for text in texts])
    format_ = V.matches(r"<think>(?!.*<think>).*?</think>.*")
    assert [format_(said(text)) for text in texts] == theirs
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 3, n) for n in range(12)]
    said_ids = [dataclasses.replace(said(tokens=len(some)), tokens=some) for some in ids]
    theirs = trl.get_repetition_penalty_reward(3, -2.0)([some.tolist() for some in ids])
    assert [rl.repetition(3, 2.0)(rollout) for rollout in said_ids] == pytest.approx(theirs)


@pytest.mark.reference
def test_cosine_lengths_beside_trl():
    trl = pytest.importorskip("trl.rewards.accuracy_rewards", reason="TRL is not installed")
    pytest.importorskip("math_verify", reason="TRL's reward needs math_verify")
    theirs = trl.get_cosine_scaled_reward(8, -2.0, -0.25, 0.1, 3.0)
    ours = rl.cosine_length(V.exact_number(where="boxed"), 8, (3.0, 0.1), (-2.0, -0.25))
    for text in (r"\boxed{4}", r"\boxed{5}"):
        for n in range(1, 12):
            expected = theirs([[{"content": text}]], ["4"], [[1] * n])
            assert [ours(said(text, tokens=n, answer=4))] == pytest.approx(expected)


def test_gsm8k():
    answer = "He has 5.\n#### 1,200"
    assert V.gsm8k()(said("...\n#### 1200", answer=answer)) == 1.0
    assert V.gsm8k()(said("it is 1200", answer=answer)) == 0.0
    assert V.gsm8k(flexible=True)(said("it is $1,200.", answer=answer)) == 1.0
    assert V.gsm8k()(said("#### 1,200 dollars", answer=answer)) == 1.0
    assert V.gsm8k()(said("#### twelve 1200", answer=answer)) == 0.0
    with pytest.raises(ValueError, match="no number"):
        V.gsm8k()(said("1", answer="none"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3*(4-2)+6", 1.0), ("(4-2)*6", 1.0), ("6*4/2", 1.0), ("6+6", 0.0), ("12", 0.0), ("2+4", 0.1), ("6*2=12", 1.0),
        ("3*4", 1.0), ("6*2\nor so", 1.0), ("", 0.0), ("six", 0.0), ("6**2", 0.0), ("2//2", 0.0), ("24/2", 0.0),
        ("((((6*2))))", 1.0), ("(" * 100_000 + "6", 0.0), ("6*2)", 0.0), ("6 * 2 # yes", 0.0), ("6 2", 0.0),
    ],
)  # fmt: skip
def test_countdown(text, value):
    assert V.countdown(partial=0.1)(said(text, numbers=[2, 4, 6, 3], target=12)) == value


def test_countdown_with_every_number_and_a_mark():
    check = V.countdown(all_used=True, mark="=>")
    assert check(said("=> 2*6", numbers=[2, 6], target=12)) == 1.0
    assert check(said("=> 12", numbers=[12, 6], target=12)) == 0.0
    assert check(said("2*6", numbers=[2, 6], target=12)) == 0.0
    assert V.countdown()(said("3+3", numbers=[3, 3], target=6)) == 1.0
    assert V.countdown()(said("3+3", numbers=[3, 4], target=6)) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9", "1" * 1_000_000, "(" * 100_000 + "1" + ")" * 100_000, "1/0", "0**-1", "2**0.5", "x", "(1).real",
        "1 if 1 else 2", "[1]", "1,2", "1==1", "'a'", "1_000", "٣+1", "", "   ", "1 << 70", "~1", "1j", "5 % 0",
        "2**64*2**64**64", "__import__('os').system('ls')", "10**64**64",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic(text):
    assert evaluate(text) is None


def test_decimals_are_what_is_written():
    assert evaluate("0.1 + 0.2") == Fraction(3, 10) and evaluate(".5 * 2.") == 1
    assert evaluate("1.00000000000000000000001") != 1  # to a float it is


def test_deep_signs_and_long_sums_are_fine_or_refused_but_never_raise():
    assert evaluate("-" * 100 + "5") == 5
    assert evaluate("+".join(["1"] * 400)) in (400, None)
    assert evaluate("-" * 900 + "5") is None or evaluate("-" * 900 + "5") == 5


def expressions() -> st.SearchStrategy[str]:
    numbers = st.integers(0, 99).map(str)
    grow = lambda inner: st.builds("({}{}{})".format, inner, st.sampled_from("+-*/"), inner)
    return st.recursive(numbers, grow, max_leaves=8)


@hypothesis.given(expressions())
@hypothesis.settings(deadline=None, max_examples=200)
def test_values_are_exact(text):
    import re

    try:
        expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))
    except ZeroDivisionError:
        expected = None
    assert evaluate(text) == expected
    assert numbers_used(text) == [Fraction(number) for number in re.findall(r"\d+", text)]


def test_other_verifiers():
    assert V.exact_match()(said(" yes\n", answer="yes")) == 1.0 and V.exact_match()(said("Yes", answer="yes")) == 0.0
    assert V.exact_match(case=False)(said("Yes", answer="yes")) == 1.0
    assert V.contains()(said("oh yes!", answer="yes")) == 1.0
    assert V.matches(r"a+b")(said("aab")) == 1.0 and V.matches(r"a+b")(said("aabc")) == 0.0
    assert V.matches("b.c", whole=False)(said("ab\ncd")) == 1.0
    assert V.expression_equals()(said("2*3", answer="6")) == 1.0 and V.expression_equals()(said("x", answer="6")) == 0.0
    check = V.tagged("think", "answer")
    good = "<think>a</think>\n<answer>b</answer>"
    texts = {good: 1.0, good + "x": 0.0, "<think><think>a</think><answer>b</answer>": 0.0, "<answer>b</answer>": 0.0}
    assert [check(said(text)) for text in texts] == list(texts.values())
    assert V.length_between(2, 4)(said(tokens=4)) == 1.0 and V.length_between(2, 4)(said(tokens=5)) == 0.0
    assert V.ended()(said(finish="length")) == 0.0


def test_steps_end_at_separators():
    assert V.step_ends(said(tokens=5), 2) == [2, 4] and V.step_ends(said(tokens=5), 4) == [4]
    judge = lambda text, answer: [float(step == answer) for step in text.split(";")]
    assert V.step_rewards(judge, 2, "answer")(said("a;b", tokens=5, answer="b")) == [(2, 0.0), (4, 1.0)]
    with pytest.raises(ValueError, match="1 numbers for 2 steps"):
        V.step_rewards(judge, 2, "answer")(said("a", tokens=5, answer="b"))


def test_steps_end_where_a_text_does():
    rollout = said(tokens=0)
    ids = ByteTokenizer().encode("é\n\n\u00fcber\n\nend")
    rollout = dataclasses.replace(rollout, tokens=np.array(ids), own=np.ones(len(ids), bool))
    assert V.step_ends(rollout, "\n\n", ByteTokenizer()) == [3, 10, 13]
    pairs = Pairs()  # a separator may end within a token, and two may end within one
    assert V.text_ends([0, 1, 2, 3], ";", pairs) == [0, 2, 3]
    assert V.text_ends([1, 1], ";", pairs) == []
    with pytest.raises(UserError, match="tokenizer"):
        V.step_rewards(lambda text: [1.0], "\n")


class Pairs(ByteTokenizer):
    """Tokens of two letters."""

    def decode(self, ids: Any, *options: Any, **more: Any) -> str:
        return "".join(["a;", "bc", ";;", "d;"][i] for i in ids)


def test_verifiers_can_be_sent_to_processes():
    made = [
        V.exact_number(), V.gsm8k(), V.countdown(), V.expression_equals(), V.exact_match(), V.contains(),
        V.matches("a"), V.tagged("a"), V.length_between(0, 1), V.ended(), rl.cosine_length(V.ended(), 4),
        V.step_rewards(len, 1), rl.repetition(),
    ]  # fmt: skip
    rollout = said("12", answer="12", numbers=[12], target=12)
    for function in made[:-2]:
        assert pickle.loads(pickle.dumps(function))(rollout) == function(rollout)
    assert [pickle.loads(pickle.dumps(function)).args for function in made[-2:]] == [f.args for f in made[-2:]]


def test_marks_that_are_tags_end_at_the_closing_tag():
    check = V.countdown(mark="<answer>")
    given = {"numbers": [2, 6], "target": 12}
    assert check(said("<think>6/2</think><answer> 2*6 = 12 </answer>.", **given)) == 1.0
    assert check(said("<answer>2*6", **given)) == 0.0
    assert check(said("<answer>6</answer> <answer>(2 * 6)</answer>", **given)) == 1.0
    assert V.exact_number(mark="<answer>")(said("<answer>12</answer> or 13", answer=12)) == 1.0
    assert V.expression_equals(mark="=>")(said("it is => 2*3", answer="6")) == 1.0
    with pytest.raises(ValueError, match="are none"):
        check(said("6", numbers=["six"], target=1))


def test_repetition():
    repeats = rl.repetition(2)
    ids = lambda *some: dataclasses.replace(said(tokens=len(some)), tokens=np.array(some))
    heard = dataclasses.replace(ids(5, 5, 5, 5), own=np.array([True, True, False, False]))  # others may repeat
    assert repeats(heard) == 0.0
    assert [repeats(ids(1, 2, 3, 4)), repeats(ids(5, 5, 5, 5, 5)), repeats(ids(1))] == [0.0, -0.75, 0.0]


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: rl.repetition(0), "at least 1"),
        (lambda: rl.cosine_length(V.ended(), 0), "at least 1"),
        (lambda: V.exact_number(where="first"), "'first'"),
        (lambda: V.matches("("), "no regular expression"),
        (lambda: V.tagged(), "no tags"),
        (lambda: V.length_between(5, 4), "cannot be"),
    ],
)
def test_verifiers_that_cannot_be(build: Any, sentence: str):
    with pytest.raises(UserError, match=sentence):
        build()


def test_a_field_that_is_missing_is_named():
    with pytest.raises(KeyError, match="no field 'answer'"):
        V.exact_number()(said("1"))
