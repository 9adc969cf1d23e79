"""Tokenizer files of tiktoken and SentencePiece. Both packages are extras."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lmjax.errors import UserError
from lmjax.tokenizers.base import OWN_FILE, check_ids, digest, utf8, write_file

# Split patterns and special tokens as published with tiktoken (tiktoken_ext/openai_public.py); the files hold
# ranks only.
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (_GPT2, {"<|endoftext|>": 50256}),
    "r50k_base": (_GPT2, {"<|endoftext|>": 50256}),
    "p50k_base": (_GPT2, {"<|endoftext|>": 50256}),
    "cl100k_base": (
        _CL100K,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


def _role(role: str, text: str | None, auto: str | None, specials: dict[str, int]) -> tuple[str | None, int | None]:
    text = auto if text == "auto" else text
    if text is not None and text not in specials:
        raise UserError(f"the {role} token {text!r} is not a special token of this file: name one of {list(specials)}")
    return text, None if text is None else specials[text]


class TiktokenTokenizer:
    """Byte-pair ranks with a split pattern, run by `tiktoken`."""

    kind = "tiktoken"

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        specials: dict[str, int],
        bos: str | None = "auto",
        eos: str | None = "auto",
        pad: str | None = "auto",
    ):
        try:
            import tiktoken
        except ImportError:
            raise UserError("tiktoken files need the package tiktoken: pip install tiktoken") from None
        self._ranks, self._pattern, self._specials = ranks, pattern, dict(specials)
        self._inner = tiktoken.Encoding("lmjax", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        auto_eos = next((t for t in ("<|endoftext|>", "<|end_of_text|>") if t in specials), None)
        auto_bos = "<|begin_of_text|>" if "<|begin_of_text|>" in specials else None
        self._marks = {}
        self._marks["bos"], self.bos = _role("bos", bos, auto_bos, specials)
        self._marks["eos"], self.eos = _role("eos", eos, auto_eos, specials)
        self._marks["pad"], self.pad = _role("pad", pad, None, specials)

    @property
    def vocab_size(self) -> int:
        return self._inner.n_vocab

    @property
    def specials(self) -> dict[str, int]:
        return dict(self._specials)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        utf8(text)
        ids = self._inner.encode(text, allowed_special="all") if special else self._inner.encode_ordinary(text)
        return np.array(ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._inner.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array(ids, np.int32) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        array = check_ids(ids, self.vocab_size)
        try:
            return self._inner.decode(array.tolist(), errors="replace")
        except KeyError as error:
            raise UserError(
                f"id {error} is a gap in this tokenizer's vocabulary: these ids were made by another"
            ) from None

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._ranks.items():
            lengths[i] = len(token)
        return lengths

    def _content(self) -> dict:
        return {"kind": self.kind, "pattern": self._pattern, "specials": self._specials, **self._marks}

    def _file(self) -> bytes:
        return b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in sorted(self._ranks.items(), key=lambda p: p[1]))

    def fingerprint(self) -> str:
        return digest(digest(self._file()).encode() + json.dumps(self._content(), sort_keys=True).encode())

    def save(self, directory: str | os.PathLike) -> None:
        """The ranks as `tokenizer.tiktoken`; pattern and specials beside it."""
        os.makedirs(directory, exist_ok=True)
        write_file(os.path.join(directory, "tokenizer.tiktoken"), self._file())
        write_file(os.path.join(directory, OWN_FILE), json.dumps(self._content()))


def from_tiktoken_file(
    path: str | os.PathLike,
    pattern: str | None = None,
    specials: dict[str, int] | None = None,
    bos: str | None = "auto",
    eos: str | None = "auto",
    pad: str | None = "auto",
) -> TiktokenTokenizer:
    """Opens a rank file (`base64 rank` lines).

    Pattern and special tokens come from the arguments, from `NAME.json` ({"pattern": ..., "specials": {...}})
    beside the file, or from its name where tiktoken publishes one (cl100k_base.tiktoken).
    """
    path = os.fspath(path)
    stem = os.path.splitext(os.path.basename(path))[0]
    beside = os.path.splitext(path)[0] + ".json"
    if pattern is None and os.path.exists(beside):
        with open(beside, encoding="utf-8") as file:
            said = json.load(file)
        pattern, specials = said.get("pattern"), specials or said.get("specials", {})
    if pattern is None:
        if stem not in _KNOWN:
            raise UserError(
                f"{path} holds ranks only: put its split pattern and special tokens into {beside} as "
                '{"pattern": "...", "specials": {"<|endoftext|>": 50256}}'
            )
        pattern, known = _KNOWN[stem]
        specials = known if specials is None else specials
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise UserError(f"{path} line {number} is not 'base64 rank': this is not a tiktoken file") from None
    if not ranks:
        raise UserError(f"{path} is empty: a tiktoken file holds one 'base64 rank' line a token")
    return TiktokenTokenizer(ranks, pattern, specials or {}, bos, eos, pad)


class SentencePieceTokenizer:
    """A SentencePiece `.model`, run by `sentencepiece`. Its control symbols are never read out of text."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, bos: str | None = "auto", eos: str | None = "auto", pad: str | None = "auto"):
        try:
            import sentencepiece
        except ImportError:
            raise UserError("SentencePiece .model files need the package: pip install sentencepiece") from None
        self._model = model
        self._inner: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._inner.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"this is not a SentencePiece model ({error})") from None
        inner = self._inner
        self._specials = {inner.id_to_piece(i): i for i in range(inner.get_piece_size()) if inner.is_control(i)}
        auto = {
            r: inner.id_to_piece(i) if i >= 0 else None
            for r, i in (("bos", inner.bos_id()), ("eos", inner.eos_id()), ("pad", inner.pad_id()))
        }
        self._marks = {}
        self._marks["bos"], self.bos = _role("bos", bos, auto["bos"], self._specials)
        self._marks["eos"], self.eos = _role("eos", eos, auto["eos"], self._specials)
        self._marks["pad"], self.pad = _role("pad", pad, auto["pad"], self._specials)

    @property
    def vocab_size(self) -> int:
        return self._inner.get_piece_size()

    @property
    def specials(self) -> dict[str, int]:
        return dict(self._specials)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        from lmjax.tokenizers.base import pieces

        utf8(text)
        parts = pieces(text, self._specials) if special else [text]
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._inner.encode(part, out_type=int)
        return np.array(ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._inner.encode(list(texts), out_type=int, num_threads=os.cpu_count() or 1)
        return [np.array(ids, np.int32) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode(check_ids(ids, self.vocab_size).tolist())

    def token_bytes(self) -> None:
        """None: normalisation and the dummy prefix leave an id without a fixed length."""
        return None

    def fingerprint(self) -> str:
        return digest(self._model + json.dumps(self._marks, sort_keys=True).encode())

    def save(self, directory: str | os.PathLike) -> None:
        """The model as `tokenizer.model`; the choice of marks beside it."""
        os.makedirs(directory, exist_ok=True)
        write_file(os.path.join(directory, "tokenizer.model"), self._model)
        write_file(os.path.join(directory, OWN_FILE), json.dumps({"kind": self.kind, **self._marks}))
