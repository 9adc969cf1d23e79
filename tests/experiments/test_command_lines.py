"""The command lines of the experiments: help without jax, configs that survive printing, one-sentence errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import lmjax as lm
from experiments import pretrain
from experiments.pretrain_config import FROM_TOKENIZER, PretrainConfig
from lmjax import command_line

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "pretrain").glob("[!_]*.py"))
TINY = ["--model.num-layers", "1", "--model.embed-dim", "16", "--model.num-heads", "8", "--data.sequence-length", "16"]


def _main(argv: list[str]) -> int:
    try:
        command_line.main(pretrain.run, PretrainConfig(), plan=True, argv=argv)
    except SystemExit as end:
        return end.code  # type: ignore[return-value]
    return 0


def test_help_and_print_config_do_not_import_jax() -> None:
    program = """
import importlib, io, contextlib, sys
from lmjax import command_line
for name in ("pretrain", "sft", "distill", "evaluate", "generate", "chat"):
    script = importlib.import_module(f"experiments.{name}")
    default = getattr(importlib.import_module(f"experiments.{name}_config"), f"{name.title()}Config")()
    for argv in (["--help"], ["--print-config"]):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            command_line.main(script.run, default, argv=argv)
        assert len(said.getvalue()) > 200, (name, argv)
        assert "jax" not in sys.modules, (name, argv)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_survive_printing(path: Path, tmp_path: Path, capsys) -> None:
    assert _main(["--config", str(path), "--print-config", "--seed", "7"]) == 0
    (tmp_path / "printed.py").write_text(capsys.readouterr().out)
    config = command_line.load_config(tmp_path / "printed.py", PretrainConfig)
    assert config == dataclasses.replace(command_line.load_config(path, PretrainConfig), seed=7)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_have_a_plan(path: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_text("some characters\n" * 100)
    argv = ["--config", str(path), "--plan", "--batch-size", "8", "--data.cache-dir", str(tmp_path)]
    assert _main([*argv, "--data.kind", "auto", "--data.path", str(tmp_path / "text.txt")]) == 0
    said = capsys.readouterr().out
    assert all(
        word in said for word in ("params/embed/embedding", "parameters  ", "memory  ", "FLOPs  ", "attention  ")
    )


def test_a_plan_needs_no_data_where_the_vocabulary_is_known(tmp_path: Path, capsys) -> None:
    assert _main(["--plan", "--data.path", str(tmp_path / "nowhere.txt"), *TINY]) == 0
    said = capsys.readouterr().out
    assert "params/embed/embedding" in said and "(256, 16)" in said and "data=8 × fsdp=1 × tensor=1" in said


def test_each_field_that_shapes_the_state_shows_in_the_plan(capsys) -> None:
    plans = set()
    fields = (
        [],
        ["--ema-decay", "0.9"],
        ["--optimizer.kind", "sgd"],
        ["--model.num-layers", "2"],
        ["--model.window", "4"],
        ["--data.sequence-length", "8"],
        ["--batch-size", "24"],
        ["--vocab-multiple", "100"],
        ["--mesh.data", "4", "--mesh.tensor", "2"],
        ["--loop.steps", "2000"],
        ["--microbatches", "2"],
    )
    for more in fields:
        assert _main(["--plan", *TINY, *more]) == 0
        plans.add(capsys.readouterr().out)
    assert len(plans) == len(fields)


BAD = {
    "unknown key": (["--model.num-layer", "3"], "did you mean --model.num-layers?"),
    "long sequence": (["--data.sequence-length", "4096"], "max_length 1024"),
    "batch and devices": (["--batch-size", "12"], "a batch of 12 rows does not split evenly over"),
    "batch and microbatches": (["--microbatches", "3"], "does not split into 3 microbatches"),
    "held-out batch and devices": (["--eval-batch-size", "3"], "a batch of 3 rows"),
    "mesh": (["--mesh.data", "3"], "a mesh of data=3"),
    "heads": (["--mesh.data", "1", "--mesh.tensor", "8", "--model.num-heads", "4"], "4 query heads do not divide"),
    "vocabulary": (["--model.vocab-size", "100"], "has 256 ids but model.vocab_size is 100"),
    "vocabulary twice": (["--model.vocab-size", "512", "--vocab-multiple", "64"], "leave out one of them"),
    "no text": (["--data.path", "{tmp}/nowhere.txt"], "nowhere.txt"),
    "empty text": (["--data.path", "{tmp}/empty.txt"], "empty.txt"),
    "binary text": (["--data.path", "{tmp}/binary.txt"], "binary.txt is not UTF-8 text"),
    "little text": (["--data.path", "{tmp}/little.txt"], "little.txt"),
    "no config file": (["--config", "{tmp}/nothing.py"], "there is no config file"),
    "cudnn on a CPU": (["--model.attention", "cudnn"], "attention='cudnn' cannot serve this model"),
    "warmup": (["--schedule.warmup-steps", "50"], "warmup"),
    "run directory": (["--run-dir", "{tmp}/little.txt", "--data.path", "{tmp}/text.txt"], "little.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00" * 100)
    (tmp_path / "little.txt").write_text("a")
    (tmp_path / "text.txt").write_text("a few words\n" * 100)
    extra, sentence = BAD[case]
    short = ["--loop.steps", "3", "--schedule.warmup-steps", "1"]
    argv = [*TINY, *short, "--data.cache-dir", str(tmp_path / "cache"), *(part.format(tmp=tmp_path) for part in extra)]
    assert _main(argv) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and sentence in said and "\n" not in said


def test_a_checkpoint_of_another_model_and_a_truncated_one(tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_text("a few words\n" * 200)
    argv = [*TINY, "--data.cache-dir", str(tmp_path / "cache"), "--data.path", str(tmp_path / "text.txt"),
            "--run-dir", str(tmp_path / "run"), "--loop.steps", "2", "--schedule.kind", "constant",
            "--schedule.warmup-steps", "0", "--sample-tokens", "0", "--batch-size", "8"]  # fmt: skip
    assert _main(argv) == 0
    capsys.readouterr()
    assert _main([*argv, "--model.embed-dim", "32"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said and "[256,16]" in said
    config = command_line.load_config(tmp_path / "run" / "config.py", PretrainConfig)
    assert config.model.embed_dim == 16  # what was refused leaves no trace
    for file in (tmp_path / "run" / "checkpoints").rglob("*"):
        if file.is_file() and "state" in file.parts and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])
    assert _main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "checkpoint" in said


def test_the_vocabulary_is_the_tokenizers_rounded_up() -> None:
    config = dataclasses.replace(PretrainConfig(), vocab_multiple=64)
    settled = config.with_vocabulary(100)
    assert settled.model.vocab_size == 128 and settled.with_vocabulary(100) == settled
    assert PretrainConfig().model.vocab_size == FROM_TOKENIZER
    with pytest.raises(lm.UserError, match=r"129 ids but model.vocab_size is 128"):
        settled.with_vocabulary(129)
