"""The token cache: a corpus tokenized once, memory-mapped ever after.

A cache is a directory named by its fingerprint. For each split it holds raw little-endian arrays:
`SPLIT.tokens` (uint16 or uint32 [N]), `SPLIT.ends` (uint64 [D], where each document ends) and `SPLIT.bytes`
(uint64 [D], its UTF-8 length); the held-out text itself in `validation.text`; the tokenizer; and
`metadata.json`. It is written as NAME.partial, shard by shard with a journal, and renamed when it is whole: a
kill at any moment costs one shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer, digest, write_file

FORMAT = 1
SHARD_BYTES = 32 << 20
_SPLITS = ("train", "validation")
_BATCH_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A finished cache.

    Attributes:
      directory: where it lies.
      metadata: what `metadata.json` says: "fingerprint", "dtype", "vocab_size", "splits", "files".
    """

    directory: str
    metadata: dict

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        path = os.path.join(self.directory, name)
        if os.path.getsize(path) == 0:
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(path, dtype, mode="r"))  # a plain view: the memmap subclass is slow to index

    def tokens(self, split: str) -> np.ndarray:
        """uint16 or uint32 [N], read-only."""
        return self._map(f"{split}.tokens", np.dtype(self.metadata["dtype"]))

    def ends(self, split: str) -> np.ndarray:
        """int64 [D]: index in `tokens` behind the last token of each document."""
        return self._map(f"{split}.ends", np.dtype("<u8")).view(np.int64)

    def document_bytes(self, split: str) -> np.ndarray:
        """int64 [D]: UTF-8 bytes of each document's text."""
        return self._map(f"{split}.bytes", np.dtype("<u8")).view(np.int64)

    def validation_text(self) -> bytes:
        """The held-out text, documents joined without anything between."""
        with open(os.path.join(self.directory, "validation.text"), "rb") as file:
            return file.read()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was made with."""
        from lmjax.tokenizers.files import load

        return load(os.path.join(self.directory, "tokenizer"))

    def verify(self) -> None:
        """Reads every byte and compares checksums; `UserError` where they differ."""
        for name, said in self.metadata["files"].items():
            crc = 0
            with open(os.path.join(self.directory, name), "rb") as file:
                while block := file.read(1 << 24):
                    crc = zlib.crc32(block, crc)
            if crc != said["crc32"]:
                raise _broken(self.directory, f"the content of {name} has changed")


def _broken(directory: str, what: str) -> UserError:
    return UserError(f"token cache {directory} is damaged ({what}): delete that directory and run again")


def open_cache(directory: str | os.PathLike) -> TokenCache:
    """Opens a finished cache, sizes checked against the metadata and that against its checksum."""
    directory = os.fspath(directory)
    try:
        with open(os.path.join(directory, "metadata.json"), encoding="utf-8") as file:
            metadata = json.load(file)
        checksum = metadata.pop("checksum")
        if checksum != digest(metadata):
            raise _broken(directory, "metadata.json does not match its checksum")
        files = metadata["files"]
    except FileNotFoundError:
        raise _broken(directory, "metadata.json is missing") from None
    except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError):
        raise _broken(directory, "metadata.json is not readable") from None
    if metadata["format"] != FORMAT:
        raise UserError(
            f"token cache {directory} has format {metadata['format']}, not {FORMAT}: delete it and run again"
        )
    for name, said in files.items():
        path = os.path.join(directory, name)
        size = os.path.getsize(path) if os.path.exists(path) else -1
        if size != said["size"]:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise _broken(directory, f"{name} {found} where {said['size']} were written")
    return TokenCache(directory, metadata)


def build_cache(
    root: str | os.PathLike,
    identity: Any,
    documents: Callable[[], Iterable[tuple[str, str]]],
    tokenizer: Tokenizer,
    *,
    markers: bool = True,
    shard_bytes: int = SHARD_BYTES,
    meter: Callable[[], tuple[int, int | None]] | None = None,
    name: str = "corpus",
    progress: bool = False,
) -> TokenCache:
    """The cache of these documents and this tokenizer: opened if there, continued if begun, else made.

    Args:
      root: directory of caches.
      identity: JSON-able; what the documents depend on.
      documents: opens a pass over (split, text), split being "train" or "validation"; always the same one.
      tokenizer: encodes them.
      markers: put bos (or else eos) before each document and eos behind it, where the tokenizer has them.
      shard_bytes: text between two commits.
      meter: (bytes read, bytes in all or None), for the progress bar.
      name: the corpus, for messages.
      progress: show a progress bar.

    Raises:
      UserError: an empty corpus, an id beyond the vocabulary, a full disk (what was committed is kept).
    """
    root = os.path.expanduser(os.fspath(root))
    fingerprint = digest([FORMAT, identity, tokenizer.fingerprint(), markers])
    final = os.path.join(root, fingerprint)
    try:
        os.makedirs(root, exist_ok=True)
        if os.path.isdir(final):
            return open_cache(final)
        with _lock(os.path.join(root, f"{fingerprint}.lock")):
            if not os.path.isdir(final):  # else another process made it while we waited
                writer = _Writer(final + ".partial", tokenizer, markers, name)
                with _bar(progress, f"tokenizing {name}", meter) as advance:
                    writer.write(documents(), shard_bytes, advance)
                writer.finish(final, fingerprint)
            return open_cache(final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full under {root}: free some space or set data.cache_dir; the finished part is "
                "kept and the next run continues from it"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"cannot write under {root} ({error.strerror}): set data.cache_dir elsewhere") from None
        raise


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """One builder at a time on this machine; the lock dies with its process."""
    try:
        import fcntl
    except ImportError:  # not POSIX: builders must not overlap
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _bar(show: bool, what: str, meter: Callable[[], tuple[int, int | None]] | None) -> Iterator[Callable[[], None]]:
    if not show or meter is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)

        def advance() -> None:
            done, total = meter()
            bar.update(task, completed=done, total=total)

        yield advance


def _append(path: str, block: bytes) -> None:
    with open(path, "ab") as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())


class _Writer:
    """Appends shards to the files of a partial cache; the journal says how much of each file counts."""

    def __init__(self, directory: str, tokenizer: Tokenizer, markers: bool, name: str):
        self.directory, self.tokenizer, self.name = directory, tokenizer, name
        self.dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
        prefix = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
        self.prefix = np.array([prefix] if markers and prefix is not None else [], np.int64)
        self.suffix = np.array([tokenizer.eos] if markers and tokenizer.eos is not None else [], np.int64)
        names = [f"{split}.{part}" for split in _SPLITS for part in ("tokens", "ends", "bytes")] + ["validation.text"]
        self.journal: dict = {
            "documents": 0,
            "tokens": dict.fromkeys(_SPLITS, 0),
            "files": {n: {"size": 0, "crc32": 0} for n in names},
        }
        self._recover()
        self.pending: dict[str, list[bytes]] = {n: [] for n in names}
        self.tokens = dict(self.journal["tokens"])

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _recover(self) -> None:
        """Cuts every file back to its last commit; starts over where a file is shorter than that."""
        try:
            with open(self._path("journal.json"), encoding="utf-8") as file:
                journal = json.load(file)
            whole = all(os.path.getsize(self._path(n)) >= f["size"] for n, f in journal["files"].items())
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            whole = False
        if whole:
            self.journal = journal
        else:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.makedirs(self.directory)
        for name, said in self.journal["files"].items():
            with open(self._path(name), "ab") as file:
                file.truncate(said["size"])

    def write(self, documents: Iterable[tuple[str, str]], shard_bytes: int, advance: Callable[[], None]) -> None:
        seen = held = size = 0
        texts: list[tuple[str, str]] = []
        for split, text in documents:
            seen += 1
            if seen <= self.journal["documents"]:
                advance() if seen % 256 == 0 else None
                continue
            texts.append((split, text))
            held += len(text)
            if held >= _BATCH_CHARACTERS or held >= shard_bytes:
                size += self._encode(texts)
                texts, held = [], 0
                advance()
                if size >= shard_bytes:
                    self._commit(seen)
                    size = 0
        self._encode(texts)
        self._commit(seen)

    def _encode(self, texts: list[tuple[str, str]]) -> int:
        texts = [(split, text) for split, text in texts if text]
        total = 0
        for (split, text), ids in zip(texts, self.tokenizer.encode_batch([t for _, t in texts])):
            raw = text.encode("utf-8", errors="surrogatepass")
            ids = np.concatenate([self.prefix, ids, self.suffix])
            if ids.size and int(ids.max()) >= self.tokenizer.vocab_size:
                raise UserError(
                    f"the tokenizer gave id {int(ids.max())} for {self.name} but its vocabulary has "
                    f"{self.tokenizer.vocab_size} ids: the tokenizer file is inconsistent"
                )
            self.tokens[split] += ids.size
            total += len(raw)
            self.pending[f"{split}.tokens"].append(ids.astype(self.dtype).tobytes())
            self.pending[f"{split}.ends"].append(np.array([self.tokens[split]], "<u8").tobytes())
            self.pending[f"{split}.bytes"].append(np.array([len(raw)], "<u8").tobytes())
            if split == "validation":
                self.pending["validation.text"].append(raw)
        return total

    def _commit(self, seen: int) -> None:
        files = {}
        for name, blocks in self.pending.items():
            block, said = b"".join(blocks), self.journal["files"][name]
            if block:
                _append(self._path(name), block)
            files[name] = {"size": said["size"] + len(block), "crc32": zlib.crc32(block, said["crc32"])}
        journal = {"documents": seen, "tokens": dict(self.tokens), "files": files}
        write_file(self._path("journal.json"), json.dumps(journal))
        self.journal = journal
        self.pending = {n: [] for n in self.pending}

    def finish(self, final: str, fingerprint: str) -> None:
        files = self.journal["files"]
        if not any(self.tokens.values()):
            shutil.rmtree(self.directory, ignore_errors=True)
            raise UserError(f"{self.name} is empty: there is no text to train on")
        splits = {
            s: {
                "tokens": self.tokens[s],
                "documents": files[f"{s}.ends"]["size"] // 8,
                "bytes": int(np.fromfile(self._path(f"{s}.bytes"), "<u8").sum()),
            }
            for s in _SPLITS
        }
        metadata = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "source": self.name,
            "splits": splits,
            "files": files,
            "dtype": self.dtype.str,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.tokenizer.save(self._path("tokenizer"))
        write_file(self._path("metadata.json"), json.dumps({**metadata, "checksum": digest(metadata)}, indent=1))
        os.replace(self.directory, final)
        os.remove(os.path.join(final, "journal.json"))
        folder = os.open(os.path.dirname(final), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
