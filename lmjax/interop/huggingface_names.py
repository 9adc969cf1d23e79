"""What transformers calls our parameters: one table a family, read in both directions.

Rows for parameters that a config does not have (biases, an untied head, QK-norms) are not used: the model's
own parameter tree decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of ours and where it lies in a checkpoint. `{i}` stands for the layer.

    Attributes:
      theirs: tensor name.
      ours: path under "params", in the unrolled layout.
      transpose: theirs is [out, in] (torch's Linear), ours [in, out].
      part: theirs is three of ours side by side along its last axis, this one at that place (GPT-2's c_attn).
    """

    theirs: str
    ours: str
    transpose: bool = False
    part: int | None = None

    def at(self, layer: int) -> Row:
        return dataclasses.replace(self, theirs=self.theirs.format(i=layer), ours=self.ours.format(i=layer))


PARTS = 3


def _linear(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/kernel", transpose=True), Row(f"{theirs}.bias", f"{ours}/bias")


def _conv1d(theirs: str, ours: str, part: int | None = None) -> tuple[Row, Row]:
    """GPT-2's Conv1D holds its weight as [in, out], as we do."""
    return Row(f"{theirs}.weight", f"{ours}/kernel", part=part), Row(
        f"{theirs}.bias", f"{ours}/bias", part=part
    )


def _norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


_L, _O = "transformer.h.{i}", "layer_{i}"
GPT2: tuple[Row, ...] = (
    Row("transformer.wte.weight", "embed/embedding"),
    Row("transformer.wpe.weight", "position/embedding"),
    *_norm(f"{_L}.ln_1", f"{_O}/attention_norm"),
    *_conv1d(f"{_L}.attn.c_attn", f"{_O}/attention/query", 0),
    *_conv1d(f"{_L}.attn.c_attn", f"{_O}/attention/key", 1),
    *_conv1d(f"{_L}.attn.c_attn", f"{_O}/attention/value", 2),
    *_conv1d(f"{_L}.attn.c_proj", f"{_O}/attention/output"),
    *_norm(f"{_L}.ln_2", f"{_O}/mlp_norm"),
    *_conv1d(f"{_L}.mlp.c_fc", f"{_O}/mlp/up"),
    *_conv1d(f"{_L}.mlp.c_proj", f"{_O}/mlp/down"),
    *_norm("transformer.ln_f", "final_norm"),
    Row("lm_head.weight", "head/embedding"),
)


def _llama_like(norms: Iterable[tuple[str, str]]) -> tuple[Row, ...]:
    """The names that Llama began and later families kept; only the norms around sublayers differ."""
    layer = "model.layers.{i}"
    return (
        Row("model.embed_tokens.weight", "embed/embedding"),
        *_linear(f"{layer}.self_attn.q_proj", f"{_O}/attention/query"),
        *_linear(f"{layer}.self_attn.k_proj", f"{_O}/attention/key"),
        *_linear(f"{layer}.self_attn.v_proj", f"{_O}/attention/value"),
        *_linear(f"{layer}.self_attn.o_proj", f"{_O}/attention/output"),
        Row(f"{layer}.self_attn.q_norm.weight", f"{_O}/attention/query_norm/scale"),
        Row(f"{layer}.self_attn.k_norm.weight", f"{_O}/attention/key_norm/scale"),
        *_linear(f"{layer}.mlp.gate_proj", f"{_O}/mlp/gate"),
        *_linear(f"{layer}.mlp.up_proj", f"{_O}/mlp/up"),
        *_linear(f"{layer}.mlp.down_proj", f"{_O}/mlp/down"),
        *(row for theirs, ours in norms for row in _norm(f"{layer}.{theirs}", f"{_O}/{ours}")),
        *_norm("model.norm", "final_norm"),
        Row("lm_head.weight", "head/embedding"),
    )


LLAMA = _llama_like([("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")])
GEMMA = _llama_like(
    [
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "attention_post_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    ]
)
TABLES: dict[str, tuple[Row, ...]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}
HEAD = "lm_head.weight"
# Buffers that older files hold beside the parameters: causal masks and rotary frequencies.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def rows(kind: str, num_layers: int) -> list[Row]:
    """The table of a model type with its layers written out, in the order of a forward pass."""
    table = TABLES[kind]
    inside = [row for row in table if "{i}" in row.theirs]
    first = table.index(inside[0])
    before = [row for row in table[:first] if row not in inside]
    after = [row for row in table[first:] if row not in inside]
    return [*before, *(row.at(i) for i in range(num_layers) for row in inside), *after]
