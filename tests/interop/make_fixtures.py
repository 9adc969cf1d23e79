"""Computes the logits that tests compare with, by transformers: `python -m tests.interop.make_fixtures`.

Needs torch and transformers (the `dev` extra); the tests do not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop import cases


def reference_model(config: dict[str, Any]) -> Any:
    """The model of transformers with the weights that its names and shapes determine."""
    import torch
    import transformers

    entries = dict(config)
    made = transformers.AutoConfig.for_model(entries.pop("model_type"), **entries)
    # Eager attention: float32 throughout, with softcaps and windows applied as written.
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(cases.weight(name, tuple(parameter.shape))))
    return model


def main() -> None:
    import torch

    stored: dict[str, np.ndarray] = {}
    for name, config in cases.CASES.items():
        model = reference_model(config)
        with torch.no_grad():
            logits = model(torch.from_numpy(cases.tokens()).long()).logits[0, cases.POSITIONS].numpy()
        with tempfile.TemporaryDirectory() as folder:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            written = json.loads((Path(folder) / "config.json").read_text())
        shapes = {key: list(parameter.shape) for key, parameter in model.named_parameters()}
        stored[f"{name}/logits"] = logits.astype(np.float32)
        stored[f"{name}/about"] = np.array(json.dumps({"config": written, "shapes": shapes}))
        print(f"{name}: logits of standard deviation {logits.std():.2f}")
    np.savez_compressed(cases.FIXTURES, **stored)
    print(f"{cases.FIXTURES}: {cases.FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
