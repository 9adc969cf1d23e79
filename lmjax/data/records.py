"""Files of records: JSON lines, JSON arrays and Parquet."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmjax.data.sources import find_files, open_raw
from lmjax.errors import UserError


class Record(NamedTuple):
    """A record and how errors call it."""

    where: str
    fields: dict[str, Any]


def read_records(path: str) -> Iterator[Record]:
    """The records at a path, file by file in the order of their names.

    Args:
      path: a file, directory, glob or URL. A file is Parquet (.parquet), or JSON that is an array of objects, or else
        holds an object a line; JSON may be gzipped.

    Raises:
      UserError: nothing there, a malformed file or line, or something that is no object.
    """
    if not path:
        raise UserError("no conversations are named: set data.path to a JSON or Parquet file")
    for file in find_files(path, "records")[1]:
        with open_raw(file) as raw:
            found = _parquet(file, raw) if file.lower().endswith(".parquet") else _json(file, raw)
            for where, fields in found:
                if not isinstance(fields, dict):
                    raise UserError(f"{where} is a {type(fields).__name__}: write an object with named fields")
                yield Record(where, fields)


def _json(path: str, raw: Any) -> Iterator[tuple[str, Any]]:
    unpacked: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
    try:
        text = io.TextIOWrapper(unpacked, encoding="utf-8-sig")
        first = ""
        while not first.strip() and (line := text.readline()):
            first += line
        if first.lstrip().startswith("["):
            for number, fields in enumerate(json.loads(first + text.read())):
                yield f"{path} record {number}", fields
            return
        blank = first.count("\n") - first.endswith("\n")
        for number, line in enumerate([first.lstrip("\n"), *text] if first else [], 1 + blank):
            if line.strip():
                try:
                    fields = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path} line {number} is not JSON ({error.msg}): mend or remove it") from None
                yield f"{path} line {number}", fields
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON (line {error.lineno}: {error.msg}): write it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8 first") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): fetch it again") from None


def _parquet(path: str, raw: Any) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import lib, parquet
    except ImportError:
        raise UserError("reading Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(raw)
    except (lib.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a Parquet file ({str(error).splitlines()[0]}): write it again") from None
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for fields in batch.to_pylist():
            yield f"{path} row {number}", fields
            number += 1
