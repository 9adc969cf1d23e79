"""Opens a tokenizer from a path, or makes the one a `TokenizerConfig` describes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from lmjax.errors import UserError
from lmjax.tokenizers.base import OWN_FILE, Tokenizer
from lmjax.tokenizers.config import TokenizerConfig


def build(config: TokenizerConfig, texts: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer a config describes; `texts` is what char, bpe, wordpiece and unigram are trained on."""
    from lmjax.tokenizers import simple, subword

    if config.kind == "file":
        return load(config.path, config.bos, config.eos, config.pad)
    bos, eos, pad = config.marks()
    if config.kind == "byte":
        return simple.ByteTokenizer(bos, eos, pad)
    if texts is None:
        raise UserError(
            f"a {config.kind} tokenizer is trained: give it texts, or a file of one (tokenizer.kind 'file')"
        )
    if config.kind == "char":
        return simple.CharTokenizer.train(texts, bos, eos, pad)
    return subword.train(config.kind, texts, config.vocab_size, bos, eos, pad)


def load(
    path: str | os.PathLike, bos: str | None = "auto", eos: str | None = "auto", pad: str | None = "auto"
) -> Tokenizer:
    """Opens a tokenizer.

    Args:
      path: a directory written by `save`, a Hugging Face model directory, or one file: `tokenizer.json`,
        `*.tiktoken`, `*.model` (SentencePiece), `encoder.json` / `vocab.json` with its merges beside it.
      bos, eos, pad: the token texts of these roles; "auto" for what the files say, None for none.

    Raises:
      UserError: the path is missing or holds no tokenizer, or a package it needs is not installed.
    """
    from lmjax.tokenizers import foreign, subword

    path = os.path.expanduser(os.fspath(path))
    marks: dict[str, Any] = {"bos": bos, "eos": eos, "pad": pad}
    if not os.path.exists(path):
        raise UserError(f"tokenizer {path} does not exist: give a tokenizer file or a directory that holds one")
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if os.path.isdir(path):
        names = (OWN_FILE, "tokenizer.json", "tokenizer.model", "encoder.json", "vocab.json")
        ranks = sorted(n for n in os.listdir(path) if n.endswith(".tiktoken"))
        found = next((n for n in (*names, *ranks) if os.path.exists(os.path.join(path, n))), None)
        if found is None:
            raise UserError(f"{path} holds no tokenizer: expected one of {', '.join(names)} or *.tiktoken")
        path = os.path.join(path, found)
    name = os.path.basename(path)
    if name == OWN_FILE:
        return _load_own(path, marks)
    if name in ("encoder.json", "vocab.json"):
        merges = next((m for m in ("vocab.bpe", "merges.txt") if os.path.exists(os.path.join(folder, m))), None)
        if merges is None:
            raise UserError(f"{path} needs its merges: put vocab.bpe or merges.txt beside it")
        return subword.from_gpt2_files(path, os.path.join(folder, merges), **marks)
    if name.endswith(".json"):
        return subword.from_file(path, **marks)
    if name.endswith(".tiktoken"):
        return foreign.from_tiktoken_file(path, **marks)
    if name.endswith(".model"):
        with open(path, "rb") as file:
            return foreign.SentencePieceTokenizer(file.read(), **marks)
    raise UserError(f"{path} is not a tokenizer file: expected tokenizer.json, encoder.json, *.tiktoken or *.model")


def _load_own(path: str, marks: dict[str, str | None]) -> Tokenizer:
    from lmjax.tokenizers import foreign, simple

    folder = os.path.dirname(path)
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
        kind = said["kind"]
        roles = {role: said[role] if marks[role] == "auto" else marks[role] for role in marks}
        if kind == "byte":
            return simple.ByteTokenizer(**roles)
        if kind == "char":
            return simple.CharTokenizer(said["alphabet"], **roles)
        if kind == "tiktoken":
            ranks = os.path.join(folder, "tokenizer.tiktoken")
            return foreign.from_tiktoken_file(ranks, said["pattern"], said["specials"], **roles)
        if kind == "sentencepiece":
            with open(os.path.join(folder, "tokenizer.model"), "rb") as model:
                return foreign.SentencePieceTokenizer(model.read(), **roles)
    except (json.JSONDecodeError, KeyError, FileNotFoundError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): save the tokenizer again") from None
    raise UserError(f"{path} names an unknown kind {kind!r}: it was written by a newer version")


def describe(config: TokenizerConfig) -> dict:
    """What a tokenizer depends on besides its training text, for fingerprints."""
    said = dataclasses.asdict(config)
    if config.kind not in ("bpe", "wordpiece", "unigram"):
        said.pop("vocab_size")
    return said
