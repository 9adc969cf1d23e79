"""Bottleneck adapters: small MLPs beside or behind the sublayers."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp

from lmjax.adapters.targets import Variables, refuse_second, unstacked
from lmjax.errors import UserError
from lmjax.modules.adapted import CONSTANT, NAMES, PLACES


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """`y + scale (f(z down + b) up + b')` of the sublayers named. See `houlsby`, `pfeiffer` and `parallel`.

    Attributes:
      sublayers: "attention", "mlp" or both.
      place: what z is: the sublayer's "output", the residual "stream" with it, or the stream before the sublayer and
        its norm ("parallel").
      activation: "relu", "swish", "gelu" or "tanh".
      reduction: the model's width over the adapter's.
      scale: as above.
    """

    sublayers: tuple[str, ...]
    place: str
    activation: str = "relu"
    reduction: float = 16.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (("place", self.place, PLACES), ("activation", self.activation, tuple(NAMES))):
            if value not in known:
                raise UserError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
        if not self.sublayers or set(self.sublayers) - {"attention", "mlp"}:
            raise UserError(f"sublayers is {self.sublayers!r}; name attention, mlp or both.")

    @property
    def trainable(self) -> tuple[str, ...]:
        """What `make_step` is to train."""
        return ("bottleneck",)

    def init(self, key: jax.Array, variables: Variables) -> Variables:
        """The variables with the adapters beside them; `up` is zero, so the outputs are what they were, to the bit.

        `down` is normal with a deviation of 1/sqrt(D).

        Raises:
          UserError: the reduction leaves no width, or there are such adapters already.
        """
        return _init((self, key), variables)


@unstacked
def _init(how: tuple[Bottleneck, jax.Array], variables: Variables) -> Variables:
    method, key = how
    refuse_second(variables, "bottleneck")
    params = variables["params"]
    D = params["embed"]["embedding"].shape[1]
    width = int(D / method.reduction)
    if width < 1:
        raise UserError(f"a reduction of {method.reduction} leaves nothing of the width {D}; lower it.")
    layers: Variables = {}
    for name in (name for name in params if re.fullmatch(r"layer_\d+", name)):
        for number, sublayer in enumerate(method.sublayers):
            own_key = jax.random.fold_in(jax.random.fold_in(key, int(name.removeprefix("layer_"))), number)
            layers.setdefault(name, {})[sublayer] = {
                f"{method.place}_{method.activation}": {
                    "down": {"kernel": jax.random.normal(own_key, (D, width)) / D**0.5, "bias": jnp.zeros((width,))},
                    "up": {"kernel": jnp.zeros((width, D)), "bias": jnp.zeros((D,))},
                    CONSTANT: {"scale": jnp.asarray(method.scale)},
                }
            }
    return variables | {"bottleneck": layers}


def houlsby(reduction: float = 16.0, activation: str = "swish") -> Bottleneck:
    """Two a layer, behind attention and behind the MLP, before each joins the stream (arXiv:1902.00751)."""
    return Bottleneck(("attention", "mlp"), "output", activation, reduction)


def pfeiffer(reduction: float = 16.0, activation: str = "relu") -> Bottleneck:
    """One a layer, which reads the stream behind the MLP (arXiv:2005.00247)."""
    return Bottleneck(("mlp",), "stream", activation, reduction)


def parallel(reduction: float = 2.0, activation: str = "relu", scale: float = 4.0) -> Bottleneck:
    """One a layer, beside the MLP (He et al., arXiv:2110.04366)."""
    return Bottleneck(("mlp",), "parallel", activation, reduction, scale)
