"""Teaches a smaller language model what a larger one says: distillation.

    python -m experiments.distill --teacher runs/large --model.num-layers 2 --run-dir runs/small
    python -m experiments.distill --config configs/distill/layers.py --teacher runs/large --on-policy 0.5

A run directory that holds a checkpoint is gone on with; SIGTERM or Ctrl-C saves one and ends the run. The run directory
is a model like any other: `experiments.evaluate`, `generate` and `chat` open it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments import planning
from experiments.distill_config import DistillConfig
from experiments.pretrain_config import PretrainConfig
from experiments.support import TOKENIZER, OpenedModel, completion_text, open_model, prompt_ids, use_compilation_cache
from lmjax import command_line
from lmjax.errors import UserError
from lmjax.models.config import DecoderConfig


def run(config: DistillConfig, options: command_line.Options) -> int:
    """Distils, evaluates and samples; the last line printed has the held-out losses of teacher and student."""
    import jax

    started = time.monotonic()
    use_compilation_cache(config.data.cache_root())

    # The devices, and whether the batch can be spread over them.
    mesh = lm.sharding.make_mesh(**dataclasses.asdict(config.mesh))
    for rows in {config.batch_size, config.eval_batch_size or config.batch_size}:
        lm.sharding.check_batch_size(rows, mesh)
    lm.sharding.check_batch_size(config.batch_size, mesh, microbatches=config.microbatches)

    # The teacher; and the student, new, of some of its layers or from elsewhere.
    if not config.teacher:
        raise UserError("no teacher is named; give --teacher a run directory or a Hugging Face model directory")
    teacher = open_model(config.teacher, step=config.teacher_step)
    config, begin_from = _student(config, teacher)
    plan = planning.make_plan(_as_pretraining(config), mesh)
    if options.plan:
        print(f"{plan.table}\n\n{plan.summary}")
        return 0
    policy = lm.Policy(config.model)

    # What the student learns from: the text, as the teacher reads it.
    print("reading the text; the first time, it is tokenized", flush=True)
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    vocab_size = teacher.policy.config.vocab_size
    data = lm.data.load(
        config.data, config.batch_size, tokenizer=teacher.tokenizer, vocab_size=vocab_size, **processes
    )
    held_out = some_held_out = None
    if data.validation_tokens > 1:
        rows = config.eval_batch_size or config.batch_size
        held_out = data.validation(rows)
        some_held_out = data.validation(rows, config.eval_batches or None)

    # What it learns: the teacher's distribution and insides, and the text itself.
    width, insides = _insides(config, teacher)
    lessons = ([config.soft * _divergence(config)] if config.soft else []) + insides
    of_text = sum(lessons, config.hard * lm.objectives.cross_entropy()) if config.hard else sum(lessons)
    of_itself = sum(lessons).on("sampled")  # no text says what should follow the student's own words
    places = lm.training.state.variables_plan(teacher.policy, teacher.variables, mesh).shardings
    roles = {"teacher": lm.objectives.Role(jax.device_put(teacher.variables, places), teacher.policy)}
    schedule = lm.training.make_schedule(config.schedule, config.loop.steps)
    optimizer = lm.training.make_optimizer(config.optimizer, schedule)
    trainable = ("params", "projection") if width else ("params",)
    make_step = lambda objective: lm.training.make_step(
        policy,
        objective,
        optimizer,
        trainable=trainable,
        roles=roles,
        mesh=mesh,
        microbatches=config.microbatches,
        clip_norm=config.clip_norm or None,
        ema_decay=config.ema_decay or None,
        schedule=schedule,
    )

    # What is measured and shown along the way: always of the moving average, where there is one.
    measured = lm.objectives.cross_entropy() + lm.objectives.distillation() + lm.objectives.agreement()

    def score(state: Any, batches: Any) -> dict[str, float]:
        return _score(measured, policy, state.averaged, batches, roles, mesh)

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
    init_key, projection_key, run_key = jax.random.split(jax.random.key(config.seed), 3)
    if width:
        begin_from = lm.policy.add_projection(begin_from or policy.init(init_key), width, projection_key)
    fresh = lm.training.init_state(
        policy, optimizer, run_key, mesh=mesh, trainable=trainable, ema=config.ema_decay > 0, variables=begin_from
    )
    checkpointer.check(jax.eval_shape(lambda state: state, fresh))
    batches = data.train()
    state, start = lm.training.resume(checkpointer, fresh, batches)
    step = make_step(of_text)
    if config.on_policy:
        eos = data.tokenizer.eos
        step = _mixed(config, policy, step, make_step(of_itself), start, eos, mesh if mesh.size > 1 else None)

    with checkpointer, lm.training.RunDirectory.open(folder, config, command_line.format_config(config)) as directory:
        directory.truncate(start)
        data.tokenizer.save(folder / TOKENIZER)
        print(
            f"teacher     {teacher.description}, {lm.policy.count_parameters(teacher.variables):,} parameters\n"
            f"data        {data.train_tokens:,} training tokens, {data.validation_tokens:,} held out, vocabulary "
            f"{data.vocab_size:,}\n{plan.summary}"
            + (f"\nprojection  of hidden states to {width} wide, trained beside" if width else "")
            + f"\nrun         {folder}"
            + (f"\nresumed     from step {start:,}" if start else ""),
            flush=True,
        )
        found: dict[str, dict[str, float]] = {}
        if held_out is not None:
            own = lm.evaluation.evaluate_batches(teacher.policy, roles["teacher"].variables, held_out, mesh=mesh)
            found = {"teacher": own.metrics(), "before": score(fresh, held_out)}
        del fresh, begin_from
        result = lm.training.run(
            step,
            state,
            batches,
            config=config.loop,
            checkpointer=checkpointer,
            run_directory=directory,
            evaluate=None if some_held_out is None else lambda state: score(state, some_held_out),
            sample=sample if prompt is not None else None,
            sharding=lambda batch: lm.sharding.shard_batch(batch, mesh),
            tokens_per_step=config.batch_size * config.data.sequence_length,
            flops_per_token=_flops_per_token(plan, teacher, config),
        )
        if result.interrupted:
            print(
                f"{result.interrupted}: saved at step {result.step:,}; the same command with --run-dir {folder} "
                "goes on from there"
            )
            return result.exit_code

        # How near the student came.
        if held_out is not None:
            found["after"] = score(result.state, held_out)
            _compare(found, directory.path)
        if prompt is not None:
            print(f"\nsample\n{sample(result.state)}\n")
        print("plots       " + ", ".join(str(path) for path in directory.plot()))
        print(f"took        {time.monotonic() - started:.0f} s")
        names = {"after": "val_loss", "teacher": "teacher_loss", "before": "before"}
        losses = "".join(f" {short}={found[name]['loss']:.4f}" for name, short in names.items() if name in found)
        print(f"run_dir={folder} step={result.step}{losses}", flush=True)
    return 0


def _student(config: DistillConfig, teacher: OpenedModel) -> tuple[DistillConfig, Any]:
    """The config with the student's model in it, and the variables that it begins from; None for new ones.

    Raises:
      UserError: its tokens are not the teacher's, or either has no positions for the rows.
    """
    import jax
    import jax.numpy as jnp

    variables, known = None, teacher.policy.config
    if config.student == "teacher":
        if not isinstance(known, DecoderConfig):
            raise UserError("the teacher has no layers to take; describe a new student with --model")
        taken = lm.models.spread_layers(config.student_layers or max(known.num_layers // 2, 1), known.num_layers)
        model, variables = lm.models.take_layers(known, {"params": teacher.variables["params"]}, taken)
        config = config.with_model(model)
        variables = jax.tree.map(jnp.copy, variables)  # training overwrites them
    elif config.student:
        student = open_model(config.student)
        if student.tokenizer.fingerprint() != teacher.tokenizer.fingerprint():
            raise UserError(f"the tokenizer of {config.student} is not the teacher's; distil between models of one")
        config, variables = config.with_model(student.policy.config), student.variables
    config = config.with_vocabulary(known.vocab_size)
    for name, model in (("student", config.model), ("teacher", known)):
        length = config.data.sequence_length
        if isinstance(model, DecoderConfig) and length > model.max_length:
            raise UserError(
                f"data.sequence_length is {length} but the {name}'s positions end at {model.max_length}; shorten it"
            )
    return config, variables


def _insides(config: DistillConfig, teacher: OpenedModel) -> tuple[int, list[lm.objectives.Objective]]:
    """The width that hidden states are to be projected to, 0 for none, and the terms over the models' insides."""
    own, known = config.model, teacher.policy.config
    found: list[lm.objectives.Objective] = []
    if not (config.hidden or config.attention):
        return 0, found
    if not isinstance(own, DecoderConfig) or not isinstance(known, DecoderConfig):
        raise UserError("hidden states and attention are those of decoders; set hidden and attention to 0")
    width = known.embed_dim if config.hidden and own.embed_dim != known.embed_dim else 0
    if config.hidden:
        found.append(
            config.hidden
            * lm.objectives.hidden_states(kind=config.hidden_kind, layers=config.hidden_layers, project=width > 0)
        )
    if config.attention:
        if own.num_heads != known.num_heads:
            raise UserError(
                f"attention of {own.num_heads} heads cannot be compared with the teacher's {known.num_heads}; "
                "set model.num_heads to as many, or attention to 0"
            )
        found.append(config.attention * lm.objectives.attention_maps(of=config.attention_of))
    return width, found


def _divergence(config: DistillConfig) -> lm.objectives.Objective:
    return lm.objectives.distillation(
        beta=config.beta, temperature=config.temperature, scaled=config.scaled, top_k=config.top_k or None
    )


def _mixed(
    config: DistillConfig, policy: Any, of_text: Any, of_itself: Any, start: int, eos: int | None, mesh: Any
) -> Callable[[Any, Any], tuple[Any, dict[str, Any]]]:
    """A step that is taken, as often as `on_policy` says, on what the student itself goes on with (GKD).

    Which steps those are and what is said in them depends on the seed and the number of the step alone.
    """
    import jax
    import numpy as np

    number = start

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal number
        here, number = number, number + 1
        if np.random.default_rng((config.seed, here)).random() >= config.on_policy:
            return of_text(state, batch)
        own = lm.generation.continued_batch(
            policy,
            state.variables,
            batch,
            jax.random.fold_in(jax.random.key(config.seed), here),
            prompt_tokens=config.prompt_length,
            temperature=config.on_policy_temperature,
            eos=eos,
            mesh=mesh,
        )
        state, metrics = of_itself(state, {"sampled": own})
        # Another objective on other tokens: its loss is no point of the same curve.
        return state, {"loss/sampled" if name == "loss" else name: value for name, value in metrics.items()}

    return step


def _score(
    objective: Any, policy: Any, variables: Any, batches: Any, roles: dict[str, Any], mesh: Any
) -> dict[str, float]:
    """The student's loss on the text, and how near it is to the teacher there."""
    sums = lm.evaluation.evaluate_objective(objective, policy, variables, batches, roles=roles, mesh=mesh)
    nats, tokens = sums["loss/cross_entropy"]
    score = lm.evaluation.Score(nats, tokens, sums["accuracy"][0], batches.bytes)
    near = {"kl_from_teacher": "loss/distillation_teacher", "agreement": "loss/agreement_teacher"}
    return score.metrics() | {name: sums[key][0] / max(sums[key][1], 1.0) for name, key in near.items()}


def _compare(found: dict[str, dict[str, float]], folder: Path) -> None:
    """Prints the held-out scores of teacher and student, and writes them as `comparison.json`."""
    from rich.console import Console
    from rich.table import Table

    columns = {
        "loss": "nats a token", "bits_per_byte": "bits a byte", "accuracy": "accuracy",
        "kl_from_teacher": "KL from it", "agreement": "agreement",
    }  # fmt: skip
    table = Table(title="held-out text: the teacher, and the student before and after", title_justify="left")
    for name in ("", *columns.values()):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for who, values in found.items():
        table.add_row(who, *(f"{values[name]:.4f}" if name in values else "" for name in columns))
    Console().print(table)
    (folder / "comparison.json").write_text(json.dumps(found, indent=2) + "\n")


def _as_pretraining(config: DistillConfig) -> PretrainConfig:
    """The run without its teacher, for the plan of what is trained."""
    names = "model data optimizer schedule loop checkpoint mesh batch_size microbatches clip_norm ema_decay".split()
    return PretrainConfig(**{name: getattr(config, name) for name in names})


def _flops_per_token(plan: Any, teacher: OpenedModel, config: DistillConfig) -> float | None:
    """Of the student's step, and of the teacher's forward pass, a third of a step."""
    of_teacher = planning.flops_per_token(teacher.policy.config, config.data.sequence_length)
    return None if plan.flops_per_token is None else plan.flops_per_token + (of_teacher or 0.0) / 3


def _new_run(options: command_line.Options) -> Path:
    """A run directory named after the config file and the time."""
    name = Path(options.config_path).stem if options.config_path else "distill"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


if __name__ == "__main__":
    command_line.main(run, DistillConfig(), plan=True)
