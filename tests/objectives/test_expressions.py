"""Objectives as text."""

from __future__ import annotations

import pytest

import lmjax as lm
from lmjax.errors import UserError
from lmjax.objectives import parse_objective


def test_an_expression_is_what_it_says():
    found = parse_objective(
        "dpo(beta=0.2, ratio=LogRatio(mean=True)) + 0.2 * chosen_nll() - kl('reference', estimator='k3') / 4"
        " + 0.1 * cross_entropy().on('pretrain').named('lm')"
    )
    terms = [(c, t.name, t.roles, t.stream) for c, t in found.terms]
    assert terms == [
        (1.0, "dpo", ("reference",), None),
        (0.2, "chosen_nll", (), None),
        (-0.25, "kl_reference", ("reference",), None),
        (0.1, "lm", (), "pretrain"),
    ]
    assert parse_objective("0.5 * gdpo((3, 4))").terms[0][0] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpoo()", "did you mean dpo"),
        ("dpo", "not understood"),
        ("0.1", "is no term"),
        ("dpo(", "is no expression"),
        ("dpo(gamma=1)", "does not work"),
        ("__import__('os').system('true')", "not understood"),
        ("dpo() + 1", "cannot be computed"),
        ("[x for x in ()]", "not understood"),
        ("dpo().__class__", "not understood"),
        ("dpo(**{})", "not understood"),
        ("evaluate()", "there is no term 'evaluate'"),
        ("dpo(label_smoothing=0.7)", "below one half"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_objective(text)


def test_every_term_can_be_named():
    for name in ("cross_entropy", "dpo", "kto", "bradley_terry", "entropy"):
        assert isinstance(parse_objective(f"{name}()"), lm.objectives.Objective)
