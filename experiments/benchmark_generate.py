"""Generation speed beside Hugging Face's `generate`, against memory bandwidth, and with ragged lengths.

    python -m experiments.benchmark_generate --cases batch-1 batch-8 batch-32 ragged --rounds 5

- batch-N: the same GPT-2 (6 layers, 384, 50,257 words, random weights, float32) continues N prompts of 32 tokens by
  128 sampled ones, beside `generate` with a static cache. The two sides live in processes of their own and take turns;
  reported is the median over rounds of the ratio of neighbouring windows. Their greedy tokens and log-probabilities
  are compared first. The bytes that a step must read are set against the read bandwidth measured in between.
- ragged: 48 requests of 16 to 512 new tokens (log-uniform) through 8 slots of continuous batching, beside static
  batches of 8 in order, which last as long as their longest.
- model: ours alone against the bandwidth, any preset: `--preset qwen2.5-0.5b --dtype bfloat16 --batch 256
  --prompt 896 --new 128`.

Needs the `dev` extra for the peer. Results are appended to `docs/benchmarks/generate.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import benchmarking

BATCHES = {"batch-1": 1, "batch-8": 8, "batch-32": 32}
LAYERS, WIDTH, HEADS, VOCABULARY, PROMPT, NEW = 6, 384, 6, 50257, 32, 128


def prompts(batch: int, length: int = PROMPT, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (batch, length))


def torch_side(batch: int, folder: str) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]:
    """Hugging Face's model, saved for the other side to load; a run of its `generate`, and what else to report."""
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    ids = torch.from_numpy(prompts(batch))
    common: dict[str, Any] = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=NEW, cache_implementation="static", pad_token_id=0
    )

    @torch.no_grad()
    def run(**options: Any) -> Any:
        return model.generate(ids, **common, **options)

    found = run(do_sample=False)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(found).logits[:, PROMPT - 1 : -1], -1)
    scores = torch.gather(logprobs, 2, found[:, PROMPT:, None])[..., 0]
    hello = {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "tokens": found[:, PROMPT:].numpy(),
        "logprobs": scores.numpy(),
    }
    return lambda: run(do_sample=True, top_k=0, temperature=1.0), dict, hello


def lmjax_side(batch: int, folder: str) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]:
    """The same weights through lmjax."""
    import jax

    import lmjax as lm

    config, variables = lm.interop.load_huggingface(Path(folder))
    policy = lm.Policy(config)
    rows = list(prompts(batch))
    model = lm.generation.prepare(policy, variables, rows=batch)  # once, as the peer's weights are laid out once
    seeds = iter(range(10**6))

    def run(temperature: float) -> Any:
        key = jax.random.key(next(seeds))
        found = lm.generation.generate(policy, model, rows, key, max_new_tokens=NEW, temperature=temperature)
        return jax.block_until_ready(found)

    greedy = run(0.0)
    run(1.0)
    engine = lm.generation.engine
    compiled = engine._advance._cache_size()
    weights = sum(x.nbytes for x in jax.tree.leaves(variables)) - variables["params"]["position"]["embedding"].nbytes
    cache = jax.eval_shape(lambda: policy.init_cache(batch, PROMPT + NEW))
    hello = {
        "version": f"lmjax {lm.__version__}, jax {jax.__version__}",
        "tokens": np.asarray(greedy.tokens),
        "logprobs": np.asarray(greedy.logprobs),
        "bytes_per_step": weights + lm.modules.cache.cache_bytes(cache),
    }

    def report() -> dict[str, Any]:
        return {"bandwidth": read_bandwidth(), "recompilations": engine._advance._cache_size() - compiled}

    return lambda: run(1.0), report, hello


SIDES = {"torch": torch_side, "lmjax": lmjax_side}  # torch first: it makes the weights


def read_bandwidth(megabytes: int = 256) -> float:
    """Bytes a second that a sum over a large array reads, the best of five."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((megabytes * 2**18,))
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - started)
    return x.nbytes / min(times)


def worker(side: str, batch: int, folder: str, pipe: Any) -> None:
    """Generates on request; answers with times."""
    run, report, hello = SIDES[side](batch, folder)
    pipe.send(hello)
    while pipe.recv():
        run()  # not timed: the process was idle while the other side ran
        pipe.send(benchmarking.timed(run) | report())


def beside_transformers(name: str, rounds: int, quiet: float) -> dict[str, Any]:
    """One batch size: both sides in turns."""
    batch = BATCHES[name]
    with tempfile.TemporaryDirectory() as folder:
        hello, windows = benchmarking.take_turns(worker, list(SIDES), (batch, folder), rounds)
    ours, peer = windows["lmjax"], windows["torch"]
    calm = [i for i in range(rounds) if max(ours[i]["others"], peer[i]["others"]) < quiet]
    used = calm or range(rounds)
    wall = {side: statistics.median(windows[side][i]["wall"] for i in used) for side in SIDES}
    bandwidth = statistics.median(ours[i]["bandwidth"] for i in used)
    needed = hello["lmjax"]["bytes_per_step"]
    same = float(np.mean(hello["lmjax"]["tokens"] == hello["torch"]["tokens"]))
    gap = float(np.max(np.abs(hello["lmjax"]["logprobs"] - hello["torch"]["logprobs"]))) if same == 1 else None
    return {
        "case": name,
        "peer": hello["torch"]["version"],
        "ours": hello["lmjax"]["version"],
        "tokens_per_second": {side: round(batch * NEW / wall[side], 1) for side in SIDES},
        "speedup": round(statistics.median(peer[i]["wall"] / ours[i]["wall"] for i in used), 2),
        "cpu_speedup": round(statistics.median(peer[i]["cpu"] / ours[i]["cpu"] for i in used), 2),
        "megabytes_per_step": round(needed / 1e6, 1),
        "read_gigabytes_per_second": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(needed * NEW / wall["lmjax"] / bandwidth, 3),
        "same_greedy_tokens": same,
        "largest_logprob_gap": gap,
        "recompilations": max(window["recompilations"] for window in ours),
        "rounds": rounds,
        "calm_rounds": len(calm),
    }


def ragged(rounds: int, slots: int = 8, count: int = 48) -> dict[str, Any]:
    """Continuous batching beside static batches, on requests of very different lengths."""
    import jax

    import lmjax as lm

    policy = lm.Policy(
        lm.models.gpt2(VOCABULARY, num_layers=LAYERS, embed_dim=WIDTH, num_heads=HEADS, max_length=1024)
    )
    variables = policy.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    rows = list(prompts(count))
    lengths = np.exp(rng.uniform(np.log(16), np.log(512), count)).astype(int)
    key = jax.random.key(1)

    def static() -> None:
        for start in range(0, count, slots):
            part = slice(start, start + slots)
            found = lm.generation.generate(policy, variables, rows[part], key, max_new_tokens=lengths[part], room=512)
            jax.block_until_ready(found)

    def continuous() -> None:
        requests = [
            lm.generation.batching.Request(row, max_new_tokens=int(n)) for row, n in zip(rows, lengths, strict=True)
        ]
        found = lm.generation.generate_many(policy, variables, requests, key, slots=slots)
        assert np.sum(found.lengths) == lengths.sum()

    static()
    continuous()
    windows = [(benchmarking.timed(static), benchmarking.timed(continuous)) for _ in range(rounds)]
    wall = [statistics.median(window[i]["wall"] for window in windows) for i in (0, 1)]
    longest = sum(int(max(lengths[i : i + slots])) for i in range(0, count, slots))
    return {
        "case": "ragged",
        "requests": count,
        "slots": slots,
        "new_tokens": int(lengths.sum()),
        "static_steps": longest,
        "fewest_steps": int(-(-lengths.sum() // slots)),
        "tokens_per_second": {
            "static": round(lengths.sum() / wall[0], 1),
            "continuous": round(lengths.sum() / wall[1], 1),
        },
        "speedup": round(statistics.median(a["wall"] / b["wall"] for a, b in windows), 2),
        "rounds": rounds,
    }


def model_alone(options: argparse.Namespace) -> dict[str, Any]:
    """Any preset with random weights, against the bytes that its steps must read."""
    import jax

    import lmjax as lm

    config = dataclasses.replace(lm.models.preset(options.preset), dtype=options.dtype)
    policy = lm.Policy(config)
    variables = jax.tree.map(lambda x: x.astype(options.dtype), policy.init(jax.random.key(0)))
    rows = list(prompts(options.batch, options.prompt, config.vocab_size))
    model = lm.generation.prepare(policy, variables, rows=options.batch)

    def run(new: int) -> float:
        started = time.perf_counter()
        found = lm.generation.generate(policy, model, rows, jax.random.key(0), max_new_tokens=new)
        jax.block_until_ready(found)
        return time.perf_counter() - started

    short = max(options.new // 8, 1)
    run(options.new), run(short)
    # The difference of two lengths leaves the prompts out.
    step = statistics.median((run(options.new) - run(short)) / (options.new - short) for _ in range(options.rounds))
    cache = jax.eval_shape(lambda: policy.init_cache(options.batch, options.prompt + options.new))
    needed = sum(x.nbytes for x in jax.tree.leaves(variables)) + lm.modules.cache.cache_bytes(cache)
    bandwidth = read_bandwidth(1024 if jax.default_backend() != "cpu" else 256)
    return {
        "case": "model",
        "preset": options.preset,
        "dtype": options.dtype,
        "batch": options.batch,
        "prompt": options.prompt,
        "new": options.new,
        "device": jax.devices()[0].device_kind,
        "ms_per_step": round(1e3 * step, 3),
        "tokens_per_second": round(options.batch / step, 1),
        "read_gigabytes_per_second": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(needed / step / bandwidth, 3),
    }


def main() -> None:
    parser = benchmarking.parser(__doc__)
    cases = [*BATCHES, "ragged", "model"]
    parser.add_argument("--cases", nargs="+", default=cases[:-1], choices=cases)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--quiet", type=float, default=0.05, help="leave out windows with more load from others")
    parser.add_argument("--preset", default="small-3m", help="case model: which")
    parser.add_argument("--dtype", default="float32", help="case model: of weights, activations and cache")
    parser.add_argument("--batch", type=int, default=8, help="case model: rows")
    parser.add_argument("--prompt", type=int, default=128, help="case model: tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="case model: tokens to sample")
    options = parser.parse_args()
    for name in options.cases:
        if name in BATCHES:
            result = beside_transformers(name, options.rounds, options.quiet)
        elif name == "ragged":
            result = ragged(options.rounds)
        else:
            result = model_alone(options)
        benchmarking.report(result, "generate", options.run_dir)


if __name__ == "__main__":
    main()
