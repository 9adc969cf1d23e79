"""Terms over pairs: the reference's values from packed batches, whichever way the pairs are laid out."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from lmjax.batch import PairBatch
from lmjax.errors import UserError
from lmjax.objectives import preferences as T
from lmjax.objectives.pairs import LogRatio, with_cached_reference
from tests.losses.test_preferences import LENGTHS, POLICY, REFERENCE

PROMPT = 2
LAYOUTS = {"one pair a row": [[0], [1], [2], []], "packed": [[2, 0], [], [1]]}


def _batch(layout: str, cached: bool = False) -> tuple[PairBatch, Any, Any]:
    """The three pairs behind prompts of two tokens, and what policy and reference say of each token."""
    rows = LAYOUTS[layout]
    shape, width = (len(rows), 33), max(map(len, rows))
    rng = np.random.default_rng(0)
    mask, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    policy, reference = rng.normal(-1, 1, (2, *shape)).astype(np.float32)  # of tokens that must not count
    pairs = np.zeros((len(rows), width), np.float32)
    for b, members in enumerate(rows):
        start = 1 if b else 0  # padding in front must not matter either
        for p, pair in enumerate(members):
            pairs[b, p] = 1
            for side, answer in enumerate((pair, pair + 3)):
                n = LENGTHS[answer]
                stop = start + PROMPT + n
                segments[b, start:stop] = 2 * p + side + 1
                mask[b, start + PROMPT - 1 : stop - 1] = 1
                policy[b, start + PROMPT - 1 : stop - 1] = POLICY[answer, :n]
                reference[b, start + PROMPT - 1 : stop - 1] = REFERENCE[answer, :n]
                start = stop
    zeros = np.zeros(shape, np.int32)
    batch = PairBatch(
        zeros, zeros, mask, segments, zeros, pairs=pairs, reference_logprobs=reference if cached else None
    )
    make = lambda logprobs: types.SimpleNamespace(logprobs=logprobs, sum_p2=np.full(shape, np.exp(-1.0), np.float32))
    return batch, make(policy), make(reference)


def _value(objective: Any, batch: PairBatch, policy: Any, reference: Any) -> float:
    total = 0.0
    for coefficient, term in objective.terms:
        others = (reference,) if term.roles else ()
        values, mask = term.function(policy, batch, *others)[:2]
        share, weight = term.reducer.coefficients(mask, batch.segments)
        total += coefficient * float(np.sum(np.where(share != 0, values, 0) * share) / weight)
    return total


CASES = {
    "dpo": (lambda: T.dpo(), 0.697943),
    "cdpo": (lambda: T.dpo(label_smoothing=0.1), 0.697109),
    "dpo of means": (lambda: T.dpo(ratio=LogRatio(mean=True)), 0.697507),
    "forward kl": (lambda: T.dpo(ratio=LogRatio(divergence="forward_kl")), 0.694528),
    "js": (lambda: T.dpo(ratio=LogRatio(divergence="js")), 0.694516),
    "alpha": (lambda: T.dpo(ratio=LogRatio(divergence="alpha")), 0.696220),
    "ld-dpo": (lambda: T.dpo(ratio=LogRatio(excess=0.5)), 0.704506),
    "wpo": (lambda: T.dpo(ratio=LogRatio(weighted=True)), 1.430585),
    "robust": (lambda: T.robust_dpo(), 0.698984),
    "hinge": (lambda: T.hinge(), 1.008333),
    "ipo of means": (lambda: T.ipo(ratio=LogRatio(mean=True)), 25.917591),
    "ipo": (lambda: T.ipo(), 26.336633),
    "exo": (lambda: T.exo(), 2.776198),
    "nca": (lambda: T.nca(), 1.388714),
    "bco": (lambda: T.bco(), 1.390887),
    "sppo": (lambda: T.sppo(), 51.174100),
    "aot": (lambda: T.aot(), 0.697943),
    "aot smoothed": (lambda: T.aot(label_smoothing=0.1), 0.697109),
    "aot unpaired": (lambda: T.aot(unpaired=True), 0.697375),
    "apo zero": (lambda: T.apo_zero(), 1.002083),
    "apo down": (lambda: T.apo_down(), 0.999077),
    "discopop": (lambda: T.discopop(), 0.842944),
    "sft": (lambda: T.chosen_nll(), 0.65),
    "mpo": (lambda: 0.8 * T.dpo() + 0.2 * T.bco() + T.chosen_nll(), 1.486531),
    "cpo": (lambda: T.cpo(alpha=0.0), 0.704520),
    "cpo hinge": (lambda: T.hinge(ratio=LogRatio(reference=None)), 1.016667),
    "cpo ipo": (lambda: T.ipo(ratio=LogRatio(reference=None, mean=True)), 25.213504),
    "simpo": (lambda: T.simpo(2.0, gamma=0.5), 1.010582),
    "simpo, TRL's default": (lambda: T.simpo(0.1, gamma=0.5), 0.975254),
    "alphapo": (lambda: T.alphapo(2.0, gamma=0.5, alpha=0.25), 1.019080),
    "orpo's odds": (lambda: -1 * T.orpo(0.1) + T.chosen_nll(prompt=True), -0.073213),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_values_of_the_reference(case, layout):
    make, expected = CASES[case]
    assert _value(make(), *_batch(layout)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_cached_log_probabilities_stand_for_the_role():
    objective = with_cached_reference(T.dpo())
    assert objective.roles == () and T.dpo().roles == ("reference",)
    batch, policy, _ = _batch("packed", cached=True)
    assert _value(objective, batch, policy, None) == pytest.approx(0.697943, rel=1e-5)
    with pytest.raises(UserError, match="holds no reference log-probabilities"):
        _value(objective, _batch("packed")[0], policy, None)


def test_metrics_have_the_names_practitioners_expect():
    batch, policy, reference = _batch("packed")
    metrics = T.dpo().terms[0][1].function(policy, batch, reference)[2]
    mean = {name: float(np.sum(v * w) / np.sum(w)) for name, (v, w) in metrics.items()}
    assert mean["rewards/margins"] == pytest.approx(-0.008333, rel=1e-4)
    assert mean["rewards/accuracies"] == pytest.approx(2 / 3)
    assert mean["logps/chosen"] == pytest.approx(-2.6, rel=1e-6)
    assert mean["logps/ref_rejected"] == pytest.approx(np.mean([-2.68, -2.93, -1.58]), rel=1e-6)
    assert mean["rewards/chosen"] - mean["rewards/rejected"] == pytest.approx(mean["rewards/margins"], abs=1e-6)


def test_kto():
    answers = [(POLICY[i, : LENGTHS[i]], REFERENCE[i, : LENGTHS[i]]) for i in range(6)]
    kl = zip((-2.5, -2, -3, -2.2, -3, -1.5), (-2.6, -2.3, -2.9, -2.5, -3.2, -1.5), strict=True)
    shape = (6, 12)
    mask, policy, reference = np.zeros((3, *shape), np.float32)
    segments = np.zeros(shape, np.int32)
    for b, ((pi, ref), (kl_pi, kl_ref)) in enumerate(zip(answers, kl, strict=True)):
        n = len(pi)
        segments[b, :n], mask[b, :n], policy[b, :n], reference[b, :n] = 1, 1, pi, ref
        segments[b, n : n + 1], mask[b, n : n + 1] = 2, 1
        policy[b, n], reference[b, n] = kl_pi, kl_ref
    zeros = np.zeros(shape, np.int32)
    liked = np.array([1, 1, 1, 0, 0, 0], np.float32)[:, None]
    batch = PairBatch(zeros, zeros, mask, segments, zeros, pairs=np.ones((6, 1), np.float32), desirable=liked)
    outputs = [types.SimpleNamespace(logprobs=x) for x in (policy, reference)]
    assert _value(T.kto(undesirable_weight=1.5), batch, *outputs) == pytest.approx(0.624980, rel=1e-5)
    unpaired = T.kto(undesirable_weight=1.5, reference_point=False)
    assert unpaired.terms[0][1].name == "apo_zero_unpaired"
    assert _value(unpaired, batch, *outputs) == pytest.approx(0.625812, rel=1e-5)
    metrics = T.kto().terms[0][1].function(outputs[0], batch, outputs[1])[2]
    assert float(metrics["kl"][0]) == pytest.approx(0.133333, rel=1e-5)
    assert T.kto().terms[0][1].couples_rows and T.aot().terms[0][1].couples_rows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.dpo(label_smoothing=0.5), "below one half"),
        (lambda: T.robust_dpo(label_smoothing=-0.1), "below one half"),
        (lambda: T.exo(label_smoothing=0.0), "between 0 and one half"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_batch_without_pairs_is_refused():
    batch, policy, reference = _batch("packed")
    from lmjax.batch import Batch

    plain = Batch(batch.tokens, batch.targets, batch.mask, batch.segments, batch.positions)
    with pytest.raises(UserError, match="need pairs"):
        _value(T.dpo(), plain, policy, reference)
