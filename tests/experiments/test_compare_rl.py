"""The comparison of ways to learn from rewards: one budget, rewards of steps, and runs too short to mean anything."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments import compare_rl, ladder, trials
from experiments.arithmetic_rewards import steps
from experiments.compare_rl_config import METHODS, CompareRlConfig
from experiments.pretrain_config import FROM_TOKENIZER
from lmjax import rl
from lmjax.command_line import Options
from lmjax.data.config import DataConfig
from lmjax.errors import UserError
from lmjax.models.presets import small

TINY = dict(
    methods=("ppo_process",), strengths=(0.1,), seeds=1, iterations=2, prompts=16, samples=2, max_new_tokens=8,
    evaluations=1, answers=2, documents=60, pretrain_steps=2, solutions=40, sft_steps=2, held_out=16,
)  # fmt: skip
NUMBERS = ("accuracy", "reward", "steps_right", "kl", "kl_error", "length", "ended")


def _said(text: str, group: int = 0, end: bool = True) -> rl.Rollout:
    tokens = np.array([*text.encode(), *([256] if end else [])], np.int32)
    nothing = np.zeros(len(tokens), np.float32)
    record = {"prompt": "Q: 3+8-5=?\nA: ", "answer": 6}
    return rl.Rollout(
        np.array([1]), tokens, group, nothing, nothing, "eos" if end else "length", nothing == 0, "", text, record
    )


@pytest.mark.parametrize(
    ("text", "rewards"),
    [
        ("3+8=11, 11-5=6 => 6", [1, 1, 1]),
        ("3+8=12, 12-5=7 => 7", [0, 1, 0]),  # a mistake counts once
        ("3+8=11, 11-5=7 => 7", [1, 0, 0]),
        ("3+8=11, 11-5=7 => 6", [1, 0, 1]),
        ("8+3=11, 11-5=6 => 6", [0, 1, 1]),  # right, and not what is asked
        ("=> 6", [0, 1]),
        ("3+8=11, 3+8=11, 3+8=11, 11-5=6 => 6", [1, 0, 0, 0, 1]),  # saying it again is worth nothing
        ("3+8=11, 11-5=6 => 6 => 6", [1, 1, 0, 1]),
        ("3+8=11", [0]),
        ("ü, 11-5=6 => six", [0, 0, 0]),
        ("", [0]),
    ],
)
def test_steps_are_judged_where_they_end(text, rewards):
    rollout = _said(text)
    found = steps(rollout)
    assert [reward for _, reward in found] == rewards
    assert [end for end, _ in found][-1] == len(rollout.tokens) - 1
    for end, _ in found[:-1]:
        assert rollout.tokens[end] in b",>"


def test_what_has_no_question_or_no_end():
    assert steps(_said("3+8=11,", end=False)) == [(6, 1.0)]
    assert steps(_said("", end=False)) == []
    rollout = _said("")
    rollout.record["prompt"] = "2?"  # type: ignore[index]
    with pytest.raises(ValueError, match="no question"):
        steps(rollout)


def test_right_and_wrong_steps_get_their_credit():
    """Rewards 1, 1, 1 and 0, 1, 0: their mean is 2/3, their variance 4/15; each token has what is still to come."""
    rollouts = [_said("3+8=11, 11-5=6 => 6"), _said("3+8=12, 12-5=7 => 7")]
    with rl.Judge([rl.Reward("steps", steps)]) as judge:
        scores = judge(rollouts)()
    assert scores.total.tolist() == [3.0, 1.0]
    credit = rl.process_credit()(rollouts, scores, None)
    unit = 1 / 3 / math.sqrt(4 / 15)
    lengths = [len("3+8=11,"), len(" 11-5=6 =>"), len(" 6") + 1]
    for found, units in zip(credit.advantages, ([3, 2, 1], [-3, -1, -2])):
        np.testing.assert_allclose(found, unit * np.repeat(units, lengths), rtol=1e-5)


@pytest.fixture
def started(tmp_path, monkeypatch):
    monkeypatch.setattr(DataConfig, "cache_root", lambda self: str(tmp_path / "cache"))
    return tmp_path / "rl"


def test_methods_have_one_budget(started):
    config = CompareRlConfig()
    made = {
        method: compare_rl.experiment_of(method, 0.1, compare_rl.Start(config, 0, started)) for method in METHODS
    }
    shared = ("model", "data", "rollout", "optimizer", "schedule", "loop", "reference_kl", "seed", "adapter")
    for experiment, own in made.values():
        assert all(getattr(own, name) == getattr(made["grpo"][1], name) for name in shared)
        assert own.loop.steps == config.updates == 128 and experiment.run
    assert made["grpo_process"][1].process and not made["grpo"][1].process
    assert made["grpo_process"][1].rewards == made["ppo_process"][1].rewards != made["ppo"][1].rewards


def test_the_table_has_every_method_and_is_gone_on_with(started, monkeypatch):
    made: list[str] = []

    def run(experiment, settings, folder):
        made.append(folder.name)

    def measured(model, start):
        place = len(made) + start.seed
        return {name: 0.1 * place for name in NUMBERS}

    monkeypatch.setattr(compare_rl, "quietly", run)
    monkeypatch.setattr(compare_rl, "measured", measured)
    monkeypatch.setattr(compare_rl, "open_model", lambda path: path)
    took = {"training_seconds": 1.0, "tokens": 10, "curve": [[2.0, 0.5], [4.0, 0.75]]}
    monkeypatch.setattr(compare_rl, "about_run", lambda config, folder: took)
    config = CompareRlConfig(**TINY | dict(methods=METHODS, strengths=(0.1, 1.0), seeds=2))
    compare_rl.run(config, Options(run_dir=str(started)))
    runs = [name for name in made if name not in ("pretrain", "sft")]
    assert len(runs) == len(set(runs)) == len(METHODS) * 2 * 2
    lines = (started / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 2 + len(runs)
    for line in map(json.loads, lines):
        first = next(one for one in map(json.loads, lines) if (one["method"], one["seed"]) == ("start", line["seed"]))
        assert line["gain"] == pytest.approx(line["reward"] - first["reward"])
    results = json.loads((started / "results.json").read_text())
    assert len(results) == 1 + 2 * len(METHODS) and all(line["seeds"] == 2 for line in results)
    table = (started / "table.txt").read_text()
    assert all(f" {name} " in table for name in ("start", *METHODS)) and "±" in table
    for name in ("frontier", "curves"):
        assert (started / f"{name}.png").stat().st_size > 10_000

    (started / "trials.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # as if killed before the last one
    made.clear()
    compare_rl.run(config, Options(run_dir=str(started)))
    assert [name for name in made if name not in ("pretrain", "sft")] == runs[-1:]
    assert len((started / "trials.jsonl").read_text().splitlines()) == len(lines)
    with pytest.raises(UserError, match="other settings"):
        compare_rl.run(CompareRlConfig(**TINY), Options(run_dir=str(started)))


def test_it_runs(started, monkeypatch, capfd):
    whole = ladder.rungs

    def smaller(config, folder):
        found = whole(config, folder)
        model = small(FROM_TOKENIZER, num_layers=1, num_heads=2, embed_dim=16, max_length=128)
        experiment, own = found["pretrain"]
        return found | {"pretrain": (experiment, dataclasses.replace(own, model=model))}

    monkeypatch.setattr(ladder, "rungs", smaller)
    compare_rl.run(CompareRlConfig(**TINY), Options(run_dir=str(started)))
    found = {line["method"]: line for line in map(json.loads, (started / "trials.jsonl").read_text().splitlines())}
    assert list(found) == ["start", "ppo_process"]
    assert found["start"]["kl"] == 0 and found["start"]["gain"] == 0
    own, folder = found["ppo_process"], started / "ppo_process-0.1-0"
    assert all(math.isfinite(own[name]) for name in NUMBERS)
    assert 64 <= own["tokens"] <= 64 * 8 and own["training_seconds"] > 0
    assert own["curve"] == [[64.0, 0.0]], "of answers to held-out questions, and not of steps"
    assert "objective" in (folder / "log.txt").read_text()
    metrics = (folder / "metrics.jsonl").read_text()
    assert "rewards/steps/mean" in metrics and "loss/kl_reference" in metrics and "loss/value_loss" in metrics
    assert "step 1/" not in "".join(capfd.readouterr()), "it is in the log"


def test_an_interrupted_run_is_no_trial(started, capsys):
    class Interrupted:
        @staticmethod
        def run(settings, options):
            return 130

    with pytest.raises(SystemExit) as end:
        compare_rl.quietly(Interrupted, None, started / "ppo")
    assert end.value.code == 130 and "the same command goes on with it" in capsys.readouterr().err


def test_intervals_and_cells():
    (line,) = trials.summary([dict(method="m", seed=0, kl=2.0, curve=[])], by=("method",))
    assert line["kl"] == 2.0 and math.isnan(line["kl_interval"]) and trials.cell(line, "kl", 1) == "2.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(methods=("dpo",)), "choose among ppo"),
        (dict(methods=()), "nothing to compare"),
        (dict(strengths=(0.1, 0.1)), "give each once"),
        (dict(strengths=(-0.1,)), "must not be negative"),
        (dict(iterations=0), "at least 1"),
        (dict(samples=1), "at least 2"),
        (dict(seeds=11), "at most 10"),
        (dict(prompts=9), "do not divide into 2 minibatches"),
        (dict(iterations=3), "evaluations is 4"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(UserError, match=message):
        CompareRlConfig(**change)
