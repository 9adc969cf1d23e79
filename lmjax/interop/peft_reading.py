"""PEFT's tensors as collections of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.interop.peft_config import CONFIG, TENSORS, of_module, scale_of
from lmjax.interop.peft_modules import PROMPT, ROOT, Flat, column_norms, modules_of, nested, split
from lmjax.models import layout
from lmjax.models.decoder import Variables
from lmjax.modules.adapted import CONSTANT
from lmjax.modules.config import DecoderConfig


def collections_from_peft(
    raw: Mapping[str, Any], tensors: Mapping[str, Any], config: DecoderConfig, variables: Variables
) -> Variables:
    """The collections that a PEFT config and its tensors amount to: a linear map of the tensors, which JAX can trace.

    Args:
      raw: the contents of `adapter_config.json`.
      tensors: name -> float32 array, as in the file.
      config: the model's.
      variables: the model, for its layout and for DoRA its weights.

    Raises:
      UserError: as `load_peft`.
    """
    left = dict(tensors)
    kind = "dora" if raw.get("use_dora") else _KINDS[raw["peft_type"]]
    if kind in variables:
        raise UserError(f"these variables have a {kind!r} adapter already; leave it out before another is loaded.")
    flat = _READERS[raw["peft_type"]](raw, left, config, variables)
    if left:
        raise UserError(_unexpected(min(left)))
    if not flat:
        raise UserError(f"{TENSORS} holds no tensors of {raw['peft_type']}; save the adapter again.")
    tree = nested({path: jnp.asarray(leaf) for path, leaf in flat.items()})
    stacked = any(layout.STACKED in of for of in variables.values() if isinstance(of, dict))
    return {kind: layout.stack_adapter(kind, tree, config.num_layers) if stacked else tree}


def _take(left: dict[str, Any], name: str, shape: tuple[int, ...]) -> Any:
    """A tensor, which is there no more. Raises a UserError if it is missing or of another shape."""
    if name not in left:
        raise UserError(f"the tensor {name} is missing; save the adapter again.")
    array = left.pop(name)
    if array.shape != shape:
        raise UserError(
            f"the tensor {name} has shape {array.shape}, but this model and {CONFIG} ask for {shape}; "
            "it is an adapter of another model."
        )
    return array


def _unexpected(name: str) -> str:
    for part, what in (("embed", "the embedding"), (".wte", "the embedding"), ("lm_head", "the head")):
        if part in name and name != PROMPT:
            return f"the tensor {name} adapts {what}, which is not supported; train without it."
    return f"the tensor {name} has no place in this model; it is an adapter of another one."


def _read_low_rank(raw: Mapping[str, Any], left: dict[str, Any], config: DecoderConfig, variables: Variables) -> Flat:
    flat: Flat = {}
    for module in modules_of(config):
        prefix = f"{ROOT}{module.name}.lora_"
        if not any(name.startswith(prefix) for name in left):
            continue
        rank = of_module(raw.get("rank_pattern"), module.name, raw.get("r", 8))
        alpha = of_module(raw.get("alpha_pattern"), module.name, raw.get("lora_alpha", 8))
        scale = scale_of(alpha, rank, raw.get("use_rslora", False))
        out = sum(module.outs)
        a = _take(left, f"{prefix}A.weight", (rank, module.into)).T
        b = _take(left, f"{prefix}B.weight", (out, rank)).T
        magnitudes: list[Any] = [None] * len(module.parts)
        if raw.get("use_dora"):
            written = f"{prefix}magnitude_vector"
            name = written if written in left else f"{written}.weight"
            magnitudes = split(module, _take(left, name, (out,)))
        for path, part, magnitude in zip(module.parts, split(module, b), magnitudes):
            where = tuple(path.split("/"))
            flat[*where, "a"], flat[*where, "b"] = a, part
            flat[*where, CONSTANT, "scale"] = jnp.full((rank,), scale)
            if raw.get("lora_dropout"):
                flat[*where, CONSTANT, "dropout"] = jnp.asarray(raw["lora_dropout"])
            if magnitude is not None:
                flat[*where, "magnitude"] = magnitude
                flat[*where, CONSTANT, "norm"] = column_norms(variables, path)
    return flat


def _read_ia3(raw: Mapping[str, Any], left: dict[str, Any], config: DecoderConfig, variables: Variables) -> Flat:
    flat: Flat = {}
    for module in modules_of(config):
        name = f"{ROOT}{module.name}.ia3_l"
        if name not in left:
            continue
        if left[name].shape[0] == 1:  # of a feedforward module: [1, in]
            vector = _take(left, name, (1, module.into))[0]
            side, parts = "input", [vector] * len(module.parts)
        else:
            side, parts = "output", split(module, _take(left, name, (sum(module.outs), 1))[:, 0])
        for path, vector in zip(module.parts, parts):
            flat[*path.split("/"), side] = vector
    return flat


def _read_prompt(raw: Mapping[str, Any], left: dict[str, Any], config: DecoderConfig, variables: Variables) -> Flat:
    rows_PD = _take(left, PROMPT, (raw["num_virtual_tokens"], config.embed_dim))
    # Theirs come behind the scaling of embeddings (Gemma's), ours go through it.
    return {("embedding",): rows_PD / config.embed_scale}


def _read_prefix(raw: Mapping[str, Any], left: dict[str, Any], config: DecoderConfig, variables: Variables) -> Flat:
    P, L, G, K = raw["num_virtual_tokens"], config.num_layers, config.kv_heads, config.head_width
    both = _take(left, PROMPT, (P, L * 2 * G * K)).reshape(P, L, 2, G, K).transpose(1, 2, 3, 0, 4)
    flat: Flat = {}
    for index in range(L):
        where = (layout.layer_name(index), "attention")
        flat[*where, "keys"], flat[*where, "values"] = both[index]
    return flat


_KINDS = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
_READERS: dict[str, Callable[..., Flat]] = {
    "LORA": _read_low_rank,
    "IA3": _read_ia3,
    "PROMPT_TUNING": _read_prompt,
    "PREFIX_TUNING": _read_prefix,
}
