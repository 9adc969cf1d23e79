"""Files of prompts, and the file of what became of them, which an interrupted run goes on with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lmjax.errors import UserError
from lmjax.tokenizers.base import write_file

Key = tuple[int, int]  # the number of a prompt, and of its sample


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer.

    Attributes:
      where: how errors call it: the file and its line.
      text, messages: the one or the other; the other is None.
      record: the other fields it came with.
    """

    where: str
    text: str | None = None
    messages: Any = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_prompts(path: str, field: str = "prompt", conversations: bool = True) -> list[Prompt]:
    """The prompts of a file. Blank lines are passed over.

    Args:
      path: JSON lines (.jsonl, .ndjson, .json), Parquet (.parquet), or else text with a prompt a line.
      field: of JSON lines and Parquet: which one holds the prompt.
      conversations: whether a record without it may have `messages`.

    Raises:
      UserError: no such file, no prompts in it, or a bad line, by its number.
    """
    file, suffix = Path(path).expanduser(), Path(path).suffix.lower()
    if not file.is_file():
        raise UserError(f"there is no file of prompts {path}; give a text, JSON lines or Parquet file")
    if suffix == ".parquet":
        prompts = [_from_record(row, f"{path} row {i}", field, conversations) for i, row in enumerate(_parquet(file))]
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
        numbered = [(f"{path} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        if suffix in (".jsonl", ".ndjson", ".json"):
            prompts = [_from_record(_parse(line, where), where, field, conversations) for where, line in numbered]
        else:
            prompts = [Prompt(where, line) for where, line in numbered]
    if not prompts:
        raise UserError(f"{path} holds no prompts; give it at least one line")
    return prompts


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); write one object a line") from None


def _parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import lib, parquet
    except ImportError:
        raise UserError("reading Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        return parquet.read_table(file).to_pylist()
    except (lib.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a Parquet file ({str(error).splitlines()[0]}); write it again") from None


def _from_record(record: Any, where: str, field: str, conversations: bool) -> Prompt:
    if not isinstance(record, dict):
        raise UserError(f"{where} is a {type(record).__name__}; write an object, with the prompt in {field!r}")
    text, messages = record.get(field), record.get("messages") if conversations else None
    others = {name: value for name, value in record.items() if name != field}
    if messages is None and text is None:
        names = ", ".join(map(str, record)) or "nothing"
        also = " and no 'messages'" if conversations else ""
        raise UserError(f"{where} has no field {field!r}{also} (it has: {names}); set --prompt-field")
    if messages is None:
        if not isinstance(text, str):
            raise UserError(f"{where}: {field!r} is not text but {type(text).__name__}; give a string")
        return Prompt(where, text, None, others)
    if text is not None:
        raise UserError(f"{where} has {field!r} and 'messages'; leave out one, or pass over these by --template none")
    others.pop("messages")
    return Prompt(where, None, messages, others)


class Results:
    """`generations.jsonl`: a line for each continuation. From `open_results`.

    Attributes:
      path: the file.
      rows: what is in it, by prompt and sample.
      kept: where a file that was there before went, or None.
    """

    def __init__(self, path: Path, rows: dict[Key, dict[str, Any]], kept: Path | None, file: TextIO):
        self.path, self.rows, self.kept, self._file = path, rows, kept, file

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row, with its `index` and `sample`; it is there even if the process is killed next."""
        self._file.write(_line(row))
        self._file.flush()
        self.rows[row["index"], row["sample"]] = row

    def finish(self) -> list[dict[str, Any]]:
        """All rows in order; the file is replaced by one in order, whole or not at all."""
        rows = [self.rows[key] for key in sorted(self.rows)]
        write_file(self.path, "".join(map(_line, rows)))
        return rows


@contextlib.contextmanager
def open_results(folder: Path, settings: dict[str, Any], total: int) -> Iterator[Results]:
    """Goes on with the results in a folder, or begins them.

    `generations.json` beside them says what made them. What is finished and of another run, or not of ours, is kept
    under a number; what is unfinished and of another run is left alone.

    Args:
      folder: where they are.
      settings: JSON values that settle the results.
      total: how many rows there will be.

    Raises:
      UserError: the folder holds unfinished results of another run, or another process writes there.
    """
    from lmjax.training.run_directory import take_lock

    path, said = folder / "generations.jsonl", folder / "generations.json"
    settings = json.loads(json.dumps({"total": total, **settings}))
    with contextlib.ExitStack() as stack:
        try:
            lock = take_lock(folder / "generations.lock")
            if lock is not None:
                stack.enter_context(lock)
            rows, size = _read_rows(path)
            kept = None
            if size and not _same_run(path, said, settings, len(rows)):
                kept, rows, size = _keep(path, said), {}, 0
            if not rows:
                write_file(said, json.dumps(settings, indent=2) + "\n")
            file = stack.enter_context(open(path, "a", encoding="utf-8"))
            file.truncate(size)  # a line that was cut off
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --run-dir") from error
        yield Results(path, rows, kept, file)


def _read_rows(path: Path) -> tuple[dict[Key, dict[str, Any]], int]:
    """The rows of a file and the bytes of its whole lines. No rows where any of these is not of ours."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        parsed = [json.loads(line) for line in lines]
        rows = {(row["index"], row["sample"]): row for row in parsed}
    except (ValueError, TypeError, KeyError):
        rows = {}
    return rows, sum(map(len, lines))


def _same_run(path: Path, said: Path, settings: dict[str, Any], count: int) -> bool:
    """Whether the rows of a file are of the run with these settings."""
    try:
        earlier = json.loads(said.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if count and earlier == settings:
        return True
    if isinstance(earlier, dict) and 0 < count < earlier.get("total", 0):
        name = next(name for name in (settings | earlier) if earlier.get(name) != settings.get(name))
        old, new = json.dumps(earlier.get(name)), json.dumps(settings.get(name))
        words = {"model": "with another model", "prompts": "with other prompts"}
        what = words.get(name, f"with {name} {old}, not {new}")
        raise UserError(
            f"{path} holds {count} of {earlier['total']} generations of another run ({what}); repeat that run to go "
            "on with it, or choose another --run-dir"
        )
    return False


def _keep(path: Path, said: Path) -> Path:
    """Moves a file, and the settings that made it, out of the way."""
    number = 1
    while path.with_stem(f"{path.stem}-{number}").exists():
        number += 1
    if said.exists():
        said.rename(said.with_stem(f"{said.stem}-{number}"))
    return path.rename(path.with_stem(f"{path.stem}-{number}"))


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which came in as an escape
        text = json.dumps(row, default=str)
    return text + "\n"
