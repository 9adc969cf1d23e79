"""The plan of a run, printed before anything is compiled: leaves, memory a device, FLOPs a token, kernel."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import lmjax as lm
from experiments.pretrain_config import FROM_TOKENIZER, PretrainConfig
from lmjax.models.config import DecoderConfig, ModelConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jax.sharding import Mesh

    from experiments.finetuning_config import FinetuningConfig
    from lmjax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run will hold and do.

    Attributes:
      shapes: the training state as shapes.
      table: a line for each parameter.
      summary: mesh, memory, work and kernel, a line each.
      flops_per_token: of a training step; None for a model that only looks up.
    """

    shapes: TrainState
    table: str
    summary: str
    flops_per_token: float | None


def vocabulary_size(config: PretrainConfig) -> int | None:
    """The number of the tokenizer's ids, if it is known without reading the data.

    A trained tokenizer is taken at its word: it ends smaller where the text has too few pieces.
    """
    if config.model.vocab_size != FROM_TOKENIZER:
        return config.model.vocab_size
    tokenizer = config.data.tokenizer
    if tokenizer.kind in ("byte", "file"):
        return lm.tokenizers.build(tokenizer).vocab_size
    return None if tokenizer.kind == "char" else tokenizer.vocab_size


def make_plan(config: PretrainConfig, mesh: Mesh) -> RunPlan:
    """The plan of a run whose vocabulary is settled. Nothing is computed: shapes only.

    Raises:
      UserError: something does not divide over the mesh, or no attention kernel serves the model.
    """
    import jax

    from lmjax.modules.attention import implementation
    from lmjax.sharding.planning import bytes_per_device
    from lmjax.training.state import new_state, state_shardings, variables_plan

    policy = lm.Policy(config.model)
    schedule = lm.training.make_schedule(config.schedule, config.loop.steps)
    optimizer = lm.training.make_optimizer(config.optimizer, schedule)

    def state(key: jax.Array) -> TrainState:
        return new_state(policy.model.init(key), optimizer, key, ema=config.ema_decay > 0)

    shapes = jax.eval_shape(state, jax.random.key(0))
    plan = variables_plan(policy, shapes.variables, mesh)
    places = state_shardings(policy, shapes, mesh)
    parameters = bytes_per_device(shapes.variables, places.variables)
    moments = bytes_per_device(shapes.opt_state, places.opt_state)
    average = 0 if shapes.ema is None else bytes_per_device(shapes.ema, places.ema)
    flops = flops_per_token(config.model, config.data.sequence_length)
    tokens = config.batch_size * config.data.sequence_length
    lines = [
        f"mesh        {' × '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}, "
        f"{mesh.devices.flat[0].device_kind}",
        f"parameters  {plan.num_parameters:,}",
        f"memory      {_bytes(2 * parameters + moments + average)} a device without activations: parameters "
        f"{_bytes(parameters)}, gradients {_bytes(parameters)}, optimizer {_bytes(moments)}"
        + (f", average {_bytes(average)}" if average else ""),
        f"batch       {config.batch_size} rows × {config.data.sequence_length} tokens = {tokens:,} tokens a step"
        + (f", in {config.microbatches} microbatches" if config.microbatches > 1 else ""),
    ]
    if flops is not None and isinstance(config.model, DecoderConfig):
        kernel, reason = implementation(config.model, jax.default_backend())
        lines += [
            f"FLOPs       {flops / 1e6:,.2f} million a token, {flops * tokens:.3g} a step, "
            f"{flops * tokens * config.loop.steps:.3g} in {config.loop.steps:,} steps",
            f"attention   {kernel} ({reason})",
        ]
    return RunPlan(shapes, plan.table(), "\n".join(lines), flops)


def make_finetuning_plan(
    config: FinetuningConfig,
    policy: lm.Policy,
    make_state: Callable[[], TrainState],
    trainable: Sequence[str],
    mesh: Mesh,
) -> RunPlan:
    """The plan of a run that trains part of what it has. Nothing is computed: shapes only.

    Args:
      config: the run.
      policy: the model.
      make_state: the state at step 0.
      trainable: what is trained of it.
      mesh: the devices.

    Raises:
      UserError: something does not divide over the mesh, or there is nothing to train.
    """
    import jax

    from lmjax.sharding.planning import bytes_per_device
    from lmjax.training.state import state_shardings, trainable_part, variables_plan

    shapes = jax.eval_shape(make_state)
    plan = variables_plan(policy, shapes.variables, mesh)
    places = state_shardings(policy, shapes, mesh, trainable=trainable)
    part = trainable_part(shapes.variables, trainable)
    trained = sum(leaf.size for leaf in jax.tree.leaves(part))
    parameters = bytes_per_device(shapes.variables, places.variables)
    gradients = bytes_per_device(part, trainable_part(places.variables, trainable))
    moments = bytes_per_device(shapes.opt_state, places.opt_state)
    whole = trained == lm.policy.count_parameters(shapes.variables)
    flops = flops_per_token(policy.config, config.row_length) if whole else None
    lines = [
        f"mesh        {' × '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}, "
        f"{mesh.devices.flat[0].device_kind}",
        f"parameters  {plan.num_parameters:,}, of which {trained:,} are trained "
        f"({trained / plan.num_parameters:.2%}: {', '.join(trainable)})",
        f"memory      {_bytes(parameters + gradients + moments)} a device without activations: parameters "
        f"{_bytes(parameters)}, gradients {_bytes(gradients)}, optimizer {_bytes(moments)}",
        f"batch       {config.step_rows} rows × {config.row_length} tokens at the most"
        + (f", in {config.microbatches} microbatches" if config.microbatches > 1 else ""),
    ]
    return RunPlan(shapes, plan.table(), "\n".join(lines), flops)


def flops_per_token(model: ModelConfig, length: int) -> float | None:
    """Floating-point operations of one token in a training step; None for a model that only looks up."""
    if not isinstance(model, DecoderConfig):
        return None
    return lm.training.flops_per_token(
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        embed_dim=model.embed_dim,
        num_heads=model.num_heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_width,
        mlp_dim=model.mlp_width,
        gated_mlp=model.gated,
        context_length=length,
        window=[model.window if model.windowed(layer) else None for layer in range(model.num_layers)],
    )


def _bytes(count: int) -> str:
    """A number of bytes in the unit that suits it.

    >>> _bytes(512), _bytes(1536), _bytes(3 * 2**30)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
