"""Terms over pairs give TRL's losses and gradients through a whole model: the gradient of every parameter."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import interop
from lmjax.objectives import Objective, evaluate
from tests.interop import cases
from tests.objectives import trl_cases
from tests.objectives.trl_cases import CASES, SCORE

TOLERANCE = 1e-5  # of the loss, and of the gradient's largest number
HEADS = ("lm_head.weight", SCORE)  # a model has one of them


@functools.cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(trl_cases.FIXTURES) as found:
        return dict(found)


@functools.cache
def _about() -> dict[str, Any]:
    return json.loads(str(_stored()["about"]))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> its loss, and its gradient by the names of transformers.

    All cases are terms of one objective whose coefficients are 1 at the step of their number: one program for all.
    """
    about = _about()
    folder = tmp_path_factory.mktemp("model")
    config, variables = interop.load_huggingface(cases.write_directory(folder, about["config"], about["shapes"]))
    drawn = {name: trl_cases.weight(name, tuple(shape), reference=True) for name, shape in about["shapes"].items()}
    reference = _loaded(folder / "reference", about["config"], drawn)
    score = trl_cases.weight(SCORE, (1, config.embed_dim))
    variables |= {"value": {"kernel": jnp.asarray(score.T), "bias": jnp.zeros((1,))}}
    policy = lm.Policy(config, chunk_elements=16 * config.vocab_size)  # some tokens at a time
    objective = sum(_at_step(number, name) for number, name in enumerate(CASES))

    @jax.jit
    def run(variables: Any, step: jax.Array) -> Any:
        def loss(variables: Any) -> jax.Array:
            roles = {"reference": reference}
            return evaluate(objective, policy, variables, trl_cases.batches(), roles=roles, step=step).loss

        return jax.value_and_grad(loss)(variables)

    def one(name: str) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradient = run(variables, jnp.asarray(list(CASES).index(name)))
        interop.save_huggingface(folder / "gradient", config, {"params": gradient["params"]})
        found = _tensors(folder / "gradient")
        return float(loss), found | {SCORE: np.asarray(gradient["value"]["kernel"].T)}

    return one


def _at_step(number: int, name: str) -> Objective:
    case = CASES[name]
    own = trl_cases.on_streams(case.build(), case.trainer)
    return own * (lambda step: (step == number).astype(jnp.float32))


def _loaded(path: Any, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    from safetensors.numpy import save_file

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return interop.load_huggingface(path)[1]


def _tensors(path: Any) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_every_gradient_are_those_of_trl(name, ours):
    expected = {part: _stored()[f"{name}/{part}"] for part in ("loss", "largest", "along")}
    loss, gradient = ours(name)
    unused, head = HEADS if CASES[name].trainer == "reward" else HEADS[::-1]
    assert not gradient.pop(unused).any() and gradient[head].any()
    along = np.array([trl_cases.along_directions(key, gradient[key]) for key in sorted(gradient)])
    # A direction sums over all numbers of a tensor: rounding adds up like the root of how many there are.
    scale = expected["largest"] * np.sqrt([[gradient[key].size] for key in sorted(gradient)])
    error = np.abs((along - expected["along"]) / scale).max()
    print(f"{name}: losses differ by {abs(loss / expected['loss'] - 1):.1e}, gradients by {error:.1e}")
    assert loss == pytest.approx(float(expected["loss"]), rel=TOLERANCE)
    assert error < TOLERANCE
    assert max(np.abs(g).max() for g in gradient.values()) == pytest.approx(float(expected["largest"]), rel=TOLERANCE)


def test_the_cases_differ():
    """No two are one function by accident, so that a wrong option would show."""
    losses = [float(_stored()[f"{name}/loss"]) for name in CASES]
    assert np.diff(np.sort(losses)).min() > 1e-4
    assert len(CASES) > 30
    assert set(_stored()) == {"about"} | {f"{name}/{part}" for name in CASES for part in ("loss", "largest", "along")}


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_trl_itself(name, ours):
    """TRL's trainer, made and run here: every number of its gradients."""
    pytest.importorskip("trl", reason="runs TRL's trainers (pip install trl peft torch transformers datasets)")
    from tests.objectives.make_trl_fixtures import compute

    loss, gradient = ours(name)
    expected_loss, expected = compute(name)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert set(expected) == set(gradient) - {HEADS[0] if CASES[name].trainer == "reward" else HEADS[1]}
    largest = max(np.abs(g).max() for g in expected.values())
    error = max(np.abs(gradient[key] - g).max() for key, g in expected.items()) / largest
    print(f"{name}: losses differ by {abs(loss / expected_loss - 1):.1e}, gradients by {error:.1e}")
    assert error < TOLERANCE
