"""Safetensors files as one lazy table of tensors: slices are read, and tensors written, one at a time."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TYPES = FLOATS | {"bool": "BOOL", "int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}


class TensorFiles:
    """The tensors of a checkpoint directory or of one file, by name. Opening it reads headers only.

    Raises:
      UserError: there are no safetensors, a file that the index names is missing, or a file is truncated.
    """

    def __init__(self, path: str | Path):
        from safetensors import SafetensorError, safe_open

        self._slices: dict[str, Any] = {}
        self._handles = []
        for file in _files(Path(path)):
            try:
                handle = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is truncated or not a safetensors file ({error}); fetch it again."
                ) from error
            self._handles.append(handle)
            self._slices |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118

    @property
    def names(self) -> set[str]:
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """The type as the file names it: "F32", "BF16", ..."""
        return self._slices[name].get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A block of a tensor; nothing else is read."""
        return self._slices[name][index]


def _files(directory: Path) -> list[Path]:
    """As transformers looks for them: the single file, else those of the index, else whatever is there."""
    if directory.is_file():
        return [directory]
    if (single := directory / SINGLE).is_file():
        return [single]
    if (index := directory / INDEX).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not a safetensors index; fetch it again.") from error
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise UserError(f"{index} names {missing[0]}, which is not there; fetch it again.")
        return [directory / name for name in names]
    if found := sorted(directory.glob("*.safetensors")):
        return found
    raise UserError(
        f"there is no safetensors file in {directory}; save the model with safe_serialization=True."
    )


class Tensor(NamedTuple):
    """A tensor to be written: `make` is called when its turn comes, and its result is dropped after."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _BYTES[TYPES[self.dtype]]


def write_tensors(directory: Path, tensors: Iterable[Tensor], max_shard_bytes: int) -> None:
    """Writes tensors one at a time, to one file or to numbered files and their index.

    Each file appears under its name only when it is complete; files of an earlier export are removed last.
    """
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = (
        [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    for name, shard in zip(names, shards):
        write_file(directory / name, shard)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(t.size for shard in shards for t in shard)},
            "weight_map": {t.name: name for name, shard in zip(names, shards) for t in shard},
        }
        write_json(directory / INDEX, index)
        names.append(INDEX)
    for old in [directory / SINGLE, directory / INDEX, *directory.glob("model-*-of-*.safetensors")]:
        if old.name not in names:
            old.unlink(missing_ok=True)


def write_file(path: Path, tensors: Iterable[Tensor]) -> None:
    """Writes one file, which appears under its name only when it is complete.

    The format: header length (8 bytes), JSON header padded to a multiple of 8, then the data.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"}
    }  # the layout torch's loaders expect to be named
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            array = np.asarray(tensor.make(), order="C")
            assert array.shape == tensor.shape and array.dtype.name == tensor.dtype, tensor.name
            file.write(array.view(np.uint8).data if array.ndim else array.tobytes())
    os.replace(partial, path)


def write_json(path: Path, contents: Any) -> None:
    """Writes JSON, which appears under its name only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
