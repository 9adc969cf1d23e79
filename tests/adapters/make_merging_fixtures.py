"""What PEFT's functions for merging give, where they are right: all weights 1, where its election is the weighted one.

    python -m tests.adapters.make_merging_fixtures

writes `merging.npz`, which `test_merging.py` reads without torch. Random pruning is left out: its numbers are
those of torch's generator.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "merging.npz"
DENSITIES = (1.0, 0.5, 0.23)
WEIGHTS = (2.0, -1.0, 0.3)


def tensors() -> np.ndarray:
    """Three task vectors without ties, float32 [3, 5, 7]."""
    random = np.random.RandomState(0)
    return random.standard_normal((3, 5, 7)).astype(np.float32)


def of_peft() -> dict[str, np.ndarray]:
    """Their results, by name."""
    import torch
    from peft.utils import merge_utils

    given = [torch.tensor(x) for x in tensors()]
    ones, weights = torch.ones(3), torch.tensor(WEIGHTS)
    found = {"arithmetic": merge_utils.task_arithmetic(given, weights)}
    for density in DENSITIES:
        found[f"trim {density}"] = torch.stack([merge_utils.prune(x, density, "magnitude") for x in given])
        found[f"ties {density}"] = merge_utils.ties(given, ones, density)
    pair = [torch.tensor([1.0]), torch.tensor([-2.0])]
    found["elected unweighted"] = merge_utils.ties(pair, torch.tensor([10.0, 1.0]), 1.0)
    return {name: value.numpy() for name, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(FIXTURES, **of_peft())
