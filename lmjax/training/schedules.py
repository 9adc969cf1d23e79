"""Learning-rate schedules: a linear warmup, then one of six shapes; `schedule(step)` for step 0, 1, 2, ...

With P the peak, W the warmup steps, T the total steps, f the final fraction and i the step, the warmup is
P (i + 1) / W for i < W (the first step already moves, and step W - 1 runs at the peak). From step W on, with
u = min((i - W) / (T - W), 1):

  constant      P
  cosine        P (f + (1 - f) (1 + cos(pi u)) / 2)
  linear        P (1 - (1 - f) u)
  step          P factor^(number of milestones m with i >= round(m T))
  wsd           P until step S = T - round(cooldown_fraction T) (or W if that is later); then, with
                v = min((i - S) / (T - S), 1), P (1 - (1 - f) d(v)) where d(v) is v (linear),
                (1 - cos(pi v)) / 2 (cosine) or sqrt(v) ("1 - sqrt": Haegele et al., arXiv:2405.18392)
  inverse_sqrt  P sqrt(max(W, 1) / (i + 1)), continuous with the warmup (Vaswani et al., arXiv:1706.03762)

The final value P f belongs to step T, one past the last step of a run of T steps, so a run that decays to
zero never spends a step at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from lmjax.errors import UserError
from lmjax.training.config import ScheduleConfig

Schedule = Callable[[Any], Any]


def make_schedule(config: ScheduleConfig, total_steps: int) -> Schedule:
    """The learning rate, a float32 scalar, as a function of the step, an int or a traced int32 scalar.

    Args:
      config: kind, peak and shape.
      total_steps: the length of the run; `config.total_steps` goes before it when set.

    Raises:
      UserError: if a schedule that decays has no steps left after its warmup.

    >>> schedule = make_schedule(ScheduleConfig("linear", peak=1.0, warmup_steps=2), total_steps=10)
    >>> [round(float(schedule(i)), 3) for i in (0, 1, 2, 6, 10, 11)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    full: Any = config.filled()
    peak, warmup = full.peak, full.warmup_steps
    total = full.total_steps or total_steps
    if full.kind not in ("constant", "inverse_sqrt") and total <= warmup:
        raise UserError(
            f"the {full.kind} schedule has {warmup} warmup steps and the run only {total} steps: "
            "lower warmup_steps or train for longer"
        )
    if full.kind == "inverse_sqrt":
        after = _inverse_sqrt(peak, warmup)
    elif full.kind == "constant":
        after = optax.constant_schedule(peak)
    elif full.kind == "cosine":
        after = optax.cosine_decay_schedule(peak, total - warmup, alpha=full.final_fraction)
    elif full.kind == "linear":
        after = optax.linear_schedule(peak, peak * full.final_fraction, total - warmup)
    elif full.kind == "step":
        after = _stairs(peak, [round(m * total) - warmup for m in full.milestones], full.factor)
    else:
        start = max(total - round(full.cooldown_fraction * total), warmup)
        end = _cooldown(peak, full.final_fraction, total - start, full.cooldown_shape)
        after = optax.join_schedules([optax.constant_schedule(peak), end], [start - warmup])
    if warmup == 0:
        return _float32(after)
    climb = optax.linear_schedule(peak / warmup, peak * (1 + 1 / warmup), warmup)
    joined = optax.join_schedules([climb, after], [warmup])
    return _float32(joined)


def _float32(schedule: Schedule) -> Schedule:
    """Rounding can take a rate that ends at zero below it."""
    return lambda step: jnp.maximum(jnp.asarray(schedule(step), jnp.float32), 0.0)


def _inverse_sqrt(peak: float, warmup: int) -> Schedule:
    """Counted from the end of the warmup, as `join_schedules` counts."""
    return lambda count: peak * jnp.sqrt(max(warmup, 1) / (jnp.maximum(count, 0) + warmup + 1.0))


def _stairs(peak: float, boundaries: list[int], factor: float) -> Schedule:
    """Not `piecewise_constant_schedule`: that one drops a step late and cannot hold two equal boundaries."""

    def schedule(count: Any) -> Any:
        passed = jnp.sum(jnp.asarray(count) >= jnp.asarray(boundaries))
        return peak * factor ** passed.astype(jnp.float32)

    return schedule


def _cooldown(peak: float, fraction: float, steps: int, shape: str) -> Schedule:
    if shape == "linear":
        return optax.linear_schedule(peak, peak * fraction, steps)
    if shape == "cosine":
        return optax.cosine_decay_schedule(peak, steps, alpha=fraction)
    # clip before the root: join_schedules evaluates this at counts before its start too
    return lambda count: peak * (1 - (1 - fraction) * jnp.sqrt(jnp.clip(count / steps, 0.0, 1.0)))
