"""Trains a language model on preferences: DPO, its relatives, and sums of them.

    python -m experiments.dpo --config configs/dpo/instruct.py --model runs/mine --data.path preferences.json

The objective is an expression (--objective "ipo(beta=0.05) + 0.2 * chosen_nll()"); what is trained is an adapter
beside the model, or the model itself (--adapter.kind full). A run directory that holds a checkpoint is gone on with;
SIGTERM or Ctrl-C saves one and ends the run. `experiments.chat --model RUN` talks to it.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments import finetuning
from experiments.answers import answers, compare, said
from experiments.dpo_config import DpoConfig
from experiments.support import OpenedModel, use_compilation_cache
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.errors import UserError
from lmjax.tokenizers.base import digest

PAIRS, PRETRAIN = "pairs", "pretrain"  # streams, where there are two


def run(config: DpoConfig, options: command_line.Options) -> int:
    """Trains, evaluates and answers; the last line printed has `accuracy=`, the held-out pairs the right way round."""
    started = time.monotonic()
    use_compilation_cache(DataConfig().cache_root())
    objective = lm.objectives.parse_objective(config.objective)
    mesh = finetuning.make_mesh(config)
    if config.pretrain_batch_size:
        lm.sharding.check_batch_size(config.pretrain_batch_size, mesh, microbatches=config.microbatches)

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

    # What is trained, beside which reference.
    folder = finetuning.run_folder(options, "dpo")
    roles, beside = _reference(config, model, objective)
    if config.reference == "cached":
        objective = lm.objectives.with_cached_reference(objective)
    training = finetuning.set_up(config, model, objective, mesh, folder, roles=roles, beside=beside)
    if options.plan:
        print(f"{training.plan.table}\n\n{training.plan.summary}")
        return 0
    if config.reference == "cached":
        held_out = _cache_reference(config, model, data, held_out, mesh)
    step = training.step
    if config.reference == "following" and roles:
        step = lm.training.Following(step, config.follow_every, config.follow_rate)
    batches = _batches(config, model, data)
    on_pairs = [(float(c), term) for c, term in objective.terms if term.stream in (None, PAIRS)]
    scored = lm.objectives.Objective(tuple((c, dataclasses.replace(term, stream=None)) for c, term in on_pairs))

    def score(variables: Any) -> dict[str, float]:
        if not held_out:
            return {}
        sums = lm.evaluation.evaluate_objective(scored, training.policy, variables, held_out, roles=roles, mesh=mesh)
        found = {name: total / weight for name, (total, weight) in sums.items() if weight}
        total = sum(c * found[f"loss/{label}"] for (c, _), label in zip(on_pairs, scored.labels))
        return {"loss": total} | {name: value for name, value in found.items() if name != "loss"}

    talks = [record.first for record in data.held_out][: config.samples if config.sample_tokens else 0]

    def answer(variables: Any) -> list[str]:
        return answers(
            training.policy,
            variables,
            [template.prompt(model.tokenizer, talk.prompt) for talk in talks],
            model.tokenizer,
            template,
            max_new_tokens=config.sample_tokens,
            temperature=config.sample_temperature,
            seed=config.seed,
        )

    fresh = training.begin()
    before = score(fresh.variables), answer(fresh.variables)
    state, start = lm.training.resume(training.checkpointer, fresh, batches)
    training = dataclasses.replace(training, begin=None)  # the state has its own arrays
    model = dataclasses.replace(model, variables=None)
    del fresh
    settings = command_line.format_config(config)
    with training.checkpointer, lm.training.RunDirectory.open(folder, config, settings) as directory:
        directory.truncate(start)
        finetuning.save_model_files(folder, training.policy, model)
        print(
            f"model       {model.description}\ntemplate    {template.name}\nobjective   {config.objective}, reference "
            f"{config.reference}\n"
            + "".join(f"data        {line}\n" for line in data.report().splitlines())
            + f"{training.plan.summary}\nrun         {folder}"
            + (f"\nresumed     from step {start:,}" if start else ""),
            flush=True,
        )
        result = lm.training.run(
            step,
            state,
            batches,
            config=config.loop,
            checkpointer=training.checkpointer,
            run_directory=directory,
            writers=finetuning.writers(config, folder),
            evaluate=(lambda state: score(state.variables)) if held_out else None,
            sample=(lambda state: "\n\n".join(answer(state.variables))) if talks else None,
            sharding=lambda batch: lm.sharding.shard_batch(batch, mesh),
            flops_per_token=training.plan.flops_per_token,
        )
        if finetuning.interrupted(result, folder):
            return result.exit_code
        variables = result.state.variables
        after = score(variables), answer(variables)
        rows = [
            {"prompt": said(talk.prompt), "chosen": said(talk.messages[talk.start :]), "before": old, "after": new}
            for talk, old, new in zip(talks, before[1], after[1])
        ]
        compare(before[0], after[0], rows, directory.path, "held-out preferences")
        if training.method is not None:
            print(finetuning.save_adapter(folder, variables))
        print("plots       " + ", ".join(str(path) for path in directory.plot()))
        print(f"took        {time.monotonic() - started:.0f} s")
        shown = {"val_loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
        scores = "".join(f" {short}={after[0][name]:.4f}" for short, name in shown.items() if name in after[0])
        print(f"run_dir={folder} step={result.step}{scores}", flush=True)
    return 0


def _reference(config: DpoConfig, model: OpenedModel, objective: Any) -> tuple[dict[str, Any] | None, Any]:
    """The roles of the objective, and what lies beside the model for them."""
    if strangers := [name for name in objective.roles if name != "reference"]:
        raise UserError(f"the objective takes the role {strangers[0]!r}; here there is only 'reference'")
    if not objective.roles:
        if config.reference != "role":
            raise UserError(f"reference is {config.reference!r}, but no term of the objective takes one; leave it out")
        return None, None
    if config.reference == "cached":
        return None, None
    if config.reference == "following":
        return {"reference": lm.training.reference_of}, lm.training.with_reference
    if config.adapter.kind == "full":
        return {"reference": model.variables}, None
    own = tuple(model.variables)  # what training adds to the variables is the adapter
    return {"reference": lambda variables: {name: variables[name] for name in own}}, None


def _cache_reference(config: DpoConfig, model: OpenedModel, data: Any, held_out: list[Any], mesh: Any) -> list[Any]:
    """Gives batches the log-probabilities of the model as it is; those of training are kept on disk."""
    import numpy as np

    rows, size = data.rows(), config.eval_batch_size or config.batch_size
    compute = lambda batches: lm.evaluation.token_logprobs(model.policy, model.variables, batches, mesh=mesh)

    def blocks() -> Any:
        print("computing the reference's log-probabilities", flush=True)
        return compute(rows.gather(np.minimum(np.arange(size) + first, len(rows) - 1))
                       for first in range(0, len(rows), size))  # fmt: skip

    name = digest([data.fingerprint, finetuning.digest_of(model.variables)])
    path = Path(DataConfig().cache_root()) / "reference" / f"{name}.npy"
    data.with_reference(lm.evaluation.kept_on_disk(path, (len(rows), rows.sequence_length), blocks))
    return [
        dataclasses.replace(batch, reference_logprobs=logprobs)
        for batch, logprobs in zip(held_out, compute(held_out))
    ]


def _batches(config: DpoConfig, model: OpenedModel, data: Any) -> Any:
    """Training batches: of pairs, or of pairs and text."""
    if not config.pretrain_batch_size:
        return data.train()
    text = lm.data.load(config.pretrain, config.pretrain_batch_size, tokenizer=model.tokenizer)
    return lm.data.Together({PAIRS: data.train(), PRETRAIN: text.train()})


if __name__ == "__main__":
    command_line.main(run, DpoConfig(), plan=True)
