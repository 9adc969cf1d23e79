"""KL as a cost: the libraries' own numbers, also where they hold them, and its expectation by enumeration."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.rl.returns import kl_costs

OWN = np.array([-0.1, -1.0, -2.5, -0.7, -30.0, -1.0, -4.0])
OTHER = np.array([-0.3, -0.4, -2.5, -5.0, -1.0, -30.0, -0.5])  # two of them are beyond all bounds

# Of verl 0.9.1 (kl_penalty_forward) and OpenRLHF 0.11.2 (compute_approx_kl), float64 and float32.
STORED = {
    "verl/k1": [0.2, -0.6, 0.0, 4.3, -29.0, 29.0, -3.5],
    "verl/abs": [0.2, 0.6, 0.0, 4.3, 29.0, 29.0, 3.5],
    "verl/k2": [0.02, 0.18, 0.0, 9.245, 420.5, 420.5, 6.125],
    "verl/k3": [0.01873075, 0.2221188, 0.0, 3.31356856, 10.0, 10.0, 10.0],
    "openrlhf/k1": [0.20000002, -0.60000002, 0.0, 4.30000019, -10.0, 10.0, -3.5],
    "openrlhf/k2": [0.02, 0.18000001, 0.0, 9.24500084, 10.0, 10.0, 6.125],
    "openrlhf/k3": [0.01873073, 0.22211885, 0.0, 3.31356883, 10.0, 10.0, 10.0],
}  # fmt: skip


def ours(name: str) -> np.ndarray:
    library, _, estimator = name.partition("/")
    bounds: dict[str, Any] = {"largest": 10.0} if library == "openrlhf" or estimator == "k3" else {}
    if library == "verl" and estimator == "k3":
        bounds["held"] = 20.0
    return kl_costs(OWN, OTHER, estimator, **bounds)  # type: ignore[arg-type]


def theirs(name: str) -> np.ndarray:
    import torch

    library, _, estimator = name.partition("/")
    own, other = torch.tensor(OWN), torch.tensor(OTHER)
    if library == "verl":
        from verl.trainer.ppo.core_algos import kl_penalty_forward

        return kl_penalty_forward(own, other, estimator).numpy()
    names: dict[str, Any] = {}
    exec(_openrlhf_source(), names)
    return names["compute_approx_kl"](own, other, kl_estimator=estimator).numpy()


def _openrlhf_source() -> str:
    """The function as it stands; its module would import much that is of no concern here."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / "models" / "utils.py").read_text()
    function = "".join(inspect.getblock(text[text.index("def compute_approx_kl") :].splitlines(keepends=True)))
    return "from typing import Optional\nimport torch\n" + function


@pytest.mark.parametrize("name", STORED)
def test_numbers_are_those_of_the_libraries(name):
    np.testing.assert_allclose(ours(name), STORED[name], rtol=1e-6, atol=1e-7)


@pytest.mark.reference
@pytest.mark.parametrize("name", STORED)
def test_the_libraries_themselves(name):
    library = name.partition("/")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"runs {library}'s own function (pip install {library})")
    found = theirs(name)
    np.testing.assert_allclose(ours(name), found, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(STORED[name], found, rtol=1e-6, atol=1e-7)


def test_k1_and_k3_have_the_divergence_as_their_mean_and_k2_has_not():
    random = np.random.default_rng(0)
    log_p, log_q = (x - np.log(np.exp(x).sum()) for x in random.normal(size=(2, 6)))
    exact = np.exp(log_p) @ (log_p - log_q)
    mean = {name: np.exp(log_p) @ kl_costs(log_p, log_q, name) for name in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(exact) and mean["k3"] == pytest.approx(exact)
    assert mean["k2"] != pytest.approx(exact, rel=1e-3)


def test_shapes_must_be_alike():
    with pytest.raises(UserError, match=r"\(2,\) and \(3,\)"):
        kl_costs([0.0, 0.0], [0.0, 0.0, 0.0])
