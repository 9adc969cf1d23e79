"""Every fine-tuning method on the same tasks: quality against trained parameters, with intervals.

    python -m experiments.compare_adapters --run-dir runs/compare
    python -m experiments.compare_adapters --tasks synthetic instruct --model runs/mine --data instructions.json

Each method is trained once at every learning rate of its range, which grows while its best rate is its lowest or its
highest; the rate that is best on one half of the held-out examples is trained again with other seeds, and the other
half is reported: mean and 95 % interval (Student's t) over seeds. Every run is a line in `trials.jsonl`; a comparison
that was interrupted goes on where it stopped. The table and the picture are made anew at the end, as `table.txt`,
`results.json` and `quality.png`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments.compare_config import CompareConfig
from experiments.trials import Trial, Trials, half, mean_and_half, new_figure, saved
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.errors import UserError


def methods(policy: Any) -> dict[str, tuple[Any, float]]:
    """Name -> the method (None: all parameters in place) and the lowest of its learning rates."""
    from lmjax import adapters

    return {
        "full": (None, 1e-4),
        "norm_tuning": (adapters.norm_tuning(), 1e-3),
        "lora_r1": (adapters.lora(1), 1e-3),
        "lora_r8": (adapters.lora(8), 1e-3),
        "rslora_r8": (adapters.lora(8, rank_stabilized=True), 3e-4),
        "dora_r8": (adapters.dora(8), 1e-3),
        "ia3": (adapters.ia3(), 1e-2),
        "houlsby": (adapters.houlsby(8), 1e-3),
        "pfeiffer": (adapters.pfeiffer(8), 1e-3),
        "parallel": (adapters.parallel(8), 3e-4),
        "prefix": (adapters.prefix(policy, 16), 1e-2),
        "prefix_network": (adapters.prefix(policy, 16, network_width=64), 3e-4),
        "prompt": (adapters.prompt(policy, 16), 1e-2),
    }


class Trainer:
    """Trains one method on one task as often as asked, compiled once."""

    def __init__(self, task: Any, method: Any):
        import optax

        self._task, self._method, self._steps = task, method, task.steps
        self._trainable = ("params",) if method is None else method.trainable
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, task.steps // 10, task.steps)

        def optimizer(learning_rate: Any) -> Any:
            return optax.chain(
                optax.scale_by_adam(), optax.scale(-1.0), optax.scale_by_schedule(schedule), optax.scale(learning_rate)
            )

        self._optimizer = optax.inject_hyperparams(optimizer)(learning_rate=1.0)
        self._step = lm.training.make_step(
            task.policy, lm.objectives.cross_entropy(), self._optimizer, trainable=self._trainable, clip_norm=1.0
        )

    def run(self, rate: float, seed: int) -> Trial:
        """The trial of a learning rate and a seed: losses and accuracies after it, and the parameters it trained."""
        import jax
        import jax.numpy as jnp

        task, key = self._task, jax.random.key(1000 + seed)
        variables = jax.tree.map(jnp.asarray, task.variables)
        if self._method is not None:
            variables = self._method.init(key, variables)
        state = lm.training.init_state(
            task.policy, self._optimizer, key, variables=variables, trainable=self._trainable
        )
        state.opt_state.hyperparams["learning_rate"] = jnp.asarray(rate)
        trained = lm.training.state.trainable_part(state.variables, self._trainable)
        found: Trial = {"trained": sum(leaf.size for leaf in jax.tree.leaves(trained))}
        for index in range(self._steps):
            state, _ = self._step(state, task.batch(seed, index))
        for name in ("choosing", "held_out"):
            scores = lm.evaluation.evaluate_batches(task.policy, state.variables, getattr(task, name)).metrics()
            found |= {f"{name}_loss": scores["loss"], f"{name}_accuracy": scores["accuracy"]}
        return found


def trials_of(task: Any, name: str, config: CompareConfig, book: Trials) -> list[Trial]:
    """All trials of a method on a task; those that are known already are not made again."""
    method, lowest = methods(task.policy)[name]
    trainer = functools.cache(lambda: Trainer(task, method))
    found: list[Trial] = []

    def trial(rate: float, seed: int) -> None:
        label: Trial = {"task": task.name, "method": name, "rate": float(f"{rate:.4g}"), "seed": seed}
        found.append(book.ask(label, lambda: trainer().run(rate, seed), told=False))

    low, high = 0, config.rates - 1
    for power in range(config.rates):
        trial(lowest * config.factor**power, 0)
    best = _best(found)
    for _ in range(config.extensions):
        if best["rate"] == min(t["rate"] for t in found):
            low -= 1
            trial(lowest * config.factor**low, 0)
        elif best["rate"] == max(t["rate"] for t in found):
            high += 1
            trial(lowest * config.factor**high, 0)
        best = _best(found)
    for seed in range(1, config.seeds):
        trial(best["rate"], seed)
    return found


def _best(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda t: t["choosing_loss"] if math.isfinite(t["choosing_loss"]) else math.inf)


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """One line of the table: the mean over seeds at the chosen rate, and half the width of its 95 % interval.

    >>> runs = [dict(task="t", method="m", rate=1.0, seed=s, trained=5, choosing_loss=2.0 + s,
    ...              held_out_loss=3.0 + s, held_out_accuracy=0.5, seconds=1.0) for s in range(3)]
    >>> line = summary(runs)
    >>> line["loss"], round(line["loss_interval"], 3), line["edge"]
    (4.0, 2.484, False)
    """
    firsts = [t for t in trials if t["seed"] == 0 and math.isfinite(t["choosing_loss"])]
    if not firsts:
        raise UserError(f"{trials[0]['method']} diverged at every learning rate; lower the rates.")
    best = _best(firsts)["rate"]
    rates = sorted(t["rate"] for t in trials if t["seed"] == 0)
    chosen = [t for t in trials if t["rate"] == best]
    line: dict[str, Any] = {name: chosen[0][name] for name in ("task", "method", "trained")} | {
        "rate": best,
        "edge": len(rates) > 1 and best in (rates[0], rates[-1]),
        "seeds": len(chosen),
        "seconds": round(sum(t["seconds"] for t in trials), 1),
    }
    for name in ("loss", "accuracy"):
        line[name], line[f"{name}_interval"] = mean_and_half([t[f"held_out_{name}"] for t in chosen])
    return line


def write_table(lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """Prints the table, and writes it as text and as JSON."""
    from rich.console import Console
    from rich.table import Table

    with (folder / "table.txt").open("w") as file:
        for console in (Console(), Console(file=file, width=140)):
            for task in dict.fromkeys(line["task"] for line in lines):
                table = Table(title=f"{task}: held-out examples, 95 % intervals over seeds", title_justify="left")
                for name in ("method", "trained", "learning rate", "loss", "accuracy of a token", "seconds"):
                    table.add_column(name, justify="left" if name == "method" else "right")
                for line in sorted((x for x in lines if x["task"] == task), key=lambda x: x["loss"]):
                    table.add_row(
                        line["method"],
                        f"{line['trained']:,}",
                        f"{line['rate']:.1e}" + ("*" if line["edge"] else ""),
                        f"{line['loss']:.4f} ± {line['loss_interval']:.4f}",
                        f"{line['accuracy']:.4f} ± {line['accuracy_interval']:.4f}",
                        f"{line['seconds']:.0f}",
                    )
                console.print(table)
            console.print("* the best rate is the lowest or the highest that was tried")
    (folder / "results.json").write_text(json.dumps(list(lines), indent=2) + "\n")


def plot(lines: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Held-out loss against trained parameters, a panel a task."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure, panels = new_figure(len(tasks), (8 * len(tasks), 5.5))
    for axes, task in zip(panels, tasks, strict=True):
        for line in (line for line in lines if line["task"] == task):
            place = line["trained"], line["loss"]
            axes.errorbar(*place, yerr=half(line, "loss"), fmt="o", capsize=3, color="#2f6fb2")
            axes.annotate(line["method"], place, xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", xlabel="trained parameters", ylabel="held-out loss, nats a token", title=task)
        axes.margins(x=0.15)
    return saved(figure, folder / "quality.png")


def run(config: CompareConfig, options: command_line.Options) -> None:
    """Makes the trials that are missing, then the table and the picture."""
    from experiments import compare_tasks
    from experiments.support import use_compilation_cache

    use_compilation_cache(DataConfig().cache_root())
    done, total = 0, len(config.tasks) * len(config.methods)
    lines = []
    with Trials(options.run_dir, "compare", config) as book:
        for name in config.tasks:
            task = getattr(compare_tasks, name)(config, lambda text: print(text, flush=True))
            for method in config.methods:
                lines.append(summary(trials_of(task, method, config, book)))
                done += 1
                left = book.took / done * (total - done)
                print(
                    f"{name} {method}: loss {lines[-1]['loss']:.4f}, accuracy {lines[-1]['accuracy']:.4f}, "
                    f"{lines[-1]['trained']:,} trained; {done}/{total}, left {left / 60:.1f} min",
                    flush=True,
                )
        write_table(lines, book.folder)
        print(f"picture     {plot(lines, book.folder)}\nrun_dir={book.folder} took={book.took:.0f}s")


if __name__ == "__main__":
    command_line.main(run, CompareConfig())
