"""Computes the logits that bottleneck adapters are compared with, by the `adapters` library, which wants an environment
of its own:

    pip install "adapters==1.3.0" "transformers~=4.57.6" torch numpy
    python -m tests.adapters.make_bottleneck_fixtures
"""

from __future__ import annotations

import numpy as np

from tests.adapters.bottleneck_cases import FAMILIES, FIXTURES, METHODS, library_logits


def main() -> None:
    logits = {f"{family}/{method}": library_logits(family, method) for family in FAMILIES for method in METHODS}
    np.savez_compressed(FIXTURES, **logits)
    print(f"{FIXTURES}: {FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
