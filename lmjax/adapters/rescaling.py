"""IA3: activations times learned vectors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.adapters.targets import Patterns, Variables, at, leaves, nested, refuse_second, select, unstacked
from lmjax.adapters.weights import kernel_of, replaced


@dataclasses.dataclass(frozen=True)
class IA3:
    """Vectors that start at one. See `ia3`.

    Attributes:
      outputs: patterns of the layers whose output is scaled.
      inputs: patterns of the layers whose input is.
    """

    outputs: Patterns = ("attention/key", "attention/value")
    inputs: Patterns = ("mlp/down",)

    @property
    def trainable(self) -> tuple[str, ...]:
        """What `make_step` is to train."""
        return ("ia3",)

    def init(self, key: jax.Array, variables: Variables) -> Variables:
        """The variables with the vectors beside them; the outputs are what they were, to the bit.

        Raises:
          UserError: a pattern matches nothing, or there is such an adapter already.
        """
        del key
        return _init(self, variables)


@unstacked
def _init(method: IA3, variables: Variables) -> Variables:
    refuse_second(variables, "ia3")
    flat: dict[tuple[str, ...], Any] = {}
    for side, patterns in (("output", method.outputs), ("input", method.inputs)):
        for path, (into, out) in (select(variables, patterns) if patterns else {}).items():
            flat[*path.split("/"), side] = jnp.ones((out if side == "output" else into,))
    return variables | {"ia3": nested(flat)}


def ia3(
    outputs: Patterns = ("attention/key", "attention/value"), inputs: Patterns = ("mlp/down",)
) -> IA3:
    """(IA)^3 (Liu et al., arXiv:2205.05638): keys, values and the MLP's hidden activations times vectors.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.llama(vocab_size=32, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24))
    >>> adapted = ia3().init(jax.random.key(0), policy.init(jax.random.key(0)))
    >>> jax.tree.map(jnp.shape, adapted["ia3"]["layer_0"]["mlp"])
    {'down': {'input': (24,)}}
    """
    return IA3(outputs, inputs)


def fold(variables: Variables, kind: str, sign: int = 1) -> Variables:
    """Weights with the vectors folded in (sign 1) or divided out again (-1). Unstacked variables."""
    changes: dict[str, Any] = {}
    for (*where, side), vector in leaves(variables[kind]):
        path = "/".join(where)
        entries = changes.setdefault(path, {"kernel": kernel_of(variables, path)})
        factor = vector.astype(jnp.float32) ** sign
        kernel = entries["kernel"]
        entries["kernel"] = (kernel * (factor if side == "output" else factor[:, None])).astype(kernel.dtype)
        bias = at(variables["params"], [*where, "bias"])
        if side == "output" and bias is not None:
            entries["bias"] = bias * factor
    return replaced(variables, changes)
