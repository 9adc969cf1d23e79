"""Where documents come from: files, URLs, Hugging Face datasets, the standard library's source text."""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from lmjax.data.config import SourceConfig
from lmjax.errors import UserError

_EXTENSIONS = {
    "text": (".txt", ".md", ".text", ".rst"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "records": (".jsonl", ".ndjson", ".json", ".parquet"),
}
_SAMPLE = 1 << 16  # bytes at the beginning and at the end of a file that go into its identity,
_SAMPLED_FILES = 1000  # where there are no more files than this
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass
class Source:
    """Documents in a fixed order.

    Attributes:
      name: for messages.
      identity: JSON-able; changes whenever the documents may have changed.
      size: bytes of the files, for a progress bar; None where unknown.
      read: opens a fresh pass over the documents.
      skipped: undecodable files left out by the last pass.
    """

    name: str
    identity: Any
    size: int | None
    read: Callable[[], Iterator[str]]
    skipped: int = 0
    _done: int = 0
    _raw: Any = None

    def position(self) -> int:
        """File bytes the last pass has gone through, for a progress bar."""
        try:
            return self._done + (self._raw.tell() if self._raw is not None else 0)
        except ValueError:  # closed: the file has ended and is counted in a moment
            return self._done


def open_source(config: SourceConfig) -> Source:
    """The source a config describes. Files are looked up here, and read by `read()`.

    Raises:
      UserError: nothing at the path, a missing package, an undecodable or malformed file.
    """
    kind = config.resolved_kind()
    if kind == "huggingface":
        return _huggingface(config)
    if kind == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        files, name = _stdlib_files(root), "the standard library"
    else:
        root, files, name = *find_files(config.path, kind), config.path
    source = Source(name, None, None, lambda: iter(()))
    explicit = len(files) == 1
    sampled = len(files) <= _SAMPLED_FILES
    source.identity = [kind, config.text_field, config.separator, [_identity(f, root, sampled) for f in files]]
    sizes = [_size(f) for f in files]
    source.size = sum(s for s in sizes if s is not None) if all(s is not None for s in sizes) else None

    def read() -> Iterator[str]:
        source.skipped = source._done = 0
        for path, size in zip(files, sizes):
            try:
                with open_raw(path) as source._raw:
                    yield from _documents(path, source._raw, kind, config)
            except UnicodeDecodeError as error:
                if explicit:
                    raise UserError(
                        f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8 first"
                    ) from None
                source.skipped += 1
            source._done += size or 0

    source.read = read
    return source


def _stdlib_files(root: str) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(d for d in folders if d not in _LEFT_OUT)
        found += [os.path.join(folder, n) for n in names if n.endswith(".py")]
    if not found:
        raise UserError(f"this Python carries no standard library source at {root}: set data.path to a text file")
    return sorted(found, key=lambda p: os.path.relpath(p, root).replace(os.sep, "/"))


def _is_url(path: str) -> bool:
    return "://" in path


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError:
        raise UserError("reading a URL needs the package fsspec: pip install fsspec") from None
    return fsspec


def find_files(path: str, kind: str) -> tuple[str, list[str]]:
    """The root and the sorted files at a path, glob, directory or URL."""
    if _is_url(path):
        if not any(c in path for c in "*?["):
            return path, [path]
        system, inner = _fsspec().core.url_to_fs(path)
        found = sorted(system.unstrip_protocol(p) for p in system.glob(inner))
        if not found:
            raise UserError(f"data path {path} matches nothing: check the address")
        return path, found
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        files = [
            os.path.join(d, n)
            for d, _, names in os.walk(path)
            for n in names
            if n.lower().removesuffix(".gz").endswith(_EXTENSIONS[kind])
        ]
        if not files:
            raise UserError(f"directory {path} holds no {'/'.join(_EXTENSIONS[kind])} file: give a file or a glob")
        return path, sorted(files)
    if os.path.isfile(path):
        return os.path.dirname(path), [path]
    files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not files:
        raise UserError(f"data path {path} does not exist: give a file, a directory, a glob or a URL")
    return os.path.dirname(path.split("*")[0]), files


def _size(path: str) -> int | None:
    return None if _is_url(path) else os.path.getsize(path)


def _identity(path: str, root: str, sampled: bool) -> list:
    if _is_url(path):
        system, inner = _fsspec().core.url_to_fs(path)
        try:
            info = system.info(inner)
        except Exception as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}): check the address and the network"
            ) from None
        return [
            path,
            *(str(info.get(k)) for k in ("size", "ETag", "etag", "mtime", "LastModified", "updated")),
        ]
    status = os.stat(path)
    ends = hashlib.blake2b(digest_size=8)
    if sampled:  # a clock tick may be too coarse to tell two files of one name and size apart
        with open(path, "rb") as file:
            ends.update(file.read(_SAMPLE))
            file.seek(max(file.tell(), status.st_size - _SAMPLE))
            ends.update(file.read(_SAMPLE))
    name = os.path.relpath(path, root) if root else path
    return [name.replace(os.sep, "/"), status.st_size, status.st_mtime_ns, ends.hexdigest()]


def open_raw(path: str) -> BinaryIO:
    try:
        return _fsspec().open(path, "rb").open() if _is_url(path) else open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror or error}): check the path") from None


def _documents(path: str, raw: BinaryIO, kind: str, config: SourceConfig) -> Iterator[str]:
    if kind == "parquet":
        yield from _parquet(path, raw, config.text_field)
        return
    file: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
    try:
        if kind == "jsonl":
            yield from _json_lines(path, file, config.text_field)
        elif config.separator is None:
            yield file.read().decode("utf-8-sig")
        else:
            yield from _separated(file, config.separator)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): fetch it again") from None


def _separated(file: BinaryIO, separator: str) -> Iterator[str]:
    """Documents between separators, without holding more than one and a chunk."""
    mark, held = separator.encode(), b""
    while chunk := file.read(1 << 20):
        *whole, held = (held + chunk).split(mark)
        for document in whole:
            yield document.decode("utf-8").strip("\r\n")
    yield held.decode("utf-8").strip("\r\n")


def _json_lines(path: str, file: BinaryIO, field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg}): mend or remove the line") from None
        yield _text(record, field, f"{path} line {number}")


def _text(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict) or field not in record:
        names = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where} has no field {field!r} (it has: {names}): set data.text_field")
    if not isinstance(record[field], str):
        raise UserError(f"{where}: field {field!r} is not text but {type(record[field]).__name__}")
    return record[field]


def _parquet(path: str, raw: BinaryIO, field: str) -> Iterator[str]:
    try:
        from pyarrow import lib, parquet
    except ImportError:
        raise UserError("reading Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(raw)
    except (lib.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a Parquet file ({str(error).splitlines()[0]})") from None
    names = file.schema_arrow.names
    if field not in names:
        raise UserError(f"{path} has no column {field!r} (it has: {', '.join(names)}): set data.text_field")
    for batch in file.iter_batches(columns=[field], batch_size=1024):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
                raise UserError(f"{path}: column {field!r} holds {type(text).__name__}, not text")
            yield text


def _huggingface(config: SourceConfig) -> Source:
    try:
        import datasets
    except ImportError:
        raise UserError("Hugging Face datasets need the package datasets: pip install datasets") from None
    name, _, subset = config.path.partition(":")
    try:
        if os.path.isdir(name) and os.path.exists(os.path.join(name, "dataset_dict.json")):
            table = datasets.load_from_disk(name)[config.subset]
        elif os.path.isdir(name) and os.path.exists(os.path.join(name, "state.json")):
            table = datasets.load_from_disk(name)
        else:
            table = datasets.load_dataset(name, subset or None, split=config.subset)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"Hugging Face dataset {config.path!r} cannot be loaded ({reason})") from None
    if config.text_field not in table.column_names:
        raise UserError(
            f"{config.path} has no column {config.text_field!r} (it has: {', '.join(table.column_names)}): "
            "set data.text_field"
        )

    def read() -> Iterator[str]:
        for record in table:
            yield _text(record, config.text_field, config.path)

    identity = ["huggingface", config.path, config.subset, config.text_field, len(table), table._fingerprint]
    return Source(config.path, identity, None, read)
