"""The linear modules of a model as PEFT sees them, and what of ours lies in each."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.interop.huggingface_config import config_to_huggingface
from lmjax.interop.huggingface_names import rows
from lmjax.models import layout
from lmjax.models.decoder import Decoder, Variables
from lmjax.modules.config import DecoderConfig
from lmjax.modules.quantized import KINDS

ROOT = "base_model.model."  # what PEFT puts before the name of a module
PROMPT = "prompt_embeddings"  # its one tensor of prompts and prefixes
Flat = dict[tuple[str, ...], Any]


class Module(NamedTuple):
    """A linear module of transformers.

    Attributes:
      name: theirs, such as "model.layers.0.self_attn.q_proj".
      parts: the paths of our layers; three for a fused one.
      into: width of the input.
      outs: width of the output of each part.
    """

    name: str
    parts: tuple[str, ...]
    into: int
    outs: tuple[int, ...]


def modules_of(config: DecoderConfig) -> list[Module]:
    """The linear modules that a model has in transformers, in the order of a forward pass."""
    kind = config_to_huggingface(config)["model_type"]
    unrolled = dataclasses.replace(config, layers="unrolled")
    shapes = jax.eval_shape(Decoder(unrolled).init, jax.eval_shape(lambda: jax.random.key(0)))["params"]
    found: dict[str, Module] = {}
    for row in rows(kind, config.num_layers):
        leaf = _at(shapes, row.ours.split("/"))
        if leaf is None or not row.ours.endswith("/kernel"):
            continue
        name, path = row.theirs.removesuffix(".weight"), row.ours.removesuffix("/kernel")
        before = found.get(name, Module(name, (), leaf.shape[0], ()))
        found[name] = before._replace(parts=(*before.parts, path), outs=(*before.outs, leaf.shape[1]))
    return list(found.values())


def split(module: Module, array: Any) -> list[Any]:
    """An array [..., out] by the parts of a module."""
    edges = itertools.accumulate(module.outs, initial=0)
    return [array[..., start:stop] for start, stop in itertools.pairwise(edges)]


def _at(tree: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return tree


def layer_of(tree: Variables, path: str) -> Any:
    """The node at a path such as "layer_1/mlp/up", None if there is none; a stacked layer is taken out."""
    if layout.STACKED not in tree:
        return _at(tree, path.split("/"))
    layer, _, rest = path.partition("/")
    node = _at(tree[layout.STACKED], rest.split("/"))
    index = int(layer.removeprefix("layer_"))
    return None if node is None else jax.tree.map(lambda leaf: leaf[index], node)


def column_norms(variables: Variables, path: str) -> jax.Array:
    """Length of each column of a layer's weight, float32 [out], whatever it is kept in."""
    for kind, make in KINDS.items():
        if (own := layer_of(variables.get(kind, {}), path)) is not None:
            return jnp.linalg.norm(make(**own).dense(jnp.dtype("float32")), axis=1)
    own = layer_of(variables.get("params", {}), path)
    if own is None:
        raise UserError(f"DoRA needs the weight of {path}, which these variables have not; give them with the model.")
    return jnp.linalg.norm(own["kernel"].astype(jnp.float32), axis=0)


def nested(flat: Flat) -> Variables:
    """Leaves by path as nested dicts."""
    tree: Variables = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree
