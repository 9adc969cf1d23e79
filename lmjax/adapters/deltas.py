"""Changes of some of a model's own parameters, kept beside them: BitFit, norm tuning, and all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.adapters.targets import Patterns, Variables, leaves, matches, nested, refuse_second, unstacked
from lmjax.errors import UserError
from lmjax.models.adapted import add_delta


@dataclasses.dataclass(frozen=True)
class Delta:
    """Zeros that are added to the parameters whose path matches. See `delta`, `bitfit`, `norm_tuning`, `full`.

    To train such parameters in place, without a way back, give `make_step` their pattern instead:
    `trainable=("params/*/bias",)`.

    Attributes:
      targets: patterns of the parameters' paths, such as "bias" or "layer_0/*".
    """

    targets: Patterns

    @property
    def trainable(self) -> tuple[str, ...]:
        """What `make_step` is to train."""
        return ("delta",)

    def init(self, key: jax.Array, variables: Variables) -> Variables:
        """The variables with the changes beside them; the outputs are what they were, to the bit.

        Raises:
          UserError: a pattern matches no parameter, or there are such changes already.
        """
        del key
        return _init(self, variables)


@unstacked
def _init(method: Delta, variables: Variables) -> Variables:
    refuse_second(variables, "delta")
    paths = {"/".join(path): leaf for path, leaf in leaves(variables["params"])}
    for pattern in [method.targets] if isinstance(method.targets, str) else method.targets:
        if not any(matches(path, pattern) for path in paths):
            names = sorted({path.rsplit("/", 1)[-1] for path in paths})
            raise UserError(f"the target {pattern!r} matches no parameter; their names end in {', '.join(names)}.")
    flat: dict[tuple[str, ...], Any] = {
        tuple(path.split("/")): jnp.zeros(leaf.shape, jnp.float32)
        for path, leaf in paths.items()
        if matches(path, method.targets)
    }
    return variables | {"delta": nested(flat)}


def delta(targets: Patterns) -> Delta:
    """Trains the parameters that match, as a change beside them."""
    return Delta(targets)


def bitfit() -> Delta:
    """All biases (Ben Zaken et al., arXiv:2106.10199). Models without biases have nothing to train.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.gpt2(vocab_size=32, num_layers=1, embed_dim=16, num_heads=2))
    >>> adapted = bitfit().init(jax.random.key(0), policy.init(jax.random.key(0)))
    >>> sorted(adapted["delta"]["layer_0"]["mlp"])
    ['down', 'up']
    """
    return Delta("bias")


def norm_tuning() -> Delta:
    """Scales and biases of the norms (Zhao et al., arXiv:2312.11420)."""
    return Delta("*norm/*")


def full() -> Delta:
    """Every parameter, as a change beside it. `trainable=("params",)` trains them in place, for half the memory."""
    return Delta("*")


def fold(variables: Variables, kind: str, sign: int = 1) -> Variables:
    """Parameters with the changes added (sign 1) or subtracted (-1). Unstacked variables."""
    return add_delta(variables | {"delta": jax.tree.map(lambda leaf: sign * leaf, variables[kind])})
