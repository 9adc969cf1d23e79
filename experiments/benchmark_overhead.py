"""What is paid around the arithmetic: imports, compilation, and the host's work in a step.

    python -m experiments.benchmark_overhead

Imports and compilation are timed in fresh processes; the cache of compiled programs is a new folder. The host's share
of a step is that of a program with the same arguments and results that computes nothing. Results are appended to
`docs/benchmarks/overhead.jsonl`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from experiments import benchmarking

COMPILE = """
import sys, time
import jax, numpy as np, optax
import lmjax as lm
config = lm.models.gpt2(65, num_layers=6, embed_dim=384, num_heads=6, max_length=256)
policy, optimizer = lm.Policy(config), optax.adamw(1e-3)
shapes = jax.eval_shape(lambda key: lm.training.new_state(policy.model.init(key), optimizer, key), jax.random.key(0))
batch = lm.batch.next_token_batch(np.zeros((4, 257), np.int32))
step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer)
start, cpu = time.perf_counter(), time.process_time()
lowered = step.lower(shapes, batch)
traced = time.perf_counter()
lowered.compile()
end = time.perf_counter()
print(traced - start, end - traced, time.process_time() - cpu)
"""

HOST = """
import time
import jax, numpy as np, optax
import lmjax as lm
config = lm.models.FAMILY(65, num_layers=12, embed_dim=16, num_heads=2, max_length=16, layers="unrolled")
policy, optimizer = lm.Policy(config), optax.adamw(1e-3)
state = lm.training.init_state(policy, optimizer, jax.random.key(0))
batch = jax.device_put(lm.batch.next_token_batch(np.zeros((1, 9), np.int32)))  # as the loop hands it over
step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer)
state, metrics = step(state, batch)
names = list(metrics)
nothing = lambda state, streams, roles: (state, {name: np.float32(0) for name in names})
step._jitted = jax.jit(nothing, donate_argnums=0)
for _ in range(50):
    state, metrics = step(state, batch)
times = []
for _ in range(20):
    start = time.process_time()
    for _ in range(50):
        state, metrics = step(state, batch)
    times.append((time.process_time() - start) / 50)
print(min(times), sorted(times)[10], len(jax.tree.leaves(state)))
"""


def run(code: str, **environment: str) -> list[float]:
    """Prints of a fresh process as numbers."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(x) for x in done.stdout.split()]


def import_seconds(module: str) -> float:
    """Processor seconds of importing a module, interpreter included."""
    before = os.times()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(rounds: int) -> dict[str, Any]:
    imports = [(import_seconds("jax"), import_seconds("lmjax"), import_seconds("jax, lmjax")) for _ in range(rounds)]
    cold, warm = [], []
    for _ in range(max(3, rounds // 3)):
        with tempfile.TemporaryDirectory() as folder:
            cache = {
                "JAX_COMPILATION_CACHE_DIR": folder,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            cold.append(run(COMPILE, **cache))
            warm.append(run(COMPILE, **cache))
    hosts = {family: [run(HOST.replace("FAMILY", family)) for _ in range(3)] for family in ("gpt2", "llama")}
    median = statistics.median
    return {
        "import_cpu_seconds": {
            "jax": round(median(a for a, _, _ in imports), 3),
            "lmjax": round(median(b for _, b, _ in imports), 3),
            "jax and lmjax": round(median(c for _, _, c in imports), 3),
        },
        "import_ratio": round(median(c / a for a, _, c in imports), 3),
        "compile_6_layers_seconds": {
            "trace": round(median(t for t, _, _ in cold), 2),
            "compile_cold": round(median(c for _, c, _ in cold), 2),
            "compile_cached": round(median(c for _, c, _ in warm), 2),
            "trace_and_compile_cold": round(median(t + c for t, c, _ in cold), 2),
            "trace_and_compile_cached": round(median(t + c for t, c, _ in warm), 2),
        },
        "host_ms_a_step_12_layers": {
            family: {
                "best": round(1e3 * min(h[0] for h in host), 3),
                "median": round(1e3 * median(h[1] for h in host), 3),
                "state_leaves": int(host[0][2]),
            }
            for family, host in hosts.items()
        },
    }


def main() -> None:
    parser = benchmarking.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    benchmarking.report(measure(options.rounds), "overhead", options.run_dir)


if __name__ == "__main__":
    main()
