"""Supervised fine-tuning from the command line, end to end: it learns, it resumes, it is chatted with."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lmjax as lm
from experiments import chat, sft
from experiments.adapter_config import AdapterConfig
from experiments.chat_config import ChatConfig
from experiments.sft_config import SftConfig
from experiments.support import open_model
from lmjax import command_line
from lmjax.command_line import Options
from lmjax.data.supervised_config import ConversationSource, SupervisedConfig
from lmjax.sharding.config import MeshShape
from lmjax.tokenizers.simple import ByteTokenizer
from lmjax.training.config import CheckpointConfig, LoopConfig, ScheduleConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
MODEL = dict(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, max_length=64, init_std=0.2)


def _fresh(config: Any) -> Any:
    return lm.Policy(config).init(jax.random.key(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a model that knows nothing."""
    folder = tmp_path_factory.mktemp("base")
    config = lm.models.llama(258, **MODEL)
    lm.interop.save_huggingface(folder, config, _fresh(config))
    ByteTokenizer(bos="<|im_start|>", eos="<|im_end|>").save(folder)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that are answered by their last word, and others that are all answered by ok."""
    rng = random.Random(0)
    words = ["fox", "dog", "hill", "sun", "sea", "map"]
    records = [
        {"prompt": " ".join(rng.choice(words) for _ in range(3)) + "?", "completion": "ok", "task": "fine"}
        for _ in range(80)
    ]
    records += [{"prompt": f"say {word}{i}", "completion": word, "task": "say"} for word in words for i in range(6)]
    file = tmp_path_factory.mktemp("data") / "talks.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def _config(base: Path, path: Path, **fields: Any) -> SftConfig:
    """Everything on that has a state: dropout, noise, microbatches, LoRA+, a mixture."""
    config = SftConfig(
        model=str(base),
        data=SupervisedConfig(
            path=str(path), domain_field="task", temperature=2.0, sequence_length=48, validation_fraction=0.2
        ),
        adapter=AdapterConfig("lora", rank=4, dropout=0.1, lora_plus=4.0),
        schedule=ScheduleConfig(peak=0.02, warmup_steps=4),
        loop=LoopConfig(steps=STEPS, log_every=1, eval_every=8, sample_every=12),
        checkpoint=CheckpointConfig(every=5),
        batch_size=16,
        microbatches=2,
        neftune=1.0,
        samples=3,
        sample_tokens=6,
    )
    return dataclasses.replace(config, **fields)


def _run(config: SftConfig, folder: Path) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = sft.run(config, Options(str(folder)))
    return status, said.getvalue()


def _records(folder: Path) -> list[dict[str, Any]]:
    return lm.training.read_metrics(folder / "metrics.jsonl")


def _losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in _records(folder) if "loss" in record}


@pytest.fixture(scope="module")
def finished(base: Path, path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    status, said = _run(_config(base, path), folder)
    assert status == 0
    return folder, said


def test_it_learns_and_says_so(finished: tuple[Path, str]) -> None:
    folder, said = finished
    found = re.fullmatch(r"run_dir=\S+ step=24 val_loss=(\d+\.\d+) before=(\d+\.\d+)", said.strip().splitlines()[-1])
    assert found, said
    assert float(found[1]) < 0.6 * float(found[2])
    assert "template    chatml, loss on assistant" in said and "of the mixture" in said and "held-out prompts" in said
    losses = _losses(folder)
    assert sorted(losses) == list(range(1, STEPS + 1))
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["after"]["loss"] == pytest.approx(float(found[1]), abs=1e-4)
    assert {"loss/say", "loss/fine"} <= set(comparison["after"])
    evaluated = [record for record in _records(folder) if "validation/loss/say" in record]
    assert evaluated[-1]["validation/loss"] == pytest.approx(comparison["after"]["loss"])
    assert len(comparison["samples"]) == 3 and all(row["before"] != row["after"] for row in comparison["samples"])
    assert (folder / "samples" / f"step_{STEPS:08d}.txt").read_text().count("--- answer") == 3
    assert (folder / "plots" / "loss.png").stat().st_size > 1000


def test_the_adapter_is_a_file_of_its_own_and_the_run_does_not_hold_the_model(
    finished: tuple[Path, str], base: Path
) -> None:
    folder, _ = finished
    leaves = lm.training.read_metadata(folder / "checkpoints")["leaves"]
    assert {name.split("/")[1] for name in leaves if name.startswith("variables/")} == {"lora"}
    opened, under = open_model(str(folder)), open_model(str(base))
    assert "step 24, over" in opened.description
    loaded = lm.adapters.load(folder / "adapter", under.variables)
    batch = lm.batch.next_token_batch(np.arange(40).reshape(2, 20))
    logits = [np.asarray(opened.policy(variables, batch).logits) for variables in (opened.variables, loaded)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
    assert np.abs(logits[0] - under.policy(under.variables, batch).logits).max() > 0.1


def test_the_run_is_chatted_with(finished: tuple[Path, str], monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("fox dog hill?\n"))
    chat.run(ChatConfig(model=str(finished[0]), temperature=0.0, max_new_tokens=6), Options())
    said = capsys.readouterr()
    assert "template chatml" in said.err and said.out.strip()


def test_stopped_and_gone_on_with_it_is_as_if_it_never_stopped(
    finished: tuple[Path, str], base: Path, path: Path, tmp_path: Path, monkeypatch
) -> None:
    from lmjax.training.run_directory import RunDirectory

    write = RunDirectory.write

    def write_and_ask(self, step, values):
        write(self, step, values)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    config, folder = _config(base, path), tmp_path / "run"
    monkeypatch.setattr(RunDirectory, "write", write_and_ask)
    status, said = _run(config, folder)
    assert status == 128 + signal.SIGTERM and "SIGTERM: saved at step" in said
    monkeypatch.setattr(RunDirectory, "write", write)
    status, said = _run(config, folder)
    assert status == 0 and "resumed     from step" in said
    assert _losses(folder) == _losses(finished[0])
    parts = [lm.training.load_part(run / "checkpoints", "variables") for run in (folder, finished[0])]
    jax.tree.map(np.testing.assert_array_equal, *parts)


@pytest.mark.slow
def test_on_a_mesh_it_learns_the_same(finished: tuple[Path, str], base: Path, path: Path, tmp_path: Path) -> None:
    config = _config(base, path, mesh=MeshShape(2, 2, 2), samples=0, adapter=AdapterConfig("lora", rank=4))
    status, _ = _run(config, tmp_path / "mesh")
    assert status == 0
    one = _run(dataclasses.replace(config, mesh=MeshShape(8, 1, 1)), tmp_path / "one")
    assert one[0] == 0
    losses = [_losses(tmp_path / name) for name in ("mesh", "one")]
    np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), atol=2e-3)


METHODS: dict[str, AdapterConfig] = {
    "full": AdapterConfig("full"),
    "part": AdapterConfig("full", parameters=("layer_1/*", "*norm/*")),
    "dora": AdapterConfig("dora", rank=2, targets=("attention/*",), rank_stabilized=True),
    "ia3": AdapterConfig("ia3"),
    "prefix": AdapterConfig("prefix", length=4),
    "network": AdapterConfig("prefix", length=4, network_width=8),
    "prompt": AdapterConfig("prompt", text="ok fox"),
    "houlsby": AdapterConfig("houlsby", reduction=4.0),
    "norms": AdapterConfig("norm_tuning"),
}
FAST = ("full",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_every_method_is_trained_written_and_opened(name: str, base: Path, path: Path, tmp_path: Path) -> None:
    config = _config(
        base, path, adapter=METHODS[name], loop=LoopConfig(steps=6, eval_every=0), samples=0, microbatches=1,
        checkpoint=CheckpointConfig(every=0), data=SupervisedConfig(path=str(path), sequence_length=48, seed=1),
    )  # fmt: skip
    status, said = _run(config, tmp_path / "run")
    assert status == 0
    after, before = map(float, re.findall(r"(?:val_loss|before)=(\d+\.\d+)", said))
    assert after < before
    opened = open_model(str(tmp_path / "run"))
    data = lm.data.load_supervised(config.data, 8, opened.tokenizer)
    loss = lm.evaluation.evaluate_batches(opened.policy, opened.variables, data.validation()["talks"]).loss
    assert loss == pytest.approx(after, abs=1e-4)
    assert (tmp_path / "run" / "adapter").exists() == (config.adapter.kind != "full")
    if config.adapter.kind == "full":
        old = open_model(str(base)).variables["params"]["layer_0"]
        same = jax.tree.map(np.array_equal, opened.variables["params"]["layer_0"], old)
        assert not same["attention_norm"]["scale"]
        assert same["attention"]["query"]["kernel"] == (name == "part")


@pytest.mark.slow
def test_an_adapter_is_trained_over_a_quantized_model_and_over_an_adapted_one(
    finished: tuple[Path, str], base: Path, path: Path, tmp_path: Path
) -> None:
    for name, fields in {"int8": {"quantize": "int8"}, "second": {"model": str(finished[0])}}.items():
        config = _config(
            base, path, **fields, loop=LoopConfig(steps=6, eval_every=0), samples=0, microbatches=1, neftune=0.0
        )  # fmt: skip
        status, said = _run(config, tmp_path / name)
        assert status == 0
        after, before = map(float, re.findall(r"(?:val_loss|before)=(\d+\.\d+)", said))
        assert after < before
        opened = open_model(str(tmp_path / name))
        assert ("int8" in opened.variables) == (name == "int8")
        data = lm.data.load_supervised(config.data, 16, opened.tokenizer)
        scores = sft._score(opened.policy, opened.variables, data.validation(), None)
        assert scores["loss"] == pytest.approx(after, abs=1e-4)


def test_an_adapter_without_its_model_is_said_to_be(finished: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    run = shutil.copytree(finished[0], tmp_path / "run")
    text = (run / "config.py").read_text()
    assert str(base) in text
    (run / "config.py").write_text(text.replace(str(base), str(moved)))
    assert "moved" in open_model(str(run)).description
    lm.interop.save_huggingface(moved, wider := lm.models.llama(258, **MODEL | dict(embed_dim=32)), _fresh(wider))
    with pytest.raises(lm.UserError, match=r"an adapter of another model than .*moved is now"):
        open_model(str(run))
    shutil.rmtree(moved)
    with pytest.raises(lm.UserError, match=r"is an adapter of another model, which cannot be opened: .*moved holds no"):
        open_model(str(run))


# The command line


def _main(argv: list[str]) -> int:
    try:
        command_line.main(sft.run, SftConfig(), plan=True, argv=argv)
    except SystemExit as end:
        return end.code  # type: ignore[return-value]
    return 0


def test_the_plan_says_what_is_trained(base: Path, path: Path, capsys) -> None:
    argv = ["--plan", "--model", str(base), "--data.path", str(path), "--data.sequence-length", "48", "--samples", "0"]
    plans = set()
    options = (
        *([], ["--adapter.kind", "full"], ["--adapter.rank", "2"], ["--adapter.kind", "prefix"]),
        *(["--optimizer.kind", "sgd"], ["--batch-size", "16"], ["--mesh.data", "4", "--mesh.tensor", "2"]),
    )
    for more in options:
        assert _main([*argv, *more]) == 0
        plans.add(said := capsys.readouterr().out)
        assert "params/embed/embedding" in said and "are trained" in said and "optimizer" in said
    assert len(plans) == len(options)


def test_the_config_survives_printing(tmp_path: Path, capsys) -> None:
    file = ROOT / "configs" / "sft" / "instruct.py"
    argv = ["--config", str(file), "--print-config", "--adapter.rank", "3", "--data.domain", "x"]
    assert _main(argv) == 0
    (tmp_path / "printed.py").write_text(capsys.readouterr().out)
    config = command_line.load_config(file, SftConfig)
    config = dataclasses.replace(
        config,
        adapter=dataclasses.replace(config.adapter, rank=3),
        data=dataclasses.replace(config.data, domain="x"),
    )
    assert command_line.load_config(tmp_path / "printed.py", SftConfig) == config
    mixed = dataclasses.replace(config, data=SupervisedConfig("a", mixture=(ConversationSource("b", weight=2.0),)))
    (tmp_path / "mixed.py").write_text(command_line.format_config(mixed))
    assert command_line.load_config(tmp_path / "mixed.py", SftConfig) == mixed


BAD = {
    "no model": (["--model", ""], "no model is named"),
    "no data": (["--data.path", ""], "no conversations are named"),
    "another method's field": (["--adapter.kind", "ia3", "--adapter.rank", "4"], "is read by lora and dora and not by"),
    "no such method": (["--adapter.kind", "loro"], "loro"),
    "a pattern that matches nothing": (["--adapter.targets", "querry"], "'querry' matches no linear layer"),
    "parameters that are none": (["--adapter.kind", "full", "--adapter.parameters", "layer_9/*"], "nothing to train"),
    "too high a rank": (["--adapter.rank", "99"], "rank 99 exceeds the width"),
    "no biases": (["--adapter.kind", "bitfit"], "'bias' matches no parameter"),
    "long rows": (["--data.sequence-length", "65"], "the model's positions end at 64"),
    "rows and virtual tokens": (
        ["--adapter.kind", "prompt", "--data.sequence-length", "60"], "the adapter takes 16 more"
    ),
    "long answers": (["--sample-tokens", "64"], "sample_tokens is 64, but the model has 64 positions"),
    "batch and microbatches": (["--microbatches", "3"], "does not split into 3"),
    "batch and devices": (["--batch-size", "12"], "a batch of 12 rows"),
    "a template without its tokens": (["--data.template", "llama3"], "<|begin_of_text|>, which is no special token"),
    "quantized and full": (["--adapter.kind", "full", "--quantize", "int8"], "quantized weights are not trained"),
    "noise": (["--neftune", "-1"], "neftune is -1"),
    "the average of a directory": (["--average", "True"], "leave out step and average"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case: str, base: Path, path: Path, tmp_path: Path, capsys) -> None:
    more, sentence = BAD[case]
    argv = ["--model", str(base), "--data.path", str(path), "--data.sequence-length", "48", "--sample-tokens", "8"]
    assert _main([*argv, "--run-dir", str(tmp_path / "run"), *more]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and sentence in said and "\n" not in said
    assert not (tmp_path / "run").exists()
