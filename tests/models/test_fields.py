"""Law 3: every field of a config changes something. A field without a case here is an error."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.models import Decoder
from lmjax.models.config import BigramConfig
from lmjax.models.table import Bigram
from lmjax.modules.attention import implementation
from lmjax.modules.config import DecoderConfig, RopeScaling
from lmjax.modules.positions import rope_frequencies
from tests.models.small import forward, random_tokens, variables_of

BASE = DecoderConfig(11, 2, 16, 2, mlp_dim=24, max_length=64, init_std=0.3, layers="unrolled")
LAYER_NORM = dict(norm="layer")
WINDOW = dict(window=2)
GPU = dict(dtype="bfloat16", head_dim=8)

# Field -> (what changes, other value, fields to set on both sides).
#   "shapes": parameters come or go, or change shape; "init": their initial values; "outputs": logits from the same
#   variables; "layout": the tree of parameters; "training": logits while training; "program": the jaxpr of a
#   step; "plan": the kernel chosen on a GPU.
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "vocab_size": ("shapes", 12, {}),
    "num_layers": ("shapes", 3, {}),
    "embed_dim": ("shapes", 20, {}),
    "num_heads": ("shapes", 4, dict(head_dim=8)),
    "num_kv_heads": ("shapes", 1, {}),
    "head_dim": ("shapes", 4, {}),
    "mlp_dim": ("shapes", 32, {}),
    "max_length": ("shapes", 65, dict(position="learned")),
    "position": ("outputs", "none", {}),
    "rope_theta": ("outputs", 9000.0, {}),
    "rope_scaling": ("outputs", RopeScaling("linear", 2.0), {}),
    "local_rope_theta": ("outputs", 9000.0, WINDOW),
    "norm": ("shapes", "layer", {}),
    "norm_eps": ("outputs", 1e-3, {}),
    "norm_bias": ("shapes", False, LAYER_NORM),
    "norm_position": ("shapes", "sandwich", {}),
    "norm_unit_offset": ("outputs", True, {}),
    "qk_norm": ("shapes", True, {}),
    "qkv_bias": ("shapes", True, {}),
    "output_bias": ("shapes", True, {}),
    "mlp_bias": ("shapes", True, {}),
    "activation": ("outputs", "gelu", {}),
    "gated": ("shapes", False, {}),
    "window": ("outputs", 2, {}),
    "window_pattern": ("outputs", (True, False), WINDOW),
    "query_scale": ("outputs", 1.0, {}),
    "attention_softcap": ("outputs", 1.0, {}),
    "logit_softcap": ("outputs", 1.0, {}),
    "logit_scale": ("outputs", 2.0, {}),
    "embed_scale": ("outputs", 4.0, {}),
    "tied_embeddings": ("shapes", False, {}),
    "dropout": ("training", 0.5, {}),
    "init_std": ("init", 0.2, {}),
    "layers": ("layout", "scanned", {}),
    "remat": ("program", "full", {}),
    "dtype": ("outputs", "bfloat16", {}),
    "attention": ("plan", "xla", GPU),
}
# Other values of fields that name one of several things: each must be told from all the rest.
CHOICES: dict[str, tuple[str, list[Any]]] = {
    "norm_position": ("shapes", ["pre", "post", "sandwich"]),
    "position": ("any", ["rope", "learned", "none"]),
    "activation": ("outputs", ["gelu", "gelu_erf", "relu", "silu"]),
    "remat": ("program", ["none", "attention", "dots", "full"]),
}
TOKENS = random_tokens(1, 7) % 11


@functools.cache
def observe(config: DecoderConfig, what: str) -> Any:
    """Something to compare: NumPy arrays, or text."""
    model = Decoder(config)
    if what == "plan":
        return implementation(config, "gpu")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if what in ("shapes", "layout"):
        return str(shapes)
    if what == "init":
        variables = jax.jit(model.init)(jax.random.key(0))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(variables)])
    ones, steps = np.ones_like(TOKENS), np.arange(TOKENS.shape[1], dtype=np.int32)[None]
    if what == "program":
        return str(jax.make_jaxpr(jax.grad(lambda v: model.apply(v, TOKENS, ones, steps).hidden.sum()))(shapes))
    variables = variables_of(config)
    if what == "training":
        train = jax.jit(functools.partial(model.apply, train=True))
        return np.asarray(train(variables, TOKENS, ones, steps, rng=jax.random.key(1)).hidden)
    return np.asarray(forward(config, variables, TOKENS))


def differ(a: Any, b: Any) -> bool:
    return a != b if isinstance(a, (str, tuple)) else a.shape != b.shape or float(np.abs(a - b).max()) > 1e-5


def test_every_field_has_a_case():
    assert set(CASES) == {field.name for field in dataclasses.fields(DecoderConfig)}


@pytest.mark.parametrize("field", CASES)
def test_every_field_changes_something(field):
    what, value, shared = CASES[field]
    base = dataclasses.replace(BASE, **shared)
    assert getattr(base, field) != value
    assert differ(observe(base, what), observe(dataclasses.replace(base, **{field: value}), what))


@pytest.mark.parametrize("field", CHOICES)
def test_every_choice_is_another(field):
    what, values = CHOICES[field]
    views = [
        (observe(config, "shapes"), observe(config, "outputs")) if what == "any" else observe(config, what)
        for config in (dataclasses.replace(BASE, **{field: value}) for value in values)
    ]
    for i, one in enumerate(views):
        for other in views[:i]:
            pairs = zip(one, other) if what == "any" else [(one, other)]
            assert any(differ(a, b) for a, b in pairs)


def test_norm_position_post_has_no_final_norm():
    assert "final_norm" not in observe(dataclasses.replace(BASE, norm_position="post"), "shapes")
    assert "final_norm" in observe(BASE, "shapes")


LLAMA3 = RopeScaling("llama3", 8.0, 64)
YARN = RopeScaling("yarn", 8.0, 4096)
SCALING_CASES: dict[str, tuple[RopeScaling, Any]] = {
    "kind": (YARN, "linear"),
    "factor": (LLAMA3, 4.0),
    "original_length": (YARN, 512),
    "low_frequency_factor": (LLAMA3, 0.5),
    "high_frequency_factor": (LLAMA3, 8.0),
    "beta_fast": (YARN, 8.0),
    "beta_slow": (YARN, 4.0),
    "attention_factor": (YARN, 1.5),
    "mscale": (dataclasses.replace(YARN, mscale_all_dim=1.0), 0.5),
    "mscale_all_dim": (dataclasses.replace(YARN, mscale=1.0), 0.5),
    "truncate": (YARN, False),
}


def test_every_field_of_a_scaling_has_a_case():
    assert set(SCALING_CASES) == {field.name for field in dataclasses.fields(RopeScaling)}


@pytest.mark.parametrize("field", SCALING_CASES)
def test_every_field_of_a_scaling_changes_the_rotation(field):
    scaling, value = SCALING_CASES[field]
    frequencies, factor = rope_frequencies(32, 1e4, scaling)
    others, other_factor = rope_frequencies(32, 1e4, dataclasses.replace(scaling, **{field: value}))
    assert factor != other_factor or np.abs(np.log(frequencies / others)).max() > 1e-3


def test_every_field_of_the_bigram_table_matters():
    assert {field.name for field in dataclasses.fields(BigramConfig)} == {"vocab_size", "init_std"}
    tables = [Bigram(config).init(jax.random.key(0)) for config in (BigramConfig(3), BigramConfig(3, 1.0))]
    assert not tables[0]["params"]["table"].any() and tables[1]["params"]["table"].all()
    assert Bigram(BigramConfig(4)).init(jax.random.key(0))["params"]["table"].shape == (4, 4)
