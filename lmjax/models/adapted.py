"""Adapters of a whole model: those worked out before the layers read them, and how the leaves of all lie on a mesh.

`delta` is added to "params". `prompt` (embeddings of virtual tokens) and `prefix_network` (a small network) become a
`prefix`, keys and values of every layer. What single layers read is in `lmjax.modules.adapted`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.models import layout
from lmjax.modules.adapted import CONSTANT

Variables = dict[str, Any]


WORKED_OUT = frozenset({"delta", "prefix_network", "prompt"})  # what `resolve` has to do with


def resolve(model: Any, variables: Variables) -> Variables:
    """The variables as the layers read them. Nothing is copied that need not be."""
    variables = add_delta(variables)
    for kind, make in (("prefix_network", _network_prefix), ("prompt", _prompt_prefix)):
        if kind in variables:
            rest = {name: tree for name, tree in variables.items() if name not in (kind, "cache", "prefix")}
            kept = {"cache": variables["cache"]} if "cache" in variables else {}
            variables = rest | kept | {"prefix": make(model, rest, variables[kind])}
    return variables


def add_delta(variables: Variables) -> Variables:
    """Parameters with the changes of a "delta" collection, which holds some of their leaves."""
    if "delta" not in variables:
        return variables
    rest = {name: tree for name, tree in variables.items() if name != "delta"}
    return rest | {"params": _add(variables["params"], variables["delta"])}


def _add(params: Any, delta: Any) -> Any:
    if not isinstance(params, dict):
        return params + delta.astype(params.dtype)
    return {name: _add(tree, delta[name]) if name in delta else tree for name, tree in params.items()}


def _prompt_prefix(model: Any, rest: Variables, prompt: Variables) -> Variables:
    """Prompt tuning (arXiv:2104.08691). The virtual tokens see each other only, so that one run of them serves all."""
    return _with_constant(model.prefix_of(rest, prompt["embedding"]), prompt)


def _network_prefix(model: Any, rest: Variables, network: Variables) -> Variables:
    """Keys and values as `tanh(table W + b) W' + b'`, by which prefixes train more steadily (arXiv:2101.00190, 4.3)."""
    config = model.config
    hidden = jnp.tanh(network["table"] @ network["hidden"]["kernel"] + network["hidden"]["bias"])
    flat = hidden @ network["output"]["kernel"] + network["output"]["bias"]
    both = flat.reshape(-1, config.num_layers, 2, config.kv_heads, config.head_width).transpose(1, 2, 3, 0, 4)
    layers = {
        layout.layer_name(index): {"attention": {"keys": both[index, 0], "values": both[index, 1]}}
        for index in range(config.num_layers)
    }
    return _with_constant(layout.stack_layers(layers) if config.scanned else layers, network)


def _with_constant(prefix: Variables, source: Variables) -> Variables:
    """A prefix that rows see as far as its source says."""
    if CONSTANT not in source:
        return prefix

    def put(name: str, layer: Variables) -> Variables:
        constant = source[CONSTANT]
        if name == layout.STACKED:
            count = layer["attention"]["keys"].shape[0]
            constant = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), constant)
        return {"attention": layer["attention"] | {CONSTANT: constant}}

    return {name: put(name, layer) for name, layer in prefix.items()}


def prefix_length(variables: Variables) -> tuple[int, Any]:
    """P, and the position of the first token behind the prefix: P, or int32 [B, 1] where prefixes differ; 0 without.

    There may be fewer prefixes than rows, each of as many rows that follow each other.
    """
    prefix = variables.get("prefix")
    if not prefix:
        return 0, 0
    name, layer = next(iter(prefix.items()))
    length = layer["attention"]["keys"].shape[-2]
    visible = layer["attention"].get(CONSTANT, {}).get("visible")
    if visible is None:
        return length, length
    visible = visible[0] if name == layout.STACKED else visible
    return length, jnp.sum(visible, axis=1, keepdims=True, dtype=jnp.int32)


# What has the rows of a batch in front where each has its own -> its dimensions then.
_OF_ROWS = {"rows": 2, "input": 2, "output": 2, "keys": 4, "embedding": 3}


def chosen_rows(variables: Variables) -> int | None:
    """For how many rows adapters were chosen one by one (`lmjax.adapters.choose`); None if they serve every row."""
    kinds = {kind: variables[kind] for kind in ("lora", "dora", "ia3", "prefix", "prompt") if kind in variables}
    for path, leaf in jax.tree_util.tree_leaves_with_path(kinds):
        names = [entry.key for entry in path]
        dimensions = _OF_ROWS.get(names[-1])
        if dimensions is not None and leaf.ndim - (layout.STACKED in names) == dimensions:
            return int(leaf.shape[-dimensions])
    return None


def has_dropout(variables: Variables) -> bool:
    """Whether an adapter of the layers drops some of its input while it trains."""
    paths = jax.tree_util.tree_leaves_with_path({k: variables[k] for k in ("lora", "dora") if k in variables})
    return any(path[-1].key == "dropout" for path, _ in paths)


Axes = tuple[str | None, ...]
# The path of a leaf without its collection and layer -> logical axes, from those of the kernel it belongs to.
_OF_KERNEL: tuple[tuple[str, Callable[[Axes], Axes]], ...] = (
    (r"(.+)/a", lambda kernel: (kernel[0], None)),
    (r"(.+)/b", lambda kernel: (None, kernel[1])),
    (r"(.+)/(magnitude|output|constant/norm)", lambda kernel: (kernel[1],)),
    (r"(.+)/input", lambda kernel: (kernel[0],)),
    (r"(.+)/codes", lambda kernel: (kernel[1], kernel[0])),
    (r"(.+)/scales", lambda kernel: (kernel[1], None)),  # a byte for 64 inputs: whole blocks need not divide
)
_OF_ITSELF: tuple[tuple[str, Axes], ...] = (
    (r"attention/(keys|values)", ("kv_heads", None, None)),
    (r"(attention|mlp)/[a-z]+_[a-z]+/down/kernel", ("embed", None)),
    (r"(attention|mlp)/[a-z]+_[a-z]+/up/kernel", (None, "embed")),
)
_WHOLE = (
    *("lora", "dora", "ia3", "bottleneck", "prefix", "prompt", "prefix_network"),
    *("nf4", "int8", "value", "projection"),
)


def logical_axes(collection: str, path: str, ndim: int, table: Sequence[tuple[str, Axes]]) -> Axes | None:
    """The logical axes of an adapter's leaf, None if it is not one.

    Args:
      collection: the collection.
      path: within it, without the layer.
      ndim: axes besides that of stacked layers.
      table: the model's own, which names those of kernels.
    """
    if collection not in _WHOLE:
        return None
    for pattern, axes in _OF_ITSELF:
        if re.fullmatch(pattern, path) and len(axes) == ndim:
            return axes
    for pattern, of_kernel in _OF_KERNEL:
        if match := re.fullmatch(pattern, path):
            kernels = [axes for known, axes in table if re.fullmatch(known, f"{match[1]}/kernel")]
            if kernels and len(of_kernel(kernels[0])) >= ndim:
                return of_kernel(kernels[0])[:ndim]
    return (None,) * ndim  # small, or of each row
