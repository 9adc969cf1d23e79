"""One small model climbs: pretraining, worked solutions, preferences, rewards. What `make quickstart` runs.

    python -m experiments.ladder

Every rung is an experiment of its own (`pretrain`, `sft`, `dpo`, `grpo`), run as it would be from the command line, on
made-up arithmetic (`experiments.arithmetic`). After each, the same held-out questions are asked. A ladder that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments import arithmetic, dpo, grpo, pretrain, sft
from experiments.adapter_config import AdapterConfig
from experiments.dpo_config import DpoConfig
from experiments.ladder_config import LadderConfig
from experiments.reinforcement_config import GrpoConfig
from experiments.rungs import HELD_OUT, LAST, climb, judged_answers, open_climb, pretraining, share
from experiments.sft_config import SftConfig
from experiments.support import use_compilation_cache
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.data.preference_config import PreferenceConfig
from lmjax.data.prompt_config import PromptConfig
from lmjax.data.supervised_config import SupervisedConfig
from lmjax.rl.plan import Plan
from lmjax.training.config import LoopConfig, OptimizerConfig, ScheduleConfig

RUNGS = ("pretrain", "sft", "dpo", "grpo")
NAMES = {"pretrain": "pretrained", "sft": "+ worked solutions", "dpo": "+ preferences", "grpo": "+ rewards (GRPO)"}


def make_data(config: LadderConfig, folder: Path) -> None:
    """Writes what each rung reads. No rung sees the held-out questions, and the first three none of another's."""
    random = np.random.default_rng(config.seed)
    held_out = arithmetic.questions(random, config.held_out, config.largest)
    solved = arithmetic.questions(random, config.solutions, config.largest, held_out)
    paired = arithmetic.questions(random, config.pairs, config.largest, [*held_out, *solved])
    rest = arithmetic.questions(random, 2 * config.held_out, config.largest, held_out)
    asked = lambda some: [{"prompt": q.prompt, "answer": q.answer} for q in some]
    arithmetic.write_lines(
        folder / "text.jsonl",
        ({"text": arithmetic.text(random, config.largest, 10, config.wrong)} for _ in range(config.documents)),
    )
    arithmetic.write_lines(folder / "sft.jsonl", ({"prompt": q.prompt, "completion": q.solution()} for q in solved))
    arithmetic.write_lines(folder / "dpo.jsonl", (arithmetic.preference(random, q) for q in paired))
    arithmetic.write_lines(folder / "grpo.jsonl", asked(rest))
    arithmetic.write_lines(folder / HELD_OUT, asked(held_out))


def rungs(config: LadderConfig, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Of each rung its experiment and config; each goes on from the rung below."""
    data, below = folder / "data", lambda rung: str(folder / rung)
    few = dict(eval_every=0, log_every=5)
    whole = AdapterConfig(kind="full")
    adam = OptimizerConfig(weight_decay=0.0, b2=0.99)
    return {
        "pretrain": (pretrain, pretraining(
            data / "text.jsonl", steps=config.pretrain_steps, rows=32, length=64, positions=128,
            sample="7+5=", sample_tokens=60, seed=config.seed,
        )),
        "sft": (sft, SftConfig(
            model=below("pretrain"),
            data=SupervisedConfig(
                path=str(data / "sft.jsonl"), template="none", sequence_length=128, seed=config.seed,
            ),
            adapter=whole, optimizer=adam,
            schedule=ScheduleConfig(peak=2e-3, warmup_steps=min(5, config.sft_steps // 5)),
            loop=LoopConfig(steps=config.sft_steps, **few), checkpoint=LAST, batch_size=8, sample_tokens=40,
            seed=config.seed,
        )),
        "dpo": (dpo, DpoConfig(
            model=below("sft"),
            data=PreferenceConfig(path=str(data / "dpo.jsonl"), template="none", max_length=64, seed=config.seed),
            objective="dpo(beta=1.0) + chosen_nll()",
            adapter=whole, optimizer=adam,
            schedule=ScheduleConfig(peak=5e-5, warmup_steps=min(5, config.dpo_steps // 5)),
            loop=LoopConfig(steps=config.dpo_steps, **few), checkpoint=LAST, batch_size=16, sample_tokens=40,
            seed=config.seed,
        )),
        "grpo": (grpo, GrpoConfig(
            model=below("dpo"),
            data=PromptConfig(
                path=str(data / "grpo.jsonl"), template="none", validation_path=str(data / HELD_OUT),
            ),
            rewards=(arithmetic.REWARD,),
            objective="dapo()",
            rollout=Plan(prompts=32, samples=8, max_new_tokens=32, max_prompt=0, temperature=0.7),
            adapter=whole, optimizer=adam, schedule=ScheduleConfig(kind="constant", peak=3e-4, warmup_steps=20),
            loop=LoopConfig(steps=config.grpo_steps, eval_every=20, log_every=1, prefetch=0), checkpoint=LAST,
            evaluations=config.held_out, seed=config.seed,
        )),
    }  # fmt: skip


def accuracy(folder: Path, rung: str) -> dict[str, Any]:
    """How many held-out questions a rung answers, and what it says to three of them."""
    said, right = judged_answers(folder, rung, arithmetic.REWARD, 32)
    found = share(right) | {"samples": [rollout.prompt_text + rollout.text for rollout in said[:3]]}
    print(f"after {rung}: {found['accuracy']:.1%} of {len(said)} held-out questions", flush=True)
    return found


def run(config: LadderConfig, options: command_line.Options) -> int:
    """Climbs; the last line printed has the accuracy after each rung."""
    started = time.monotonic()
    use_compilation_cache(DataConfig().cache_root())
    folder = open_climb(config, options, "ladder", make_data)
    status, found = climb(rungs(config, folder), folder, "ladder", lambda rung: accuracy(folder, rung))
    if status:
        return status
    _show(found, folder)
    print(f"talk to it  python -m experiments.generate --model {folder / 'grpo'} --prompt $'Q: 7+8-9=?\\nA: ' "
          "--temperature 0")  # fmt: skip
    print(f"took        {time.monotonic() - started:.0f} s")
    print(f"run_dir={folder} " + " ".join(f"{rung}={found[rung]['accuracy']:.4f}" for rung in RUNGS), flush=True)
    return 0


def _show(found: dict[str, Any], folder: Path) -> None:
    """A table, and the picture of the climb."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="held-out questions answered", title_justify="left")
    for name in ("rung", "right", "95 % interval", "seconds", "says"):
        table.add_column(name)
    for rung in RUNGS:
        one = found[rung]
        interval = f"{one['low']:.1%} to {one['high']:.1%}"
        table.add_row(rung, f"{one['accuracy']:.1%}", interval, f"{one['seconds']:.0f}", Text(one["samples"][0]))
    Console().print(table)
    print(f"picture     {picture([found], folder / 'ladder.png', folder / 'grpo' / 'metrics.jsonl')}")


def picture(ladders: list[dict[str, Any]], path: Path, *metrics: Path) -> Path:
    """The accuracy after each rung, and within the last: a line a ladder.

    Args:
      ladders: from `ladder.json`, one a seed.
      path: of the picture.
      metrics: of the last rung of each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lmjax.training.metrics import read_metrics

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for number, found in enumerate(ladders):
        heights = [found[rung]["accuracy"] for rung in RUNGS]
        errors = [
            [found[rung]["accuracy"] - found[rung]["low"] for rung in RUNGS],
            [found[rung]["high"] - found[rung]["accuracy"] for rung in RUNGS],
        ]
        left.errorbar(range(4), heights, yerr=errors, marker="o", capsize=3, color=f"C{number}")
        if len(ladders) == 1:
            for x, height in enumerate(heights):
                left.annotate(f"{height:.0%}", (x, height), xytext=(7, 5), textcoords="offset points", fontsize=9)
    for number, file in enumerate(metrics):
        records = [r for r in read_metrics(file) if "validation/accuracy" in r]
        steps, values = [r["step"] for r in records], [r["validation/accuracy"] for r in records]
        right.plot([0, *steps], [ladders[number]["dpo"]["accuracy"], *values], marker="o", color=f"C{number}")
    left.set_xticks(range(4), [NAMES[rung] for rung in RUNGS])
    left.set_ylabel("held-out questions answered")
    left.set_title("the ladder", loc="left")
    right.set_title("the last rung", loc="left")
    right.set_xlabel("updates")
    left.set_ylim(-0.03, 1.08)
    left.margins(x=0.12)
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    command_line.main(run, LadderConfig())
