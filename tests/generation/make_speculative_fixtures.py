"""What transformers proposes by prompt lookup, for the tests of speculative decoding:

    pip install "transformers>=5" torch && python -m tests.generation.make_speculative_fixtures
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "prompt_lookup.json"


def histories() -> list[tuple[list[int], int, int]]:
    """Histories over small alphabets, with the most tokens to match and to propose."""
    rng = np.random.default_rng(0)
    cases = []
    for case in range(90):
        length, letters = int(rng.integers(1, 15)), int(rng.integers(2, 6))
        cases.append((rng.integers(0, letters, length).tolist(), 1 + case % 3, (1, 2, 4)[case // 3 % 3]))
    return cases


def proposals() -> list[list[int]]:
    import torch
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    found = []
    for history, ngram, count in histories():
        lookup = PromptLookupCandidateGenerator(
            num_output_tokens=count, max_matching_ngram_size=ngram, max_length=1000
        )
        candidates, _ = lookup.get_candidates(torch.tensor([history]))
        found.append(candidates[0, len(history) :].tolist())
    return found


if __name__ == "__main__":
    FIXTURES.write_text(json.dumps(proposals()) + "\n")
