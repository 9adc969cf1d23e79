"""What `experiments.compare_preferences` makes of its trials: tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from experiments.trials import Line, Trial, cell, half, new_figure, points, saved


def write_table(lines: Sequence[Line], models: Trial | None, folder: Path) -> None:
    """Prints the tables, and writes them as text and as JSON."""
    from rich.console import Console
    from rich.table import Table

    columns = {
        "reward": "true reward",
        "proxy": "by the judge",
        "js_distance": "JS distance",
        "majority": "majority's",
        "accuracy": "accuracy",
        "kl": "KL, nats",
        "length": "tokens",
        "seconds": "seconds",
    }
    with (folder / "table.txt").open("w") as file:
        for console in (Console(width=110), Console(file=file, width=110)):
            for task in dict.fromkeys(line["task"] for line in lines):
                own = [line for line in lines if line["task"] == task]
                table = Table(title=f"{task}: fresh answers, 95 % intervals over seeds", title_justify="left")
                shown = [name for name in columns if name in own[0]]
                for name in ("method", "strength", *(columns[name] for name in shown)):
                    table.add_column(name, justify="left" if name == "method" else "right")
                for line in own:
                    cells = (cell(line, n) for n in shown if n != "seconds")
                    strength = f"{line['strength']:g}" if line["strength"] else ""
                    table.add_row(line["method"], strength, *cells, f"{line['seconds']:.1f}")
                console.print(table)
            if models:
                each = ", ".join(f"{accuracy:.4f}" for accuracy in models["accuracies"])
                console.print(
                    f"reward models on {models['pairs']:,} held-out pairs: accuracy {each}; of their mean "
                    f"{models['ensemble_accuracy']:.4f}; calibration error {models['calibration_error']:.4f}; spread "
                    f"{models['spread_right']:.3f} where it is right, {models['spread_wrong']:.3f} where it is wrong"
                )
    results = {"lines": list(lines), "reward_models": models}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def pictures(lines: Sequence[Line], models: Trial | None, folder: Path) -> list[Path]:
    """Every picture that there are numbers for."""
    found = []
    for task, draw in (("preferences", frontier), ("overoptimisation", overoptimisation), ("pluralistic", beliefs)):
        own = [line for line in lines if line["task"] == task]
        if own:
            found.append(draw(own, folder))
    if models:
        found.append(calibration(models, folder))
    return found


def frontier(lines: Sequence[Line], folder: Path) -> Path:
    """True reward against KL: a line a method, a point a strength."""
    figure, (axes,) = new_figure(1, (9, 6))
    methods = [name for name in dict.fromkeys(line["method"] for line in lines) if name != "start"]
    start = next(line for line in lines if line["method"] == "start")
    axes.errorbar(
        start["kl"], start["reward"], yerr=half(start, "reward"), fmt="*", color="black", markersize=12, label="start"
    )
    for number, method in enumerate(methods):
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: line["kl"])
        points(axes, own, "kl", "reward", color=f"C{number}", label=method, marker="osD^vPX<>"[number % 9])
    axes.set(xlabel="KL to the starting model, nats an answer", ylabel="true reward of fresh answers")
    axes.set_title("what is gained, and how far the policy went for it", loc="left")
    axes.legend(fontsize=8, ncols=2)
    return saved(figure, folder / "frontier.png")


def overoptimisation(lines: Sequence[Line], folder: Path) -> Path:
    """The truth and the judge that is nearly right against KL."""
    figure, (axes,) = new_figure(1, (8, 5.5))
    own = sorted(lines, key=lambda line: line["kl"])
    points(axes, own, "kl", "proxy", color="#c06020", label="what the judge sees", marker="s")
    points(axes, own, "kl", "reward", color="#2f6fb2", label="what is true", marker="o")
    for line in own:
        name = f"β {line['strength']:g}" if line["strength"] else "start"
        axes.annotate(
            name, (line["kl"], line["reward"]), xytext=(5, -12), textcoords="offset points", fontsize=8, color="#444444"
        )
    axes.set(xlabel="KL to the starting model, nats an answer", ylabel="reward of fresh answers")
    axes.set_title("online DPO with a judge that is nearly right, as β falls", loc="left")
    axes.legend()
    return saved(figure, folder / "overoptimisation.png")


def beliefs(lines: Sequence[Line], folder: Path) -> Path:
    """Distance of the beliefs to the population's, and the worth of answers to those who hold them."""
    figure, panels = new_figure(2, (11, 4.5))
    names = [line["method"] + (f", β {line['strength']:g}" if line["strength"] else "") for line in lines]
    titles = ("Jensen-Shannon distance to the population's beliefs", "worth of fresh answers to who holds the belief")
    for axes, name, title in zip(panels, ("js_distance", "reward"), titles, strict=True):
        axes.barh(
            names, [line[name] for line in lines], xerr=[half(line, name) for line in lines], color="#7fa8d1",
            ecolor="#333333", capsize=3,
        )  # fmt: skip
        axes.invert_yaxis()
        axes.set_title(title, loc="left", fontsize=10)
    panels[1].set_yticklabels([])
    return saved(figure, folder / "pluralistic.png")


def calibration(models: Trial, folder: Path) -> Path:
    """How often an answer is better beside the probability that the reward models give it; and how many pairs."""
    figure, (axes, counts) = new_figure(2, (10, 4.5))
    predicted, observed, number = models["predicted"], models["observed"], [n for n in models["counts"] if n]
    errors = [1.96 * math.sqrt(max(p * (1 - p), 1e-9) / n) for p, n in zip(observed, number, strict=True)]
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="as predicted")
    axes.errorbar(predicted, observed, yerr=errors, fmt="o", capsize=3, color="#2f6fb2", label="reward models, mean")
    axes.set(xlabel="predicted probability that the first is better", ylabel="how often it is")
    axes.set_title(f"calibration error {models['calibration_error']:.3f}", loc="left")
    axes.legend()
    width = 1 / len(models["counts"])
    middles = [(i + 0.5) * width for i in range(len(models["counts"]))]
    counts.bar(middles, models["counts"], 0.9 * width, color="#7fa8d1")
    counts.set(xlabel="predicted probability", ylabel="held-out pairs", yscale="log")
    counts.set_title(f"accuracy {models['ensemble_accuracy']:.3f} on {models['pairs']:,} pairs", loc="left")
    return saved(figure, folder / "calibration.png")
