"""Pretrains a language model on text.

    python -m experiments.pretrain --config configs/pretrain/stdlib.py --model.num-layers 6 --run-dir runs/mine

A run directory that holds a checkpoint is gone on with. SIGTERM or Ctrl-C saves a checkpoint and ends the run; the
same command then continues as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments import planning
from experiments.pretrain_config import PretrainConfig
from experiments.support import TOKENIZER, completion_text, prompt_ids, use_compilation_cache
from lmjax import command_line


def run(config: PretrainConfig, options: command_line.Options) -> int:
    """Trains, evaluates and samples; the last line printed has `val_loss=`, nats a token of all held-out text."""
    import jax

    started = time.monotonic()
    use_compilation_cache(config.data.cache_root())

    # The devices, and whether the batch and the model can be spread over them.
    mesh = lm.sharding.make_mesh(**dataclasses.asdict(config.mesh))
    for rows in {config.batch_size, config.eval_batch_size or config.batch_size}:
        lm.sharding.check_batch_size(rows, mesh)
    lm.sharding.check_batch_size(config.batch_size, mesh, microbatches=config.microbatches)
    size = planning.vocabulary_size(config)
    if size is not None:
        plan = planning.make_plan(config.with_vocabulary(size), mesh)
        if options.plan:
            print(f"{plan.table}\n\n{plan.summary}")
            return 0

    # The text, tokenized once and then read from a cache. The tokenizer settles the model's vocabulary.
    print("reading the text; the first time, it is tokenized", flush=True)
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    data = lm.data.load(config.data, config.batch_size, **processes)
    config = config.with_vocabulary(data.vocab_size)
    plan = planning.make_plan(config, mesh)
    if options.plan:
        print(f"{plan.table}\n\n{plan.summary}")
        return 0
    held_out = some_held_out = None
    if data.validation_tokens > 1:
        rows = config.eval_batch_size or config.batch_size
        held_out = data.validation(rows)
        some_held_out = data.validation(rows, config.eval_batches or None)

    # The model, what it is trained on, and how it moves.
    policy = lm.Policy(config.model)
    objective = lm.objectives.cross_entropy(label_smoothing=config.label_smoothing)
    if config.z_loss:
        objective += config.z_loss * lm.objectives.z_loss()
    schedule = lm.training.make_schedule(config.schedule, config.loop.steps)
    optimizer = lm.training.make_optimizer(config.optimizer, schedule)
    step = lm.training.make_step(
        policy,
        objective,
        optimizer,
        mesh=mesh,
        microbatches=config.microbatches,
        clip_norm=config.clip_norm or None,
        ema_decay=config.ema_decay or None,
        schedule=schedule,
    )

    # What is measured and shown along the way: always of the moving average, where there is one.
    def score(state: Any, batches: Any) -> dict[str, float]:
        return lm.evaluation.evaluate_batches(policy, state.averaged, batches, mesh=mesh).metrics()

    prompt = None
    if config.sample_tokens:
        prompt = prompt_ids(data.tokenizer, config.sample_prompt or "\n", config.data.document_markers)

    def sample(state: Any) -> str:
        found = lm.generation.generate(
            policy,
            state.averaged,
            [prompt],
            jax.random.fold_in(jax.random.key(config.seed), state.step),
            max_new_tokens=config.sample_tokens,
            temperature=config.sample_temperature,
            processors=(lm.generation.top_k(config.sample_top_k),) if config.sample_top_k else (),
            eos=data.tokenizer.eos,
        )
        return config.sample_prompt + completion_text(data.tokenizer, found.tokens[0], found.lengths[0])

    # Where the run left off, if it did. Nothing is written before all that can be refused has been.
    folder = Path(options.run_dir or _new_run(options))
    checkpointer = lm.training.Checkpointer(
        folder / "checkpoints",
        config.checkpoint,
        to_disk=lm.models.unstack_layers,
        from_disk=lm.models.stack_layers,
    )
    checkpointer.check(plan.shapes)
    key = jax.random.key(config.seed)
    fresh = lm.training.init_state(policy, optimizer, key, mesh=mesh, ema=config.ema_decay > 0)
    batches = data.train()
    state, start = lm.training.resume(checkpointer, fresh, batches)

    with checkpointer, lm.training.RunDirectory.open(folder, config, command_line.format_config(config)) as directory:
        directory.truncate(start)
        data.tokenizer.save(folder / TOKENIZER)
        print(
            f"data        {data.train_tokens:,} training tokens, {data.validation_tokens:,} held out, vocabulary "
            f"{data.vocab_size:,}\n{plan.summary}\nrun         {folder}"
            + (f"\nresumed     from step {start:,}" if start else ""),
            flush=True,
        )
        before = score(fresh, held_out) if config.compare and held_out is not None else None
        del fresh
        result = lm.training.run(
            step,
            state,
            batches,
            config=config.loop,
            checkpointer=checkpointer,
            run_directory=directory,
            writers=_writers(config, folder),
            evaluate=None if some_held_out is None else lambda state: score(state, some_held_out),
            sample=sample if prompt is not None else None,
            sharding=lambda batch: lm.sharding.shard_batch(batch, mesh),
            tokens_per_step=config.batch_size * config.data.sequence_length,
            flops_per_token=plan.flops_per_token,
        )
        if result.interrupted:
            print(
                f"{result.interrupted}: saved at step {result.step:,}; the same command with --run-dir {folder} "
                "goes on from there"
            )
            return result.exit_code

        # How good it became.
        after: dict[str, float] = {}
        if held_out is not None:
            ended = {name.removeprefix("validation/"): value for name, value in result.metrics.items()}
            after = score(result.state, held_out) if config.eval_batches else ended
        if before is not None:
            _compare(before, after, data, held_out, directory.path)
        if prompt is not None:
            print(f"\nsample\n{sample(result.state)}\n")
        print("plots       " + ", ".join(str(path) for path in directory.plot()))
        print(f"took        {time.monotonic() - started:.0f} s")
        scores = "".join(
            f" {short}={after[name]:.4f}"
            for short, name in (("val_loss", "loss"), ("val_bits_per_byte", "bits_per_byte"))
            if name in after
        )
        print(f"run_dir={folder} step={result.step}{scores}", flush=True)
    return 0


def _compare(before: dict[str, float], after: dict[str, float], data: Any, held_out: Any, folder: Path) -> None:
    """Prints the table of bits a byte of the held-out text, and writes it as `comparison.json`."""
    from rich.console import Console
    from rich.table import Table

    ids = [data.train_ids(source) for source in range(len(data.config.sources()))]
    bigram = lm.evaluation.bigram_score(ids, held_out, data.vocab_size).metrics()
    rows = {
        "before training": before,
        "bigram counts": bigram,
        "gzip -9": {"bits_per_byte": lm.evaluation.gzip_bits_per_byte(data.validation_text())},
        "after training": after,
    }
    table = Table(title="held-out text", title_justify="left")
    table.add_column("")
    table.add_column("bits a byte", justify="right")
    table.add_column("nats a token", justify="right")
    for name, values in rows.items():
        style = "bold" if name == "after training" else ""
        cells = (f"{values[key]:.3f}" if key in values else "" for key in ("bits_per_byte", "loss"))
        table.add_row(name, *cells, style=style)
    Console().print(table)
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")


def _new_run(options: command_line.Options) -> Path:
    """A run directory named after the config file and the time."""
    name = Path(options.config_path).stem if options.config_path else "pretrain"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _writers(config: PretrainConfig, folder: Path) -> list[Any]:
    writers: list[Any] = []
    if config.tensorboard:
        writers.append(lm.training.TensorBoardWriter(folder / "tensorboard"))
    if config.wandb_project:
        from lmjax.training.run_directory import to_json

        writers.append(lm.training.WandbWriter(config.wandb_project, folder, to_json(config), folder.name))
    return writers


if __name__ == "__main__":
    command_line.main(run, PretrainConfig(), plan=True)
