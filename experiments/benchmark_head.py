"""The language-model head: loss and gradients in slices, beside the same with all logits at once.

    python -m experiments.benchmark_head --embed-dim 256 --rounds 9

Both take mean cross-entropy of 4,096 tokens over 50,304 words and its gradients by hidden states and weights, in
float32. Temporary memory is what the compiler reserves beyond arguments and results. Rounds alternate; the ratio is the
median over rounds. Results are appended to `docs/benchmarks/head.jsonl`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments import benchmarking
from lmjax.losses.fused import token_loss
from lmjax.losses.logits import Head
from lmjax.losses.vocabulary import token_statistics


def materialised(weight: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy with logits [B, T, V] in memory."""
    logits = jnp.einsum("btd,vd->btv", hidden, weight)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def in_one_pass(elements: int) -> Any:
    """Gradients while each slice of logits is there."""

    def loss(weight: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        of_token = lambda statistics, _: -statistics["logprobs"] / targets.size
        return token_loss(Head(weight), hidden, targets, of_token, elements=elements)[0]

    return loss


def recomputed(elements: int) -> Any:
    """Logits of each slice computed again in the backward pass: what terms that couple tokens use."""

    def loss(weight: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        statistics = token_statistics(Head(weight), hidden, targets, wanted=["logprobs"], elements=elements)
        return -jnp.mean(statistics["logprobs"])

    return loss


def main() -> None:
    parser = benchmarking.parser(__doc__)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--elements", type=int, default=2**24, help="logits that exist at once")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (options.batch, options.length, options.embed_dim))
    weight = 0.02 * jax.random.normal(keys[1], (options.vocab_size, options.embed_dim))
    targets = jax.random.randint(keys[2], hidden.shape[:2], 0, options.vocab_size)
    functions = {
        "materialised": materialised,
        "one_pass": in_one_pass(options.elements),
        "recomputed": recomputed(options.elements),
    }
    steps = {
        name: jax.jit(jax.value_and_grad(f, (0, 1))).lower(weight, hidden, targets).compile()
        for name, f in functions.items()
    }
    memory = {name: step.memory_analysis().temp_size_in_bytes for name, step in steps.items()}
    results = {name: step(weight, hidden, targets) for name, step in steps.items()}
    gaps = {
        name: float(jnp.max(jnp.abs(result[1][0] - results["materialised"][1][0]))) for name, result in results.items()
    }
    del results
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(weight, hidden, targets))
            seconds[name].append(time.perf_counter() - start)
    base = seconds["materialised"]
    result = {
        "shape": {k: getattr(options, k) for k in ("batch", "length", "embed_dim", "vocab_size", "elements")},
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "time_ratio": {
            name: round(statistics.median(t / b for t, b in zip(times, base)), 3) for name, times in seconds.items()
        },
        "temporary_mib": {name: round(size / 2**20, 1) for name, size in memory.items()},
        "memory_ratio": {name: round(size / memory["materialised"], 4) for name, size in memory.items()},
        "largest_weight_gradient_gap": gaps,
        "rounds": options.rounds,
    }
    benchmarking.report(result, "head", options.run_dir)


if __name__ == "__main__":
    main()
