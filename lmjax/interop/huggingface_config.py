"""`config.json` of Hugging Face transformers to and from `DecoderConfig`. Importable without JAX.

Reading is strict: every field of the file is either understood, known to have no effect on the function the
model computes, empty, or an error. Writing is by round trip: a family can express a config if what it writes
reads back as the same model, so that nothing is lost in silence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.errors import UserError
from lmjax.interop.huggingface_families import FAMILIES, initial_std, shortest_pattern
from lmjax.interop.huggingface_fields import Fields
from lmjax.interop.huggingface_rope import canonical_scaling
from lmjax.modules.config import DecoderConfig

# What a run chooses and a checkpoint does not hold.
RUN_FIELDS = {"dropout": 0.0, "layers": "auto", "remat": "none", "dtype": "float32", "attention": "auto"}


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The contents of `config.json` in a directory, or of the file itself.

    Raises:
      UserError: there is none, or it is not a JSON object.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"there is no config.json at {path}; give a directory that transformers' save_pretrained wrote."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds a {type(raw).__name__}, not an object; fetch it again.")
    return raw


def config_from_huggingface(source: str | Path | Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Dropout is left at 0 and types at float32: they are choices of a run, not of a checkpoint.

    Args:
      source: a model directory, a `config.json`, or its contents.

    Raises:
      UserError: the model type or one of its features is unknown here. No field is ignored in silence, unless
        it is known to have no effect on the model's function.

    >>> source = {"model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_embd": 768, "n_head": 12}
    >>> config_from_huggingface(source).mlp_dim
    3072
    """
    raw = source if isinstance(source, Mapping) else read_config_json(source)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        hint = " (of Gemma 3, the text-only models)" if kind == "gemma3" else ""
        raise UserError(
            f"model_type {kind!r} of config.json is not supported; lmjax loads {', '.join(FAMILIES)}{hint}."
        )
    fields = Fields(raw)
    found = FAMILIES[kind].read(fields)
    if leftovers := fields.leftovers():
        name = leftovers[0]
        raise UserError(
            f"config.json: lmjax does not know the field {name!r} = {raw[name]!r} of {kind}; "
            "remove it if the model does not depend on it."
        )
    return DecoderConfig(**found)


def canonical(config: DecoderConfig) -> DecoderConfig:
    """The same function of the same parameters, with defaults written out and what has no effect reset."""
    windowed = [config.windowed(i) for i in range(config.num_layers)]
    rope = config.position == "rope"
    scale = config.head_width**-0.5 if config.query_scale is None else config.query_scale
    local = config.local_rope_theta if rope and any(windowed) else None
    if config.rope_scaling is None and local == config.rope_theta:
        local = None
    default = DecoderConfig(vocab_size=1)
    return dataclasses.replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_width,
        mlp_dim=config.mlp_width,
        window=config.window if any(windowed) else None,
        window_pattern=shortest_pattern(windowed) if any(windowed) else (True,),
        rope_theta=config.rope_theta if rope else default.rope_theta,
        rope_scaling=canonical_scaling(config.rope_scaling) if rope else None,
        local_rope_theta=local,
        norm_bias=config.norm_bias or config.norm == "rms",
        query_scale=float(f"{scale:.12g}"),
        embed_scale=float(f"{config.embed_scale:.12g}"),
        init_std=initial_std(config),
        **RUN_FIELDS,  # type: ignore[arg-type]
    )


def config_to_huggingface(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, as a dict, with the first family of transformers that can express it.

    Raises:
      UserError: none can; the fields in which the nearest one differs are named.
    """
    wanted = canonical(config)
    differences: dict[str, list[str]] = {}
    for kind, family in FAMILIES.items():
        written = {"model_type": kind, "architectures": [family.architecture]} | family.write(config)
        try:
            found = canonical(config_from_huggingface(written))
        except UserError as error:
            differences[kind] = [str(error)]
            continue
        names = [
            f.name for f in dataclasses.fields(config) if getattr(found, f.name) != getattr(wanted, f.name)
        ]
        if not names:
            return written
        differences[kind] = names
    nearest = min(differences, key=lambda kind: len(differences[kind]))
    raise UserError(
        f"no family of transformers ({', '.join(FAMILIES)}) expresses this model; "
        f"{nearest} comes nearest and differs in: {', '.join(differences[nearest])}."
    )
