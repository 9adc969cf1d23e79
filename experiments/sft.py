"""Teaches a language model to answer as in given conversations: supervised fine-tuning.

    python -m experiments.sft --config configs/sft/instruct.py --model runs/mine --data.path instructions.json

What is trained is an adapter beside the model, or the model itself (--adapter.kind full). A run directory that holds a
checkpoint is gone on with; SIGTERM or Ctrl-C saves one and ends the run. `experiments.chat --model RUN` talks to it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments import planning
from experiments.sft_config import SftConfig
from experiments.support import MODEL, TOKENIZER, OpenedModel, open_model, use_compilation_cache
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.errors import UserError

ADAPTER = "adapter"  # its folder in the run directory


def run(config: SftConfig, options: command_line.Options) -> int:
    """Trains, evaluates and answers; the last line printed has `val_loss=`, nats a learned token of all held out."""
    import jax

    started = time.monotonic()
    use_compilation_cache(DataConfig().cache_root())

    # The devices, and whether the batch can be spread over them.
    mesh = lm.sharding.make_mesh(**dataclasses.asdict(config.mesh))
    for rows in {config.batch_size, config.eval_batch_size or config.batch_size}:
        lm.sharding.check_batch_size(rows, mesh)
    lm.sharding.check_batch_size(config.batch_size, mesh, microbatches=config.microbatches)

    # The model to start from, and the conversations as it reads them.
    model = open_model(
        config.model,
        step=config.step,
        average=config.average,
        tokenizer=config.tokenizer,
        quantize=config.quantize,
        targets=config.quantize_targets,
    )
    config = dataclasses.replace(config, model=str(Path(config.model).expanduser().absolute()))
    _check_length(config, model)
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    named = model.template if config.data.template == "auto" else config.data.template
    template = lm.data.open_template(named, model.tokenizer, model.tokenizer_path)
    data = lm.data.load_supervised(config.data, config.batch_size, model.tokenizer, template=template, **processes)
    held_out = data.validation(config.eval_batch_size or None)
    some_held_out = data.validation(config.eval_batch_size or None, config.eval_batches or None)

    # What is trained, by what, and how it moves.
    policy = dataclasses.replace(model.policy, embedding_noise=config.neftune)
    method = config.adapter.method(policy, model.tokenizer)
    trainable = config.adapter.trainable(method)
    objective = lm.objectives.cross_entropy(label_smoothing=config.label_smoothing)
    schedule = lm.training.make_schedule(config.schedule, config.loop.steps)
    optimizer = config.adapter.optimizer(lm.training.make_optimizer(config.optimizer, schedule))
    step = lm.training.make_step(
        policy,
        objective,
        optimizer,
        trainable=trainable,
        mesh=mesh,
        microbatches=config.microbatches,
        clip_norm=config.clip_norm or None,
        schedule=schedule,
    )
    adapter_key, run_key = jax.random.split(jax.random.key(config.seed))

    def begin() -> Any:
        variables = model.variables if method is None else method.init(adapter_key, model.variables)
        return lm.training.new_state(variables, optimizer, run_key, trainable=trainable)

    plan = planning.make_finetuning_plan(config, policy, begin, trainable, mesh)
    if options.plan:
        print(f"{plan.table}\n\n{plan.summary}")
        return 0

    # What is measured and shown: before, along the way, after.
    asked = _questions(config, data, model) if config.sample_tokens else []

    def score(variables: Any, batches: Any) -> dict[str, float]:
        return _score(policy, variables, batches, mesh)

    def answer(variables: Any) -> list[str]:
        return _answers(config, data, policy, variables, asked)

    def sample(state: Any) -> str:
        return "\n\n".join(
            f"--- {_shown(talk)}\n--- reference\n{_reference(talk)}\n--- answer\n{text}"
            for talk, text in zip(asked, answer(state.variables))
        )

    # Where the run left off, if it did. Nothing is written before all that can be refused has been.
    folder = Path(options.run_dir or _new_run(options))
    layout = dict(to_disk=lm.models.unstack_layers, from_disk=lm.models.stack_layers)
    where = folder / "checkpoints"
    checkpointer: Any = lm.training.Checkpointer(where, config.checkpoint, **layout)
    if method is not None:  # the model lies where it came from
        kinds = lm.adapters.adapters_of(plan.shapes.variables)
        checkpointer = lm.training.PartCheckpointer(where, config.checkpoint, collections=tuple(kinds), **layout)
    checkpointer.check(plan.shapes)
    before = score(model.variables, held_out), answer(model.variables)
    variables = begin().variables
    fresh = lm.training.init_state(policy, optimizer, run_key, mesh=mesh, trainable=trainable, variables=variables)
    batches = data.train()
    state, start = lm.training.resume(checkpointer, fresh, batches)
    model = dataclasses.replace(model, variables=None)  # the state has its own
    del variables, fresh

    with checkpointer, lm.training.RunDirectory.open(folder, config, command_line.format_config(config)) as directory:
        directory.truncate(start)
        _save_model_files(folder, policy, model)
        print(
            f"model       {model.description}\ntemplate    {template.name}, loss on {config.data.loss_on}\n"
            + "".join(f"data        {line}\n" for line in data.report().splitlines())
            + f"{plan.summary}\nrun         {folder}"
            + (f"\nresumed     from step {start:,}" if start else ""),
            flush=True,
        )
        result = lm.training.run(
            step,
            state,
            batches,
            config=config.loop,
            checkpointer=checkpointer,
            run_directory=directory,
            writers=_writers(config, folder),
            evaluate=(lambda state: score(state.variables, some_held_out)) if held_out else None,
            sample=sample if asked else None,
            sharding=lambda batch: lm.sharding.shard_batch(batch, mesh),
            flops_per_token=plan.flops_per_token,
        )
        if result.interrupted:
            print(
                f"{result.interrupted}: saved at step {result.step:,}; the same command with --run-dir {folder} "
                "goes on from there"
            )
            return result.exit_code

        # How good it became.
        variables = result.state.variables
        after = score(variables, held_out), answer(variables)
        _compare(before, after, asked, directory.path)
        if method is not None:
            lm.adapters.save(folder / ADAPTER, variables)
            size = sum(path.stat().st_size for path in (folder / ADAPTER).iterdir())
            print(f"adapter     {folder / ADAPTER}, {size / 1000:,.0f} kB")
        print("plots       " + ", ".join(str(path) for path in directory.plot()))
        print(f"took        {time.monotonic() - started:.0f} s")
        scores = f" val_loss={after[0]['loss']:.4f} before={before[0]['loss']:.4f}" if held_out else ""
        print(f"run_dir={folder} step={result.step}{scores}", flush=True)
    return 0


def _check_length(config: SftConfig, model: OpenedModel) -> None:
    """Refuses rows or answers that the model has no positions for."""
    length, context = config.data.sequence_length, model.context
    virtual = config.adapter.filled().length or 0
    if context is not None and length + virtual > context:
        beside = f" and the adapter takes {virtual} more" if virtual else ""
        raise UserError(
            f"data.sequence_length is {length}{beside}, but the model's positions end at {context}; shorten it"
        )
    if context is not None and config.samples and config.sample_tokens + virtual >= context:
        raise UserError(f"sample_tokens is {config.sample_tokens}, but the model has {context} positions; lower it")


def _score(policy: Any, variables: Any, batches: Any, mesh: Any) -> dict[str, float]:
    """Loss, perplexity, accuracy and bits a byte of what is learned in all domains, and the loss of each."""
    if not batches:
        return {}
    found = {
        domain: lm.evaluation.evaluate_batches(policy, variables, own, mesh=mesh) for domain, own in batches.items()
    }
    known = [score.bytes for score in found.values() if score.bytes]
    total = lm.evaluation.Score(
        nats=sum(score.nats for score in found.values()),
        tokens=sum(score.tokens for score in found.values()),
        correct=sum(score.correct for score in found.values()),
        bytes=sum(known) if len(known) == len(found) else None,
    )
    own = {f"loss/{domain}": score.loss for domain, score in found.items()} if len(found) > 1 else {}
    return total.metrics() | own


def _questions(config: SftConfig, data: Any, model: OpenedModel) -> list[Any]:
    """Held-out conversations whose prompts leave room for an answer, from each domain in turn."""
    virtual = config.adapter.filled().length or 0
    room = None if model.context is None else model.context - config.sample_tokens - virtual
    chosen: list[Any] = []
    waiting = [iter(talks) for talks in data.held_out.values()]
    while waiting and len(chosen) < config.samples:
        for talks in list(waiting):
            talk = next((talk for talk in talks if room is None or len(data.prompt_ids(talk)) <= room), None)
            if talk is None:
                waiting.remove(talks)
            elif len(chosen) < config.samples:
                chosen.append(talk)
    return chosen


def _answers(config: SftConfig, data: Any, policy: Any, variables: Any, asked: list[Any]) -> list[str]:
    """What the model answers, without what ends it."""
    import jax

    if not asked:
        return []
    tokenizer, stops = data.tokenizer, data.template.stops(data.tokenizer)
    beyond = list(range(tokenizer.vocab_size, policy.config.vocab_size))  # they have no text
    found = lm.generation.generate(
        policy,
        variables,
        [data.prompt_ids(talk) for talk in asked],
        jax.random.key(config.seed),
        max_new_tokens=config.sample_tokens,
        temperature=config.sample_temperature,
        processors=[lm.generation.suppress(beyond)] if beyond else [],
        eos=[stop for stop in stops if isinstance(stop, int)],
    )
    texts = []
    for tokens, length in zip(found.tokens, found.lengths):
        stream = lm.tokenizers.TextStream(tokenizer, stops)
        stream.push(tokens[: int(length)].tolist())
        stream.finish()
        texts.append(stream.text.strip())
    return texts


def _shown(talk: Any) -> str:
    return "\n".join(str(message.get("content", "")) for message in talk.prompt)


def _reference(talk: Any) -> str:
    return "\n".join(str(message.get("content", "")) for message in talk.messages[talk.start :])


def _compare(before: Any, after: Any, asked: list[Any], folder: Path) -> None:
    """Prints scores and answers before and after, and writes them as `comparison.json`."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if after[0]:
        table = Table(title="held-out conversations", title_justify="left")
        for name in ("", "before", "after"):
            table.add_column(name, justify="right" if name else "left")
        for name, value in after[0].items():
            table.add_row(name, f"{before[0][name]:.4f}", f"{value:.4f}")
        console.print(table)
    rows = [
        {"prompt": _shown(talk), "reference": _reference(talk), "before": old, "after": new}
        for talk, old, new in zip(asked, before[1], after[1])
    ]
    if rows:
        table = Table(title="held-out prompts", title_justify="left", show_lines=True)
        for name in rows[0]:
            table.add_column(name, ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*map(_plain, row.values()))
        console.print(table)
    comparison = {"before": before[0], "after": after[0], "samples": rows}
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # square brackets are no markup


def _save_model_files(folder: Path, policy: Any, model: OpenedModel) -> None:
    """What opening the run needs besides checkpoints: the model's config, its tokenizer and that one's template."""
    from lmjax.data import chat_jinja

    (folder / MODEL).write_text(command_line.format_config(policy.config), "utf-8")
    text = chat_jinja.template_text(model.tokenizer_path)
    model.tokenizer.save(folder / TOKENIZER)
    if text is not None:
        (folder / TOKENIZER / "chat_template.jinja").write_text(text, "utf-8")


def _new_run(options: command_line.Options) -> Path:
    """A run directory named after the config file and the time."""
    name = Path(options.config_path).stem if options.config_path else "sft"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _writers(config: SftConfig, folder: Path) -> list[Any]:
    writers: list[Any] = []
    if config.tensorboard:
        writers.append(lm.training.TensorBoardWriter(folder / "tensorboard"))
    if config.wandb_project:
        from lmjax.training.run_directory import to_json

        writers.append(lm.training.WandbWriter(config.wandb_project, folder, to_json(config), folder.name))
    return writers


if __name__ == "__main__":
    command_line.main(run, SftConfig(), plan=True)
