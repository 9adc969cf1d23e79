"""Every logits processor beside the one of transformers that it must equal, and what the latter give.

    python -m tests.generation.make_processor_fixtures

writes their results to `fixtures/processors.npz`, which `test_processors.py` reads without torch. A new kind joins by
lines in `CASES`.

transformers sorts with `torch.sort(x)`, which beyond 16 elements leaves ties in an order of its own. Which of some tied
tokens top-p cuts then hangs on the sort's internals, so the oracle sorts stably; everything else runs as it is. No case
cuts at a sum that is a multiple of what tied rows hold (p = 0.5 on an even number of equal logits), where the
direction of the summing would decide.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from lmjax.generation import processors as p

FIXTURES = Path(__file__).parent / "fixtures" / "processors.npz"
SIZES = (1, 17, 37)  # vocabularies


@dataclasses.dataclass(frozen=True)
class Case:
    """One processor with its values.

    Attributes:
      ours: makes it for a vocabulary of V.
      theirs: makes transformers' for (its module of processors, V, length of the prompt).
    """

    ours: Callable[[int], Any]
    theirs: Callable[[Any, int, int], Any]


def _ids(V: int, *ids: int) -> list[int]:
    """Distinct ids of the vocabulary, for whatever size it has."""
    return sorted({i % V for i in ids})


def _words(V: int) -> list[list[int]]:
    return [[i % V for i in word] for word in ([9], [1, 2], [3, 1], [2, 3, 1], [1, 1, 1, 1, 1, 1], [11, 3])]


def _biases(V: int) -> dict[tuple[int, ...], float]:
    return {tuple(word): 1.5 - 0.75 * i for i, word in enumerate(_words(V))}


def _dense(V: int) -> np.ndarray:
    return np.where(np.arange(V) % 3 == 0, 0.0, np.linspace(-2, 3, V)).astype(np.float32)


def _forced(t: Any, V: int, prompt: int, place: int, ids: Sequence[int]) -> Any:
    """transformers forces a first token behind a prompt of one, and a last one; the latter serves every place."""
    if place == 0 and prompt == 1 and len(ids) == 1:
        return t.ForcedBOSTokenLogitsProcessor(ids[0])
    return t.ForcedEOSTokenLogitsProcessor(prompt + place + 1, list(ids))


def _temperature(x: float) -> Case:
    return Case(lambda V: p.temperature(x), lambda t, V, n: t.TemperatureLogitsWarper(x))


def _top_k(k: int) -> Case:
    return Case(lambda V: p.top_k(k), lambda t, V, n: t.TopKLogitsWarper(k))


def _top_p(x: float, candidates: int = 256) -> Case:
    return Case(lambda V: p.top_p(x, candidates=candidates), lambda t, V, n: t.TopPLogitsWarper(x))


def _min_p(x: float) -> Case:
    return Case(lambda V: p.min_p(x), lambda t, V, n: t.MinPLogitsWarper(x))


def _typical(x: float, candidates: int = 256) -> Case:
    return Case(lambda V: p.typical(x, candidates=candidates), lambda t, V, n: t.TypicalLogitsWarper(x))


def _epsilon(x: float) -> Case:
    return Case(lambda V: p.epsilon(x), lambda t, V, n: t.EpsilonLogitsWarper(x))


def _eta(x: float) -> Case:
    return Case(lambda V: p.eta(x), lambda t, V, n: t.EtaLogitsWarper(x))


def _repetition(x: float) -> Case:
    return Case(lambda V: p.repetition_penalty(x), lambda t, V, n: t.RepetitionPenaltyLogitsProcessor(x))


def _ngram(n: int) -> Case:
    return Case(lambda V: p.no_repeat_ngram(n), lambda t, V, _: t.NoRepeatNGramLogitsProcessor(n))


def _exponential(start: int, factor: float, *eos: int) -> Case:
    return Case(
        lambda V: p.exponential_length_penalty(start, factor, eos=_ids(V, *eos)),
        lambda t, V, n: t.ExponentialDecayLengthPenalty((start, factor), _ids(V, *eos), n),
    )


# By kind. The first of each kind stands for it in pairs and in the whole chain.
CASES: dict[str, list[Case]] = {
    "sequence_bias": [
        Case(
            lambda V: p.sequence_bias(_biases(V)),
            lambda t, V, n: t.SequenceBiasLogitsProcessor([[list(k), v] for k, v in _biases(V).items()]),
        )
    ],
    "logit_bias": [
        Case(
            lambda V: p.logit_bias({5 % V: -2.5, 3 % V: 1.5}),
            lambda t, V, n: t.SequenceBiasLogitsProcessor([[[5 % V], -2.5], [[3 % V], 1.5]]),
        ),
        Case(
            lambda V: p.logit_bias(_dense(V)),
            lambda t, V, n: t.SequenceBiasLogitsProcessor([[[i], float(x)] for i, x in enumerate(_dense(V))]),
        ),
    ],
    "repetition_penalty": [_repetition(1.3), _repetition(0.7)],
    "no_repeat_ngram": [_ngram(2), _ngram(1), _ngram(3), _ngram(12)],
    "bad_words": [
        Case(
            lambda V: p.bad_words(_words(V)),
            lambda t, V, n: t.NoBadWordsLogitsProcessor(_words(V)),
        ),
        Case(
            lambda V: p.bad_words([[2 % V], *_words(V)[1:]], eos=[2 % V]),
            lambda t, V, n: t.NoBadWordsLogitsProcessor([[2 % V], *_words(V)[1:]], [2 % V]),
        ),
    ],
    "min_length": [
        Case(lambda V: p.min_length(9, eos=2 % V), lambda t, V, n: t.MinLengthLogitsProcessor(9, 2 % V)),
        Case(
            lambda V: p.min_length(4, eos=_ids(V, 2, 8)),
            lambda t, V, n: t.MinLengthLogitsProcessor(4, _ids(V, 2, 8)),
        ),
    ],
    "min_new_tokens": [
        Case(
            lambda V: p.min_new_tokens(4, eos=_ids(V, 2, 4)),
            lambda t, V, n: t.MinNewTokensLengthLogitsProcessor(n, 4, _ids(V, 2, 4)),
        )
    ],
    "forced": [
        Case(lambda V: p.forced({0: 5 % V}), lambda t, V, n: _forced(t, V, n, 0, [5 % V])),
        Case(lambda V: p.forced({3: _ids(V, 6, 1)}), lambda t, V, n: _forced(t, V, n, 3, _ids(V, 6, 1))),
    ],
    "clean": [Case(lambda V: p.clean(), lambda t, V, n: t.InfNanRemoveLogitsProcessor())],
    # Below 2, since a cleaned -inf, raised by as much again, would overflow; fused multiplication and addition do not.
    "exponential_length_penalty": [_exponential(1, 1.1, 2), _exponential(0, 1.05, 2, 7), _exponential(3, 0.8, 2)],
    "suppress": [
        Case(
            lambda V: p.suppress(_ids(V, 3, 4)),
            lambda t, V, n: t.SuppressTokensLogitsProcessor(_ids(V, 3, 4)),
        )
    ],
    "suppress_at_start": [
        Case(
            lambda V: p.suppress_at_start(_ids(V, 3, 6)),
            lambda t, V, n: t.SuppressTokensAtBeginLogitsProcessor(_ids(V, 3, 6), n),
        ),
        Case(
            lambda V: p.suppress_at_start(_ids(V, 3, 6), start=1),
            lambda t, V, n: t.SuppressTokensAtBeginLogitsProcessor(_ids(V, 3, 6), n + 1),
        ),
    ],
    "temperature": [_temperature(0.7), _temperature(1.9)],
    "top_k": [_top_k(9), _top_k(1), _top_k(4), _top_k(64)],
    "top_p": [_top_p(0.93), _top_p(0.31), _top_p(0.77), _top_p(0.999), *(_top_p(x, 3) for x in (0.31, 0.77, 0.999))],
    "min_p": [_min_p(0.02), _min_p(0.3), _min_p(1.0)],
    "typical": [_typical(0.91), _typical(0.23), _typical(0.57), *(_typical(x, 3) for x in (0.23, 0.57, 0.91))],
    "epsilon": [_epsilon(0.01), _epsilon(0.04), _epsilon(0.3)],
    "eta": [_eta(0.02), _eta(0.1), _eta(0.5)],
}  # fmt: skip
# As transformers names them, in its order; ForcedEOS stands for both forced tokens.
THEIR_NAMES = {
    "sequence_bias": "SequenceBiasLogitsProcessor",
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
    "no_repeat_ngram": "NoRepeatNGramLogitsProcessor",
    "bad_words": "NoBadWordsLogitsProcessor",
    "min_length": "MinLengthLogitsProcessor",
    "min_new_tokens": "MinNewTokensLengthLogitsProcessor",
    "forced": "ForcedEOSTokenLogitsProcessor",
    "clean": "InfNanRemoveLogitsProcessor",
    "exponential_length_penalty": "ExponentialDecayLengthPenalty",
    "suppress": "SuppressTokensLogitsProcessor",
    "suppress_at_start": "SuppressTokensAtBeginLogitsProcessor",
    "custom": "Custom",
    "temperature": "TemperatureLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical": "TypicalLogitsWarper",
    "epsilon": "EpsilonLogitsWarper",
    "eta": "EtaLogitsWarper",
}
SINGLES = [(kind, i) for kind, cases in CASES.items() for i in range(len(cases))]
PAIRS = [(one, other) for i, one in enumerate(CASES) for other in list(CASES)[i + 1 :]]
CHAINS = (list(CASES), [kind for kind in CASES if kind not in ("clean", "typical")])


def logits(V: int) -> np.ndarray:
    """float32 [10, V]: random rows, rows with many ties, an even row, a one-hot row, rows with -inf, an empty row."""
    rng = np.random.default_rng(V)
    z = rng.normal(size=(10, V)).astype(np.float32) * 2
    z[2] = np.round(z[2])
    z[3] = np.round(z[3] * 2) / 2
    z[4] = 0.3
    z[5] = np.where(np.arange(V) == min(7, V - 1), 1.25, -np.inf)
    z[6] = np.where(np.arange(V) % 2 == 0, np.round(z[6] * 2) / 2, -np.inf)
    z[7] = np.where(np.isin(np.arange(V), _ids(V, 1, 8, 12)), z[7], -np.inf)
    z[8] *= 15
    z[9] = -np.inf
    return z


def history(V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int32 tokens [10, 14], lengths [10] and lengths of prompts [10]: few ids, so that n-grams and words recur; what
    stands behind a row's end is rubbish."""
    rng = np.random.default_rng(7)
    length = np.array([12, 14, 9, 2, 8, 7, 11, 5, 1, 6], np.int32)
    prompt = np.array([5, 13, 9, 1, 4, 1, 8, 4, 1, 6], np.int32)
    tokens = rng.integers(1, 4, (10, 14)) % V
    rubbish = np.array([-1, 2, V, -5, 2**30, 1, 3])[rng.integers(0, 7, (10, 14))]
    return np.where(np.arange(14) < length[:, None], tokens, rubbish).astype(np.int32), length, prompt


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Sorts are stable, and a row without a distribution is no error."""
    import torch

    sort = torch.sort
    validate = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with mock.patch.object(torch, "sort", lambda x, descending=False: sort(x, descending=descending, stable=True)):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(validate)


def oracle(cases: Sequence[Case], V: int, *, stable: bool = True) -> np.ndarray:
    """transformers' results, float32 [10, V]: each row by itself, with a history of its own length."""
    import torch
    from transformers.generation import logits_process

    z, (tokens, length, prompt) = logits(V), history(V)
    found = []
    with _settled() if stable else contextlib.nullcontext():
        for b in range(len(z)):
            chain = logits_process.LogitsProcessorList(case.theirs(logits_process, V, int(prompt[b])) for case in cases)
            ids = torch.from_numpy(tokens[b : b + 1, : length[b]]).long()
            found.append(chain(ids, torch.from_numpy(z[b : b + 1].copy()))[0].numpy())
    return np.stack(found)


def guidance(scale: float, V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conditional and unconditional logits [9, V], and transformers' guidance of the one by the other."""
    import torch
    from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

    conditional, unconditional = logits(V)[:9], logits(V + 1)[np.r_[1:5, 0, 1:5], :V]
    model = lambda *_, **__: type("Out", (dict,), {"logits": torch.from_numpy(unconditional)[:, None]})()
    theirs = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model)
    ids = torch.zeros((9, 1), dtype=torch.long)
    return conditional, unconditional, theirs(ids, torch.from_numpy(conditional)).numpy()


def main() -> None:
    stored: dict[str, np.ndarray] = {}
    for V in SIZES:
        stored[f"single/{V}"] = np.stack([oracle([CASES[kind][i]], V) for kind, i in SINGLES])
        stored[f"chain/{V}"] = np.stack([oracle([CASES[kind][0] for kind in chain], V) for chain in CHAINS])
    stored["pair/37"] = np.stack([oracle([CASES[kind][0] for kind in pair], 37) for pair in PAIRS])
    stored["guide/17"] = np.stack(guidance(1.5, 17))
    np.savez_compressed(FIXTURES, **stored)
    print(f"{FIXTURES}: {FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
