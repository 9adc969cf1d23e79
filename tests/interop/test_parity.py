"""Law 9: our logits are those of transformers, at short and long positions, for every family."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import interop
from lmjax.models import Decoder
from lmjax.modules.config import DecoderConfig
from tests.interop import cases

TOLERANCE = 1e-4
SHORT = 256  # scanned layers are compared up to here; they differ from unrolled ones in their loop alone


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_at(config: DecoderConfig, variables, tokens, positions: tuple[int, ...]):
    """Logits [P, V] at some positions of one row of tokens [1, T]."""
    model = Decoder(config)
    steps = jnp.arange(tokens.shape[1])[None]
    hidden = model.apply(variables, tokens, jnp.ones_like(tokens), steps).hidden[0, jnp.asarray(positions)]
    head = model.head(variables)
    logits = head.scale * hidden @ head.weight.T
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)


def error(config: DecoderConfig, variables, expected: np.ndarray, length: int = cases.LENGTH) -> float:
    positions = tuple(p for p in cases.POSITIONS if p < length)
    found = logits_at(config, variables, cases.tokens(length), positions)
    return float(np.abs(np.asarray(found) - expected[: len(positions)]).max())


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_up_to_position_4095_are_those_of_transformers(name, fixtures, make_directory):
    config, variables = interop.load_huggingface(make_directory(name), layers="unrolled")
    found = error(config, variables, fixtures[name][1])
    print(f"{name}: largest difference {found:.1e}")
    assert found < TOLERANCE


@pytest.mark.parametrize("name", cases.CASES)
def test_scanned_layers_give_the_same_logits(name, fixtures, make_directory):
    config, variables = interop.load_huggingface(make_directory(name), layers="scanned")
    assert set(variables["params"]) >= {"layers"} and "layer_0" not in variables["params"]
    assert error(config, variables, fixtures[name][1], SHORT) < TOLERANCE


# What each case is there to test, and a change of it so small that only a sharp comparison sees it.
WRONG = {
    "llama2": dict(rope_theta=10100.0),
    "llama3": dict(rope_scaling=lambda s: dataclasses.replace(s, high_frequency_factor=4.5)),
    "llama_linear": dict(rope_scaling=lambda s: dataclasses.replace(s, factor=4.05)),
    "llama_yarn": dict(rope_scaling=lambda s: dataclasses.replace(s, attention_factor=1.12)),
    "qwen2_yarn_window": dict(window_pattern=(True, False)),
    "qwen3": dict(rope_theta=1.01e6),
    "mistral": dict(window=101),
    "gemma2": dict(window=99),
    "gemma3": dict(local_rope_theta=1.01e4),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_comparison_sees_small_mistakes(name, fixtures, make_directory):
    config, variables = interop.load_huggingface(make_directory(name), layers="unrolled")
    change = {k: v(getattr(config, k)) if callable(v) else v for k, v in WRONG[name].items()}
    length = 512 if name in ("mistral", "gemma2", "qwen2_yarn_window", "gemma3", "llama_yarn") else 2048
    assert error(dataclasses.replace(config, **change), variables, fixtures[name][1], length) > 10 * TOLERANCE
