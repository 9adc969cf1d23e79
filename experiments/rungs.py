"""What experiments that climb share: rungs one after the other, each an experiment of its own, asked after each.

`ladder` and `countdown` are such. A climb that was interrupted goes on with the rung, and within it the step, where it
stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments.pretrain_config import FROM_TOKENIZER, PretrainConfig
from experiments.support import open_model
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.data.prompt_config import PromptConfig
from lmjax.errors import UserError
from lmjax.models.presets import small
from lmjax.tokenizers.config import TokenizerConfig
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

Found = dict[str, Any]
HELD_OUT = "held_out.jsonl"  # the questions, in the folder data/
LAST = CheckpointConfig(every=0, keep_best=0)


def open_climb(config: Any, options: command_line.Options, name: str, make_data: Callable[[Any, Path], None]) -> Path:
    """The run directory, with the settings in `config.json` and what `make_data` writes into data/.

    Args:
      config: a dataclass.
      options: where, if that is said.
      name: of the experiment.
      make_data: (config, folder) -> None, called once.

    Raises:
      UserError: the directory was made with other settings.
    """
    folder = Path(options.run_dir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    said = folder / "config.json"
    if said.exists() and said.read_text() != text:
        raise UserError(f"{folder} holds a {name} with other settings; choose another --run-dir")
    if not said.exists():
        make_data(config, folder / "data")
        said.write_text(text)
    return folder


def pretraining(
    text: Path, *, steps: int, rows: int, length: int, positions: int, sample: str, sample_tokens: int, seed: int
) -> PretrainConfig:
    """The first rung: 0.4 million parameters that read bytes.

    Args:
      text: JSON lines to learn from.
      steps: batches of so many rows of so many tokens.
      rows, length: of a batch.
      positions: that the model has.
      sample, sample_tokens: what it goes on from to show what it learned, and for how long.
      seed: of everything.
    """
    return PretrainConfig(
        model=small(FROM_TOKENIZER, num_layers=2, num_heads=4, embed_dim=128, max_length=positions),
        data=DataConfig(
            kind="jsonl", path=str(text), sequence_length=length, validation_fraction=0.02,
            tokenizer=TokenizerConfig(kind="byte", eos="<|endoftext|>"), seed=seed,
        ),
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.05),
        schedule=ScheduleConfig(kind="wsd", peak=6e-3, warmup_steps=min(20, steps // 5), cooldown_fraction=0.5),
        loop=LoopConfig(steps=steps, eval_every=0, log_every=10), checkpoint=LAST, batch_size=rows,
        sample_prompt=sample, sample_tokens=sample_tokens, seed=seed,
    )  # fmt: skip


def climb(
    rungs: Mapping[str, tuple[Any, Any]], folder: Path, name: str, measure: Callable[[str], Found]
) -> tuple[int, Found]:
    """Runs what is missing of the rungs and measures after each: the exit status, and by rung what was found.

    Args:
      rungs: of each its experiment and config.
      folder: of `open_climb`; each rung has its run directory in it.
      name: of the experiment; `<name>.json` holds what was found.
      measure: a rung -> its numbers; with them are the seconds that it took.
    """
    results = folder / f"{name}.json"
    found: Found = json.loads(results.read_text()) if results.exists() else {}
    for rung, (experiment, own) in rungs.items():
        if rung in found:
            continue
        print(f"\n== {rung}", flush=True)
        began = time.monotonic()
        status = experiment.run(own, command_line.Options(run_dir=str(folder / rung)))
        if status:
            return int(status), found
        found[rung] = measure(rung) | {"seconds": round(time.monotonic() - began, 1)}
        results.write_text(json.dumps(found, indent=2) + "\n")
    return 0, found


def judged_answers(
    folder: Path, rung: str, reward: str, max_new_tokens: int, temperature: float = 0.0
) -> tuple[list[Any], list[float]]:
    """What a rung says to the held-out questions, one answer each, and what a reward gives for it.

    Args:
      folder, rung: see `climb`.
      reward: as `experiments.rewards` reads it.
      max_new_tokens, temperature: of the answers; 0: the likeliest.
    """
    import jax

    from experiments.rewards import open_rewards
    from lmjax import rl

    model = open_model(str(folder / rung))
    template = lm.data.open_template("none", model.tokenizer, model.tokenizer_path)
    prompts = lm.data.load_prompts(
        PromptConfig(path=str(folder / "data" / HELD_OUT), template="none", validation_fraction=0.0),
        model.tokenizer, template=template,
    ).train  # fmt: skip
    said = rl.roll_out(
        model.policy, model.variables, prompts, jax.random.key(0), samples=1, max_new_tokens=max_new_tokens,
        eos=model.tokenizer.eos, temperature=temperature, tokenizer=model.tokenizer,
    )  # fmt: skip
    (opened,) = open_rewards([reward])
    return said, [opened.function(rollout) for rollout in said]


def share(right: list[float]) -> Found:
    """The share that is right, and its 95 % interval (Wilson)."""
    low, high = lm.evaluation.wilson(int(sum(right)), len(right))
    return {"accuracy": sum(right) / len(right), "low": low, "high": high}
