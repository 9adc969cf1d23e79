"""Computes what the tests of distillation compare with, by TRL, torch and transformers:

    pip install trl torch transformers numpy && python -m tests.objectives.make_distillation_fixtures

Losses and their gradients of random logits, hidden states and attention scores; hidden states and attention of tiny
models.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.small import FAMILIES, VOCAB, random_tokens, variables_of

FIXTURES = Path(__file__).parent / "fixtures" / "distillation.npz"
V = 13
GKD = [(beta, temperature) for beta in (0.0, 0.1, 0.5, 0.9, 1.0) for temperature in (1.0, 0.7, 2.0)]
INSIDES = ("gpt2", "llama")  # learned and rotary positions, one key head a query head and fewer


def random_logits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student's and teacher's, [V, V], and which rows count."""
    rng = np.random.default_rng(3)
    own, teacher = rng.normal(size=(2, V, V)).astype(np.float32) * 2
    return own, teacher, rng.random(V) < 0.7


def random_insides() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states [2, 5, 8] and attention scores [2, 3, 5, 5] of two models, every query seeing every key."""
    rng = np.random.default_rng(4)
    return (*rng.normal(size=(2, 2, 5, 8)).astype(np.float32), *rng.normal(size=(2, 2, 3, 5, 5)).astype(np.float32))


def gkd_losses() -> tuple[np.ndarray, np.ndarray]:
    """TRL's losses [cases] and their gradients [cases, V, V]."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    own, teacher, counted = random_logits()
    labels = torch.where(torch.tensor(counted), 0, -100)
    losses, gradients = [], []
    for beta, temperature in GKD:
        student = torch.tensor(own, requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(
            student[None], torch.tensor(teacher)[None], labels[None], beta=beta, temperature=temperature
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append(student.grad.numpy())
    return np.array(losses, np.float32), np.array(gradients)


def torch_insides() -> dict[str, np.ndarray]:
    """Means over tokens of DistilBERT's and TinyBERT's losses, and their gradients."""
    import torch

    hidden, other_hidden, scores, other_scores = random_insides()
    losses = {
        "cosine": (
            hidden, other_hidden,
            lambda a, b: torch.nn.CosineEmbeddingLoss()(a.view(-1, 8), b.view(-1, 8), torch.ones(10)),
        ),
        "mse": (hidden, other_hidden, torch.nn.functional.mse_loss),
        "scores": (scores, other_scores, torch.nn.functional.mse_loss),
        "probabilities": (
            scores, other_scores, lambda a, b: torch.nn.functional.mse_loss(a.softmax(-1), b.softmax(-1))
        ),
    }  # fmt: skip
    found = {}
    for name, (own, other, loss_of) in losses.items():
        own = torch.tensor(own, requires_grad=True)
        loss = loss_of(own, torch.tensor(other))
        loss.backward()
        found[f"{name}/loss"], found[f"{name}/gradient"] = np.float32(loss.item()), own.grad.numpy()
    return found


def tokens_of_insides() -> np.ndarray:
    return random_tokens(2, 7)


def transformers_insides(family: str) -> dict[str, np.ndarray]:
    """Streams after each layer [2, T, D] and attention [2, H, T, T] of each layer, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    import lmjax as lm

    config = FAMILIES[family]
    with tempfile.TemporaryDirectory() as folder:
        lm.interop.save_huggingface(folder, config, variables_of(config))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = torch.tensor(tokens_of_insides(), dtype=torch.long)
    assert int(tokens.max()) < VOCAB
    with torch.no_grad():
        found = model(tokens, output_hidden_states=True, output_attentions=True)
    *streams, last = found.hidden_states  # the last has been through the final norm
    named = {f"{family}/layer/{n}": stream.numpy() for n, stream in enumerate(streams)}
    named |= {f"{family}/attention/{n}": weights.numpy() for n, weights in enumerate(found.attentions, 1)}
    return named | {f"{family}/hidden": last.numpy()}


def main() -> None:
    losses, gradients = gkd_losses()
    found = {"gkd/loss": losses, "gkd/gradient": gradients} | torch_insides()
    for family in INSIDES:
        found |= transformers_insides(family)
    FIXTURES.parent.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURES, **found)
    print(f"{FIXTURES}: {FIXTURES.stat().st_size} bytes")


if __name__ == "__main__":
    main()
