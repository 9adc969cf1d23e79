"""How fast batches come, beside nanoGPT's `get_batch` on the same tokens in the same run.

    python -m experiments.benchmark_data

The peer is nanoGPT's recipe (karpathy/nanoGPT, train.py): open the memmap, draw random places, slice, cast to
int64 and stack row by row. It runs with NumPy, and with PyTorch as published where that is installed. Loaders
alternate; figures are the median over rounds, ratios the median of the ratios within a round. The page cache
is warm. Results are appended to `docs/benchmarks/data.jsonl`. On a busy machine believe the ratios of CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmjax.data.loader import BatchIterator, BatchPlan
from lmjax.data.packing import BlockRows, CropRows, PackedRows, Rows


def nanogpt_numpy(path: str, batch: int, length: int) -> Callable[[], object]:
    """nanoGPT's get_batch with NumPy in PyTorch's place."""
    rng = np.random.default_rng(0)

    def get_batch() -> tuple[np.ndarray, np.ndarray]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        places = rng.integers(len(data) - length, size=batch)
        x = np.stack([data[i : i + length].astype(np.int64) for i in places])
        y = np.stack([data[i + 1 : i + 1 + length].astype(np.int64) for i in places])
        return x, y

    return get_batch


def nanogpt_torch(path: str, batch: int, length: int) -> Callable[[], object]:
    """nanoGPT's get_batch as published, on CPU."""
    import torch

    def get_batch() -> tuple[object, object]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        places = torch.randint(len(data) - length, (batch,))
        x = torch.stack([torch.from_numpy((data[i : i + length]).astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + length]).astype(np.int64)) for i in places])
        return x, y

    return get_batch


def loaders(path: str, ends: np.ndarray, batch: int, length: int) -> dict[str, Callable[[], object]]:
    """All contenders by name; each call makes one batch."""
    tokens = np.asarray(np.memmap(path, np.uint16, mode="r"))
    makers: dict[str, Rows] = {
        "blocks": BlockRows(tokens, length),
        "crop": CropRows(tokens, length),
        "stream, isolated": BlockRows(tokens, length, ends),
        "best fit": PackedRows(tokens, length, ends),
    }
    out: dict[str, Callable[[], object]] = {"nanoGPT get_batch, numpy": nanogpt_numpy(path, batch, length)}
    if importlib.util.find_spec("torch"):
        out["nanoGPT get_batch, torch"] = nanogpt_torch(path, batch, length)
    for name, rows in makers.items():
        out[name] = BatchIterator(BatchPlan([rows], batch), prefetch=0).__next__
    out["blocks, prefetch 2"] = BatchIterator(BatchPlan([makers["blocks"]], batch), prefetch=2).__next__
    return out


def seconds(call: Callable[[], object], budget: float) -> tuple[float, float]:
    """(wall, process CPU) seconds a call, over at least `budget` seconds of wall time."""
    count, begin, cpu = 0, time.perf_counter(), time.process_time()
    while (now := time.perf_counter() - begin) < budget or count < 3:
        call()
        count += 1
    return now / count, (time.process_time() - cpu) / count


def versions() -> dict[str, str]:
    """Python and the packages that matter here."""
    found = {"python": platform.python_version()}
    for name in ("numpy", "torch", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/data.jsonl"))
    parser.add_argument("--run-dir", default="", help="append to results.jsonl of this directory, not to the output")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of the made-up corpus")
    parser.add_argument("--document", type=int, default=700, help="mean tokens of a document")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=0.2, help="seconds a loader and round")
    said = parser.parse_args(arguments)

    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.geometric(1 / said.document, size=2 * said.tokens // said.document))
    ends = np.cumsum(lengths)
    ends = ends[ends <= said.tokens].astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokens.bin")
        rng.integers(0, 50257, size=int(ends[-1]), dtype=np.uint16).tofile(path)
        contenders = loaders(path, ends, said.batch_size, said.sequence_length)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for call in contenders.values():
            seconds(call, 0.05)  # warm up
        for _ in range(said.rounds):
            for name, call in contenders.items():
                taken[name].append(seconds(call, said.budget))
        contenders.clear()
    peers = [name for name in taken if name.startswith("nanoGPT")]
    per_batch = said.batch_size * said.sequence_length
    table = {}
    for name, times in taken.items():
        wall, cpu = (statistics.median(t[kind] for t in times) for kind in (0, 1))
        row = {"million_tokens_per_second": round(per_batch / wall / 1e6, 1)}
        row |= {"wall_milliseconds": round(wall * 1e3, 4), "cpu_milliseconds": round(cpu * 1e3, 4)}
        for peer in peers:
            for kind, label in ((0, "wall"), (1, "cpu")):
                ratios = [p[kind] / t[kind] for p, t in zip(taken[peer], times)]
                row[f"{label} ratio to {peer}"] = round(statistics.median(ratios), 2)
        table[name] = row
        beside = "  ".join(
            f"{row[f'wall ratio to {p}']:6.2f}x wall {row[f'cpu ratio to {p}']:6.2f}x CPU of {p.split(', ')[1]}"
            for p in peers
        )
        print(
            f"{name:26s}{row['million_tokens_per_second']:8.1f} M tokens/s {row['wall_milliseconds']:8.4f} ms {beside}"
        )
    result = {
        "benchmark": "data",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "batch_size": said.batch_size,
        "sequence_length": said.sequence_length,
        "load": list(os.getloadavg()),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "versions": versions(),
        "results": table,
    }
    output = Path(said.run_dir) / "results.jsonl" if said.run_dir else said.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return result


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main(sys.argv[1:])
