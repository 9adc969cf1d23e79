"""A small model learns by itself to play Countdown: make a target out of two or three numbers, each used once.

    python -m experiments.countdown

Two rungs, each an experiment of its own. `pretrain` reads made-up text that teaches the form of a game, and to work out
steps and to compare them with a target; how to win is in none of it, since its attempts are random
(`experiments.countdown_games`). `grpo` rewards right expressions. After each, the same held-out games are played, with
the likeliest tokens and sampled at the temperature of training. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments import countdown_games as games
from experiments import grpo, pretrain
from experiments.arithmetic import write_lines
from experiments.countdown_config import CountdownConfig
from experiments.reinforcement_config import GrpoConfig
from experiments.rungs import HELD_OUT, LAST, climb, judged_answers, open_climb, pretraining, share
from experiments.support import use_compilation_cache
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.data.prompt_config import PromptConfig
from lmjax.rl.plan import Plan
from lmjax.training.config import LoopConfig, ScheduleConfig

RUNGS = ("pretrain", "grpo")
KINDS = {"all": (2, 3), "two": (2,), "three": (3,)}  # how many numbers a game may have to count
WAYS = ("greedy", "sampled")
GOAL = 0.8
LENGTH = 128  # tokens of a row of text
PROMPT = 32  # tokens of the longest game and its markers, and some more


def make_data(config: CountdownConfig, folder: Path) -> None:
    """Writes what each rung reads; no held-out game is in any of it."""
    random = np.random.default_rng(config.seed)
    held_out, rest = games.split(random, config.largest, config.signs, config.held_out, config.two)
    told = games.draw(random, rest, config.documents, config.two)
    asked = games.draw(random, rest, config.games, config.two)
    attempt = lambda game: game.prompt + games.attempt(random, game, config.signs, config.attempts, config.careless)
    write_lines(folder / "text.jsonl", ({"text": attempt(game)} for game in told))
    write_lines(folder / "grpo.jsonl", (game.record() for game in asked))
    write_lines(folder / HELD_OUT, (game.record() for game in held_out))


def rungs(config: CountdownConfig, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Of each rung its experiment and config."""
    data, updates = folder / "data", config.grpo_steps * config.minibatches
    return {
        "pretrain": (pretrain, pretraining(
            data / "text.jsonl", steps=config.pretrain_steps, rows=24, length=LENGTH,
            positions=max(LENGTH, config.max_new_tokens + PROMPT), sample="8 3 5 -> 19\n", sample_tokens=80,
            seed=config.seed,
        )),
        "grpo": (grpo, GrpoConfig(
            model=str(folder / "pretrain"),
            data=PromptConfig(
                path=str(data / "grpo.jsonl"), template="none", validation_path=str(data / HELD_OUT),
            ),
            rewards=(games.TAUGHT,),
            objective="dapo()",
            rollout=Plan(
                prompts=config.prompts, samples=config.samples, max_new_tokens=config.max_new_tokens, max_prompt=0,
                per_row=2, temperature=config.temperature, minibatches=config.minibatches,
            ),
            schedule=ScheduleConfig(
                kind="constant", peak=config.learning_rate, warmup_steps=min(20, updates // 5),
            ),
            loop=LoopConfig(steps=updates, eval_every=10 * config.minibatches, log_every=1, prefetch=0),
            checkpoint=LAST,
            evaluations=config.held_out, seed=config.seed,
        )),
    }  # fmt: skip


def success(config: CountdownConfig, folder: Path, rung: str) -> dict[str, Any]:
    """Of the held-out games the share that a rung wins, in both ways and by how many numbers a game has."""
    found: dict[str, Any] = {}
    for way, temperature in zip(WAYS, (0.0, config.temperature)):
        said, right = judged_answers(folder, rung, games.REWARD, config.max_new_tokens, temperature)
        counts = [len(rollout.record["numbers"]) for rollout in said]
        found[way] = {
            kind: share([one for one, count in zip(right, counts) if count in which]) for kind, which in KINDS.items()
        }
        found[way]["samples"] = [rollout.prompt_text + rollout.text for rollout in said[:4]]
    print(f"after {rung}: " + ", ".join(f"{found[way]['all']['accuracy']:.1%} {way}" for way in WAYS), flush=True)
    return found


def run(config: CountdownConfig, options: command_line.Options) -> int:
    """Learns; the last line printed has the share of held-out games won before and after the rewards, sampled."""
    started = time.monotonic()
    use_compilation_cache(DataConfig().cache_root())
    folder = open_climb(config, options, "countdown", make_data)
    status, found = climb(rungs(config, folder), folder, "countdown", lambda rung: success(config, folder, rung))
    if status:
        return status
    _show(found)
    print(f"picture     {picture([found], folder / 'countdown.png', folder / 'grpo' / 'metrics.jsonl')}")
    print(f"play        python -m experiments.generate --model {folder / 'grpo'} --prompt $'8 3 5 -> 19\\n' "
          "--temperature 0")  # fmt: skip
    print(f"took        {time.monotonic() - started:.0f} s")
    before, after = (found[rung]["sampled"]["all"]["accuracy"] for rung in RUNGS)
    print(f"run_dir={folder} before={before:.4f} after={after:.4f}", flush=True)
    return 0


def _show(found: dict[str, Any]) -> None:
    """Tables: the games won after each rung, and what is said to some."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="held-out games won, 95 % intervals", title_justify="left")
    for name in ("after", "answers", "all", "two numbers", "three numbers", "seconds"):
        table.add_column(name)
    says = Table(title="likeliest answers", title_justify="left")
    for rung in RUNGS:
        says.add_column(f"after {rung}")
        for way in WAYS:
            cells = (
                f"{one['accuracy']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
                for one in (found[rung][way][kind] for kind in KINDS)
            )
            table.add_row(rung, way, *cells, f"{found[rung]['seconds']:.0f}")
    for texts in zip(*(found[rung]["greedy"]["samples"] for rung in RUNGS)):
        says.add_row(*map(Text, texts), end_section=True)
    Console().print(table)
    Console().print(says)


def picture(climbs: list[dict[str, Any]], path: Path, *metrics: Path) -> Path:
    """Held-out games won over updates, and by how many numbers they have: a colour a run.

    Args:
      climbs: from `countdown.json`, one a seed.
      path: of the picture.
      metrics: of the last rung of each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lmjax.training.metrics import read_metrics

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for number, (found, file) in enumerate(zip(climbs, metrics, strict=True)):
        colour, start = f"C{number}", found["pretrain"]["greedy"]["all"]["accuracy"]
        records = read_metrics(file)
        tried = [(record["step"], record["reward"]) for record in records if "reward" in record]
        asked = [(r["step"], r["validation/accuracy"]) for r in records if "validation/accuracy" in r]
        left.plot(*zip(*tried), color=colour, alpha=0.25, linewidth=1)
        left.plot(*zip((0, start), *asked), color=colour, marker="o", markersize=4, label=f"run {number + 1}")
        left.axhline(start, color=colour, linestyle=":", linewidth=1)
        for rung, marker, inside in zip(RUNGS, ("o", "s"), ("white", colour)):
            ones = [found[rung]["sampled"][name] for name in KINDS]
            places = [x + 0.16 * (number - (len(climbs) - 1) / 2) for x in range(len(KINDS))]
            heights = [one["accuracy"] for one in ones]
            errors = [[o["accuracy"] - o["low"] for o in ones], [o["high"] - o["accuracy"] for o in ones]]
            right.errorbar(
                places, heights, yerr=errors, marker=marker, linestyle="", capsize=3, color=colour,
                markerfacecolor=inside,
            )  # fmt: skip
    for axes in (left, right):
        axes.axhline(GOAL, color="black", linestyle="--", linewidth=1)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    left.set_title("held-out games, greedy (faint: rollouts of training games, sampled)", loc="left", fontsize=10)
    left.set_xlabel("updates (dotted: the start; dashed: 0.8)")
    left.set_ylabel("games won")
    left.set_ylim(-0.03, 1.03)
    right.set_xticks(range(len(KINDS)), ["all", "two numbers", "three numbers"])
    right.set_title("held-out, sampled: before (hollow), after", loc="left", fontsize=10)
    right.margins(x=0.15)
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    command_line.main(run, CountdownConfig())
