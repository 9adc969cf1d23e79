"""Optimizers from a configuration. Each gives the same update whether layers are stacked or stored singly."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.errors import UserError
from lmjax.training.adafactor import scale_by_factored_rms, scale_by_parameter_rms
from lmjax.training.config import OptimizerConfig
from lmjax.training.layers import decay_mask, names
from lmjax.training.muon import scale_by_muon
from lmjax.training.schedules import Schedule


class LearningRateState(NamedTuple):
    """Attributes:
    count: int32 [], the number of updates made.
    """

    count: jax.Array  # type: ignore[assignment]


def scale_by_schedule(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by -schedule(step).

    `update(..., step=step)` takes the step from the caller, so that the rate applied is the rate reported
    even after updates that were skipped. Without `step` the number of updates made is used.
    """

    def init(params: Any) -> LearningRateState:
        del params
        return LearningRateState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: LearningRateState, params: Any = None, *, step: Any = None, **extra: Any) -> Any:
        del params, extra
        rate = schedule(state.count if step is None else step)
        updates = jax.tree.map(lambda u: u * -jnp.asarray(rate, u.dtype), updates)
        return updates, LearningRateState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config` describes.

    Weight decay is decoupled: it is added to the direction before the learning rate is applied (Loshchilov
    and Hutter, arXiv:1711.05101, as PyTorch does it), and touches matrices only
    (`lmjax.training.layers.decay_mask`).

    Args:
      config: kind and hyperparameters.
      schedule: learning rate of each step, `lmjax.training.schedules.make_schedule`.

    Returns:
      An optax transformation over trees of parameters, `{"params": ...}`. Its state is a tuple of named
      tuples of scalars and of trees with the paths of the parameters. `update` takes `step=` besides, see
      `scale_by_schedule`.

    >>> optimizer = make_optimizer(OptimizerConfig("sgd", momentum=0.0, weight_decay=0.0), lambda step: 0.5)
    >>> state = optimizer.init({"params": {"x": jnp.ones(2)}})
    >>> updates, state = optimizer.update({"params": {"x": jnp.full(2, 4.0)}}, state)
    >>> updates["params"]["x"].tolist()
    [-2.0, -2.0]
    """
    full: Any = config.filled()
    state_dtype = jnp.dtype(full.state_dtype or "float32")
    steps: list[optax.GradientTransformation] = []
    if full.kind == "adamw":
        steps += [optax.scale_by_adam(full.b1, full.b2, full.eps, mu_dtype=state_dtype)]
    elif full.kind == "lion":
        steps += [optax.scale_by_lion(full.b1, full.b2, mu_dtype=state_dtype)]
    elif full.kind == "sgd":
        if full.momentum:
            steps += [optax.trace(full.momentum, full.nesterov, accumulator_dtype=state_dtype)]
    elif full.kind == "muon":
        steps += [
            scale_by_muon(
                momentum=full.momentum,
                nesterov=full.nesterov,
                steps=full.muon_steps,
                dtype=jnp.dtype(full.muon_dtype),
                scale=full.muon_scale,
                adam_scale=full.adam_scale,
                b1=full.b1,
                b2=full.b2,
                eps=full.eps,
                state_dtype=state_dtype,
            )
        ]
    else:
        steps += [scale_by_factored_rms(full.b2_power, full.clip_rms)]
        if full.relative_scale:
            steps += [scale_by_parameter_rms()]
        if full.momentum:
            steps += [optax.ema(full.momentum, debias=False)]
    if full.weight_decay:
        steps += [optax.add_decayed_weights(full.weight_decay, mask=decay_mask(full.decay_embeddings))]
    return optax.chain(*steps, scale_by_schedule(schedule))


def lora_plus(optimizer: optax.GradientTransformation, ratio: float = 16.0) -> optax.GradientTransformationExtraArgs:
    """LoRA+ (arXiv:2402.12354): the matrices `b` of "lora" and "dora" learn at `ratio` times the rate of the rest.

    Decoupled weight decay goes with the rate, as it does in a parameter group of PyTorch.

    Args:
      optimizer: whose last step is to multiply by the learning rate, as all of `make_optimizer` do.
      ratio: lr_b / lr_a.

    >>> optimizer = lora_plus(optax.sgd(0.5), ratio=4)
    >>> layer = {"lora": {"query": {"a": jnp.ones(2), "b": jnp.ones(2)}}}
    >>> updates, _ = optimizer.update(layer, optimizer.init(layer))
    >>> jax.tree.map(lambda leaf: leaf.tolist(), updates["lora"]["query"])
    {'a': [-0.5, -0.5], 'b': [-2.0, -2.0]}
    """
    if not ratio > 0:
        raise UserError(f"the learning-rate ratio of LoRA+ is {ratio}; give a positive number.")

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        del leaf
        own = names(path)
        return "b" if own[0] in ("lora", "dora") and own[-1] == "b" else "rest"

    rates = optax.partition(
        {"b": optax.scale(ratio), "rest": optax.identity()},
        lambda tree: jax.tree_util.tree_map_with_path(label, tree),
    )
    return optax.with_extra_args_support(optax.chain(optimizer, rates))
