"""Preferences from the command line, end to end: DPO with each kind of reference, KTO, two streams, reward models."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lmjax as lm
from experiments import dpo, reward_model
from experiments.adapter_config import AdapterConfig
from experiments.dpo_config import DpoConfig
from experiments.reward_model_config import RewardModelConfig
from experiments.support import open_model
from lmjax.command_line import Options
from lmjax.data.config import DataConfig
from lmjax.data.preference_config import PreferenceConfig
from lmjax.errors import UserError
from lmjax.tokenizers.simple import ByteTokenizer
from lmjax.training.config import CheckpointConfig, LoopConfig, ScheduleConfig

MODEL = dict(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, max_length=64, init_std=0.2)
STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face directory with a model that knows nothing."""
    folder = tmp_path_factory.mktemp("base")
    config = lm.models.llama(258, **MODEL)
    lm.interop.save_huggingface(folder, config, lm.Policy(config).init(jax.random.key(0)))
    ByteTokenizer(bos="<|im_start|>", eos="<|im_end|>").save(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs in which "yes" is better than "no", the same as single answers, and a text."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": f"is {n} {n % 7}?", "chosen": "yes", "rejected": "no"} for n in range(40)]
    answers = [
        {"prompt": record["prompt"], "completion": record[side], "label": side == "chosen"}
        for record in pairs
        for side in ("chosen", "rejected")
    ]
    for name, records in (("pairs", pairs), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return folder


def _config(base: Path, files: Path, file: str = "pairs", **fields: Any) -> DpoConfig:
    config = DpoConfig(
        model=str(base),
        data=PreferenceConfig(path=str(files / f"{file}.jsonl"), max_length=40, validation_fraction=0.25),
        adapter=AdapterConfig("lora", rank=4, dropout=0.1),
        schedule=ScheduleConfig(peak=0.02, warmup_steps=2),
        loop=LoopConfig(steps=STEPS, log_every=1, eval_every=6),
        checkpoint=CheckpointConfig(every=5, keep_last=3),
        batch_size=8,
        samples=2,
        sample_tokens=4,
    )
    return dataclasses.replace(config, **fields)


def _run(experiment: Any, config: Any, folder: Path) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert experiment.run(config, Options(str(folder))) == 0
    return said.getvalue()


def _losses(folder: Path) -> dict[int, float]:
    records = lm.training.read_metrics(folder / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def finished(base, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, _run(dpo, _config(base, files), folder)


def test_it_learns_and_says_so(finished):
    folder, said = finished
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["before"]["loss/dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert comparison["after"]["rewards/accuracies"] == 1.0 and comparison["after"]["loss"] < 0.6
    assert len(comparison["samples"]) == 2 and comparison["samples"][0]["chosen"] == "yes"
    assert "accuracy=1.0000" in said and " pairs in " in said
    for name in ("reward_margins", "accuracies", "answer_logprobs", "overview"):
        assert (folder / "plots" / f"{name}.png").stat().st_size > 5_000
    opened = open_model(str(folder))
    assert not lm.adapters.adapters_of(opened.variables), "folded in"
    loaded = lm.adapters.load(folder / "adapter", open_model(_model_of(folder)).variables)
    assert lm.adapters.count(loaded) > 0


def _model_of(folder: Path) -> str:
    from lmjax import command_line

    found: str = command_line.load_config(folder / "config.py").model
    return found


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(base, files, finished, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(finished[0], folder)
    for checkpoint in sorted((folder / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(checkpoint)
    said = _run(dpo, _config(base, files), folder)
    assert "resumed     from step 5" in said
    assert _losses(folder) == _losses(finished[0])


@pytest.mark.parametrize("reference", ["cached", "following"])
def test_other_references(base, files, finished, tmp_path, monkeypatch, reference):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    config = _config(base, files, reference=reference, follow_every=3, follow_rate=0.5)
    _run(dpo, config, tmp_path / "run")
    losses, whole = _losses(tmp_path / "run"), _losses(finished[0])
    if reference == "cached":  # the same numbers, from disk
        np.testing.assert_allclose(list(losses.values()), list(whole.values()), rtol=1e-4, atol=1e-6)
    else:  # the same until it moves
        assert [losses[n] for n in (1, 2, 3)] == pytest.approx([whole[n] for n in (1, 2, 3)], rel=1e-4)
        assert losses[6] != pytest.approx(whole[6], rel=1e-3)


@pytest.mark.parametrize(
    ("data", "objective", "fields"),
    [
        ("answers", "kto(beta=0.1)", {}),
        ("pairs", "simpo(beta=2.0) + 0.2 * chosen_nll()", {}),
        ("pairs", "dpo() + 0.5 * cross_entropy().on('pretrain')", {"pretrain_batch_size": 8}),
        ("pairs", "0.8 * dpo() + 0.2 * bco() + kl('reference', estimator='k3')", {"adapter": AdapterConfig("full")}),
    ],
)
def test_other_objectives(base, files, tmp_path, data, objective, fields):
    text = DataConfig(path=str(files / "text.txt"), sequence_length=16, cache_dir=str(tmp_path / "cache"))
    config = _config(base, files, data, objective=objective, pretrain=text, samples=0, **fields)
    _run(dpo, config, tmp_path / "run")
    losses = _losses(tmp_path / "run")
    assert len(losses) == STEPS and np.isfinite(list(losses.values())).all()
    assert losses[STEPS] < losses[1]


def test_a_reward_model_learns_which_is_better(base, files, tmp_path):
    config = RewardModelConfig(
        model=str(base),
        data=PreferenceConfig(
            kind="pairs", path=str(files / "pairs.jsonl"), max_length=40, validation_fraction=0.25
        ),
        adapter=AdapterConfig("lora", rank=4),
        schedule=ScheduleConfig(peak=0.02, warmup_steps=2),
        loop=LoopConfig(steps=STEPS, log_every=1, eval_every=6),
        checkpoint=CheckpointConfig(every=5),
        batch_size=8,
    )
    said = _run(reward_model, config, tmp_path / "run")
    assert "accuracy=1.0000" in said
    assert (tmp_path / "run" / "plots" / "calibration.png").stat().st_size > 5_000
    opened = open_model(str(tmp_path / "run"))
    yes, no = ([1, *b"is 9 2?", *word] for word in (b"yes", b"no"))
    scores = lm.evaluation.sequence_scores(opened.policy, opened.variables, [np.array(yes), np.array(no)])
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(objective="dpoo()"), "did you mean dpo"),
        (dict(objective="distillation('teacher')"), "there is only 'reference'"),
        (dict(objective="simpo()", reference="cached"), "no term of the objective takes one"),
        (dict(data=PreferenceConfig(path="nowhere.jsonl", max_length=40)), "does not exist"),
        (dict(data=PreferenceConfig(path="x", max_length=65)), "positions end at 64"),
    ],
)
def test_bad_input(base, files, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        dpo.run(_config(base, files, **fields), Options(str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_bad_options():
    with pytest.raises(UserError, match="reads the stream 'pretrain'"):
        DpoConfig(objective="dpo() + cross_entropy().on('pretrain')")
    with pytest.raises(UserError, match="give 1 or more"):
        DpoConfig(follow_rate=0.0)
    with pytest.raises(UserError, match="learns from pairs"):
        RewardModelConfig(data=PreferenceConfig(kind="answers"))
