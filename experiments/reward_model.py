"""Trains a reward model: the trunk of a language model with a scalar head, on pairs of answers (Bradley-Terry).

    python -m experiments.reward_model --model runs/mine --data.path preferences.json --run-dir runs/reward

What is trained is an adapter and the head, or the whole model (--adapter.kind full). A run directory that holds a
checkpoint is gone on with; SIGTERM or Ctrl-C saves one and ends the run.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments import finetuning
from experiments.reward_model_config import RewardModelConfig
from experiments.support import use_compilation_cache
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.errors import UserError


def run(config: RewardModelConfig, options: command_line.Options) -> int:
    """Trains and evaluates; the last line printed has `accuracy=`, the held-out pairs the right way round."""
    import jax

    started = time.monotonic()
    use_compilation_cache(DataConfig().cache_root())
    mesh = finetuning.make_mesh(config)

    # The model to start from, and the preferences as it reads them.
    model = finetuning.open_base(config)
    config = dataclasses.replace(config, model=str(Path(config.model).expanduser().absolute()))
    if model.context is not None and config.data.max_length > model.context:
        raise UserError(
            f"data.max_length is {config.data.max_length}, but the model's positions end at {model.context}; lower it"
        )
    named = model.template if config.data.template == "auto" else config.data.template
    template = lm.data.open_template(named, model.tokenizer, model.tokenizer_path)
    data = lm.data.load_preferences(config.data, config.batch_size, model.tokenizer, template=template)
    held_out = data.validation(config.eval_batch_size or None)

    # What is trained: the head, drawn as Ziegler et al. (arXiv:1909.08593) draw it, and the adapter or the model.
    objective = lm.objectives.bradley_terry(center=config.center)
    folder = finetuning.run_folder(options, "reward")

    def with_head(variables: Any, trainable: Any) -> Any:
        del trainable
        std = (model.policy.config.embed_dim + 1) ** -0.5
        return lm.policy.add_value_head(variables, jax.random.key(config.seed), std)

    training = finetuning.set_up(
        config, model, objective, mesh, folder, beside=with_head, also_trained=("value",)
    )
    if options.plan:
        print(f"{training.plan.table}\n\n{training.plan.summary}")
        return 0

    def score(variables: Any) -> dict[str, float]:
        if not held_out:
            return {}
        sums = lm.evaluation.evaluate_objective(objective, training.policy, variables, held_out, mesh=mesh)
        found = {name: total / weight for name, (total, weight) in sums.items() if weight}
        return {"loss": found["loss/bradley_terry"]} | {n: v for n, v in found.items() if n.startswith("rewards/")}

    fresh, batches = training.begin(), data.train()
    before = score(fresh.variables)
    state, start = lm.training.resume(training.checkpointer, fresh, batches)
    training = dataclasses.replace(training, begin=None)  # the state has its own arrays
    model = dataclasses.replace(model, variables=None)
    del fresh
    settings = command_line.format_config(config)
    with training.checkpointer, lm.training.RunDirectory.open(folder, config, settings) as directory:
        directory.truncate(start)
        finetuning.save_model_files(folder, training.policy, model)
        print(
            f"model       {model.description}\ntemplate    {template.name}\n"
            + "".join(f"data        {line}\n" for line in data.report().splitlines())
            + f"{training.plan.summary}\nrun         {folder}"
            + (f"\nresumed     from step {start:,}" if start else ""),
            flush=True,
        )
        result = lm.training.run(
            training.step,
            state,
            batches,
            config=config.loop,
            checkpointer=training.checkpointer,
            run_directory=directory,
            writers=finetuning.writers(config, folder),
            evaluate=(lambda state: score(state.variables)) if held_out else None,
            sharding=lambda batch: lm.sharding.shard_batch(batch, mesh),
            flops_per_token=training.plan.flops_per_token,
        )
        if finetuning.interrupted(result, folder):
            return result.exit_code
        variables = result.state.variables
        after = score(variables)
        written = directory.plot()
        if held_out:
            report, picture = _calibrate(config, training.policy, variables, data.held_out_pairs, directory.path)
            written.append(picture)
            _show(before, after, report, directory.path)
        print("plots       " + ", ".join(str(path) for path in written))
        print(f"took        {time.monotonic() - started:.0f} s")
        scores = f" val_loss={after['loss']:.4f} accuracy={after['rewards/accuracies']:.4f}" if held_out else ""
        print(f"run_dir={folder} step={result.step}{scores}", flush=True)
    return 0


def _calibrate(
    config: RewardModelConfig, policy: Any, variables: Any, pairs: list[Any], folder: Path
) -> tuple[dict[str, float], Path]:
    """Whether the probabilities of held-out pairs can be believed: numbers, and a picture."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = [
        lm.evaluation.sequence_scores(policy, variables, [getattr(pair, side).ids for pair in pairs])
        for side in ("first", "second")
    ]
    gaps = scores[0] - scores[1]
    swapped = np.arange(len(gaps)) % 2 == 1  # so that the better one does not always come first
    found = lm.evaluation.calibration(
        1 / (1 + np.exp(-np.where(swapped, -gaps, gaps))), np.where(swapped, 0.0, 1.0), config.bins
    )
    figure = Figure(figsize=(5.4, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    axes.scatter(found.predicted, found.observed, s=8 + 200 * found.counts / found.counts.sum(), color="#2f6fb2")
    axes.set(
        xlabel="predicted probability that the first answer is the better", ylabel="how often it is",
        title=f"held-out pairs, calibration error {found.error:.3f}", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
    )  # fmt: skip
    axes.grid(color="#dddddd", linewidth=0.6)
    path = folder / "plots" / "calibration.png"
    figure.savefig(path, dpi=130)
    both = np.concatenate(scores)
    numbers = {"min": both.min(), "mean": both.mean(), "max": both.max(), "std": both.std()}
    return {f"score/{name}": float(x) for name, x in numbers.items()} | {"calibration_error": found.error}, path


def _show(before: dict[str, float], after: dict[str, float], report: dict[str, float], folder: Path) -> None:
    """Prints scores before and after, and writes them as `comparison.json`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out pairs", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in after.items():
        table.add_row(name, f"{before[name]:.4f}", f"{value:.4f}")
    for name, value in report.items():
        table.add_row(name, "", f"{value:.4f}")
    Console().print(table)
    comparison = {"before": before, "after": after | report}
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n")


if __name__ == "__main__":
    command_line.main(run, RewardModelConfig(), plan=True)
