"""Live comparisons with PEFT: directories that it loads from us and we from it, and its sums of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax import adapters, interop
from lmjax.models import Decoder, gemma2, gpt2, llama, qwen3
from tests.interop import peft_cases
from tests.interop.make_fixtures import reference_model
from tests.interop.make_peft_fixtures import adapted_model, compute, logits_of
from tests.interop.test_peft import _logits, _noisy, _stored

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch", reason="compares with torch and peft (pip install -e '.[dev]')")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-5
TOKENS = peft_cases.tokens()[:, :-1]


def _theirs(base: Path, adapter: Path) -> np.ndarray:
    """Logits of the model that transformers and PEFT load."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return logits_of(adapted, TOKENS).numpy()


@pytest.mark.parametrize(("model", "name"), peft_cases.CASES)
def test_the_fixtures_are_what_peft_computes(model, name):
    _, logits, gradients = _stored(model, name)
    about, found, found_gradients = compute(model, name)
    np.testing.assert_allclose(found, logits, atol=TOLERANCE)
    np.testing.assert_allclose(peft_cases.joined(found_gradients), gradients, atol=TOLERANCE)
    assert about["tensors"] == _stored(model, name)[0]["tensors"]


@pytest.mark.parametrize(("model", "name"), peft_cases.CASES)
def test_directories_go_round_through_both(model, name, tmp_path):
    """From PEFT to us, and from us back to PEFT."""
    adapted = adapted_model(model, *peft_cases.CASES[model, name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # other values than the fixtures'
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = logits_of(adapted, TOKENS).numpy()
    adapted.save_pretrained(tmp_path / "theirs")
    reference_model(peft_cases.MODELS[model]).save_pretrained(tmp_path / "base")
    config, variables = interop.load_huggingface(tmp_path / "base")
    found = adapters.load(tmp_path / "theirs", variables, lm.Policy(config))
    np.testing.assert_allclose(_logits(config, found), expected, atol=TOLERANCE)
    interop.save_peft(tmp_path / "ours", config, found)
    np.testing.assert_allclose(_theirs(tmp_path / "base", tmp_path / "ours"), expected, atol=TOLERANCE)


_SHAPE: dict[str, Any] = dict(
    num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, max_length=64, init_std=0.3
)
MODELS = {
    "gpt2": gpt2(peft_cases.VOCAB, **_SHAPE | dict(num_kv_heads=None)),
    "llama": llama(peft_cases.VOCAB, **_SHAPE, layers="scanned"),
    "qwen3": qwen3(peft_cases.VOCAB, **_SHAPE, head_dim=8),
    "gemma2": gemma2(peft_cases.VOCAB, **_SHAPE, window=32),
}
METHODS = {
    "lora": lambda policy: adapters.lora(2, 5, targets=("query", "key", "mlp/down")),
    "rslora": lambda policy: adapters.lora(3, 4, rank_stabilized=True),
    "dora": lambda policy: adapters.dora(2, 3, targets=("query", "value", "mlp/up")),
    "ia3": lambda policy: adapters.ia3(),
    "prompt": lambda policy: adapters.prompt(policy, 3),
    "prefix": lambda policy: adapters.prefix(policy, 3),
    "network": lambda policy: adapters.prefix(policy, 3, network_width=5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_peft_loads_what_we_write(model, method, tmp_path):
    config = MODELS[model]
    policy, variables = lm.Policy(config), Decoder(config).init(jax.random.key(0))
    adapted = _noisy(METHODS[method](policy).init(jax.random.key(1), variables))
    interop.save_huggingface(tmp_path / "base", config, variables)
    interop.save_peft(tmp_path / "adapter", config, adapted)
    found = _logits(config, adapted)
    assert np.abs(found - _logits(config, variables)).max() > 0.01
    np.testing.assert_allclose(_theirs(tmp_path / "base", tmp_path / "adapter"), found, atol=2 * TOLERANCE)


def test_layers_of_their_own_ranks_and_places(tmp_path):
    config = MODELS["qwen3"]
    variables = Decoder(config).init(jax.random.key(0))
    method = adapters.lora(2, 3, targets=("layer_1/attention/*", "layer_0/mlp/down"), ranks={"output": 5})
    adapted = _noisy(method.init(jax.random.key(1), variables))
    interop.save_huggingface(tmp_path / "base", config, variables)
    interop.save_peft(tmp_path / "adapter", config, adapted)
    found = _theirs(tmp_path / "base", tmp_path / "adapter")
    np.testing.assert_allclose(found, _logits(config, adapted), atol=2 * TOLERANCE)


def _error(found: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    """Over all modules, relative to what is expected."""
    off = sum(np.square(found[name] - expected[name]).sum() for name in expected)
    return float(np.sqrt(off / sum(np.square(change).sum() for change in expected.values())))


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.5, 0.5), (2.0, -1.0, 0.3)])
def test_sums_of_their_adapters_are_exact_where_their_linear_ones_are_not(weights, tmp_path):
    """Summing A and B apart gives products of strangers; side by side they give the sum of the products."""
    options = dict(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    names = [f"adapter_{index}" for index in range(len(weights))]
    model = None
    for name in names:
        made = peft.LoraConfig(r=4, lora_alpha=8, **options)
        if model is None:
            model = peft.get_peft_model(reference_model(peft_cases.MODELS["llama"]), made, adapter_name=name)
        else:
            model.add_adapter(name, made)
    model.add_weighted_adapter(names, list(weights), "linear", combination_type="linear")
    model.save_pretrained(tmp_path, selected_adapters=names)
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    change = lambda module, name: module.get_delta_weight(name).detach().numpy().T.astype(np.float64)
    expected = {
        key: sum(weight * change(module, name) for name, weight in zip(names, weights))
        for key, module in modules.items()
    }

    reference_model(peft_cases.MODELS["llama"]).save_pretrained(tmp_path / "base")
    config, variables = interop.load_huggingface(tmp_path / "base")
    policy = lm.Policy(config)
    loaded = [adapters.load(tmp_path / name, variables, policy) for name in names]
    summed = adapters.weighted_sum(loaded, weights)["lora"]
    found = {}
    for index in range(2):
        of = lambda *path, index=index: summed[f"layer_{index}"][path[0]][path[1]]
        for path, key in ((("attention", "query"), "self_attn.q_proj"), (("mlp", "down"), "mlp.down_proj")):
            own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), of(*path))
            found[f"model.layers.{index}.{key}"] = (own["a"] * own["constant"]["scale"]) @ own["b"]
    theirs = _error({key: change(module, "linear") for key, module in modules.items()}, expected)
    print(f"weights {weights}: PEFT's linear sum is off by {theirs:.2f}, ours by {_error(found, expected):.1e}")
    assert _error(found, expected) < 1e-6
    assert theirs > 0.8
