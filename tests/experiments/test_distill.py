"""Distillation from the command line, end to end: it learns, it resumes, and it says what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import signal
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lmjax as lm
from experiments import distill
from experiments.distill_config import DistillConfig
from experiments.pretrain_config import FROM_TOKENIZER
from experiments.support import open_model
from lmjax import UserError, command_line
from lmjax.command_line import Options
from lmjax.data.config import DataConfig
from lmjax.models.presets import llama, small
from lmjax.tokenizers.config import TokenizerConfig
from lmjax.tokenizers.simple import ByteTokenizer
from lmjax.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, ScheduleConfig
from lmjax.training.run_directory import RunDirectory

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "distill").glob("[!_]*.py"))
TEACHER = llama(256, num_layers=4, embed_dim=32, num_heads=2, mlp_dim=32, max_length=64)
STEPS = 12


def _text(lines: int = 600, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = ["the", "old", "fox", "and", "a", "dog", "ran", "over", "every", "hill"]
    return "\n".join(" ".join(rng.choice(words) for _ in range(6)) for _ in range(lines)) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a teacher that has read it, in a directory of Hugging Face's."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "corpus.txt").write_text(_text(), encoding="utf-8")
    policy, optimizer = lm.Policy(TEACHER), optax.adam(1e-2)
    step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer)
    state = lm.training.init_state(policy, optimizer, jax.random.key(0))
    ids = ByteTokenizer().encode(_text(900, seed=1))
    for number in range(60):
        rows = np.stack([ids[start : start + 33] for start in range(number * 256, number * 256 + 256, 32)])
        state, _ = step(state, lm.batch.next_token_batch(rows))
    lm.interop.save_huggingface(folder / "teacher", TEACHER, state.variables)
    ByteTokenizer().save(folder / "teacher")
    return folder


def _config(folder: Path, **fields) -> DistillConfig:
    """Everything on: a projection, attention, own continuations, a moving average."""
    everything = dict(
        teacher=str(folder / "teacher"),
        model=small(FROM_TOKENIZER, num_layers=2, embed_dim=16, num_heads=2, max_length=32),
        data=DataConfig(path=str(folder / "corpus.txt"), sequence_length=32, cache_dir=str(folder / "cache")),
        optimizer=OptimizerConfig(kind="adamw"),
        schedule=ScheduleConfig(peak=0.02, warmup_steps=2),
        loop=LoopConfig(steps=STEPS, log_every=1, eval_every=6),
        checkpoint=CheckpointConfig(every=5),
        batch_size=16,
        ema_decay=0.5,
        temperature=1.5,
        hidden=0.02,
        hidden_kind="mse",
        hidden_layers="uniform",
        attention=0.02,
        on_policy=0.5,
        eval_batches=2,
        sample_prompt="the ",
        sample_tokens=8,
    )
    return DistillConfig(**everything | fields)


def _records(run: Path) -> list[dict]:
    return lm.training.read_metrics(run / "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert distill.run(_config(folder), Options(str(folder / "whole"))) == 0
    return folder / "whole", printed.getvalue()


def test_it_learns_from_its_teacher_and_says_how_near_it_came(finished: tuple[Path, str]) -> None:
    run, printed = finished
    last = printed.strip().splitlines()[-1]
    found = re.fullmatch(r"run_dir=\S+ step=12 val_loss=(\S+) teacher_loss=(\S+) before=(\S+)", last)
    assert found, last
    scores = json.loads((run / "comparison.json").read_text())
    for name, printed_loss in zip(("after", "teacher", "before"), map(float, found.groups())):
        assert scores[name]["loss"] == pytest.approx(printed_loss, abs=1e-4)
    assert scores["teacher"]["loss"] < 2 < scores["after"]["loss"] < scores["before"]["loss"] - 1
    assert scores["after"]["kl_from_teacher"] < scores["before"]["kl_from_teacher"] - 1
    assert scores["after"]["agreement"] > scores["before"]["agreement"]
    assert scores["teacher"]["bits_per_byte"] == pytest.approx(scores["teacher"]["loss"] / np.log(2), rel=1e-6)
    assert "projection  of hidden states to 32 wide" in printed and "teacher (Hugging Face)" in printed
    assert (run / "samples" / f"step_{STEPS:08d}.txt").read_text().startswith("the ")
    assert (run / "plots" / "loss.png").stat().st_size > 1000


def test_steps_on_its_own_words_have_no_text_to_learn(finished: tuple[Path, str]) -> None:
    steps = [record for record in _records(finished[0]) if "grad_norm" in record]
    own = [record for record in steps if "loss/sampled" in record]
    assert len(steps) == STEPS and 3 <= len(own) <= 9
    for record in steps:
        assert ("loss" in record) == ("loss/cross_entropy" in record) == (record not in own)
    parts = {"distillation_teacher": 0.5, "hidden_mse_teacher": 0.02, "attention_scores_teacher": 0.02}
    for record in own:
        total = sum(weight * record[f"loss/sampled/{name}"] for name, weight in parts.items())
        assert record["loss/sampled"] == pytest.approx(total, rel=1e-4)


def test_interrupted_and_gone_on_with_equals_the_whole(folder: Path, finished, monkeypatch, capsys) -> None:
    write = RunDirectory.write

    def write_and_ask(self, step, values):
        write(self, step, values)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    run = folder / "interrupted"
    monkeypatch.setattr(RunDirectory, "write", write_and_ask)
    assert distill.run(_config(folder), Options(str(run))) == 128 + signal.SIGTERM
    monkeypatch.setattr(RunDirectory, "write", write)
    assert distill.run(_config(folder), Options(str(run))) == 0
    assert "resumed     from step" in capsys.readouterr().out
    for part in ("variables", "ema", "opt_state"):
        both = [lm.training.load_part(path / "checkpoints", part) for path in (run, finished[0])]
        assert jax.tree.structure(both[0]) == jax.tree.structure(both[1])
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, both)))
    assert "kernel" in lm.training.load_part(run / "checkpoints", "variables")["projection"]


def test_a_student_of_the_teachers_layers_begins_ahead_and_a_run_is_a_teacher(folder: Path, finished) -> None:
    new = json.loads((finished[0] / "comparison.json").read_text())["before"]
    plain = dict(hidden=0.0, attention=0.0, on_policy=0.0, ema_decay=0.0, sample_tokens=0,
                 loop=LoopConfig(steps=2), checkpoint=CheckpointConfig(every=0), optimizer=OptimizerConfig(),
                 schedule=ScheduleConfig(kind="constant", peak=1e-3, warmup_steps=0))  # fmt: skip
    default = DistillConfig().model
    config = _config(folder, student="teacher", student_layers=3, model=default, **plain)
    assert distill.run(config, Options(str(folder / "taken"))) == 0
    taken = json.loads((folder / "taken" / "comparison.json").read_text())["before"]
    assert taken["loss"] < new["loss"] - 0.5
    opened = open_model(str(folder / "taken"))
    assert opened.policy.config == dataclasses.replace(open_model(config.teacher).policy.config, num_layers=3)

    config = _config(folder, teacher=str(folder / "taken"), student=str(folder / "taken"), model=default, **plain)
    assert distill.run(config, Options(str(folder / "itself"))) == 0
    scores = json.loads((folder / "itself" / "comparison.json").read_text())
    assert scores["before"]["loss"] == pytest.approx(scores["teacher"]["loss"], rel=1e-5)
    assert scores["before"]["kl_from_teacher"] == pytest.approx(0, abs=1e-5) and scores["before"]["agreement"] == 1


def _byte_pairs(folder: Path) -> str:
    """A model whose ids mean other texts than the teacher's."""
    if not (folder / "pairs").exists():
        tokenizer = lm.tokenizers.build(TokenizerConfig("char"), ["abc"])
        lm.interop.save_huggingface(folder / "pairs", TEACHER, lm.Policy(TEACHER).init(jax.random.key(0)))
        tokenizer.save(folder / "pairs")
    return str(folder / "pairs")


WRONG = {
    "no teacher is named": lambda folder: dict(teacher=""),
    "holds no model": lambda folder: dict(teacher=str(folder)),
    "the student's vocabulary is 300 and the teacher's 256": lambda folder: dict(model=small(300)),
    "the tokenizer of .* is not the teacher's": lambda folder: dict(
        student=_byte_pairs(folder), model=DistillConfig().model
    ),
    "model describes another; leave out model": lambda folder: dict(student="teacher"),
    "9 layers cannot be taken out of 4": lambda folder: dict(student="teacher", student_layers=9),
    "attention of 4 heads cannot be compared with the teacher's 2": lambda folder: dict(
        model=small(1, embed_dim=16, num_heads=4)
    ),
    "those of decoders": lambda folder: dict(model=lm.models.bigram(1)),
    "the student's positions end at 16": lambda folder: dict(
        model=small(1, num_layers=2, embed_dim=16, num_heads=2, max_length=16)
    ),
    "the teacher's positions end at 64": lambda folder: dict(
        data=DataConfig(path=str(folder / "corpus.txt"), sequence_length=65),
        model=small(1, num_layers=2, embed_dim=16, num_heads=2),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_distilled_is_said_before_anything_is_written(folder: Path, tmp_path: Path, message) -> None:
    with pytest.raises(UserError, match=message):
        distill.run(_config(folder, **WRONG[message](folder)), Options(str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


BAD = {
    "nothing is learned from the teacher": dict(soft=0.0),
    "beta is 2": dict(beta=2.0),
    "on_policy is -1": dict(on_policy=-1.0),
    "temperature is 0": dict(temperature=0.0),
    "hidden is -1": dict(hidden=-1.0),
    "ema_decay is 1": dict(ema_decay=1.0),
    "does not split into 3 microbatches": dict(microbatches=3),
    "no layers are taken": dict(student_layers=2),
    "leaves the student nothing to say": dict(on_policy=0.5, prompt_tokens=256),
    "read by the teacher's own tokenizer": dict(data=DataConfig(tokenizer=TokenizerConfig("char"))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs(message) -> None:
    with pytest.raises(UserError, match=message):
        DistillConfig(**BAD[message])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_survive_printing(path: Path, tmp_path: Path, capsys) -> None:
    command_line.main(distill.run, DistillConfig(), argv=["--config", str(path), "--print-config", "--seed", "7"])
    (tmp_path / "printed.py").write_text(capsys.readouterr().out)
    config = command_line.load_config(tmp_path / "printed.py", DistillConfig)
    assert config == dataclasses.replace(command_line.load_config(path, DistillConfig), seed=7)
