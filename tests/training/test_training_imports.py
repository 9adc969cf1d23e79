"""What must stay cheap to import."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module, absent",
    [
        ("lmjax.training", ["jax"]),
        ("lmjax.training.config", ["jax"]),
        ("lmjax.training.checkpoint_files", ["jax", "numpy"]),
        ("lmjax.training.metrics", ["jax", "numpy"]),
        ("lmjax.training.loop", ["orbax", "matplotlib", "rich", "grain"]),
    ],
)
def test_imports_no_more_than_it_needs(module, absent):
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
