"""The models there are, as data. Importable without JAX."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError
from lmjax.modules.config import DecoderConfig, RopeScaling

__all__ = ["BigramConfig", "DecoderConfig", "ModelConfig", "RopeScaling"]


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    """The smallest policy: the logits after a token are that token's row of a V x V table.

    Attributes:
      vocab_size: V.
      init_std: standard deviation of the initial table; 0 starts from the uniform distribution.
    """

    vocab_size: int
    init_std: float = 0.0

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise UserError(f"vocab_size is {self.vocab_size}; give a number of at least 1.")


ModelConfig = DecoderConfig | BigramConfig
