"""The commands that read a model read it with an adapter: one of ours or PEFT's, folded in where that can be."""

from __future__ import annotations

import io
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmjax as lm
from experiments import chat, evaluate, generate
from experiments.chat_config import ChatConfig
from experiments.evaluate_config import EvaluateConfig
from experiments.generate_config import GenerateConfig
from experiments.support import open_model
from lmjax import adapters, command_line
from lmjax.tokenizers import CharTokenizer
from tests.laws.test_adapters import _noisy
from tests.models.small import forward

CONFIG = lm.models.llama(38, num_layers=2, embed_dim=16, num_heads=2, max_length=64, init_std=0.3, layers="unrolled")
TOKENS = np.arange(10).reshape(2, 5)


def _save(folder: Path, variables: Any) -> Path:
    lm.interop.save_huggingface(folder, CONFIG, variables)
    alphabet = string.ascii_lowercase + "UAT: \n.,!/"
    CharTokenizer(alphabet, bos="<|im_start|>", eos="<|im_end|>").save(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import jax

    return _save(tmp_path_factory.mktemp("model"), lm.Policy(CONFIG).init(jax.random.key(0)))


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with an adapter, and the adapter's directory."""
    import jax

    opened = open_model(str(model))
    adapted = _noisy(adapters.lora(2, 8).init(jax.random.key(1), opened.variables))
    folder = tmp_path_factory.mktemp("lora")
    adapters.save(folder, adapted)
    return adapted, folder


def _commands(model: Path, folder: Path, monkeypatch, capsys, *argv: Any) -> tuple[list[str], str, float]:
    """The continuations, the reply and the loss that the three commands give."""
    text = folder / "text.txt"
    folder.mkdir(exist_ok=True)
    text.write_text("the quick brown fox jumps over the lazy dog", encoding="utf-8")
    short = ["--model", model, "--run-dir", folder, *argv]
    greedy = ["--temperature", 0, "--max-new-tokens", 8]

    def main(run: Any, config: Any, *given: Any) -> str:
        capsys.readouterr()
        command_line.main(run, config, argv=list(map(str, given)))
        return capsys.readouterr().out

    main(generate.run, GenerateConfig(), *short, *greedy, "--prompts", "the fox", "a")
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    reply = main(chat.run, ChatConfig(), *short, *greedy)
    main(evaluate.run, EvaluateConfig(), *short, "--path", text)
    score = json.loads((folder / "evaluation.json").read_text())
    return [row["text"] for row in rows], reply, score["loss"]


def test_every_command_gives_what_the_merged_model_gives(model, lora, tmp_path, monkeypatch, capsys):
    adapted, folder = lora
    merged = _save(tmp_path / "merged", adapters.merge(adapted))
    run = lambda where, name, *argv: _commands(where, tmp_path / name, monkeypatch, capsys, *argv)
    texts, reply, loss = run(model, "adapter", "--adapter", folder)
    expected_texts, expected_reply, expected_loss = run(merged, "one")
    assert (texts, reply) == (expected_texts, expected_reply)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    base_texts, base_reply, base_loss = run(model, "base")
    assert texts != base_texts and reply != base_reply and abs(loss - base_loss) > 0.01


def _adapted(kind: str, variables: Any, policy: Any) -> Any:
    import jax

    keys = jax.random.split(jax.random.key(1), 2)
    make = {
        "lora": adapters.lora(2, 8),
        "prompt": adapters.prompt(policy, 3),
        "network": adapters.prefix(policy, 3, network_width=5),
        "pfeiffer": adapters.pfeiffer(4),
    }
    if kind == "lora and prefix":
        return _noisy(adapters.prefix(policy, 3).init(keys[0], make["lora"].init(keys[1], variables)))
    return _noisy(make[kind].init(keys[0], variables))


KINDS = {
    "lora": [],
    "prompt": ["prefix"],
    "network": ["prefix"],
    "pfeiffer": ["bottleneck"],
    "lora and prefix": ["prefix"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_opened_is_the_adapted_one_in_its_fastest_form(kind, model, tmp_path):
    base = open_model(str(model))
    adapted = _adapted(kind, base.variables, base.policy)
    adapters.save(tmp_path, adapted)
    opened = open_model(str(model), adapter=str(tmp_path))
    assert sorted(adapters.adapters_of(opened.variables)) == KINDS[kind]
    np.testing.assert_allclose(
        forward(CONFIG, opened.variables, TOKENS), forward(CONFIG, adapted, TOKENS), rtol=1e-4, atol=1e-5
    )
    assert str(tmp_path) in opened.description


def test_a_directory_of_peft_is_an_adapter_too(model, lora, tmp_path):
    adapted, folder = lora
    lm.interop.save_peft(tmp_path, CONFIG, adapted)
    found, expected = (open_model(str(model), adapter=str(of)).variables for of in (tmp_path, folder))
    np.testing.assert_allclose(forward(CONFIG, found, TOKENS), forward(CONFIG, expected, TOKENS), atol=1e-5)


def test_no_adapter_is_one_sentence(model, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        argv = ["--model", str(model), "--adapter", str(tmp_path), "--run-dir", str(tmp_path)]
        command_line.main(generate.run, GenerateConfig(), argv=argv)
    assert end.value.code == 2
    assert "there is no adapter.json" in capsys.readouterr().err
