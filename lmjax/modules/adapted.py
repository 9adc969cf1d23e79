"""What adapters change inside a layer. Each kind is a collection beside "params", read by the layers that have one.

`lora`, `dora` and `ia3` sit on the linear layers, `bottleneck` on the sublayers, `prefix` on attention. Numbers that
are not trained lie under `constant`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmjax.losses.slices import Static
from lmjax.modules.quantized import Quantized
from lmjax.modules.quantized import multiply as quantized_product

CONSTANT = "constant"  # the key of what an adapter holds and no optimizer touches
NAMES = {
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "tanh": jnp.tanh,
}
PLACES = ("output", "stream", "parallel")


def over_rows(rows_B: jax.Array, x_ND: jax.Array) -> jax.Array:
    """Values of each row, [B, ...], for each of its tokens, [B*T, ...]."""
    return jnp.repeat(rows_B, x_ND.shape[0] // rows_B.shape[0], axis=0)


def scaled(layer: nn.Module, side: str, x_ND: jax.Array) -> jax.Array:
    """IA3 (arXiv:2205.05638): the layer's "input" or "output" times a learned vector, [D] or [B, D]."""
    if not layer.has_variable("ia3", side):
        return x_ND
    vector = layer.get_variable("ia3", side).astype(x_ND.dtype)
    return x_ND * (vector if vector.ndim == 1 else over_rows(vector, x_ND))


def product(layer: nn.Module, x_ND: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """A linear layer's input times its weight, with what LoRA and DoRA make of it.

    LoRA (arXiv:2106.09685): `x W + (x a * scale) b`. DoRA (arXiv:2402.09353): the columns of `W + a scale b` brought to
    learned lengths, `magnitude / |W + a scale b|`, the denominator without a gradient.

    Args:
      layer: the linear layer.
      x_ND: its input, [N, in].
      weight: [in, out], of the type of x, or quantized.
    """
    multiply = lambda x: quantized_product(x.astype(x_ND.dtype), weight)
    if layer.has_variable("lora", "a"):
        return _with_update(layer, _read(layer, "lora"), x_ND, weight)
    if layer.has_variable("dora", "a"):
        own = _read(layer, "dora")
        return _with_update(layer, own, x_ND, weight) * column_gain(own, multiply).astype(x_ND.dtype)
    return multiply(x_ND)


def _read(layer: nn.Module, kind: str) -> dict[str, Any]:
    names = ("a", "b", "magnitude", CONSTANT)
    return {name: layer.get_variable(kind, name) for name in names if layer.has_variable(kind, name)}


def _with_update(
    layer: nn.Module, own: dict[str, Any], x_ND: jax.Array, weight: jax.Array | Quantized
) -> jax.Array:
    """`x W + (dropout(x) a * scale) b`, with each row's choice among the directions of `a` where there is one."""
    dtype, constant = x_ND.dtype, own[CONSTANT]
    a, b, scale = own["a"].astype(dtype), own["b"].astype(dtype), constant["scale"].astype(dtype)
    dropping = "dropout" in constant and layer.has_rng("dropout")
    (N, into), out = x_ND.shape, b.shape[1]
    # In 16 bits a sum with the weight would round small updates away.
    exact = dtype == jnp.float32 and isinstance(weight, jax.Array)
    if exact and not dropping and "rows" not in constant and N * (into + out) > into * out:
        return summed_product(x_ND, weight, a, b, scale)
    y_ND = quantized_product(x_ND, weight)
    if dropping:
        rate = constant["dropout"]
        keep = jax.random.bernoulli(layer.make_rng("dropout"), 1 - rate, x_ND.shape)
        x_ND = jnp.where(keep, x_ND / (1 - rate), 0).astype(dtype)
    h_NR = (x_ND @ a) * scale
    if "rows" in constant:
        h_NR = h_NR * over_rows(constant["rows"].astype(dtype), h_NR)
    return y_ND + h_NR @ b


@jax.custom_vjp
def summed_product(x_ND: jax.Array, weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """`x (W + a scale b)`: with many tokens the sum costs less than the update's own product and its sum with x W.

    Of the orders in which LoRA can be computed (RunLoRA, arXiv:2312.03415) the backward pass takes the one without the
    summed weights, which would be a second copy of the model. The gradient of W is computed only where it is wanted.
    """
    return x_ND @ (weight + (a * scale) @ b)


def _summed_forward(*primals: Any) -> tuple[jax.Array, Any]:
    values = tuple(primal.value for primal in primals)
    return summed_product(*values), (values, Static(primals[1].perturbed))


def _summed_backward(residuals: Any, g_NE: jax.Array) -> tuple[Any, ...]:
    (x_ND, weight, a, b, scale), weight_too = residuals
    if isinstance(g_NE, jax.custom_derivatives.SymbolicZero):
        return tuple(map(jnp.zeros_like, (x_ND, weight, a, b, scale)))
    back = g_NE @ b.T
    along = x_ND @ a
    # On CPU the product over tokens takes a quarter of the time with the few rows in front, and XLA would turn it.
    turned = jax.lax.optimization_barrier((back * scale).T @ x_ND)
    d_x = g_NE @ weight.T + (back * scale) @ a.T
    d_weight = x_ND.T @ g_NE if weight_too.value else None
    return d_x, d_weight, turned.T, (along * scale).T @ g_NE, jnp.sum(along * back, axis=0)


summed_product.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def column_gain(own: dict[str, Any], product: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """DoRA's `magnitude / |W + a s b|` of each column, [D].

    The length comes from `|W|^2`, which is kept, and products with a and b, so that the sum of the matrices never
    exists; with b = 0 it is that of W to the bit. It has no gradient (section 4.3 of the paper).
    """
    f32 = jnp.float32
    a, b, norm = own["a"].astype(f32), own["b"].astype(f32), own[CONSTANT]["norm"]
    b = b * own[CONSTANT]["scale"].astype(f32)[:, None]
    cross = jnp.sum(product(a.T).astype(f32) * b, axis=0)
    square = jnp.sum(((a.T @ a) @ b) * b, axis=0)
    length = norm * jnp.sqrt(jnp.maximum(1 + (2 * cross + square) / jnp.square(norm), 1e-12))
    return own["magnitude"] / jax.lax.stop_gradient(length)


def bottleneck(layer: nn.Module, name: str, y_ND: jax.Array, stream_ND: jax.Array) -> jax.Array:
    """A sublayer's output with what its bottleneck adapters add, `scale (f(z down + bias) up + bias)`.

    Where z is taken, and that it is not normalised first, is as in the `adapters` library.

    Args:
      layer: the block.
      name: of the sublayer.
      y_ND: its output, which adapters at the "output" read (Houlsby et al., arXiv:1902.00751).
      stream_ND: the residual stream, which "parallel" ones read as it is before the sublayer and its norm (He et al.,
        arXiv:2110.04366); with the output added, those on the "stream" read it (Pfeiffer et al., arXiv:2005.00247).
    """
    if not layer.has_variable("bottleneck", name):
        return y_ND
    sources = {"output": y_ND, "stream": stream_ND + y_ND, "parallel": stream_ND}
    for key, own in sorted(layer.get_variable("bottleneck", name).items()):
        place, activation = key.split("_")
        z, dtype = sources[place], y_ND.dtype
        inner = NAMES[activation](z @ own["down"]["kernel"].astype(dtype) + own["down"]["bias"].astype(dtype))
        outer = inner @ own["up"]["kernel"].astype(dtype) + own["up"]["bias"].astype(dtype)
        y_ND = y_ND + own[CONSTANT]["scale"].astype(dtype) * outer
    return y_ND


class Prefix(NamedTuple):
    """Keys and values of one layer that all tokens see, before any token of their own.

    Attributes:
      keys, values: [G, P, K], or [B, G, P, K] where each row has its own.
      visible: bool [B, P], or None where all are seen.
    """

    keys: jax.Array
    values: jax.Array
    visible: jax.Array | None = None


def attention_prefix(layer: nn.Module) -> Prefix | None:
    """The prefix of an attention layer, if it has one (prefix tuning, arXiv:2101.00190)."""
    if not layer.has_variable("prefix", "keys"):
        return None
    constant = layer.get_variable("prefix", CONSTANT) if layer.has_variable("prefix", CONSTANT) else {}
    return Prefix(layer.get_variable("prefix", "keys"), layer.get_variable("prefix", "values"), constant.get("visible"))
