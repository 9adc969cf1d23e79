"""Collections of ours as PEFT's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lmjax.errors import UserError
from lmjax.interop.peft_config import LowRankEntry, lora_fields, module_names
from lmjax.interop.peft_modules import PROMPT, ROOT, Module, column_norms, layer_of, modules_of
from lmjax.models import layout
from lmjax.models.decoder import Variables
from lmjax.modules.adapted import CONSTANT
from lmjax.modules.config import DecoderConfig

Written = tuple[dict[str, Any], dict[str, np.ndarray]]  # the fields of the config, and the tensors


def peft_of_collections(config: DecoderConfig, variables: Variables) -> Written:
    """The fields of `adapter_config.json` and the tensors that an adapter amounts to.

    Args:
      config: the model's.
      variables: the model with one kind of adapter, in either layout.

    Raises:
      UserError: as `save_peft`.
    """
    kinds = [kind for kind in (*_WRITERS, "bottleneck", "delta") if kind in variables]
    if len(kinds) != 1:
        what = f"adapters of {len(kinds)} kinds, {', '.join(kinds)}" if kinds else "no adapter"
        raise UserError(f"these variables have {what}; a PEFT directory holds one kind.")
    if kinds[0] not in _WRITERS:
        raise UserError(f"PEFT has no {kinds[0]!r} adapter; keep it in lmjax's own format with lmjax.adapters.save.")
    return _WRITERS[kinds[0]](config, variables)


def _host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _adapted(collection: Variables, modules: list[Module]) -> dict[str, list[Any]]:
    """Module -> what the collection holds for each of its parts, None for a part without; only those with any."""
    found = {module.name: [_host(layer_of(collection, path)) for path in module.parts] for module in modules}
    return {name: parts for name, parts in found.items() if any(part is not None for part in parts)}


def _places(config: DecoderConfig, chosen: list[str], modules: list[Module]) -> dict[str, Any]:
    fused = any(len(module.parts) > 1 for module in modules)
    names = module_names(chosen, [module.name for module in modules])
    return {"target_modules": names, "fan_in_fan_out": fused}  # GPT-2's Conv1D holds [in, out]


def _write_low_rank(kind: str, config: DecoderConfig, variables: Variables) -> Written:
    modules = modules_of(config)
    found = _adapted(variables[kind], modules)
    entries: dict[str, LowRankEntry] = {}
    arrays: dict[str, np.ndarray] = {}
    dropouts = set()
    for module in modules:
        if module.name not in found:
            continue
        parts = found[module.name]
        constants = [part[CONSTANT] for part in parts if part is not None]
        if any("rows" in constant for constant in constants):
            raise UserError("rows of a batch choose among these adapters; PEFT holds one: take one out of them first.")
        dropouts |= {float(constant.get("dropout", 0)) for constant in constants}
        a, b, scale = _joined(module, parts)
        if (scale != scale[0]).any():
            b, scale = b * scale[:, None], np.ones_like(scale)
        prefix = f"{ROOT}{module.name}.lora_"
        arrays |= {f"{prefix}A.weight": a.T, f"{prefix}B.weight": b.T}
        entries[module.name] = LowRankEntry(len(scale), float(scale[0]))
        if kind == "dora":
            # A part without an adapter keeps the length it has.
            magnitudes = [
                np.asarray(column_norms(variables, path)) if part is None else part["magnitude"]
                for path, part in zip(module.parts, parts)
            ]
            arrays[f"{prefix}magnitude_vector"] = np.concatenate(magnitudes)
    if len(dropouts) > 1:
        raise UserError("the dropout of this adapter differs between layers, which PEFT cannot hold; make it one.")
    fields = lora_fields(entries, round(dropouts.pop(), 6), kind == "dora")
    return {"peft_type": "LORA"} | fields | _places(config, list(found), modules), arrays


def _joined(module: Module, parts: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One a [in, R], b [R, out] and scale [R] for all parts of a module.

    Parts with the same `a` share it; otherwise the `a` lie side by side and b is block-diagonal.
    """
    present = [part for part in parts if part is not None]
    first = present[0]
    same = lambda x, y: x.shape == y.shape and np.array_equal(x, y)
    if all(same(p["a"], first["a"]) and same(p[CONSTANT]["scale"], first[CONSTANT]["scale"]) for p in present):
        rank = first["b"].shape[0]
        blocks = [
            np.zeros((rank, out), first["b"].dtype) if part is None else part["b"]
            for part, out in zip(parts, module.outs)
        ]
        return first["a"], np.concatenate(blocks, axis=1), first[CONSTANT]["scale"]
    a = np.concatenate([part["a"] for part in present], axis=1)
    scale = np.concatenate([part[CONSTANT]["scale"] for part in present])
    b = np.zeros((len(scale), sum(module.outs)), first["b"].dtype)
    row = column = 0
    for part, out in zip(parts, module.outs):
        if part is not None:
            b[row : row + len(part["b"]), column : column + out] = part["b"]
            row += len(part["b"])
        column += out
    return a, b, scale


def _write_ia3(config: DecoderConfig, variables: Variables) -> Written:
    modules = modules_of(config)
    found = _adapted(variables["ia3"], modules)
    arrays: dict[str, np.ndarray] = {}
    inputs = []
    for module in modules:
        if module.name not in found:
            continue
        parts = [part or {} for part in found[module.name]]
        vectors = [part["input"] for part in parts if "input" in part]
        if not vectors:
            ones = [np.ones(out, np.float32) for out in module.outs]
            joined = np.concatenate([part.get("output", one) for part, one in zip(parts, ones)])
            arrays[f"{ROOT}{module.name}.ia3_l"] = joined[:, None]
            continue
        if any("output" in part for part in parts):
            raise UserError(f"{module.parts[0]} is scaled at its input and its output; PEFT's IA3 does one of them.")
        if len(vectors) < len(parts) or any((vector != vectors[0]).any() for vector in vectors):
            raise UserError(f"{', '.join(module.parts)} are one module in PEFT and must be scaled by one input vector.")
        inputs.append(module.name)
        arrays[f"{ROOT}{module.name}.ia3_l"] = vectors[0][None]
    fields = {"peft_type": "IA3", "feedforward_modules": module_names(inputs, [module.name for module in modules])}
    return fields | _places(config, list(found), modules), arrays


def _virtual(kind: str, rows: np.ndarray, width: int, heads: int, config: DecoderConfig) -> Written:
    fields = {
        "peft_type": kind,
        "num_virtual_tokens": rows.shape[0],
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": config.num_layers,
    }
    return fields, {PROMPT: rows}


def _refuse_rows(kind: str, ndim: int, own: Variables) -> None:
    if ndim > 2 or CONSTANT in own:
        raise UserError(f"this {kind} differs from row to row of a batch; PEFT holds one: take one out of them first.")


def _write_prompt(config: DecoderConfig, variables: Variables) -> Written:
    rows_PD = np.asarray(variables["prompt"]["embedding"])
    _refuse_rows("prompt", rows_PD.ndim, variables["prompt"])
    rows_PD = (rows_PD * config.embed_scale).astype(rows_PD.dtype)
    return _virtual("PROMPT_TUNING", rows_PD, config.embed_dim, config.num_heads, config)


def _write_prefix(config: DecoderConfig, variables: Variables) -> Written:
    G, K, both = config.kv_heads, config.head_width, []
    for index in range(config.num_layers):
        own = _host(layer_of(variables["prefix"], f"{layout.layer_name(index)}/attention"))
        _refuse_rows("prefix", own["keys"].ndim - 1, own)
        both += [own["keys"], own["values"]]
    rows_PW = np.stack(both).transpose(2, 0, 1, 3).reshape(both[0].shape[1], -1)
    return _prefix_fields(rows_PW, G, K, config)


def _write_network(config: DecoderConfig, variables: Variables) -> Written:
    own = _host(variables["prefix_network"])
    _refuse_rows("prefix", own["table"].ndim, own)
    hidden = np.tanh(own["table"] @ own["hidden"]["kernel"] + own["hidden"]["bias"])
    rows_PW = hidden @ own["output"]["kernel"] + own["output"]["bias"]
    return _prefix_fields(rows_PW, config.kv_heads, config.head_width, config)


def _prefix_fields(rows_PW: np.ndarray, G: int, K: int, config: DecoderConfig) -> Written:
    fields, arrays = _virtual("PREFIX_TUNING", rows_PW, G * K, G, config)
    return fields | {"prefix_projection": False, "encoder_hidden_size": G * K}, arrays


_WRITERS: dict[str, Callable[[DecoderConfig, Variables], Written]] = {
    "lora": lambda config, variables: _write_low_rank("lora", config, variables),
    "dora": lambda config, variables: _write_low_rank("dora", config, variables),
    "ia3": _write_ia3,
    "prefix": _write_prefix,
    "prefix_network": _write_network,
    "prompt": _write_prompt,
}
