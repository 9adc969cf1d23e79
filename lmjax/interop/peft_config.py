"""`adapter_config.json` of PEFT: what is read from it, what is written, and what cannot be expressed here.

Importable without JAX. Reading is strict: a field is understood, known to have no effect on what a trained adapter
computes, empty, or an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# Fields that say where an adapter comes from, where it is put, or how it began, which its tensors tell better.
_COMMON = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "runtime_config"),
)
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
_LORA = (
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
)
_VIRTUAL = ("num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_attention_heads", "num_layers")
_PROMPT = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
FIELDS: dict[str, tuple[str, ...]] = {
    "LORA": (*_COMMON, *_PLACES, *_LORA),
    "IA3": (*_COMMON, *_PLACES, "feedforward_modules", "init_ia3_weights"),
    "PROMPT_TUNING": (*_COMMON, *_VIRTUAL, *_PROMPT),
    "PREFIX_TUNING": (*_COMMON, *_VIRTUAL, "encoder_hidden_size", "prefix_projection", "init_weights"),
}
# Ways to begin that take from the model's weights what they give to the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft_config(directory: str | Path) -> dict[str, Any]:
    """The contents of `adapter_config.json`, checked.

    Raises:
      UserError: there is none, it is not a JSON object, or it asks for what lmjax has not.
    """
    file = Path(directory) / CONFIG
    if not file.is_file():
        raise UserError(f"there is no {CONFIG} in {directory}; give a directory that PEFT's save_pretrained wrote.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds a {type(raw).__name__}, not an object; fetch it again.")
    _check(raw, str(file))
    return raw


def _check(raw: Mapping[str, Any], file: str) -> None:
    kind = raw.get("peft_type")
    if kind not in FIELDS:
        raise UserError(f"{file}: peft_type {kind!r} is not supported; lmjax loads {', '.join(FIELDS)}.")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{file}: task_type {raw['task_type']!r} is not supported; lmjax loads CAUSAL_LM.")
    if raw.get("bias", "none") != "none":
        raise UserError(
            f"{file}: bias = {raw['bias']!r} trains the model's biases too, which is not supported; "
            "train with bias='none', or merge the adapter in PEFT."
        )
    begun = str(raw.get("init_lora_weights", True)).lower()
    if begun.startswith(_CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights = {begun!r} has changed the model's weights too; save the adapter again in "
            "PEFT with path_initial_model_for_weight_conversion, which makes it one of the original model."
        )
    if raw.get("num_transformer_submodules", 1) not in (None, 1):
        raise UserError(f"{file}: num_transformer_submodules must be 1 for a decoder; it is of another model.")
    _check_numbers(raw, file)
    for name, value in raw.items():
        if name not in FIELDS[kind] and value:
            raise UserError(
                f"{file}: lmjax cannot express {name} = {value!r} of {kind}; "
                "train without it, or merge the adapter in PEFT and load the model that results."
            )


def _check_numbers(raw: Mapping[str, Any], file: str) -> None:
    if raw["peft_type"].endswith("_TUNING") and "num_virtual_tokens" not in raw:
        raise UserError(f"{file}: num_virtual_tokens is missing; fetch it again.")
    for name, kind in (("r", int), ("num_virtual_tokens", int), ("lora_alpha", (int, float))):
        pattern = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}.get(name, "")
        values = [raw[name]] if name in raw else []
        for value in (*values, *(raw.get(pattern) or {}).values()):
            if not isinstance(value, kind) or (kind is int and value < 1):
                raise UserError(f"{file}: {name} or {pattern or name} is {value!r}, which is no such number; mend it.")


def of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry of `rank_pattern` or `alpha_pattern` for a module, as PEFT looks it up: the first that matches its end.

    >>> of_module({"q_proj": 4, "layers.1.mlp.*": 2}, "model.layers.1.mlp.up_proj", 8)
    2
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


@dataclasses.dataclass(frozen=True)
class LowRankEntry:
    """The numbers of one module: its rank and what its product is multiplied by."""

    rank: int
    scale: float


def lora_fields(entries: Mapping[str, LowRankEntry], dropout: float, dora: bool) -> dict[str, Any]:
    """The fields of `LoraConfig` that give each module its rank and scale.

    Where that makes all alphas whole numbers, the scale is written as alpha / sqrt(r) (rsLoRA).
    """
    plain = {name: _alpha(entry, False) for name, entry in entries.items()}
    root = {name: _alpha(entry, True) for name, entry in entries.items()}
    stabilized = _whole(root) and not _whole(plain)
    alphas = root if stabilized else plain
    ranks = {name: entry.rank for name, entry in entries.items()}
    r, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": stabilized,
        "use_dora": dora,
        "bias": "none",
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
    }


def scale_of(alpha: float, rank: int, stabilized: bool) -> float:
    """What LoRA's product is multiplied by."""
    return alpha / (math.sqrt(rank) if stabilized else rank)


def _alpha(entry: LowRankEntry, stabilized: bool) -> float | int:
    """The shortest alpha that gives the scale, which has the precision of float32."""
    exact = entry.scale * (math.sqrt(entry.rank) if stabilized else entry.rank)
    short = round(exact, 4)
    same = np.float32(scale_of(short, entry.rank, stabilized)) == np.float32(entry.scale)
    alpha = short if same else exact
    return int(alpha) if alpha == int(alpha) else alpha


def _whole(alphas: Mapping[str, float]) -> bool:
    return all(isinstance(alpha, int) for alpha in alphas.values())


def module_names(chosen: Sequence[str], known: Sequence[str]) -> list[str]:
    """The shortest ends of names that choose these modules among all, as PEFT matches them.

    >>> module_names(["h.0.attn.c_proj", "h.1.attn.c_proj"], ["h.0.attn.c_proj", "h.1.attn.c_proj", "h.0.mlp.c_proj"])
    ['attn.c_proj']
    """
    found: list[str] = []
    all_chosen = set(chosen)
    for name in chosen:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        end = next(end for end in ends if all(other in all_chosen for other in known if other.endswith(end)))
        if end not in found:
            found.append(end)
    return found
