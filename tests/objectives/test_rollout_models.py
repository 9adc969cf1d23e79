"""Terms over rollouts give TRL's and verl's losses through a whole model: the gradient of every parameter."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import interop
from lmjax.objectives import evaluate
from tests.interop import cases
from tests.objectives import model_cases, trl_cases
from tests.objectives.model_cases import CASES
from tests.objectives.test_trl import _about, _loaded, _tensors
from tests.objectives.trl_cases import SCORE

TOLERANCE = 1e-5  # of the loss, and of the gradient's largest number
CANCELLED = 2e-6  # of a loss: it is a mean of numbers of size 1 to 4 and of both signs, in float32
KINDS = {"off policy": (False, True), "on policy": (True, True), "without tools": (False, False)}


def _kind(name: str) -> str:
    if CASES[name].options.get("on_policy"):
        return "on policy"
    return "without tools" if CASES[name].trainer == "rloo" else "off policy"


@functools.cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(model_cases.FIXTURES) as found:
        return dict(found)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> its loss, and its gradient by the names of transformers: one program for all of a kind."""
    about = _about()
    folder = tmp_path_factory.mktemp("model")
    config, variables = interop.load_huggingface(cases.write_directory(folder, about["config"], about["shapes"]))
    drawn = {name: trl_cases.weight(name, tuple(shape), reference=True) for name, shape in about["shapes"].items()}
    roles = {"reference": _loaded(folder / "reference", about["config"], drawn)}
    score = trl_cases.weight(SCORE, (1, config.embed_dim))
    variables |= {"value": {"kernel": jnp.asarray(score.T), "bias": jnp.zeros((1,))}}
    policy = lm.Policy(config, chunk_elements=16 * config.vocab_size)  # some tokens at a time

    @functools.cache
    def program(kind: str) -> Any:
        batch = model_cases.batch(_stored()["old"], *KINDS[kind])
        terms = [
            case.build() * (lambda step, number=number: (step == number).astype(jnp.float32))
            for number, (name, case) in enumerate(CASES.items())
            if _kind(name) == kind
        ]
        loss = lambda v, step: evaluate(sum(terms), policy, v, batch, roles=roles, step=step).loss
        return jax.jit(jax.value_and_grad(loss))

    def one(name: str) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradient = program(_kind(name))(variables, jnp.asarray(list(CASES).index(name)))
        interop.save_huggingface(folder / "gradient", config, {"params": gradient["params"]})
        found = _tensors(folder / "gradient")
        if CASES[name].trainer == "ppo":
            found[SCORE] = np.asarray(gradient["value"]["kernel"].T)
        return float(loss), found

    return one


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_every_gradient_are_those_of_the_peers(name, ours):
    expected = {part: _stored()[f"{name}/{part}"] for part in ("loss", "largest", "along")}
    loss, gradient = ours(name)
    along = np.array([trl_cases.along_directions(key, gradient[key]) for key in sorted(gradient)])
    # A direction sums over all numbers of a tensor: rounding adds up like the root of how many there are.
    scale = expected["largest"] * np.sqrt([[gradient[key].size] for key in sorted(gradient)])
    error = np.abs((along - expected["along"]) / scale).max()
    print(f"{name}: losses differ by {abs(loss - expected['loss']):.1e}, gradients by {error:.1e}")
    assert loss == pytest.approx(float(expected["loss"]), rel=TOLERANCE, abs=CANCELLED)
    assert error < TOLERANCE
    assert max(np.abs(g).max() for g in gradient.values()) == pytest.approx(float(expected["largest"]), rel=TOLERANCE)


def test_the_cases_differ():
    """No two are one function by accident, so that a wrong option would show."""
    losses = [float(_stored()[f"{name}/loss"]) for name in CASES]
    assert np.diff(np.sort(losses)).min() > 1e-3
    assert set(_stored()) == {"old", "trl"} | {f"{n}/{part}" for n in CASES for part in ("loss", "largest", "along")}


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_the_peers_themselves(name, ours):
    """Their trainers, made and run here: every number of their gradients."""
    pytest.importorskip("trl", reason="runs TRL's trainers (pip install trl torch transformers datasets)")
    if CASES[name].trainer == "ppo":
        pytest.importorskip("verl", reason="runs verl's losses (pip install verl)")
    from tests.objectives.make_model_fixtures import compute

    loss, gradient = ours(name)
    expected_loss, expected = compute(name, _stored()["old"])
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE, abs=CANCELLED)
    assert set(expected) == set(gradient)
    largest = max(np.abs(g).max() for g in expected.values())
    error = max(np.abs(gradient[key] - g).max() for key, g in expected.items()) / largest
    print(f"{name}: losses differ by {abs(loss - expected_loss):.1e}, gradients by {error:.1e}")
    assert error < TOLERANCE
