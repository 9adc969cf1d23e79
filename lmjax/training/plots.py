"""The curves of a run as PNG: loss, learning rate, gradient norm, throughput, and the four on one sheet.

`python -m lmjax.training.plots RUN_DIR` draws them again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _INK, _GRID = "#2f6fb2", "#d9772b", "#333333", "#dddddd"

Record = dict[str, Any]


def plot_run(records: Sequence[Record], directory: Path | str, title: str = "") -> list[Path]:
    """Draws the curves that there are numbers for.

    Args:
      records: as `lmjax.training.metrics.read_metrics` returns them.
      directory: where `loss.png`, `learning_rate.png`, `gradient_norm.png`, `throughput.png`, those of preferences
        and `overview.png` go.
      title: the name of the run.

    Returns:
      The files written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    panels = [(name, draw) for name, keys, draw in _PANELS if any(_series(records, key)[0] for key in keys)]
    written = []

    def save(figure: Any, name: str) -> None:
        # The canvas is made by hand: pyplot would keep every figure, and choose a window system.
        FigureCanvasAgg(figure)
        figure.savefig(directory / f"{name}.png", dpi=130)
        written.append(directory / f"{name}.png")

    for name, draw in panels:
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        draw(figure.subplots(), records)
        if title:
            figure.suptitle(title, fontsize=10, color=_INK)
        save(figure, name)
    if panels:
        rows = (len(panels) + 1) // 2
        figure = Figure(figsize=(12, 3.8 * rows), layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False).flatten()
        for ax, (_, draw) in zip(axes, panels, strict=False):
            draw(ax, records)
        for ax in axes[len(panels) :]:
            ax.axis("off")
        if title:
            figure.suptitle(title, fontsize=12, color=_INK)
        save(figure, "overview")
    return written


def smooth(values: Sequence[float], width: float) -> list[float]:
    """A moving average over about `width` values: exponential weights, normalized so that the start is fair.

    >>> smooth([1.0, 1.0, 4.0], 1)
    [1.0, 1.0, 4.0]
    """
    keep = 1 - 1 / max(width, 1.0)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def _series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float))]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _style(ax: Any, title: str, label: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, color=_INK)
    ax.set_xlabel("step", color=_INK)
    ax.set_ylabel(label, color=_INK)
    ax.grid(True, which="major", color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(colors=_INK, which="both")
    ax.margins(x=0.02)


def _log_if_wide(ax: Any, values: Sequence[float], factor: float) -> None:
    """A logarithmic axis, with plain numbers at 1, 2 and 5, where values span more than `factor`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not values or min(values) <= 0 or max(values) / min(values) < factor:
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(values) / min(values) < 200 else (1.0,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _noisy(ax: Any, steps: list[int], values: list[float], label: str) -> None:
    """A noisy series: pale as it is, dark as its moving average."""
    if len(values) < 20:
        ax.plot(steps, values, color=_BLUE, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    ax.plot(steps, values, color=_BLUE, linewidth=0.8, alpha=0.35)
    ax.plot(steps, smooth(values, len(values) / 50), color=_BLUE, linewidth=1.8, label=label)


def _loss(ax: Any, records: Sequence[Record]) -> None:
    preferences = any("rewards/margins" in record for record in records)
    _style(ax, "Loss", "loss of a pair" if preferences else "nats a token")
    steps, values = _series(records, "loss")
    held_steps, held = _series(records, "validation/loss")
    if values:
        _noisy(ax, steps, values, "training")
    if held:
        ax.plot(held_steps, held, color=_ORANGE, linewidth=1.8, marker="o", markersize=4, label="validation")
        ax.annotate(
            f"{held[-1]:.3f}",
            (held_steps[-1], held[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_ORANGE,
        )
    _log_if_wide(ax, values + held, 1.5)
    ax.legend(frameon=False, labelcolor=_INK)


def _learning_rate(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Learning rate", "learning rate")
    steps, values = _series(records, "learning_rate")
    ax.plot(steps, values, color=_BLUE, linewidth=1.8)
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _gradient_norm(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Gradient norm", "L2 norm before clipping")
    steps, values = _series(records, "grad_norm")
    _noisy(ax, steps, values, "gradient norm")
    _log_if_wide(ax, values, 5.0)


def _throughput(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Throughput", "tokens a second")
    steps, values = _series(records, "tokens_per_second")
    _noisy(ax, steps, values, "tokens a second")
    top = sorted(values)[int(0.99 * (len(values) - 1))]  # one outlier must not flatten the rest
    ax.set_ylim(0, 1.15 * max(top, 1e-9))
    ax.ticklabel_format(axis="y", style="plain")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    shares = _series(records, "mfu")[1]
    if shares:
        ax.set_title(f"MFU {100 * sorted(shares)[len(shares) // 2]:.1f} %", loc="right", fontsize=10, color=_INK)


def _margins(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Reward margins", "chosen less rejected")
    _both(ax, records, "rewards/margins")


def _accuracies(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Pairs the right way round", "share")
    _both(ax, records, "rewards/accuracies")
    ax.set_ylim(0, 1.03)


def _drift(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Log-probability of the answers", "nats an answer")
    _two(ax, records, {"logps/chosen": "chosen", "logps/rejected": "rejected"}, pale=True)


def _two(ax: Any, records: Sequence[Record], names: dict[str, str], pale: bool = False) -> None:
    """Series by their keys and what they are called, as moving averages; as they are too, in pale."""
    for (key, label), color in zip(names.items(), (_BLUE, _ORANGE), strict=True):
        steps, values = _series(records, key)
        if values:
            if pale:
                ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
            ax.plot(steps, smooth(values, len(values) / 50), color=color, linewidth=1.8, label=label)
    ax.legend(frameon=False, labelcolor=_INK)


def _rewards(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Reward", "of a rollout")
    _both(ax, records, "reward")


def _completions(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Length of rollouts", "tokens")
    steps, values = _series(records, "completions/mean_length")
    _noisy(ax, steps, values, "mean length")
    cut = _series(records, "completions/clipped_ratio")[1]
    if cut:
        ax.set_title(f"{100 * cut[-1]:.0f} % cut off", loc="right", fontsize=10, color=_INK)
    ax.set_ylim(bottom=0)


def _certainty(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Entropy of what is said", "nats a token")
    _noisy(ax, *_series(records, "rollout/entropy"), "entropy")
    ax.set_ylim(bottom=0)


def _idle(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "Prompts whose rollouts were judged alike, and clipped tokens", "share")
    _two(ax, records, {"frac_reward_zero_std": "prompts that teach nothing", "clip_ratio/region": "clipped tokens"})
    ax.set_ylim(0, 1.03)


def _distance(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "KL to the model before", "nats a token in the loss, nats a rollout in the reward")
    _two(ax, records, {"loss/kl_reference": "in the loss", "objective/kl": "in the reward"})


def _critic(ax: Any, records: Sequence[Record]) -> None:
    _style(ax, "What the critic explains", "share of the returns' variance")
    _noisy(ax, *_series(records, "val/explained_variance"), "explained variance")
    ax.set_ylim(-1.03, 1.03)


def _both(ax: Any, records: Sequence[Record], key: str) -> None:
    """A series in training and on held-out examples."""
    steps, values = _series(records, key)
    if values:
        _noisy(ax, steps, values, "training")
    held_steps, held = _series(records, f"validation/{key}")
    if held:
        ax.plot(held_steps, held, color=_ORANGE, linewidth=1.8, marker="o", markersize=4, label="validation")
    ax.legend(frameon=False, labelcolor=_INK)


_PANELS = (
    ("loss", ("loss", "validation/loss"), _loss),
    ("learning_rate", ("learning_rate",), _learning_rate),
    ("gradient_norm", ("grad_norm",), _gradient_norm),
    ("throughput", ("tokens_per_second",), _throughput),
    ("reward_margins", ("rewards/margins", "validation/rewards/margins"), _margins),
    ("accuracies", ("rewards/accuracies", "validation/rewards/accuracies"), _accuracies),
    ("answer_logprobs", ("logps/chosen",), _drift),
    ("reward", ("reward",), _rewards),
    ("completions", ("completions/mean_length",), _completions),
    ("entropy", ("rollout/entropy",), _certainty),
    ("signal", ("frac_reward_zero_std",), _idle),
    ("kl", ("loss/kl_reference", "objective/kl"), _distance),
    ("critic", ("val/explained_variance",), _critic),
)


if __name__ == "__main__":
    from lmjax.training.metrics import read_metrics

    for folder in map(Path, sys.argv[1:]):
        for file in plot_run(read_metrics(folder / "metrics.jsonl"), folder / "plots", title=folder.name):
            print(file)
