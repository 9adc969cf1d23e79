"""What a run reads. Plain data: importing this imports neither JAX nor NumPy."""

from __future__ import annotations

import dataclasses
import math
import os

from lmjax.errors import UserError
from lmjax.tokenizers.config import TokenizerConfig

KINDS = ("auto", "stdlib", "text", "jsonl", "parquet", "huggingface")
PACKINGS = ("stream", "best_fit", "crop")
SPLITS = ("auto", "hash", "position")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of documents."""

    kind: str = "auto"
    """stdlib (source text of the running Python's standard library), text, jsonl, parquet, huggingface, or
    auto: by the extension, stdlib where no path is given."""
    path: str = ""
    """A file, a directory, a glob, a URL, or the name of a Hugging Face dataset (NAME or NAME:CONFIG)."""
    text_field: str = "text"
    """The field or column that holds the text, in jsonl, parquet and huggingface."""
    separator: str | None = None
    """Text that parts the documents of a text file, such as <|endoftext|>; None: a file is one."""
    subset: str = "train"
    """The split of a Hugging Face dataset."""
    weight: float = 1.0
    """Share of the training examples in a mixture, relative to the other sources."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"data kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(f"data weight {self.weight} must be a positive number: leave the source out instead")
        if self.kind == "stdlib" and self.path:
            raise UserError(f"data kind 'stdlib' takes no path, but path is {self.path!r}: set kind to 'auto'")
        if self.kind not in ("auto", "stdlib") and not self.path:
            raise UserError(f"data kind {self.kind!r} needs a path: set data.path")
        if self.separator == "":
            raise UserError("data.separator is empty: give the text that parts documents, or none at all")

    def resolved_kind(self) -> str:
        """The kind with "auto" settled by the path.

        >>> SourceConfig(path="a/b.jsonl.gz").resolved_kind()
        'jsonl'
        """
        if self.kind != "auto":
            return self.kind
        if not self.path:
            return "stdlib"
        name = self.path.lower().removesuffix(".gz")
        if name.endswith((".jsonl", ".ndjson")):
            return "jsonl"
        return "parquet" if name.endswith(".parquet") else "text"


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The data of a run: a source (or several), a tokenizer, and how rows are made of them."""

    mixture: tuple[SourceConfig, ...] = ()
    """Further sources; each is drawn from in proportion to its weight, this config's own source included."""
    validation_path: str = ""
    """Held-out documents of their own, of this source's kind; empty: a part of each source is held out."""
    validation_fraction: float = 0.1
    """The part held out where there is no validation_path."""
    split: str = "auto"
    """hash: a document is held out by the hash of its text; position: the last part of the text is; auto:
    hash where ten documents or more can be expected to be held out, position where there are fewer."""
    max_bytes: int = 0
    """Read only the first so many UTF-8 bytes of each source; 0: all."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: int = 256
    """T: positions of a row."""
    packing: str = "stream"
    """stream: consecutive blocks of T, documents isolated by segment ids; best_fit: whole documents packed
    into rows; crop: windows at random places of the joined text, not isolated (nanoGPT's way)."""
    document_markers: bool = True
    """Put the tokenizer's bos (or else its eos) before each document and its eos after it."""
    seed: int = 0
    """Order of the training examples."""
    cache_dir: str = ""
    """Where token caches live; empty: $LMJAX_CACHE, or else ~/.cache/lmjax."""
    prefetch: int = 2
    """Batches made ahead in a thread; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing not in PACKINGS:
            raise UserError(f"data packing {self.packing!r} is unknown: use one of {', '.join(PACKINGS)}")
        if self.split not in SPLITS:
            raise UserError(f"data split {self.split!r} is unknown: use one of {', '.join(SPLITS)}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}: it must lie in [0, 1)")
        if self.sequence_length < 1:
            raise UserError(f"data.sequence_length is {self.sequence_length}: it must be at least 1")
        if self.max_bytes < 0 or self.prefetch < 0:
            raise UserError("data.max_bytes and data.prefetch must not be negative")

    def sources(self) -> tuple[SourceConfig, ...]:
        """All sources, this config's own first."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(SourceConfig)}
        return (SourceConfig(**own), *self.mixture)

    def cache_root(self) -> str:
        """The directory of token caches, `~` and `$LMJAX_CACHE` resolved."""
        return os.path.expanduser(self.cache_dir or os.environ.get("LMJAX_CACHE", "") or "~/.cache/lmjax")
