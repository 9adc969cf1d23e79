"""Computes the logits and gradients that tests compare with, by PEFT: `python -m tests.interop.make_peft_fixtures`.

Needs torch, transformers and peft (the `dev` extra); the tests do not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop import peft_cases
from tests.interop.make_fixtures import reference_model


def adapted_model(model: str, kind: str, options: dict[str, Any]) -> Any:
    """A model of transformers with an adapter whose tensors' names and shapes determine what they hold."""
    import peft
    import torch

    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(reference_model(peft_cases.MODELS[model]), config).eval()
    with torch.no_grad():
        if options.get("prefix_projection"):
            for name, parameter in adapted.prompt_encoder["default"].named_parameters():
                parameter.copy_(torch.from_numpy(peft_cases.value(name, tuple(parameter.shape))))
        else:
            names = peft.get_peft_model_state_dict(adapted)
            values = {name: torch.from_numpy(peft_cases.value(name, tuple(t.shape))) for name, t in names.items()}
            peft.set_peft_model_state_dict(adapted, values)
    return adapted


def logits_of(adapted: Any, tokens: np.ndarray) -> Any:
    """[B, T, V], without those of virtual tokens."""
    import torch

    ids = torch.from_numpy(tokens).long()
    return adapted(ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


def gradients_of(adapted: Any) -> dict[str, np.ndarray]:
    """The gradients after a backward pass, by the names that PEFT gives the tensors in a file."""
    import peft

    if adapted.peft_config["default"].is_prompt_learning:
        encoder = dict(adapted.prompt_encoder["default"].named_parameters())
        plain = set(encoder) == {"embedding.weight"}
        found = {"prompt_embeddings" if plain else name: p.grad for name, p in encoder.items()}
    else:
        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        found = peft.get_peft_model_state_dict(adapted, state_dict=gradients)
    return {name: gradient.numpy() for name, gradient in found.items()}


def compute(model: str, name: str) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    """What PEFT wrote, its logits [B, T, V] and its gradients of the mean loss."""
    import torch

    adapted = adapted_model(model, *peft_cases.CASES[model, name])
    tokens = peft_cases.tokens()
    logits = logits_of(adapted, tokens[:, :-1])
    targets = torch.from_numpy(tokens[:, 1:]).long()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = gradients_of(adapted)
    base = adapted.get_base_model()
    with tempfile.TemporaryDirectory() as folder:
        base.config.architectures = [type(base).__name__]
        base.config.save_pretrained(folder)
        written = json.loads((Path(folder) / "config.json").read_text())
        adapted.save_pretrained(folder)
        adapter = json.loads((Path(folder) / "adapter_config.json").read_text())
    about = {
        "config": written,
        "shapes": {key: list(p.shape) for key, p in reference_model(peft_cases.MODELS[model]).named_parameters()},
        "adapter": adapter,
        "tensors": {key: list(gradient.shape) for key, gradient in gradients.items()},
    }
    return about, logits.detach().numpy(), gradients


def main() -> None:
    stored: dict[str, np.ndarray] = {}
    for model, name in peft_cases.CASES:
        about, logits, gradients = compute(model, name)
        stored[f"{model}/{name}/about"] = np.array(json.dumps(about))
        stored[f"{model}/{name}/logits"] = logits.astype(np.float32)
        stored[f"{model}/{name}/gradients"] = peft_cases.joined(gradients)
        largest = max(np.abs(gradient).max() for gradient in gradients.values())
        print(f"{model} {name}: logits of standard deviation {logits.std():.2f}, gradients up to {largest:.3f}")
    np.savez_compressed(peft_cases.FIXTURES, **stored)
    print(f"{peft_cases.FIXTURES}: {peft_cases.FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
