"""Bottleneck adapters on small random models, the same in the `adapters` library and here, without a stored weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.cases import FIXTURES as MODELS
from tests.interop.cases import VOCAB, weight

FIXTURES = Path(__file__).with_name("bottleneck_logits.npz")
LAYERS, WIDTH, REDUCTION = 2, 32, 4
FAMILIES = ("gpt2", "llama2")  # of tests.interop.cases
# Name -> config class there, its changes, the function here.
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "houlsby": ("DoubleSeqBnConfig", {}, "houlsby"),
    "pfeiffer": ("SeqBnConfig", {}, "pfeiffer"),
    "parallel": ("ParBnConfig", {}, "parallel"),
    "gelu": ("SeqBnConfig", {"non_linearity": "gelu"}, "pfeiffer"),
    "tanh": ("DoubleSeqBnConfig", {"non_linearity": "tanh"}, "houlsby"),
    "weak": ("ParBnConfig", {"scaling": 0.5}, "parallel"),
}
TOKENS = np.random.RandomState(3).randint(0, VOCAB, (2, 9))


def about(family: str) -> dict[str, Any]:
    """{"config": config.json, "shapes": of its tensors}."""
    with np.load(MODELS) as stored:
        return json.loads(str(stored[f"{family}/about"]))


def adapter_weight(layer: int, sublayer: str, half: str, part: str) -> np.ndarray:
    """A kernel [in, out] or bias of the half "down" or "up"."""
    width = WIDTH // REDUCTION
    shape = {"down": (WIDTH, width), "up": (width, WIDTH)}[half]
    # Not called "norm": a bias is drawn around zero.
    return weight(f"layer_{layer}.{sublayer}.{half}.{part}", shape if part == "kernel" else shape[1:])


def library_logits(family: str, method: str) -> np.ndarray:
    """What the `adapters` library computes, float32 [B, T, V]."""
    import adapters
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = about(family)["config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(weight(name, tuple(parameter.shape))))
        name, changes, _ = METHODS[method]
        adapters.init(model)
        model.add_adapter("own", config=getattr(adapters, name)(reduction_factor=REDUCTION, **changes))
        model.set_active_adapters("own")
        count = 0
        for layer, block in enumerate(model.base_model.h if family == "gpt2" else model.base_model.layers):
            for sublayer, place in (("attention", block.attention_adapters), ("mlp", block.output_adapters)):
                for own in place.adapters.values():
                    for half, linear in (("down", own.adapter_down[0]), ("up", own.adapter_up)):
                        linear.weight.copy_(torch.tensor(adapter_weight(layer, sublayer, half, "kernel").T))
                        linear.bias.copy_(torch.tensor(adapter_weight(layer, sublayer, half, "bias")))
                    count += 1
        assert count == LAYERS * (2 if name == "DoubleSeqBnConfig" else 1)
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()
