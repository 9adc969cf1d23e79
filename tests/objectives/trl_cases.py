"""The losses of TRL's trainers and what they are called here, and the data that both compute them on.

Weights of the models are drawn from the names and shapes of their tensors; stored are TRL's losses and gradients.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.batch import PairBatch, next_token_batch
from lmjax.data.preferences import Answer, Pair, pair_batch
from lmjax.objectives import Objective, reward_models
from lmjax.objectives import preferences as P
from lmjax.objectives.pairs import LogRatio
from tests.interop import cases, peft_cases

FIXTURES = Path(__file__).parent / "fixtures" / "trl.npz"
MODEL = peft_cases.MODELS["llama"]
EOS, PAD = peft_cases.VOCAB - 2, peft_cases.VOCAB - 1  # the last words; the others are plain
DIRECTIONS = 6
SCORE = "score.weight"  # TRL's reward models read scores by this tensor in place of a head
PAIRS, JUDGED, GOLD = "pairs", "judged", "gold"  # the batches
MARGINS = (0.5, 0.0, 1.0, 0.25, 0.0)
LIKED = (True, False, True, True, False)
MEAN, ALONE, ALONE_MEAN = LogRatio(mean=True), LogRatio(reference=None), LogRatio(reference=None, mean=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    trainer: TRL's.
    options: of its config.
    build: the objective of ours that is the same function.
    """

    trainer: str
    options: dict[str, Any]
    build: Callable[[], Objective]


def _dpo(build: Callable[[], Objective], loss: str = "sigmoid", **options: Any) -> Case:
    return Case("dpo", dict(loss_type=[loss]) | options, build)


def _cpo(build: Callable[[], Objective], loss: str, **options: Any) -> Case:
    return Case("cpo", dict(loss_type=loss) | options, build)


CASES: dict[str, Case] = {
    "sigmoid": _dpo(lambda: P.dpo()),
    "sigmoid, another beta": _dpo(lambda: P.dpo(0.5), beta=0.5),
    "hinge": _dpo(lambda: P.hinge(0.5), "hinge", beta=0.5),  # not all pairs are beyond it
    "ipo": _dpo(lambda: P.ipo(ratio=MEAN), "ipo"),  # TRL's is of means, `ipo()` of sums as in the paper
    "exo_pair": _dpo(lambda: P.exo(), "exo_pair", label_smoothing=1e-3),
    "nca_pair": _dpo(lambda: P.nca(), "nca_pair"),
    "robust": _dpo(lambda: P.robust_dpo(), "robust", label_smoothing=0.1),
    "bco_pair": _dpo(lambda: P.bco(), "bco_pair"),  # without a running mean of rewards
    "sppo_hard": _dpo(lambda: P.sppo(), "sppo_hard"),
    "aot": _dpo(lambda: P.aot(), "aot"),
    "aot, smoothed": _dpo(lambda: P.aot(label_smoothing=0.1), "aot", label_smoothing=0.1),
    "aot_unpaired": _dpo(lambda: P.aot(unpaired=True), "aot_unpaired"),
    "apo_zero": _dpo(lambda: P.apo_zero(), "apo_zero"),
    "apo_down": _dpo(lambda: P.apo_down(), "apo_down"),
    "discopop": _dpo(lambda: P.discopop(), "discopop"),
    "sft": _dpo(lambda: P.chosen_nll(), "sft"),
    "sigmoid_norm": _dpo(lambda: P.dpo(ratio=MEAN), "sigmoid_norm"),
    "mpo": _dpo(
        lambda: 0.8 * P.dpo() + 0.2 * P.bco() + P.chosen_nll(),
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
    ),
    "forward_kl": _dpo(lambda: P.dpo(ratio=LogRatio(divergence="forward_kl")), f_divergence_type="forward_kl"),
    "js": _dpo(lambda: P.dpo(ratio=LogRatio(divergence="js")), f_divergence_type="js_divergence"),
    "alpha": _dpo(
        lambda: P.dpo(ratio=LogRatio(divergence="alpha", alpha=0.3)),
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.3,
    ),
    "ld-dpo": _dpo(lambda: P.dpo(ratio=LogRatio(excess=0.3)), ld_alpha=0.3),
    "wpo": _dpo(lambda: P.dpo(ratio=LogRatio(weighted=True)), use_weighting=True),
    "kto": Case(
        "kto",
        dict(desirable_weight=1.2, undesirable_weight=1.5),
        lambda: P.kto(desirable_weight=1.2, undesirable_weight=1.5),
    ),
    "apo_zero_unpaired": Case("kto", dict(loss_type="apo_zero_unpaired"), lambda: P.kto(reference_point=False)),
    "cpo": _cpo(lambda: P.cpo(label_smoothing=0.1), "sigmoid", label_smoothing=0.1),
    "cpo, hinge": _cpo(lambda: P.hinge(ratio=ALONE), "hinge", cpo_alpha=0.0),
    "cpo, ipo": _cpo(lambda: P.ipo(ratio=ALONE_MEAN), "ipo", cpo_alpha=0.0),
    "simpo": _cpo(lambda: P.simpo(2.0, gamma=0.5), "simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0),
    "alphapo": _cpo(lambda: P.alphapo(2.0, gamma=0.5), "alphapo", beta=2.0, simpo_gamma=0.5, alpha=0.25),
    "orpo": Case("orpo", {}, lambda: P.orpo()),
    "tpo": Case("tpo", dict(loss_type="sigmoid"), lambda: P.tpo(mean=False)),
    "tpo-l": Case("tpo", dict(loss_type="tpo-l", tpo_l_gamma=0.4), lambda: P.tpo(gamma=0.4)),
    "reward": Case("reward", dict(center_rewards_coefficient=0.01), lambda: reward_models.bradley_terry(center=0.01)),
}


def on_streams(objective: Objective, trainer: str) -> Objective:
    """The objective on the batch that its trainer reads; TPO's gold answers have a name of their own already."""
    stream = JUDGED if trainer == "kto" else PAIRS
    return Objective(
        tuple((c, term if term.stream else dataclasses.replace(term, stream=stream)) for c, term in objective.terms)
    )


def records() -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """Prompts, and a chosen, a rejected and a gold answer to each; answers end with the marker."""
    random = np.random.RandomState(26)
    lengths = ((3, 4, 2, 3), (2, 1, 5, 4), (4, 3, 3, 2), (1, 6, 4, 1), (2, 2, 3, 5))
    draw = lambda count: random.randint(0, EOS, count).tolist()
    return [(draw(p), *(draw(n) + [EOS] for n in answers)) for p, *answers in lengths]  # type: ignore[misc]


def _answer(prompt: list[int], answer: list[int]) -> Answer:
    ids = np.array(prompt + answer, np.int32)
    return Answer(ids, np.arange(len(ids)) >= len(prompt))


def batches() -> dict[str, Any]:
    """Ours, some pairs to a row. TRL sets the answer before behind each prompt where KTO wants a stranger's."""
    pairs, judged, golden = [], [], []
    known = records()
    for number, (prompt, chosen, rejected, gold) in enumerate(known):
        pairs.append(Pair(_answer(prompt, chosen), _answer(prompt, rejected), MARGINS[number]))
        judged.append(Pair(_answer(prompt, chosen), _answer(prompt, known[number - 1][1]), liked=LIKED[number]))
        golden.append(_answer(prompt, gold))
    length = 1 + max(len(answer.ids) for answer in golden)
    ids, segments, mask = np.zeros((3, len(golden), length), np.int32)
    for row, answer in enumerate(golden):
        n = len(answer.ids)
        ids[row, :n], segments[row, :n], mask[row, :n] = answer.ids, 1, answer.learned
    rows: Callable[[list[Pair]], PairBatch] = lambda found: pair_batch([found[:2], [], found[2:]], 48)
    return {PAIRS: rows(pairs), JUDGED: rows(judged), GOLD: next_token_batch(ids, segments, mask)}


def weight(name: str, shape: tuple[int, ...], reference: bool = False) -> np.ndarray:
    """A tensor of the policy; or of the reference, which is not far from it."""
    own = cases.weight(name, shape)
    return own + 0.2 * cases.weight(f"reference.{name}", shape) if reference else own


def along_directions(name: str, gradient: np.ndarray) -> np.ndarray:
    """A tensor's gradient along random directions that its name determines, [DIRECTIONS]; every entry counts."""
    random = np.random.RandomState(zlib.crc32(f"direction.{name}".encode()))
    directions = random.standard_normal((DIRECTIONS, gradient.size))
    return directions @ np.asarray(gradient, np.float64).reshape(-1)
