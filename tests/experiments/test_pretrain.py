"""Pretraining from the command line, end to end: it learns, it resumes, and it says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lmjax as lm
from experiments import evaluate, generate, pretrain
from experiments.evaluate_config import EvaluateConfig
from experiments.generate_config import GenerateConfig
from experiments.pretrain_config import FROM_TOKENIZER, PretrainConfig
from lmjax import command_line
from lmjax.command_line import Options
from lmjax.data.config import DataConfig
from lmjax.models.presets import small
from lmjax.sharding.config import MeshShape
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def _text(lines: int = 900, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = ["the", "old", "fox", "and", "a", "dog", "ran", "over", "every", "hill", "naïve", "café"]
    return "\n".join(" ".join(rng.choice(words) for _ in range(6)) for _ in range(lines)) + "\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(_text(), encoding="utf-8")
    return path


def _config(corpus: Path) -> PretrainConfig:
    """Everything on that has a state: dropout, a moving average, microbatches, Muon."""
    return PretrainConfig(
        model=small(FROM_TOKENIZER, num_layers=2, embed_dim=16, num_heads=2, max_length=32, dropout=0.1),
        data=DataConfig(path=str(corpus), sequence_length=32, cache_dir=str(corpus.parent / "cache")),
        optimizer=OptimizerConfig(kind="muon"),
        schedule=ScheduleConfig(peak=0.02, warmup_steps=4),
        loop=LoopConfig(steps=STEPS, log_every=1, eval_every=8),
        checkpoint=CheckpointConfig(every=5),
        batch_size=16,
        microbatches=2,
        ema_decay=0.8,
        z_loss=1e-4,
        label_smoothing=0.01,
        eval_batches=2,
        sample_prompt="the ",
        sample_tokens=8,
    )


def _records(folder: Path) -> list[dict]:
    return lm.training.read_metrics(folder / "metrics.jsonl")


def _losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in _records(folder) if "loss" in record}


@dataclasses.dataclass
class Finished:
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run to its end on the eight devices."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = dataclasses.replace(_config(corpus), mesh=MeshShape(2, 2, 2), compare=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert pretrain.run(config, Options(str(folder))) == 0
    return Finished(folder, printed.getvalue())


def test_the_last_line_says_the_loss_over_all_held_out_text(finished: Finished) -> None:
    last = finished.printed.strip().splitlines()[-1]
    found = re.fullmatch(r"run_dir=\S+ step=24 val_loss=(\d+\.\d+) val_bits_per_byte=(\d+\.\d+)", last)
    assert found, last
    comparison = json.loads((finished.folder / "comparison.json").read_text())
    assert comparison["after training"]["loss"] == pytest.approx(float(found[1]), abs=1e-4)
    assert comparison["after training"]["bits_per_byte"] == pytest.approx(float(found[2]), abs=1e-4)
    assert comparison["before training"]["bits_per_byte"] == pytest.approx(8.0, abs=0.3)
    assert float(found[2]) < comparison["before training"]["bits_per_byte"] - 2
    assert 0 < comparison["gzip -9"]["bits_per_byte"] < 4 and 0 < comparison["bigram counts"]["bits_per_byte"] < 4


def test_it_learns_and_leaves_what_a_run_directory_holds(finished: Finished) -> None:
    losses = _losses(finished.folder)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert np.mean([losses[i] for i in range(20, 25)]) < losses[1] - 1.5
    names = {path.name for path in finished.folder.iterdir()}
    assert {"config.py", "config.json", "metrics.jsonl", "plots", "samples", "checkpoints", "tokenizer"} <= names
    assert (finished.folder / "samples" / f"step_{STEPS:08d}.txt").read_text().startswith("the ")
    assert all(path.stat().st_size > 1000 for path in (finished.folder / "plots").glob("*.png"))
    evaluated = {r["step"] for r in _records(finished.folder) if "validation/bits_per_byte" in r}
    assert evaluated == {8, 16, 24} | {5, 10, 15, 20}  # a checkpoint that is ranked needs its score
    again = command_line.load_config(finished.folder / "config.py", PretrainConfig)
    assert again.model.vocab_size == 256


def test_evaluate_and_generate_read_the_run(finished: Finished, corpus: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text(_text(6, seed=1), encoding="utf-8")
    base = EvaluateConfig(model=str(finished.folder), path=str(text), window=32)
    scores = {}
    for stride, average in ((32, None), (4, None), (4, False)):
        evaluate.run(dataclasses.replace(base, stride=stride, average=average), Options(str(tmp_path / "out")))
        scores[stride, average] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    count = len(text.read_bytes()) - 1
    assert all(score["tokens"] == score["bytes"] == count for score in scores.values())
    assert scores[32, None]["bits_per_byte"] < 6
    assert len({round(score["loss"], 5) for score in scores.values()}) == 3
    config = GenerateConfig(model=str(finished.folder), prompts=("the ", "a"), samples=2, max_new_tokens=5)
    generate.run(config, Options(str(tmp_path / "out")))
    lines = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["the ", "the ", "a", "a"]
    assert all(line["tokens"] == 5 and line["mean_logprob"] < 0 for line in lines)
    assert "the " in capsys.readouterr().out


def test_evaluate_reads_a_hugging_face_directory(tmp_path: Path) -> None:
    import jax

    from lmjax.evaluation import document_batches, evaluate_batches
    from lmjax.tokenizers.simple import ByteTokenizer

    model = lm.models.llama(256, num_layers=1, embed_dim=16, num_heads=2, max_length=64, init_std=0.2)
    policy = lm.Policy(model)
    variables = policy.init(jax.random.key(0))
    lm.interop.save_huggingface(tmp_path / "model", model, variables)
    ByteTokenizer().save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Words, naïve words.", encoding="utf-8")
    config = EvaluateConfig(str(tmp_path / "model"), str(tmp_path / "text.txt"), mode="document", batch_size=1)
    evaluate.run(config, Options(str(tmp_path)))
    ids = ByteTokenizer().encode("Words, naïve words.")
    expected = evaluate_batches(policy, variables, document_batches([ids], batch_size=1))
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6) and found["bytes"] == len(ids) - 1


KILLED_AT = random.Random(2024).randrange(11, STEPS)  # behind the second checkpoint, before the end
CHILD = """
import os, signal, sys
from experiments import pretrain
from experiments.pretrain_config import PretrainConfig
from lmjax import command_line
from lmjax.training.run_directory import RunDirectory

config, killed, whole, killed_at = sys.argv[1:]
write = RunDirectory.write

def write_and_die(self, step, values):
    write(self, step, values)
    if step >= int(killed_at):
        os.kill(os.getpid(), signal.SIGKILL)

def train(folder):
    command_line.main(pretrain.run, PretrainConfig(), argv=["--config", config, "--run-dir", folder])

if int(killed_at):
    RunDirectory.write = write_and_die
    train(killed)
train(whole)
train(killed)
"""


@pytest.fixture(scope="module")
def resumed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """On one device: a run killed with -9 as it was left, the same gone on with, and one never interrupted."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "config.py").write_text(command_line.format_config(_config(corpus)))
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    killed, left, whole = folder / "killed", folder / "left", folder / "whole"

    def child(killed_at: int) -> int:
        arguments = [str(folder / "config.py"), str(killed), str(whole), str(killed_at)]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], env=environment, cwd=folder, capture_output=True, text=True
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert child(KILLED_AT) == -signal.SIGKILL
    shutil.copytree(killed, left)
    assert not whole.exists()
    assert child(0) == 0
    return left, killed, whole


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(resumed: tuple[Path, Path, Path]) -> None:
    left, killed, whole = resumed
    assert max(_losses(left)) >= KILLED_AT - 1  # it had come so far
    assert max(lm.training.checkpoint.steps(left / "checkpoints")) < KILLED_AT
    assert _losses(killed) == _losses(whole) and len(_losses(whole)) == STEPS
    same = {"validation/loss", "validation/bits_per_byte", "grad_norm", "learning_rate", "accuracy"}
    pick = [
        [{key: record[key] for key in sorted(same & set(record))} | {"step": record["step"]} for record in records]
        for records in (_records(killed), _records(whole))
    ]
    assert pick[0] == pick[1]
    for part in ("variables", "ema", "opt_state"):
        a, b = (_flat(lm.training.load_part(folder / "checkpoints", part)) for folder in (killed, whole))
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1)])
def test_killed_on_one_device_and_resumed_on_eight(
    resumed: tuple[Path, Path, Path], corpus: Path, tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    left, _, whole = resumed
    folder = tmp_path / "eight"
    shutil.copytree(left, folder)
    config = dataclasses.replace(_config(corpus), mesh=MeshShape(*shape))
    assert pretrain.run(config, Options(str(folder))) == 0
    losses, expected = _losses(folder), _losses(whole)
    np.testing.assert_allclose([losses[s] for s in sorted(losses)], [expected[s] for s in sorted(losses)], atol=1e-5)
    a, b = (_flat(lm.training.load_part(path / "checkpoints", "variables")) for path in (folder, whole))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def _flat(tree: dict) -> dict[str, np.ndarray]:
    import jax

    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_sigterm_saves_and_the_same_command_goes_on(corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from lmjax.training.run_directory import RunDirectory

    write = RunDirectory.write

    def write_and_ask(self, step, values):
        write(self, step, values)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    config = dataclasses.replace(_config(corpus), ema_decay=0.0, sample_tokens=0)
    monkeypatch.setattr(RunDirectory, "write", write_and_ask)
    assert pretrain.run(config, Options(str(tmp_path / "run"))) == 128 + signal.SIGTERM
    assert "SIGTERM: saved at step" in capsys.readouterr().out
    stopped = lm.training.checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert 7 <= stopped < STEPS
    monkeypatch.setattr(RunDirectory, "write", write)
    assert pretrain.run(config, Options(str(tmp_path / "run"))) == 0
    assert f"resumed     from step {stopped}" in capsys.readouterr().out
    assert sorted(_losses(tmp_path / "run")) == list(range(1, STEPS + 1))
