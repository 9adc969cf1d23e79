"""Small models for search, the same in transformers and here, and what transformers 4.55.4 found with them.

Weights are drawn from the names and shapes of tensors, so that none is stored.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop import cases

FIXTURES = Path(__file__).parent / "fixtures" / "search.json"
VOCAB, NEW = 31, 12
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8], [11], [16, 18, 3, 3, 9, 8]]

_LLAMA = dict(
    model_type="llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
_GPT2 = dict(model_type="gpt2", vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=64)  # tied
MODELS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gpt2": _GPT2,
    "llama_deep": _LLAMA | dict(num_hidden_layers=6),
    "gpt2_deep": _GPT2 | dict(n_layer=5),
}
ENDS = {  # tokens that the models are fond of
    "llama": [19, 11, 16],
    "gpt2": [5, 11, 0],
    "llama_deep": [5, 25, 27],
    "gpt2_deep": [5, 12, 4],
}

STOPPING = [
    dict(early_stopping=stopping, length_penalty=penalty)
    for stopping in (True, False, "never")
    for penalty in (0.0, 1.0, -0.7)
]
# `ends`: how many of the model's ENDS end a row. The other entries are arguments of transformers' generate.
_BEAM: list[dict[str, Any]] = [
    *(dict(ends=1, num_beams=3, num_return_sequences=2, **options) for options in STOPPING),
    dict(ends=0, num_beams=3, early_stopping="never", length_penalty=0.0),
]
_MORE_BEAM: list[dict[str, Any]] = [
    *(dict(ends=3, num_beams=4, early_stopping=False, length_penalty=x) for x in (2.0, 0.3)),
    dict(ends=1, num_beams=3, early_stopping=False, length_penalty=1.0, repetition_penalty=1.4),
]
_DIVERSE: list[dict[str, Any]] = [
    dict(ends=1, num_beams=4, num_beam_groups=2, num_return_sequences=4, diversity_penalty=0.8, **options)
    for options in STOPPING
]
_MORE_DIVERSE: list[dict[str, Any]] = [
    dict(ends=0, num_beams=3, num_beam_groups=3, num_return_sequences=3, diversity_penalty=2.5,
         early_stopping="never", length_penalty=0.0),
    dict(ends=1, num_beams=6, num_beam_groups=3, num_return_sequences=6, diversity_penalty=0.3,
         early_stopping=False, length_penalty=1.0, repetition_penalty=1.3),
]  # fmt: skip
_CONTRASTIVE: list[dict[str, Any]] = [
    dict(ends=ends, penalty_alpha=alpha, top_k=k)
    for ends, alpha, k in ((0, 0.6, 4), (1, 0.6, 4), (1, 0.3, 4), (0, 0.9, 4), (2, 0.5, 6))
]
_WIDE: list[dict[str, Any]] = [
    dict(ends=ends, dola_layers=layers)
    for ends, layers in ((0, "low"), (1, "high"), (1, "low"), (0, [0, 1, 2, 3, 5]), (1, [4]))
]
_TIED: list[dict[str, Any]] = [
    dict(ends=ends, dola_layers=layers) for ends, layers in ((0, "low"), (0, "high"), (2, [0, 1, 3]))
]
CASES = {
    "llama": {"beam": _BEAM + _MORE_BEAM, "diverse": _DIVERSE, "contrastive": _CONTRASTIVE},
    "gpt2": {"beam": _BEAM, "diverse": _DIVERSE + _MORE_DIVERSE, "contrastive": _CONTRASTIVE},
    "llama_deep": {"dola": _WIDE},
    "gpt2_deep": {"dola": _TIED},
}


def contrasted_logits() -> tuple[np.ndarray, np.ndarray]:
    """Logits of a last layer [200, 17] and of six early ones [6, 200, 17], alike enough for a contest."""
    random = np.random.RandomState(5)
    final_BV = 2 * random.standard_normal((200, 17))
    early_CBV = final_BV / 2 + random.uniform(0.5, 3, (6, 200, 1)) * random.standard_normal((6, 200, 17))
    return final_BV.astype(np.float32), early_CBV.astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a tensor, from its name and shape alone. Layers weigh more than in `tests.interop.cases`: the next
    token must not be the last one again, as it is where tied embeddings rule."""
    large = len(shape) == 2 and not any(part in name for part in ("embed", ".wte", ".wpe", "lm_head"))
    return (2.5 if large else 1.0) * cases.weight(name, shape)


@functools.cache
def stored() -> dict[str, Any]:
    return json.loads(FIXTURES.read_text())


def found_there(model: str, kind: str) -> list[dict[str, Any]]:
    """What transformers found: cases of `options`, `eos`, `tokens` of each sequence and perhaps `scores`."""
    return [case for case in stored()["cases"] if case["model"] == model and case["kind"] == kind]


@functools.cache
def load(name: str) -> tuple[Any, Any]:
    """The policy and its variables."""
    from safetensors.numpy import save_file

    import lmjax as lm
    from lmjax.interop.huggingface import load_huggingface

    about = stored()["models"][name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(about["config"]))
        tensors = {key: weight(key, tuple(shape)) for key, shape in about["shapes"].items()}
        save_file(tensors, Path(folder) / "model.safetensors")
        config, variables = load_huggingface(folder)
    return lm.Policy(config), variables


def rows(tokens: Any, lengths: Any) -> list[list[int]]:
    """Sequences without what stands behind their ends, those of a prompt side by side."""
    tokens, lengths = np.asarray(tokens), np.asarray(lengths).reshape(-1)
    return [row[:length].tolist() for row, length in zip(tokens.reshape(len(lengths), -1), lengths)]


def reference_model(name: str) -> Any:
    """The model of transformers."""
    import torch
    import transformers

    entries: dict[str, Any] = dict(MODELS[name], bos_token_id=None, eos_token_id=None)
    config = transformers.AutoConfig.for_model(entries.pop("model_type"), **entries)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(tensor, tuple(parameter.shape))))
    return model


def reference_search(
    model: Any, prompts: list[list[int]], eos: list[int], pad: int = VOCAB - 1, **options: Any
) -> dict[str, Any]:
    """Runs transformers' `generate` on the prompts as one batch, padded on the left.

    Returns:
      tokens: new tokens of each sequence without padding, returned sequences of a prompt side by side.
      scores: of each sequence, of a beam search in float32.
    """
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    scored = options.get("num_beams", 1) > 1 and model.dtype == torch.float32
    settings: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=eos or None, pad_token_id=pad)
    found = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=scored, **(settings | options)
    )
    new = []
    for row in found.sequences[:, longest:].tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        new.append(row[:length])
    result: dict[str, Any] = {"tokens": new}
    if scored:
        result["scores"] = [round(float(score), 6) for score in found.sequences_scores]
    return result
