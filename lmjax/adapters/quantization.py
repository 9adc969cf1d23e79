"""A base in 4 or 8 bits, over which adapters train (QLoRA, Dettmers et al., arXiv:2305.14314)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.adapters.targets import Patterns, Variables, leaves, nested
from lmjax.errors import UserError
from lmjax.models import layout
from lmjax.models.quantization import quantize_kernels, quantize_leaf
from lmjax.modules.quantized import KINDS, Quantized
from lmjax.modules.quantizers import weights_in

BASE = ("params", *KINDS)


def quantize(variables: Variables, kind: str = "nf4", targets: Patterns = "*") -> Variables:
    """The variables with the kernels of linear layers in 4 or 8 bits; biases, norms and embeddings stay as they are.

    One weight after the other is brought to the host and quantized there; besides the result, no copy is made of more
    than one of them. The result lies on the default device. `lmjax.interop.load_huggingface(..., quantize="nf4")` never
    holds the model in full precision at all.

    Args:
      variables: layers side by side or stacked.
      kind: "nf4", 4.13 bits a weight: blocks of 64 of the [out, in] weight with scales in 8 bits (double quantization),
        the bits of bitsandbytes. Or "int8": the largest magnitude of each output over 127.
      targets: patterns of the layers' paths, such as "mlp/*"; layers may be of one kind, the other, or neither.

    Returns:
      Variables with a collection "nf4" or "int8" beside "params", for the layers as for `adapters.lora`.

    Raises:
      UserError: an unknown kind; a pattern that matches no layer with a kernel, or some of stacked layers only; for
        nf4, a layer whose input is no multiple of 64; a "delta" adapter of a kernel.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.llama(vocab_size=32, num_layers=1, embed_dim=64, num_heads=2, mlp_dim=128))
    >>> variables = quantize(policy.init(jax.random.key(0)), "nf4")
    >>> jax.tree.map(jnp.shape, variables["nf4"]["layer_0"]["mlp"]["down"])
    {'codes': (64, 64), 'offset': (), 'scale_scales': (1,), 'scales': (64, 2)}
    """

    def make(path: tuple[str, ...], leaf: Any) -> Quantized:
        if path in changed:
            raise UserError(
                f"a 'delta' adapter changes the kernel of {'/'.join(path[:-1])}; fold it in with lmjax.adapters.merge "
                "before the kernel is quantized."
            )
        own = quantize_leaf(leaf.shape, kind, lambda layer: np.asarray(leaf if layer is None else leaf[layer]))
        return jax.tree.map(jnp.asarray, own)

    changed = {path for path, _ in leaves(variables.get("delta", {}))}
    found = quantize_kernels(variables["params"], kind, targets, make)
    return variables | found | {kind: _union(variables.get(kind, {}), found[kind])}


def dequantize(variables: Variables) -> Variables:
    """The variables with kernels in float32 in place of their quantized weights, as the layers multiply with them."""
    kernels = {}
    for kind, make in KINDS.items():
        for path, own in _layers(variables.get(kind, {})):
            dense = lambda own, make=make: make(**own).dense(jnp.dtype("float32")).T
            dense = jax.vmap(dense) if path[0] == layout.STACKED else dense
            kernels[*path, "kernel"] = dense(own)
    rest = {name: tree for name, tree in variables.items() if name not in KINDS}
    return rest | {"params": _union(variables["params"], nested(kernels))}


def kind_of(variables: Variables) -> str:
    """What the linear layers are kept in: "float", "nf4", "int8", or "mixed" where they differ.

    >>> kind_of({"params": {"layer_0": {"mlp": {"up": {"kernel": 0.0}}}}})
    'float'
    """
    kinds = {kind for kind in KINDS if variables.get(kind)}
    if any(path[-1] == "kernel" for path, _ in leaves(variables.get("params", {}))):
        kinds.add("float")
    return kinds.pop() if len(kinds) == 1 else "mixed"


def bits_per_parameter(variables: Variables) -> float:
    """Bits of memory for each weight of the base, scales and their scales included; adapters do not count.

    Measured on the arrays: of the linear layers alone it is `bits_per_parameter({"nf4": variables["nf4"]})`.

    >>> variables = {"params": {"up": {"kernel": np.ones((256, 128), np.float32)}}}
    >>> bits_per_parameter(variables), round(bits_per_parameter(quantize(variables)), 4)
    (32.0, 4.1279)
    """
    weights, size = 0, 0
    for path, leaf in leaves({name: variables[name] for name in BASE if name in variables}):
        weights += weights_in(path[0], path[-1], leaf.size)
        size += leaf.nbytes
    return 8 * size / weights


def _layers(tree: Variables, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Variables]]:
    """Path and arrays of every quantized weight."""
    if "codes" in tree:
        return [(path, tree)]
    return [found for name, sub in tree.items() for found in _layers(sub, (*path, name))]


def _union(tree: Variables, other: Variables) -> Variables:
    """Nested dicts with the leaves of both."""
    both = {name: _union(tree[name], other[name]) for name in set(tree) & set(other)}
    return tree | other | both
