"""The entries of a Hugging Face `config.json`, read strictly: what nobody asked for is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmjax.errors import UserError

# Fields that name things, steer generation or training, or choose among equal implementations.
NO_EFFECT = frozenset(
    {
        "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bad_words_ids",
        "begin_suppress_tokens", "boi_token_index", "bos_token", "bos_token_id", "cache_implementation",
        "cls_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
        "early_stopping", "embd_pdrop", "eoi_token_index", "encoder_no_repeat_ngram_size", "eos_token",
        "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "id2label", "image_token_index", "label2id", "length_penalty",
        "max_length", "min_length", "model_type", "n_ctx", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
        "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
        "remove_invalid_values", "reorder_and_upcast_attn", "repetition_penalty", "resid_pdrop",
        "return_dict", "return_dict_in_generate", "sep_token_id", "sliding_window_size",
        "suppress_tokens", "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p",
        "torch_dtype", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
        "use_cache",
    }
)  # fmt: skip
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
SLIDING, FULL = "sliding_attention", "full_attention"


class Fields:
    """The entries of a config.json, which remembers what has been read."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.seen = set(NO_EFFECT)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return self.raw.get(name, default)

    def number(self, name: str, default: float | None = None, kind: type = float) -> Any:
        """A number; without a default it must be there, and null counts as missing."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
            wanted = "whole number" if kind is int else "number"
            raise UserError(f"config.json: {name} is {value!r}; it must be a {wanted}.")
        return kind(value)

    def integer(self, name: str, default: int | None = None) -> int:
        return self.number(name, default, int)

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A number or null; `default` where the entry is absent."""
        self.seen.add(name)
        return default if name not in self.raw else None if self.raw[name] is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        return default if value is None else bool(value)

    def refuse(self, name: str, harmless: Any, reason: str) -> None:
        """An error unless the entry is absent, null or harmless."""
        if (value := self.get(name)) is not None and value != harmless:
            raise UserError(f"config.json: {name} is {value!r}: {reason}.")

    def activation(self, name: str, default: str) -> str:
        value = self.get(name) or default
        if value not in ACTIVATIONS:
            raise UserError(f"config.json: {name} is {value!r}; lmjax knows {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[value]

    def leftovers(self) -> list[str]:
        """Entries nobody asked for that could mean something."""
        return [
            k
            for k, v in self.raw.items()
            if k not in self.seen and not k.startswith("_") and v not in (None, False, [], {})
        ]
