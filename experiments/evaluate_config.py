"""What `experiments.evaluate` is told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """A model, a text, and how the one reads the other.

    Attributes:
      model: a run directory, or a Hugging Face model directory.
      path: the text: a file, a directory, a glob or a URL; empty for the standard library's source text.
      kind: stdlib, text, jsonl, parquet, huggingface, or auto: by the extension.
      text_field: the field that holds the text, in jsonl, parquet and huggingface.
      separator: text that parts the documents of a text file; None: each file is one document.
      max_bytes: read only the first so many UTF-8 bytes; 0 for all.
      mode: sliding (a window moves over each document) or document (each document is seen whole).
      window: sliding: tokens seen at once; 0 for as many as the model was made for.
      stride: sliding: tokens from one window to the next, so that each target has window - stride before it at
        the least; 0 for half the window.
      batch_size: rows of a batch.
      step: of a run directory: last, best, or the number of a step.
      average: of a run directory: the moving average of the parameters or the parameters; None for the average
        where there is one.
      tokenizer: a tokenizer file or directory to use instead of the one beside the model.
      adapter: a directory with an adapter of the model: one of ours, or PEFT's.
    """

    model: str = ""
    path: str = ""
    kind: str = "auto"
    text_field: str = "text"
    separator: str | None = None
    max_bytes: int = 0
    mode: Literal["sliding", "document"] = "sliding"
    window: int = 0
    stride: int = 0
    batch_size: int = 8
    step: str = "last"
    average: bool | None = None
    tokenizer: str = ""
    adapter: str = ""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "window", "stride"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.mode == "document" and (self.window or self.stride):
            raise UserError("window and stride are of the sliding mode; leave them out with mode document")
