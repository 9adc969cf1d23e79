"""What the benchmarks share: the machine they ran on, and where their results go."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lmjax.host_memory import KEEP, VARIABLE

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


def machine() -> dict[str, Any]:
    """Processor, cores, and versions of what is installed."""
    info = Path("/proc/cpuinfo")
    model = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of a benchmark, its docstring as help."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--run-dir", type=Path, help="write DIR/results.jsonl in place of docs/benchmarks")
    return found


def report(result: dict[str, Any], name: str, run_dir: Path | None) -> None:
    """Prints one result as a JSON line and appends it to the benchmark's file."""
    line = json.dumps(result | {"machine": machine(), "date": time.strftime("%Y-%m-%d")})
    print(line, flush=True)
    path = Path("docs/benchmarks") / f"{name}.jsonl" if run_dir is None else run_dir / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")


def take_turns(
    worker: Callable[..., None], sides: Sequence[str], arguments: tuple[Any, ...], rounds: int
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Two programs timed in alternation, each in a process of its own, so that neither computes while the other does.

    Args:
      worker: `worker(side, *arguments, pipe)`; it sends what it has to say of itself, and then answers each True with
        the dict of a timed window (`timed`), until it gets False.
      sides: their names; each is ready before the next one starts.
      arguments: for both.
      rounds: windows of each.

    Returns:
      What each side said of itself, and its windows.
    """
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault(VARIABLE, KEEP)  # as experiments run; both sides get it
    pipes: dict[str, Any] = {}
    workers, hello = [], {}
    for side in sides:
        pipes[side], theirs = context.Pipe()
        workers.append(context.Process(target=worker, args=(side, *arguments, theirs)))
        workers[-1].start()
        hello[side] = pipes[side].recv()
    windows: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            time.sleep(0.4)  # OpenMP threads of the other side spin for 0.2 s after their last work
            pipes[side].send(True)
            windows[side].append(pipes[side].recv())
    for side, process in zip(sides, workers, strict=True):
        pipes[side].send(False)
        process.join()
    return hello, windows


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of wall and processor time, and the share of the machine that others used meanwhile."""
    busy, cpu, start = _busy(), time.process_time(), time.perf_counter()
    work()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    others = max(0.0, (_busy() - busy) - cpu) / (wall * (os.cpu_count() or 1))
    return {"wall": wall, "cpu": cpu, "others": others}


def _busy() -> float:
    """Seconds all processors have been busy since boot."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(x) for x in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def word_tokenizer(words: int) -> Any:
    """A tokenizer of transformers with one word an id: "w0", "w1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {f"w{number}": number for number in range(words - 2)} | {"<eos>": words - 2, "<pad>": words - 1}
    found = Tokenizer(models.WordLevel(names, unk_token="w0"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<eos>", pad_token="<pad>")
