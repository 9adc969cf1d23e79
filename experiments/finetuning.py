"""What experiments that go on from a model share: opening it, what is trained of it, where the run lies."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmjax as lm
from experiments import planning
from experiments.support import MODEL, TOKENIZER, OpenedModel, open_model
from lmjax import command_line

if TYPE_CHECKING:
    from experiments.finetuning_config import FinetuningConfig

ADAPTER = "adapter"  # its folder in a run directory


def open_base(config: FinetuningConfig) -> OpenedModel:
    """The model that a run starts from."""
    return open_model(
        config.model,
        step=config.step,
        average=config.average,
        tokenizer=config.tokenizer,
        quantize=config.quantize,
        targets=config.quantize_targets,
    )


def make_mesh(config: FinetuningConfig) -> Any:
    """The devices, over which the batches must spread."""
    mesh = lm.sharding.make_mesh(**dataclasses.asdict(config.mesh))
    for rows in {config.step_rows, getattr(config, "eval_batch_size", 0) or config.step_rows}:
        lm.sharding.check_batch_size(rows, mesh)
    lm.sharding.check_batch_size(config.step_rows, mesh, microbatches=config.microbatches)
    return mesh


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained further.

    Attributes:
      policy: the model.
      method: the adapter, or None where parameters are trained in place.
      trainable: what is trained.
      step: the compiled step.
      begin: makes the state at step 0; it holds the model that the run starts from.
      plan: what it will hold and do.
      checkpointer: of the run directory; for adapters without the model under them.
    """

    policy: Any
    method: Any
    trainable: tuple[str, ...]
    step: Any
    begin: Any
    plan: planning.RunPlan
    checkpointer: Any


def set_up(
    config: FinetuningConfig,
    model: OpenedModel,
    objective: Any,
    mesh: Any,
    folder: Path,
    *,
    roles: dict[str, Any] | None = None,
    beside: Callable[[Any, Sequence[str]], Any] | None = None,
    also_trained: Sequence[str] = (),
) -> Training:
    """Everything that training needs, checked; nothing is written and nothing compiled.

    Args:
      config: the run.
      model: from `open_base`.
      objective: what is minimized.
      mesh: the devices.
      folder: the run directory.
      roles: the objective's other models.
      beside: (variables with the adapter, what is trained) -> variables with further collections.
      also_trained: collections that are trained beside the adapter.
    """
    import jax

    policy = model.policy
    method = config.adapter.method(policy, model.tokenizer)
    trainable = (*config.adapter.trainable(method), *also_trained)
    schedule = lm.training.make_schedule(config.schedule, config.loop.steps)
    optimizer = config.adapter.optimizer(lm.training.make_optimizer(config.optimizer, schedule))
    adapter_key, run_key = jax.random.split(jax.random.key(config.seed))

    def variables() -> Any:
        found = model.variables if method is None else method.init(adapter_key, model.variables)
        return found if beside is None else beside(found, trainable)

    def begin() -> Any:
        return lm.training.new_state(variables(), optimizer, run_key, trainable=trainable)

    step = lm.training.make_step(
        policy,
        objective,
        optimizer,
        trainable=trainable,
        roles=roles,
        mesh=mesh,
        microbatches=config.microbatches,
        clip_norm=config.clip_norm or None,
        schedule=schedule,
    )
    plan = planning.make_finetuning_plan(config, policy, begin, trainable, mesh)
    layout = dict(to_disk=lm.models.unstack_layers, from_disk=lm.models.stack_layers)
    where = folder / "checkpoints"
    checkpointer: Any = lm.training.Checkpointer(where, config.checkpoint, **layout)
    if method is not None:  # the model lies where it came from
        kinds = set(plan.shapes.variables) - set(model.variables)
        checkpointer = lm.training.PartCheckpointer(where, config.checkpoint, collections=sorted(kinds), **layout)
    checkpointer.check(plan.shapes)

    def placed() -> Any:
        return lm.training.init_state(
            policy, optimizer, run_key, mesh=mesh, trainable=trainable, variables=variables()
        )

    return Training(policy, method, trainable, step, placed, plan, checkpointer)


def save_model_files(folder: Path, policy: Any, model: OpenedModel) -> None:
    """What opening the run needs besides checkpoints: the model's config, its tokenizer and that one's template."""
    from lmjax.data import chat_jinja

    (folder / MODEL).write_text(command_line.format_config(policy.config), "utf-8")
    text = chat_jinja.template_text(model.tokenizer_path)
    model.tokenizer.save(folder / TOKENIZER)
    if text is not None:
        (folder / TOKENIZER / "chat_template.jinja").write_text(text, "utf-8")


def save_adapter(folder: Path, variables: Any) -> str:
    """Writes the adapter of a finished run, and says where and how large it is."""
    lm.adapters.save(folder / ADAPTER, variables)
    size = sum(path.stat().st_size for path in (folder / ADAPTER).iterdir())
    return f"adapter     {folder / ADAPTER}, {size / 1000:,.0f} kB"


def run_folder(options: command_line.Options, name: str) -> Path:
    """The run directory that is given, or a new one named after the config file, or else the experiment."""
    if options.run_dir:
        return Path(options.run_dir)
    stem = Path(options.config_path).stem if options.config_path else name
    return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def writers(config: FinetuningConfig, folder: Path) -> list[Any]:
    """Further places for records that the config names."""
    found: list[Any] = []
    if config.tensorboard:
        found.append(lm.training.TensorBoardWriter(folder / "tensorboard"))
    if config.wandb_project:
        from lmjax.training.run_directory import to_json

        found.append(lm.training.WandbWriter(config.wandb_project, folder, to_json(config), folder.name))
    return found


def interrupted(result: Any, folder: Path) -> bool:
    """Whether a run was asked to stop; says how it goes on."""
    if result.interrupted:
        print(
            f"{result.interrupted}: saved at step {result.step:,}; the same command with --run-dir {folder} "
            "goes on from there"
        )
    return bool(result.interrupted)


def digest_of(variables: Any) -> str:
    """A name for the numbers of a model."""
    import hashlib

    import jax
    import numpy as np

    found = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(jax.device_get(leaf)).view(np.uint8).data)
    return found.hexdigest()
