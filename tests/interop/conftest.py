"""The committed logits of transformers, and model directories with the weights they were computed from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.interop import cases


@pytest.fixture(scope="session")
def fixtures() -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Case -> ({"config": config.json, "shapes": tensor shapes}, logits [P, V])."""
    with np.load(cases.FIXTURES) as stored:
        return {
            name: (json.loads(str(stored[f"{name}/about"])), stored[f"{name}/logits"]) for name in cases.CASES
        }


@pytest.fixture
def make_directory(fixtures: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes the model directory of a case, with changes to its config.json."""

    def make(name: str, **changes: Any) -> Path:
        about, _ = fixtures[name]
        return cases.write_directory(tmp_path, about["config"], about["shapes"], **changes)

    return make
