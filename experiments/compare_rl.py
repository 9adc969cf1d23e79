"""Ways to learn from rewards, with one budget: PPO with its critic, GRPO of answers and of steps, RLOO.

    python -m experiments.compare_rl --run-dir runs/rl

Each seed has a starting model of its own, which was taught made-up arithmetic (the first rungs of
`experiments.ladder`). Every method goes on from it with the same prompts, rollouts, updates and learning rate, at
several strengths of the KL to it in the loss. What comes of a run is measured on held-out questions. Runs are those of
`experiments.ppo`, `grpo` and `reinforce`, in directories of their own. Each is a line in `trials.jsonl`, and a
comparison that was interrupted goes on where it stopped. At the end `table.txt`, `results.json` and the pictures are
made anew: means and 95 % intervals (Student's t) over seeds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments import arithmetic, grpo, ladder, ppo, reinforce, trials
from experiments.adapter_config import AdapterConfig
from experiments.compare_rl_config import CompareRlConfig
from experiments.ladder_config import LadderConfig
from experiments.reinforcement_config import GrpoConfig, PpoConfig, ReinforceConfig
from experiments.support import OpenedModel, open_model, use_compilation_cache
from experiments.trials import Line, Trial
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.data.prompt_config import PromptConfig
from lmjax.rl.plan import Plan
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

STEPS = f"{Path(__file__).absolute().with_name('arithmetic_rewards.py')}:steps"
# The first reward is what accuracy is read from during a run; in these it counts for nothing else.
OF_STEPS = (f"0 * {arithmetic.REWARD}", STEPS)
OF_ANSWERS = (arithmetic.REWARD,)
NAMES = {
    "ppo": "PPO with critic",
    "ppo_process": "PPO with critic, rewards of steps",
    "grpo": "GRPO",
    "grpo_process": "GRPO, rewards of steps",
    "rloo": "RLOO",
}
LOG = "log.txt"  # what an experiment prints


class Start:
    """A starting model and its questions, made when first asked for; what is there already is gone on with.

    Args:
      config: of the comparison.
      seed: which of its models.
      folder: where it lies.
    """

    def __init__(self, config: CompareRlConfig, seed: int, folder: Path):
        self.config, self.seed, self.folder = config, seed, folder

    @functools.cached_property
    def model(self) -> OpenedModel:
        """The model after worked solutions.

        Raises:
          SystemExit: making it was interrupted.
        """
        same = ("largest", "documents", "pretrain_steps", "solutions", "sft_steps", "held_out")
        own = LadderConfig(**{name: getattr(self.config, name) for name in same}, seed=self.config.seed + self.seed)
        if not self.held_out.exists():
            ladder.make_data(own, self.folder / "data")
        for rung in ("pretrain", "sft"):
            quietly(*ladder.rungs(own, self.folder)[rung], self.folder / rung)
        return open_model(str(self.folder / "sft"))

    @property
    def held_out(self) -> Path:
        """Questions that no model learns from."""
        return self.folder / "data" / "held_out.jsonl"


def experiment_of(method: str, strength: float, start: Start) -> tuple[Any, Any]:
    """The experiment that a method is, and what it is told."""
    config = start.config
    every = config.epochs * config.minibatches * (config.iterations // config.evaluations)
    shared: dict[str, Any] = dict(
        model=str(start.folder / "sft"),
        data=PromptConfig(
            path=str(start.folder / "data" / "grpo.jsonl"), template="none", validation_path=str(start.held_out)
        ),
        rewards=OF_STEPS if method.endswith("_process") else OF_ANSWERS,
        reference_kl=strength,
        rollout=Plan(
            prompts=config.prompts, samples=config.samples, max_new_tokens=config.max_new_tokens, max_prompt=0,
            epochs=config.epochs, minibatches=config.minibatches,
        ),
        adapter=AdapterConfig(kind="full"),
        optimizer=OptimizerConfig(weight_decay=0.0, b2=0.99),
        schedule=ScheduleConfig(kind="constant", peak=config.learning_rate, warmup_steps=config.updates // 10),
        loop=LoopConfig(steps=config.updates, eval_every=every, log_every=1, prefetch=0),
        checkpoint=CheckpointConfig(every=0, keep_best=0),
        evaluations=0,
        seed=config.seed + start.seed,
    )  # fmt: skip
    if method.startswith("ppo"):
        return ppo, PpoConfig(objective=f"ppo(0.2) + {config.critic} * value_loss(0.2)", **shared)
    if method == "rloo":
        return reinforce, ReinforceConfig(objective="rloo(0.2)", baseline="leave_one_out", **shared)
    return grpo, GrpoConfig(objective="grpo(0.2)", process=method == "grpo_process", **shared)


def measured(model: OpenedModel, start: Start) -> Trial:
    """What a model answers to held-out questions: likeliest answers, and samples at a temperature of 1."""
    import jax
    import numpy as np

    from experiments import arithmetic_rewards
    from experiments.rewards import open_rewards
    from lmjax import rl

    config = start.config
    template = lm.data.open_template("none", model.tokenizer, model.tokenizer_path)
    held_out = PromptConfig(path=str(start.held_out), template="none", validation_fraction=0.0)
    asked = lm.data.load_prompts(held_out, model.tokenizer, template=template).train
    say = functools.partial(
        rl.roll_out, model.policy, model.variables, asked, jax.random.key(config.seed),
        max_new_tokens=config.max_new_tokens, eos=model.tokenizer.eos, tokenizer=model.tokenizer,
    )  # fmt: skip
    likeliest, samples = say(samples=1, temperature=0.0), say(samples=config.answers)
    (right,) = (reward.function for reward in open_rewards(OF_ANSWERS))
    each = [[number for _, number in arithmetic_rewards.steps(rollout)] for rollout in samples]
    length = max(len(prompt.ids) for prompt in asked) + config.max_new_tokens
    batches = [
        lm.generation.answers_batch([r.prompt for r in some], [r.tokens for r in some], length)
        for some in (samples[i : i + len(asked)] for i in range(0, len(samples), len(asked)))
    ]
    ratios = lm.evaluation.sequence_log_ratios(model.policy, model.variables, start.model.variables, batches)
    return {
        "accuracy": float(np.mean([right(rollout) for rollout in likeliest])),
        "reward": float(np.mean([right(rollout) for rollout in samples])),
        "steps_right": float(np.mean([sum(own) for own in each])) / arithmetic_rewards.STEPS,
        "kl": float(ratios.mean()),
        "kl_error": float(ratios.std(ddof=1) / math.sqrt(len(ratios))),
        "length": float(np.mean([len(rollout.tokens) for rollout in samples])),
        "ended": float(np.mean([rollout.ended for rollout in samples])),
    }


def about_run(config: CompareRlConfig, folder: Path) -> Trial:
    """What a run took, and its accuracy on held-out questions after so many rollouts."""
    from lmjax.training.metrics import read_metrics

    records, steps = read_metrics(folder / "metrics.jsonl"), config.epochs * config.minibatches
    rollouts = config.prompts * config.samples / steps
    seconds: dict[int, list[float]] = {}  # of each update of an iteration; the first one also waits for the rollouts
    for record in records:
        if "step_seconds" in record:
            seconds.setdefault(record["step"] % steps, []).append(record["step_seconds"])
    tokens = sum(
        json.loads(line)["tokens"]
        for path in (folder / "completions").glob("iteration_*.jsonl")
        for line in path.read_text("utf-8").splitlines()
    )
    return {
        # Medians, so that compiling and what else the machine did do not count.
        "training_seconds": config.iterations * sum(map(statistics.median, seconds.values())),
        "tokens": tokens,
        "curve": [
            [record["step"] * rollouts, record["validation/accuracy"]]
            for record in records
            if "validation/accuracy" in record
        ],
    }


def quietly(experiment: Any, settings: Any, folder: Path) -> None:
    """Runs an experiment, or goes on with it; what it prints goes into a file of its directory.

    Raises:
      SystemExit: it was interrupted, and so are we.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = experiment.run(settings, command_line.Options(run_dir=str(folder)))
    if status:
        print(f"{folder} was interrupted; the same command goes on with it", file=sys.stderr)
        raise SystemExit(status)


def untrained(start: Start) -> Trial:
    """Measures a starting model."""
    return measured(start.model, start) | {"training_seconds": 0.0, "tokens": 0, "curve": [], "gain": 0.0}


def trained(method: str, strength: float, start: Start, first: Trial, folder: Path) -> Trial:
    """Trains with a method, and measures what came of it."""
    quietly(*experiment_of(method, strength, start), folder)
    found = measured(open_model(str(folder)), start) | about_run(start.config, folder)
    return found | {"gain": found["reward"] - first["reward"]}


def run(config: CompareRlConfig, options: command_line.Options) -> None:
    """Makes the runs that are missing, then the table and the pictures."""
    use_compilation_cache(DataConfig().cache_root())
    found: list[Trial] = []
    with trials.Trials(options.run_dir, "rl", config) as book:
        folder, each = book.folder.absolute(), len(config.methods) * len(config.strengths)
        for seed in range(config.seeds):
            start = Start(config, seed, folder / f"start-{seed}")
            label = {"method": "start", "strength": 0.0, "seed": seed}
            first = book.ask(label, functools.partial(untrained, start))
            found.append(first)
            for method in config.methods:
                for strength in config.strengths:
                    own = folder / f"{method}-{strength:g}-{seed}"
                    make = functools.partial(trained, method, strength, start, first, own)
                    found.append(book.ask({"method": method, "strength": strength, "seed": seed}, make))
            book.say(f"{seed + 1} of {config.seeds} starting models done, {each} runs from each")
        lines = trials.summary(found, by=("method", "strength"))
        write_table(config, lines, folder)
        for path in (frontier(lines, folder), curves(config, found, folder)):
            print(f"picture     {path}")
        print(f"run_dir={folder} took={book.took:.0f}s")


def write_table(config: CompareRlConfig, lines: Sequence[Line], folder: Path) -> None:
    """Prints the table, and writes it as text and as JSON."""
    from rich.console import Console
    from rich.table import Table

    columns = {
        "accuracy": ("likeliest right", 3),
        "reward": ("samples right", 3),
        "gain": ("gain on start", 3),
        "steps_right": ("steps right", 3),
        "kl": ("KL, nats", 2),
        "tokens": ("tokens", 0),
        "training_seconds": ("seconds", 0),
    }
    title = (
        f"{config.held_out} held-out questions, {config.answers} samples of each; 95 % intervals over {config.seeds} "
        f"starting models\n{config.iterations} iterations of {config.prompts} questions x {config.samples} rollouts, "
        f"{config.epochs} epochs of {config.minibatches} minibatches, learning rate {config.learning_rate:g}"
    )
    with (folder / "table.txt").open("w") as file:
        for console in (Console(width=132), Console(file=file, width=132)):
            table = Table(title=title, title_justify="left")
            for name in ("method", "KL in loss", *(title for title, _ in columns.values())):
                table.add_column(name, justify="left" if name == "method" else "right")
            for line in lines:
                whole = ("tokens", "training_seconds")  # their scatter is of no interest
                cells = [
                    f"{line[name]:,.0f}" if name in whole else trials.cell(line, name, digits)
                    for name, (_, digits) in columns.items()
                ]
                table.add_row(line["method"], "" if line["method"] == "start" else f"{line['strength']:g}", *cells)
            console.print(table)
    (folder / "results.json").write_text(json.dumps(list(lines), indent=2) + "\n")


def style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """How a method is drawn in every picture."""
    number = methods.index(method)
    return {"color": f"C{number}", "marker": "osD^v"[number], "label": NAMES[method]}


def frontier(lines: Sequence[Line], folder: Path) -> Path:
    """Reward against KL to the starting model: a line a method, a point a strength."""
    figure, (axes,) = trials.new_figure(1, (8.5, 5.5))
    start = next(line for line in lines if line["method"] == "start")
    methods = list(dict.fromkeys(line["method"] for line in lines if line["method"] != "start"))
    axes.axhline(0, color="#999999", linewidth=0.8)
    trials.points(axes, [start], "kl", "gain", fmt="*", color="black", markersize=13, label="start", zorder=5)
    beside = ((6, 5), (-24, -12), (6, -12), (-24, 5), (6, 5))  # of a method's labels, where others' are not
    for number, method in enumerate(methods):
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: -line["strength"])
        trials.points(axes, own, "kl", "gain", **style(method, methods))
        for line in own:
            axes.annotate(
                f"{line['strength']:g}", (line["kl"], line["gain"]), xytext=beside[number], textcoords="offset points",
                fontsize=8, color=style(method, methods)["color"],
            )  # fmt: skip
    axes.set(
        xlabel="KL to the starting model, nats an answer",
        ylabel=f"gain in reward of samples (the start: {start['reward']:.2f})",
    )
    axes.set_title("reward and KL; at each point its coefficient of the KL in the loss", loc="left", fontsize=11)
    axes.legend(loc="best", fontsize=9)
    return trials.saved(figure, folder / "frontier.png")


def curves(config: CompareRlConfig, found: Sequence[Trial], folder: Path) -> Path:
    """Accuracy on held-out questions over rollouts: a panel a strength, a line a method, the mean over seeds."""
    figure, panels = trials.new_figure(len(config.strengths), (4.6 * len(config.strengths), 4.4))
    start = trials.mean_and_half([trial["accuracy"] for trial in found if trial["method"] == "start"])[0]
    for axes, strength in zip(panels, config.strengths):
        for method in config.methods:
            own = [t["curve"] for t in found if t["method"] == method and t["strength"] == strength]
            rollouts = [0, *(int(place) for place, _ in own[0])]
            heights = [start, *(trials.mean_and_half([y for _, y in point])[0] for point in zip(*own))]
            axes.plot(rollouts, heights, markersize=4, linewidth=1.4, **style(method, config.methods))
        axes.set_title(f"{strength:g} × KL in the loss", loc="left", fontsize=10)
        axes.set_xlabel("rollouts")
        axes.sharey(panels[0])
    panels[0].set_ylabel("held-out questions, likeliest answer right")
    panels[0].legend(fontsize=8, loc="upper left")
    return trials.saved(figure, folder / "curves.png")


if __name__ == "__main__":
    command_line.main(run, CompareRlConfig())
