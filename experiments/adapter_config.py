"""Which parameters fine-tuning trains. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import lmjax as lm
from lmjax.errors import UserError
from lmjax.training.config import with_defaults

if TYPE_CHECKING:
    from lmjax.tokenizers.base import Tokenizer

AdapterKind = Literal[
    "full", "lora", "dora", "ia3", "prefix", "prompt", "houlsby", "pfeiffer", "parallel", "bitfit", "norm_tuning"
]

_LOW_RANK = {
    "rank": 8,
    "alpha": None,
    "rank_stabilized": False,
    "dropout": 0.0,
    "targets": ("*",),
    "lora_plus": 1.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {"parameters": ("*",)},
    "lora": _LOW_RANK,
    "dora": _LOW_RANK,
    "ia3": {},
    "prefix": {"length": 16, "text": "", "network_width": None},
    "prompt": {"length": 16, "text": ""},
    "houlsby": {"reduction": 16.0},
    "pfeiffer": {"reduction": 16.0},
    "parallel": {"reduction": 2.0},
    "bitfit": {},
    "norm_tuning": {},
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What is trained: an adapter beside the model, or the model. Fields that are not set have their kind's default.

    Attributes:
      kind: lora, dora, ia3, prefix, prompt, houlsby, pfeiffer, parallel, bitfit, norm_tuning; or full, the model.
      parameters: full: patterns of the parameters that are trained, such as layer_3/* or *norm/* ("*").
      rank: lora, dora (8).
      alpha: lora, dora: the scale is alpha / rank (the rank: a scale of 1).
      rank_stabilized: lora, dora: alpha / sqrt(rank) instead (False).
      dropout: lora, dora: share of the input that is dropped in training (0).
      targets: lora, dora: patterns of the layers that are adapted, such as attention/* or query ("*").
      lora_plus: lora, dora: learning rate of the second matrix over that of the first (1; LoRA+ takes 16).
      length: prefix, prompt: virtual tokens (16).
      text: prefix, prompt: start from these words instead of random numbers.
      network_width: prefix: train it through a network of this width (none).
      reduction: houlsby, pfeiffer, parallel: the model's width over the adapter's (16, 16, 2).
    """

    kind: AdapterKind = "lora"
    parameters: tuple[str, ...] | None = None
    rank: int | None = None
    alpha: float | None = None
    rank_stabilized: bool | None = None
    dropout: float | None = None
    targets: tuple[str, ...] | None = None
    lora_plus: float | None = None
    length: int | None = None
    text: str | None = None
    network_width: int | None = None
    reduction: float | None = None

    def __post_init__(self) -> None:
        full = self.filled()
        for name in ("rank", "length", "network_width"):
            value = getattr(full, name)
            if value is not None and value < 1:
                raise UserError(f"adapter {name} is {value}; give at least 1")
        if full.lora_plus is not None and not full.lora_plus > 0:
            raise UserError(f"adapter lora_plus is {full.lora_plus}; give a positive ratio of learning rates")

    def filled(self) -> AdapterConfig:
        """This config with the kind's defaults written out."""
        found: AdapterConfig = with_defaults(self, _DEFAULTS, ("kind",), "adapter")
        return found

    def method(self, policy: Any, tokenizer: Tokenizer) -> Any:
        """The adapter from `lmjax.adapters`; None for full fine-tuning.

        Args:
          policy: the model.
          tokenizer: reads `text`.
        """
        full: Any = self.filled()
        if full.kind == "full":
            return None
        if full.kind in ("lora", "dora"):
            make = getattr(lm.adapters, full.kind)
            return make(
                full.rank,
                full.alpha,
                targets=full.targets,
                rank_stabilized=full.rank_stabilized,
                dropout=full.dropout,
            )
        if full.kind in ("prefix", "prompt"):
            make = getattr(lm.adapters, full.kind)
            tokens = tokenizer.encode(full.text) if full.text else None
            more = {"network_width": full.network_width} if full.kind == "prefix" else {}
            length = full.length if tokens is None else self.length  # words alone: as many as they are
            return make(policy, length, tokens=tokens, **more)
        sizes = {} if full.reduction is None else {"reduction": full.reduction}
        return getattr(lm.adapters, full.kind)(**sizes)

    def trainable(self, method: Any) -> tuple[str, ...]:
        """What `make_step` is to train, given what `method` returned."""
        if method is not None:
            found: tuple[str, ...] = method.trainable
            return found
        return tuple(f"params/{pattern}" for pattern in self.filled().parameters or ())

    def optimizer(self, optimizer: Any) -> Any:
        """The optimizer, with LoRA+'s two learning rates where they are asked for."""
        ratio = self.filled().lora_plus
        return optimizer if ratio in (None, 1.0) else lm.training.lora_plus(optimizer, ratio)
