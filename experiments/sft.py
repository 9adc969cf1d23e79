"""Teaches a language model to answer as in given conversations: supervised fine-tuning.

    python -m experiments.sft --config configs/sft/instruct.py --model runs/mine --data.path instructions.json

What is trained is an adapter beside the model, or the model itself (--adapter.kind full). A run directory that holds a
checkpoint is gone on with; SIGTERM or Ctrl-C saves one and ends the run. `experiments.chat --model RUN` talks to it.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments import finetuning
from experiments.answers import answers, compare, said
from experiments.sft_config import SftConfig
from experiments.support import OpenedModel, use_compilation_cache
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.errors import UserError


def run(config: SftConfig, options: command_line.Options) -> int:
    """Trains, evaluates and answers; the last line printed has `val_loss=`, nats a learned token of all held out."""
    import jax

    started = time.monotonic()
    use_compilation_cache(DataConfig().cache_root())

    mesh = finetuning.make_mesh(config)

    # The model to start from, and the conversations as it reads them.
    model = finetuning.open_base(config)
    config = dataclasses.replace(config, model=str(Path(config.model).expanduser().absolute()))
    _check_length(config, model)
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    named = model.template if config.data.template == "auto" else config.data.template
    template = lm.data.open_template(named, model.tokenizer, model.tokenizer_path)
    data = lm.data.load_supervised(config.data, config.batch_size, model.tokenizer, template=template, **processes)
    held_out = data.validation(config.eval_batch_size or None)
    some_held_out = data.validation(config.eval_batch_size or None, config.eval_batches or None)

    # What is trained, by what, and how it moves.
    model = dataclasses.replace(model, policy=dataclasses.replace(model.policy, embedding_noise=config.neftune))
    policy, folder = model.policy, finetuning.run_folder(options, "sft")
    objective = lm.objectives.cross_entropy(label_smoothing=config.label_smoothing)
    training = finetuning.set_up(config, model, objective, mesh, folder)
    if options.plan:
        print(f"{training.plan.table}\n\n{training.plan.summary}")
        return 0

    # What is measured and shown: before, along the way, after.
    asked = _questions(config, data, model) if config.sample_tokens else []

    def score(variables: Any, batches: Any) -> dict[str, float]:
        return _score(policy, variables, batches, mesh)

    def answer(variables: Any) -> list[str]:
        return answers(
            policy,
            variables,
            [data.prompt_ids(talk) for talk in asked],
            data.tokenizer,
            data.template,
            max_new_tokens=config.sample_tokens,
            temperature=config.sample_temperature,
            seed=config.seed,
        )

    def sample(state: Any) -> str:
        return "\n\n".join(
            f"--- {said(talk.prompt)}\n--- reference\n{said(talk.messages[talk.start :])}\n--- answer\n{text}"
            for talk, text in zip(asked, answer(state.variables))
        )

    # Where the run left off, if it did. Nothing is written before all that can be refused has been.
    before = score(model.variables, held_out), answer(model.variables)
    fresh = training.begin()
    batches = data.train()
    state, start = lm.training.resume(training.checkpointer, fresh, batches)
    training = dataclasses.replace(training, begin=None)  # the state has its own arrays
    model = dataclasses.replace(model, variables=None)
    del fresh

    settings = command_line.format_config(config)
    with training.checkpointer, lm.training.RunDirectory.open(folder, config, settings) as directory:
        directory.truncate(start)
        finetuning.save_model_files(folder, policy, model)
        print(
            f"model       {model.description}\ntemplate    {template.name}, loss on {config.data.loss_on}\n"
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
            evaluate=(lambda state: score(state.variables, some_held_out)) if held_out else None,
            sample=sample if asked else None,
            sharding=lambda batch: lm.sharding.shard_batch(batch, mesh),
            flops_per_token=training.plan.flops_per_token,
        )
        if finetuning.interrupted(result, folder):
            return result.exit_code

        # How good it became.
        variables = result.state.variables
        after = score(variables, held_out), answer(variables)
        rows = [
            {"prompt": said(talk.prompt), "reference": said(talk.messages[talk.start :]), "before": old, "after": new}
            for talk, old, new in zip(asked, before[1], after[1])
        ]
        compare(before[0], after[0], rows, directory.path, "held-out conversations")
        if training.method is not None:
            print(finetuning.save_adapter(folder, variables))
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


if __name__ == "__main__":
    command_line.main(run, SftConfig(), plan=True)
