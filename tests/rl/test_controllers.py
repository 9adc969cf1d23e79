"""Controllers: the libraries' own, step by step."""

from __future__ import annotations

import importlib.util
import inspect
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmjax import rl

KLS = np.array([6.0, 7.1, 30.0, 0.0, -2.0, 5.5, 6.3, 12.0])
ENTROPIES = np.array([0.5, 0.3, 0.19, 0.2, 0.1, 0.05, 0.21, 0.4, 0.2, 0.15, 0.9])

# What verl 0.9.1 and OpenRLHF 0.11.2 make of 0.15 under KLS, 512 rollouts at a time, with target 6 and horizon 10,000.
FOLLOWED = [0.15, 0.15140800, 0.15295842, 0.15139212, 0.14984187, 0.14920254, 0.14958450, 0.15111624]
# What TRL 1.16 applies at each step under ENTROPIES, from 0.1 by 0.3 towards 0.2.
APPLIED = [0.0, 0.0, 0.0, 0.3, 0.6, 0.9, 1.0, 0.0, 0.0, 0.7, 1.0]


def ours_kl() -> list[float]:
    controller, seen = rl.AdaptiveKL(0.15), []
    for kl in KLS.tolist():
        controller.update(kl, 512)
        seen.append(controller.coefficient)
    return seen


def ours_entropy() -> list[float]:
    controller, applied = rl.AdaptiveEntropy(0.2, 0.1, step=0.3), []
    for entropy in ENTROPIES.tolist():
        applied.append(controller.coefficient)
        controller.update(entropy)
    return applied


def test_entropy_is_followed():
    np.testing.assert_allclose(ours_entropy(), APPLIED, atol=1e-9)


def test_kl_is_followed():
    np.testing.assert_allclose(ours_kl(), FOLLOWED, rtol=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("library", "module"), [("verl", "trainer/ppo/core_algos.py"), ("openrlhf", "trainer/ppo_utils/kl_controller.py")]
)
def test_kl_is_followed_as_the_libraries_do(library, module):
    found = importlib.util.find_spec(library)
    if found is None or found.origin is None:
        pytest.skip(f"runs {library}'s AdaptiveKLController (pip install {library})")
    source = Path(found.origin).parent / module
    text = "class AdaptiveKL" + source.read_text().partition("class AdaptiveKL")[2].partition("\nclass ")[0]
    names: dict[str, Any] = {"np": np}
    exec(text, names)
    theirs, seen = names["AdaptiveKLController"](0.15, 6.0, 10_000), []
    for kl in KLS:
        theirs.update(kl, 512)
        seen.append(theirs.value)
    np.testing.assert_allclose(ours_kl(), seen, rtol=1e-12)


@pytest.mark.reference
def test_entropy_is_followed_as_trl_does():
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="runs TRL's own lines (pip install trl)")
    source = inspect.getsource(grpo_trainer.GRPOTrainer)
    lines = lambda first, last: textwrap.dedent(
        source[source.rindex("\n", 0, source.index(first)) + 1 : source.index(last, source.index(first))]
        .rpartition("\n")[0]
    )  # fmt: skip
    apply = lines("if self.use_adaptive_entropy:\n                apply_coef", "loss = loss - apply_coef")
    update = lines("if world_entropy <= self.args.entropy_target", "self._last_world_entropy = world_entropy")
    args = SimpleNamespace(entropy_target=0.2, entropy_coef_delta=0.3, entropy_coef_min=0.0, entropy_coef_max=1.0)
    theirs = SimpleNamespace(use_adaptive_entropy=True, entropy_coef=0.1, _last_world_entropy=float("inf"), args=args)
    applied = []
    for entropy in ENTROPIES.tolist():
        names: dict[str, Any] = {"self": theirs, "world_entropy": entropy}
        exec(apply, names)
        applied.append(names["apply_coef"])
        exec(update, names)
        theirs._last_world_entropy = entropy
    np.testing.assert_allclose(ours_entropy(), applied, atol=1e-12)
