"""Hugging Face checkpoints to and from our variables, one tensor at a time.

A parameter is read straight into the shards it will live in: the host holds one parameter at
most, and of it only what its own devices need. One that is quantized is read whole, for its scales depend on all of it.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.interop.huggingface_config import config_from_huggingface, config_to_huggingface, read_config_json
from lmjax.interop.huggingface_names import BUFFERS, HEAD, PARTS, Row, rows
from lmjax.interop.tensor_files import FLOATS, Tensor, TensorFiles, write_json, write_tensors
from lmjax.models import layout
from lmjax.models.decoder import Decoder, Variables
from lmjax.models.patterns import Patterns
from lmjax.models.quantization import quantize_kernels, quantize_leaf, quantized_variable_shapes
from lmjax.modules.config import DecoderConfig
from lmjax.modules.quantized import Quantized

Index = tuple[slice, ...]


def load_huggingface(
    path: str | Path,
    *,
    shardings: Any = None,
    dtype: Any = None,
    layers: str = "auto",
    quantize: str | None = None,
    targets: Patterns = "*",
) -> tuple[DecoderConfig, Variables]:
    """A model directory of transformers (`config.json` and safetensors) as a config and variables.

    Args:
      path: the directory.
      shardings: a tree of shardings of the variables' structure, or None for the default device.
      dtype: type of the parameters; None for float32, whatever the file holds.
      layers: the config's `layers`: how the layers are run and laid out.
      quantize: "nf4" or "int8": the linear layers in 4 or 8 bits, each read, quantized and dropped before the next, so
        that the host holds one tensor in full besides the result. See `lmjax.adapters.quantize`.
      targets: patterns of the layers that are quantized.

    Returns:
      The `DecoderConfig` and `{"params": ...}`, with a collection of the name of `quantize` beside it.

    Raises:
      UserError: no or unsupported config.json; a tensor that is missing, unexpected, or of another shape; a
        truncated file; layers that cannot be quantized so. All before any tensor is read.
    """
    path = Path(path)
    raw = read_config_json(path)
    config = dataclasses.replace(config_from_huggingface(raw), layers=layers)  # type: ignore[arg-type]
    shapes = _shapes(config)
    table = {row.ours: row for row in rows(raw["model_type"], config.num_layers)}
    files = TensorFiles(path)
    table = _without_prefix(table, files)
    _check(path, files, table, layout.unstack_layers(shapes), config)
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    result = shapes if quantize is None else quantized_variable_shapes(shapes, quantize, targets)
    places = _by_path(result) if shardings is None else _by_path(shardings)
    if set(places) != set(_by_path(result)):
        odd = min(set(places) ^ set(_by_path(result)))
        raise UserError(
            f"shardings and variables differ in structure at {odd!r}; make them from the same config."
        )

    def put(name: str, shape: tuple[int, ...], read: Callable[[Index], np.ndarray]) -> jax.Array:
        if shardings is None:
            return jax.device_put(read(tuple(slice(None) for _ in shape)))
        return jax.make_array_from_callback(shape, places[name], _remember(read))

    def load(key_path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = _name(key_path)
        return put(name, leaf.shape, _reader(files, table, name, leaf.shape, dtype))

    def load_quantized(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> Quantized:
        name, layer = "/".join(path), "/".join(path[:-1])
        assert quantize is not None
        whole = quantize_leaf(leaf.shape, quantize, lambda number: _kernel(files, table, name, leaf.shape, number))
        own = {part: put(f"{layer}/{part}", array.shape, array.__getitem__) for part, array in whole._asdict().items()}
        return whole._replace(**own)

    if quantize is None:
        return config, jax.tree_util.tree_map_with_path(load, shapes)
    found = quantize_kernels(shapes["params"], quantize, targets, load_quantized)
    return config, found | jax.tree_util.tree_map_with_path(load, {"params": found["params"]})


def save_huggingface(
    path: str | Path,
    config: DecoderConfig,
    variables: Variables,
    *,
    tokenizer_files: Iterable[str | Path] = (),
    dtype: Any = None,
    extra_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Args:
      path: the directory; made if need be.
      config: the decoder's; a family of transformers must be able to express it.
      variables: `{"params": ...}` in either layout, on any devices of this process.
      tokenizer_files: files to copy beside the weights (`tokenizer.json`, `tokenizer_config.json`, ...).
      dtype: type to write; None for each parameter's own.
      extra_config: entries for config.json besides the model's, such as `{"bos_token_id": 1}`.
      max_shard_bytes: largest file of weights, unless one tensor is larger.

    Raises:
      UserError: no family expresses the config, a collection other than "params" holds something, a parameter
        is missing or has another shape, or a tokenizer file is not there. All before anything is written.
    """
    path = Path(path)
    # Special tokens are the tokenizer's; without these nulls transformers would fill in the family's ids.
    contents = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | config_to_huggingface(
        config
    )
    if others := [name for name, tree in variables.items() if name != "params" and jax.tree.leaves(tree)]:
        raise UserError(
            f"transformers has no place for the collection {others[0]!r}; merge it into params or drop it."
        )
    if missing := [file for file in map(Path, tokenizer_files) if not file.is_file()]:
        raise UserError(f"the tokenizer file {missing[0]} is not there; give the path of an existing one.")
    leaves = _by_path({"params": variables["params"]})
    _check_leaves(leaves, config)
    grouped: dict[str, list[Row]] = {}
    for row in rows(contents["model_type"], config.num_layers):
        if _stored(leaves, row.ours) is not None:
            grouped.setdefault(row.theirs, []).append(row)
    tensors = [_tensor(leaves, name, parts, dtype) for name, parts in grouped.items()]
    contents["dtype"] = tensors[0].dtype
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, max_shard_bytes)
    for file in map(Path, tokenizer_files):
        if not (path / file.name).exists() or not file.samefile(path / file.name):
            shutil.copyfile(file, path / file.name)
    write_json(path / "config.json", contents | dict(extra_config or {}))


# Paths --------------------------------------------------------------------------------------------


@functools.cache
def _shapes(config: DecoderConfig) -> Any:
    """The variables' shapes, without computing any."""
    return jax.eval_shape(Decoder(config).init, jax.eval_shape(lambda: jax.random.key(0)))


def _name(key_path: Any) -> str:
    """The path of a leaf under its collection: "layer_0/mlp/up/kernel"."""
    return "/".join(entry.key for entry in key_path[1:])


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unrolled(name: str, layer: int) -> str:
    """The path of one layer's share of a stacked leaf."""
    return layout.layer_name(layer) + name.removeprefix(layout.STACKED)


# Reading ------------------------------------------------------------------------------------------


def _without_prefix(table: dict[str, Row], files: TensorFiles) -> dict[str, Row]:
    """Names as in the file: checkpoints of the bare model (the first GPT-2's) lack the leading part."""
    embedding = table["embed/embedding"].theirs
    prefix, _, short = embedding.partition(".")
    if embedding in files.names or short not in files.names:
        return table
    return {
        ours: dataclasses.replace(row, theirs=row.theirs.removeprefix(f"{prefix}."))
        for ours, row in table.items()
    }


def _check(path: Path, files: TensorFiles, table: dict[str, Row], shapes: Any, config: DecoderConfig) -> None:
    """Every tensor is there, in a type and shape we can read, and no other."""
    leaves = _by_path(shapes)
    expected = {table[name].theirs: _their_shape(table[name], leaf.shape) for name, leaf in leaves.items()}
    if missing := sorted(set(expected) - files.names):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: the tensor {missing[0]}{more} is missing; it belongs to another config.json."
        )
    unexpected = sorted(name for name in files.names - set(expected) if not name.endswith(BUFFERS))
    if unexpected == [HEAD] and config.tied_embeddings:
        _check_tied(path, files, table["embed/embedding"].theirs)
    elif unexpected:
        raise UserError(
            f"{path}: the tensor {unexpected[0]} has no place in this config.json's model; mend the config."
        )
    for name, shape in expected.items():
        if files.shape(name) != shape:
            raise UserError(
                f"{path}: the tensor {name} has shape {files.shape(name)}, but config.json asks for {shape}; "
                "mend one of them."
            )
        if files.dtype(name) not in FLOATS.values():
            raise UserError(
                f"{path}: the tensor {name} is stored as {files.dtype(name)}; save it in {', '.join(FLOATS)}."
            )


def _their_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    if row.part is not None:
        return (*shape[:-1], PARTS * shape[-1])
    return shape[::-1] if row.transpose else shape


def _check_tied(path: Path, files: TensorFiles, embedding: str, chunk: int = 4096) -> None:
    """A head saved beside the embedding it is tied to must be the same."""
    V, D = files.shape(embedding)
    same = files.shape(HEAD) == (V, D)
    for start in range(0, V if same else 0, chunk):
        block = (slice(start, min(start + chunk, V)), slice(0, D))
        same = same and np.array_equal(files.read(HEAD, block), files.read(embedding, block))
    if not same:
        raise UserError(
            f"{path}: {HEAD} differs from {embedding}, but tie_word_embeddings is true; set it to false."
        )


def _block(files: TensorFiles, row: Row, shape: tuple[int, ...], index: Index) -> np.ndarray:
    """A block of one of our leaves, in the type and order of the file."""
    block = [slice(*part.indices(size)) for part, size in zip(index, shape)]
    if row.part is not None:
        offset = row.part * shape[-1]
        block[-1] = slice(block[-1].start + offset, block[-1].stop + offset)
    array = files.read(row.theirs, tuple(block[::-1] if row.transpose else block))
    return array.T if row.transpose else array


def _reader(
    files: TensorFiles, table: dict[str, Row], name: str, shape: tuple[int, ...], dtype: Any
) -> Callable[[Index], np.ndarray]:
    """Reads any block of one of our leaves."""

    def read(index: Index) -> np.ndarray:
        if not name.startswith(f"{layout.STACKED}/"):
            return np.ascontiguousarray(_block(files, table[name], shape, index), dtype)
        chosen = range(*index[0].indices(shape[0]))
        blocks = [len(range(*part.indices(size))) for part, size in zip(index[1:], shape[1:])]
        stacked = np.empty((len(chosen), *blocks), dtype)
        for place, layer in enumerate(chosen):
            stacked[place] = _block(files, table[_unrolled(name, layer)], shape[1:], index[1:])
        return stacked

    return read


def _kernel(
    files: TensorFiles, table: dict[str, Row], name: str, shape: tuple[int, ...], layer: int | None
) -> np.ndarray:
    """One kernel [in, out], as it lies in the file."""
    row = table[name if layer is None else _unrolled(name, layer)]
    return _block(files, row, shape[-2:], (slice(None), slice(None)))


def _remember(read: Callable[[Index], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Devices that hold the same block get the same array."""
    blocks: dict[tuple[Any, ...], np.ndarray] = {}

    def block(index: Index) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in blocks:
            blocks[key] = read(index)
        return blocks[key]

    return block


# Writing ------------------------------------------------------------------------------------------


def _check_leaves(leaves: dict[str, Any], config: DecoderConfig) -> None:
    stacked = any(name.startswith(f"{layout.STACKED}/") for name in leaves)
    expected = _by_path(_shapes(dataclasses.replace(config, layers="scanned" if stacked else "unrolled")))
    if odd := sorted(set(expected) ^ set(leaves)):
        what = "is missing" if odd[0] in expected else "has no place in the model"
        raise UserError(f"the parameter {odd[0]} {what}; give the config that the variables were made with.")
    for name, leaf in expected.items():
        if leaves[name].shape != leaf.shape:
            raise UserError(
                f"the parameter {name} has shape {leaves[name].shape}, but the config asks for {leaf.shape}."
            )


def _stored(leaves: dict[str, Any], ours: str) -> tuple[Any, int | None] | None:
    """The leaf that holds a parameter, and the layer to take if it is stacked; None if there is none."""
    if ours in leaves:
        return leaves[ours], None
    layer, _, rest = ours.partition("/")
    leaf = leaves.get(f"{layout.STACKED}/{rest}")
    return None if leaf is None else (leaf, int(layer.removeprefix("layer_")))


def _tensor(leaves: dict[str, Any], name: str, parts: list[Row], dtype: Any) -> Tensor:
    found = [_stored(leaves, row.ours) for row in parts]
    leaf, layer = found[0]  # type: ignore[misc]
    shape = _their_shape(parts[0], leaf.shape if layer is None else leaf.shape[1:])
    wanted = jnp.dtype(leaf.dtype if dtype is None else dtype)

    def make() -> np.ndarray:
        arrays = [np.asarray(leaf if layer is None else leaf[layer]) for leaf, layer in found]  # type: ignore[misc]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
        return (array.T if parts[0].transpose else array).astype(wanted, copy=False)

    return Tensor(name, wanted.name, shape, make)
