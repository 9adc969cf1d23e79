"""Which tokenizer a run uses. Plain data: importing this imports nothing else of the library."""

from __future__ import annotations

import dataclasses

from lmjax.errors import UserError

KINDS = ("byte", "char", "bpe", "wordpiece", "unigram", "file")
TRAINED = ("char", "bpe", "wordpiece", "unigram")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer by description.

    `bos`, `eos` and `pad` are the texts of the special tokens that begin a document, end it and fill a row.
    "auto" means: none for byte and char, "<|endoftext|>" as the eos of a trained one, and what the file says for
    a file.
    None means: without.
    """

    kind: str = "byte"
    """byte, char, bpe, wordpiece, unigram (the last four are trained on the corpus), or file."""
    vocab_size: int = 4096
    """Ids of a trained bpe, wordpiece or unigram tokenizer, special tokens included."""
    path: str = ""
    """Of kind file: tokenizer.json, *.tiktoken, *.model, encoder.json, or a directory that holds one."""
    bos: str | None = "auto"
    eos: str | None = "auto"
    pad: str | None = "auto"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"tokenizer kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if self.kind == "file" and not self.path:
            raise UserError("tokenizer kind 'file' needs a path: set tokenizer.path")
        if self.kind != "file" and self.path:
            raise UserError(f"tokenizer.path is set but kind is {self.kind!r}: set tokenizer.kind to 'file'")
        if self.kind in ("bpe", "wordpiece", "unigram") and self.vocab_size < 2:
            raise UserError(f"tokenizer.vocab_size is {self.vocab_size}: a trained tokenizer needs at least 2 ids")

    def marks(self) -> tuple[str | None, str | None, str | None]:
        """The texts of (bos, eos, pad) of a tokenizer that is made, not loaded, with "auto" resolved."""
        auto_eos = "<|endoftext|>" if self.kind in ("bpe", "wordpiece", "unigram") else None
        bos, eos, pad = (None if text == "auto" else text for text in (self.bos, self.eos, self.pad))
        return bos, auto_eos if self.eos == "auto" else eos, pad
