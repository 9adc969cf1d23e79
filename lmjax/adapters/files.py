"""Adapters on disk, without their model: `adapter.safetensors` and `adapter.json`; PEFT's directories are read too."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.adapters.folding import adapters_of
from lmjax.adapters.targets import Variables, at, leaves, linear_layers, nested, refuse_second
from lmjax.errors import UserError
from lmjax.interop.peft import load_peft
from lmjax.interop.peft_config import CONFIG as PEFT_CONFIG
from lmjax.interop.tensor_files import Tensor, TensorFiles, write_file, write_json
from lmjax.models.layout import STACKED, stack_adapter, unstack_layers
from lmjax.modules.config import DecoderConfig
from lmjax.policy import Policy

TENSORS, ABOUT = "adapter.safetensors", "adapter.json"
FORMAT, VERSION = "lmjax-adapter", 1


def save(directory: str | Path, variables: Variables) -> None:
    """Writes the adapters of these variables, of any kind, and the shapes of the model they belong to.

    Layers lie side by side in the file, whatever the layout. Each file appears under its name only when it is complete,
    and a pair of files that do not belong together is refused by `load`.

    Args:
      directory: made if need be; an adapter that is there already is replaced.
      variables: the model with its adapters.

    Raises:
      UserError: there is no adapter.
    """
    kinds = adapters_of(variables)
    if not kinds:
        raise UserError("these variables have no adapter to save.")
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in sorted(leaves(unstack_layers(kinds)))}
    tensors = [
        Tensor(name, array.dtype.name, array.shape, lambda array=array: array)  # type: ignore[misc]
        for name, array in flat.items()
    ]
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / TENSORS, tensors)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "kinds": sorted(kinds),
        "numbers": sum(array.size for array in flat.values()),
        "checksum": _checksum(directory / TENSORS),
        "base": _base(variables),
    }
    write_json(directory / ABOUT, about)


def load(directory: str | Path, variables: Variables, policy: Policy | None = None) -> Variables:
    """The variables with the adapters of a directory beside them, in the layout of the variables.

    Args:
      directory: what `save`, or PEFT, wrote.
      variables: the model.
      policy: the model's, which only PEFT's directories need.

    Raises:
      UserError: the directory holds no adapter, or one of another model; a file is truncated; the variables have an
        adapter of this kind already; or no policy is given for PEFT's.
    """
    directory = Path(directory)
    if not (directory / ABOUT).is_file() and (directory / PEFT_CONFIG).is_file():
        if policy is None:
            raise UserError(f"{directory} is PEFT's; give lmjax.adapters.load the policy too, which names the layers.")
        if not isinstance(policy.config, DecoderConfig):
            raise UserError(f"{directory} is PEFT's, which has no adapters of {type(policy.config).__name__} models.")
        return load_peft(directory, policy.config, variables)
    about = _about(directory)
    files = TensorFiles(directory / TENSORS)
    if _checksum(directory / TENSORS) != about["checksum"]:
        raise UserError(f"{directory}: {ABOUT} belongs to another {TENSORS}, or that is damaged; fetch both again.")
    refuse_second(variables, *about["kinds"])
    _check_base(directory, about["base"], _base(variables))
    flat: dict[tuple[str, ...], Any] = {}
    for name in sorted(files.names):
        whole = tuple(slice(0, size) for size in files.shape(name))
        flat[tuple(name.split("/"))] = jnp.asarray(files.read(name, whole))
    kinds = nested(flat)
    if count := _stacked(variables):
        kinds = {kind: stack_adapter(kind, tree, count) for kind, tree in kinds.items()}
    return variables | kinds


def _checksum(path: Path, block: int = 2**24) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(block):
            found = zlib.crc32(part, found)
    return found


def _about(directory: Path) -> dict[str, Any]:
    """`adapter.json`, once both files are there."""
    for name in (ABOUT, TENSORS):
        if not (directory / name).is_file():
            raise UserError(
                f"there is no {name} in {directory}; give a directory that lmjax.adapters.save or PEFT wrote."
            )
    try:
        about: dict[str, Any] = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
        complete = about["format"] == FORMAT and {"version", "kinds", "checksum", "base"} <= set(about)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / ABOUT} is truncated or not an adapter's; fetch it again.") from error
    if not complete:
        raise UserError(f"{directory / ABOUT} is not an adapter's; give a directory that lmjax.adapters.save wrote.")
    if about["version"] > VERSION:
        raise UserError(f"{directory / ABOUT} is of a newer lmjax; update lmjax to load it.")
    return about


def _stacked(variables: Variables) -> int:
    """How many layers are stacked; 0 where they lie side by side."""
    trees = (tree[STACKED] for tree in variables.values() if isinstance(tree, dict) and STACKED in tree)
    return next((jax.tree.leaves(tree)[0].shape[0] for tree in trees), 0)


def _base(variables: Variables) -> dict[str, str]:
    """Shapes of a model: its embedding, its linear layers and how many of each there are."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    apart = unstack_layers({name: tree for name, tree in abstract.items() if name != "cache"})
    embedding = at(apart, ("params", "embed", "embedding"))
    written = lambda shape: " x ".join(map(str, shape))
    shapes = {"embed": written(embedding.shape)} if embedding is not None else {}
    alike: dict[str, dict[str, str]] = {}
    for path, shape in linear_layers(apart).items():
        alike.setdefault(re.sub(r"^layer_\d+/", "", path), {})[path] = written(shape)
    for short, paths in alike.items():
        first = next(iter(paths.values()))
        same = all(shape == first for shape in paths.values())
        shapes |= {f"{len(paths)} x {short}": first} if same else paths
    return shapes


def _check_base(directory: Path, saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    if odd := sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)):
        theirs, ours = (shapes.get(odd[0], "no such layers") for shapes in (saved, own))
        raise UserError(
            f"{directory} holds an adapter of another model: {odd[0]} is {theirs} there and {ours} here; "
            "load it onto the model it was trained on."
        )


