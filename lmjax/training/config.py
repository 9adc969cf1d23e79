"""What a training run is told: schedule, optimizer, checkpoints, loop. Plain data, and jax is not imported.

A field that belongs to one kind of schedule or optimizer only is None unless set, which means that kind's
default. Setting it for a kind that does not read it is an error: no field is ever silently without effect.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lmjax.errors import UserError

ScheduleKind = Literal["constant", "cosine", "linear", "step", "wsd", "inverse_sqrt"]
OptimizerKind = Literal["adamw", "adafactor", "lion", "sgd", "muon"]

_SCHEDULE_DEFAULTS: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"final_fraction": 0.1},
    "linear": {"final_fraction": 0.0},
    "step": {"milestones": (0.5, 0.75), "factor": 0.1},
    "wsd": {"final_fraction": 0.0, "cooldown_fraction": 0.2, "cooldown_shape": "linear"},
    "inverse_sqrt": {},
}

_OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "state_dtype": "float32"},
    "adafactor": {"b2_power": 0.8, "clip_rms": 1.0, "relative_scale": False, "momentum": 0.0},
    "lion": {"b1": 0.9, "b2": 0.99, "state_dtype": "float32"},
    "sgd": {"momentum": 0.9, "nesterov": False, "state_dtype": "float32"},
    "muon": {
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "momentum": 0.95,
        "nesterov": True,
        "state_dtype": "float32",
        "muon_scale": "rms",
        "muon_steps": 5,
        "muon_dtype": "float32",
        "adam_scale": 1.0,
    },
}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def with_defaults(config: Any, defaults: dict[str, dict[str, Any]], shared: tuple[str, ...], what: str) -> Any:
    """`config` with the defaults of its kind in place of None, refusing fields that its kind does not read.

    Builds the copy without `__init__`, since `__post_init__` calls this.
    """
    if config.kind not in defaults:
        raise UserError(f"unknown {what} kind {config.kind!r}; choose one of {', '.join(defaults)}")
    own = defaults[config.kind]
    copy = object.__new__(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in shared and field.name not in own and value is not None:
            users = " and ".join(kind for kind, names in defaults.items() if field.name in names)
            raise UserError(
                f"{what} field {field.name} is read by {users} and not by {config.kind}: "
                "leave it out or change the kind"
            )
        if value is None and field.name in own:
            value = own[field.name]
        object.__setattr__(copy, field.name, value)
    return copy


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A learning-rate schedule; `lmjax.training.schedules` has the formulas.

    Attributes:
      kind: constant, cosine, linear, step, wsd (warmup, stable, decay) or inverse_sqrt.
      peak: the learning rate at the end of the warmup.
      warmup_steps: steps of linear warmup; step i < warmup_steps runs at peak * (i + 1) / warmup_steps.
      total_steps: the step at which the schedule ends and its last value holds; None for the whole run.
      final_fraction: last value over peak (cosine 0.1, linear and wsd 0).
      milestones: step only, shares of total_steps after which the rate is multiplied by `factor` (0.5, 0.75).
      factor: step only (0.1).
      cooldown_fraction: wsd only, the last share of total_steps, in which the rate decays (0.2).
      cooldown_shape: wsd only, linear, cosine or sqrt (linear).
    """

    kind: ScheduleKind = "cosine"
    peak: float = 1e-3
    warmup_steps: int = 100
    total_steps: int | None = None
    final_fraction: float | None = None
    milestones: tuple[float, ...] | None = None
    factor: float | None = None
    cooldown_fraction: float | None = None
    cooldown_shape: Literal["linear", "cosine", "sqrt"] | None = None

    def __post_init__(self) -> None:
        full = self.filled()
        _require(self.peak > 0, f"schedule peak must be positive, not {self.peak}")
        _require(self.warmup_steps >= 0, "schedule warmup_steps must not be negative")
        if self.total_steps is not None:
            _require(
                self.total_steps > self.warmup_steps,
                f"schedule total_steps {self.total_steps} must be more than warmup_steps {self.warmup_steps}",
            )
            _require(
                self.kind not in ("constant", "inverse_sqrt"),
                f"schedule field total_steps has no meaning for kind {self.kind!r}: leave it out",
            )
        if full.final_fraction is not None:
            _require(0 <= full.final_fraction <= 1, "schedule final_fraction must lie between 0 and 1")
        if full.milestones is not None:
            increasing = all(a < b for a, b in zip(full.milestones, full.milestones[1:], strict=False))
            _require(
                increasing and all(0 < m < 1 for m in full.milestones),
                f"schedule milestones must be increasing shares between 0 and 1, not {full.milestones}",
            )
        if full.factor is not None:
            _require(full.factor > 0, f"schedule factor must be positive, not {full.factor}")
        if full.cooldown_fraction is not None:
            _require(0 < full.cooldown_fraction <= 1, "schedule cooldown_fraction must lie in (0, 1]")
            _require(
                full.cooldown_shape in ("linear", "cosine", "sqrt"),
                f"unknown schedule cooldown_shape {full.cooldown_shape!r}; choose linear, cosine or sqrt",
            )

    def filled(self) -> ScheduleConfig:
        """This configuration with the kind's defaults written out."""
        shared = ("kind", "peak", "warmup_steps", "total_steps")
        return with_defaults(self, _SCHEDULE_DEFAULTS, shared, "schedule")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer; `lmjax.training.optimizers.make_optimizer` builds it.

    Attributes:
      kind: adamw, adafactor, lion, sgd or muon.
      weight_decay: decoupled decay: parameters shrink by learning rate * weight_decay a step. Only matrices
        decay, never norm scales or biases; a scan-stacked bias [L, D] is a bias.
      decay_embeddings: decay embedding tables and the head too.
      b1: adamw, lion, muon: decay of the first moment (0.9). For Muon: of its AdamW part.
      b2: adamw, lion, muon: decay of the second moment (0.95; Lion 0.99).
      eps: adamw, muon: added to the root of the second moment (1e-8).
      momentum: sgd, muon, adafactor: decay of the momentum (0.9, 0.95, and 0 for none).
      nesterov: sgd, muon: look one momentum step ahead (False, True).
      state_dtype: float32 or bfloat16, the type of the first moment (not adafactor).
      b2_power: adafactor: the second moment decays at 1 - t^-b2_power (0.8).
      clip_rms: adafactor: updates are scaled down to this root mean square (1).
      relative_scale: adafactor: the learning rate is relative to the root mean square of the matrix (False).
      muon_scale: muon: "rms" for 0.2 * sqrt(max(in, out)), which matches the size of AdamW's updates so that
        both parts share one learning rate, or "spectral" for sqrt(max(1, out / in)).
      muon_steps: muon: Newton-Schulz iterations (5).
      muon_dtype: muon: float32 or bfloat16, the type of the Newton-Schulz matrix products.
      adam_scale: muon: learning rate of the AdamW part over that of the matrices (1).
    """

    kind: OptimizerKind = "adamw"
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    state_dtype: Literal["float32", "bfloat16"] | None = None
    b2_power: float | None = None
    clip_rms: float | None = None
    relative_scale: bool | None = None
    muon_scale: Literal["rms", "spectral"] | None = None
    muon_steps: int | None = None
    muon_dtype: Literal["float32", "bfloat16"] | None = None
    adam_scale: float | None = None

    def __post_init__(self) -> None:
        full = self.filled()
        _require(self.weight_decay >= 0, "optimizer weight_decay must not be negative")
        for name in ("b1", "b2", "momentum"):
            value = getattr(full, name)
            _require(value is None or 0 <= value < 1, f"optimizer {name} must lie in [0, 1), not {value}")
        for name in ("eps", "b2_power", "clip_rms", "muon_steps", "adam_scale"):
            value = getattr(full, name)
            _require(value is None or value > 0, f"optimizer {name} must be positive, not {value}")
        for name in ("state_dtype", "muon_dtype"):
            value = getattr(full, name)
            _require(
                value in (None, "float32", "bfloat16"),
                f"optimizer {name} must be float32 or bfloat16, not {value!r}",
            )
        _require(
            full.muon_scale in (None, "rms", "spectral"),
            f"unknown optimizer muon_scale {full.muon_scale!r}; choose rms or spectral",
        )

    def filled(self) -> OptimizerConfig:
        """This configuration with the kind's defaults written out."""
        shared = ("kind", "weight_decay", "decay_embeddings")
        return with_defaults(self, _OPTIMIZER_DEFAULTS, shared, "optimizer")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. The newest one is always kept.

    Attributes:
      every: steps between checkpoints; 0 writes one at the end (or when the run is told to stop) only.
      keep_last: how many of the newest to keep, at least 1.
      keep_best: how many of the best by `best_metric` to keep besides; 0 for none.
      best_metric: a metric written by the evaluation hook at the step of the checkpoint.
      best_mode: min or max.
      asynchronous: write in the background while training goes on; False waits for each.
    """

    every: int = 1000
    keep_last: int = 2
    keep_best: int = 1
    best_metric: str = "validation/loss"
    best_mode: Literal["min", "max"] = "min"
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint every must not be negative, not {self.every}")
        _require(self.keep_last >= 1, f"checkpoint keep_last must be at least 1, not {self.keep_last}")
        _require(self.keep_best >= 0, f"checkpoint keep_best must not be negative, not {self.keep_best}")
        _require(self.best_mode in ("min", "max"), "checkpoint best_mode must be min or max")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The training loop.

    Attributes:
      steps: the step at which the run ends, counted from its beginning, not from where it resumed.
      log_every: steps between metric records.
      eval_every: steps between evaluations; 0 evaluates at the end only.
      sample_every: steps between samples; 0 samples at the end only.
      max_skipped: give up after this many updates in a row were skipped for losses or gradients that are not
        finite; 0 never does.
      prefetch: batches read and put on the device ahead, by a background thread; 0 reads them in the loop.
    """

    steps: int = 1000
    log_every: int = 10
    eval_every: int = 250
    sample_every: int = 0
    max_skipped: int = 10
    prefetch: int = 2

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"loop steps must be at least 1, not {self.steps}")
        _require(self.log_every >= 1, f"loop log_every must be at least 1, not {self.log_every}")
        for name in ("eval_every", "sample_every", "max_skipped", "prefetch"):
            value = getattr(self, name)
            _require(value >= 0, f"loop {name} must not be negative, not {value}")
