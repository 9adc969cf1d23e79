"""Which documents train and which are held out."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lmjax.data.config import DataConfig, SourceConfig
from lmjax.data.sources import Source

_EXPECTED_HELD_OUT = 10  # documents; with fewer, a split by hash could leave none


def like(config: DataConfig, path: str) -> SourceConfig:
    """The config of another path, read as this config's own source is."""
    own = config.sources()[0]
    kind = own.kind if own.kind != "stdlib" else "auto"
    return dataclasses.replace(own, path=path, kind=kind)


def rule_identity(config: DataConfig) -> tuple:
    """What the split of a source depends on."""
    return ("train",) if config.validation_path else (config.split, config.validation_fraction)


def _limited(source: Source, max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in source.read():
        if max_bytes:
            raw = text.encode("utf-8", errors="surrogatepass")
            if len(raw) >= left:
                yield raw[:left].decode("utf-8", errors="ignore")
                return
            left -= len(raw)
        yield text


def split(source: Source, config: DataConfig, all_train: bool) -> Callable[[], Iterator[tuple[str, str]]]:
    """A function that opens a pass over (split, text)."""
    fraction = 0.0 if all_train else config.validation_fraction

    def documents() -> Iterator[tuple[str, str]]:
        rule = config.split
        if fraction == 0:
            return (("train", text) for text in _limited(source, config.max_bytes))
        if rule == "auto":
            enough = int(np.ceil(_EXPECTED_HELD_OUT / fraction))
            found = sum(1 for _ in itertools.islice((t for t in _limited(source, config.max_bytes) if t), enough))
            rule = "hash" if found >= enough else "position"
        if rule == "hash":
            return _by_hash(_limited(source, config.max_bytes), fraction)
        total = sum(len(text) for text in _limited(source, config.max_bytes))
        return _by_position(_limited(source, config.max_bytes), int(total * (1 - fraction)))

    return documents


def _by_hash(texts: Iterable[str], fraction: float) -> Iterator[tuple[str, str]]:
    """The same text always falls on the same side, so a duplicate cannot leak from one into the other."""
    for text in texts:
        raw = text.encode("utf-8", errors="surrogatepass")
        number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
        yield ("validation" if number < fraction * 2**64 else "train"), text


def _by_position(texts: Iterable[str], cut: int) -> Iterator[tuple[str, str]]:
    seen = 0
    for text in texts:
        here = min(max(cut - seen, 0), len(text))
        if here:
            yield "train", text[:here]
        if here < len(text):
            yield "validation", text[here:]
        seen += len(text)
