"""The comparison of fine-tuning methods, on a model and with steps too few to mean anything."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from experiments import compare_adapters, compare_tasks
from experiments.compare_config import METHODS, CompareConfig
from lmjax.command_line import Options
from lmjax.errors import UserError

TINY = dict(methods=("lora_r1", "prompt"), rates=2, extensions=1, seeds=2, steps=2, batch_size=2, base_steps=2)


def test_a_comparison_is_written_and_gone_on_with(tmp_path, capsys):
    config, options = CompareConfig(**TINY), Options(run_dir=str(tmp_path))
    compare_adapters.run(config, options)
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert {t["method"] for t in trials} == {"lora_r1", "prompt"}
    for method in ("lora_r1", "prompt"):
        own = [t for t in trials if t["method"] == method]
        rates = {t["rate"] for t in own if t["seed"] == 0}
        assert len(rates) == 3, "two, and one more where the best was at an edge, as of two one always is"
        assert sum(t["seed"] == 1 for t in own) == 1
    lines = json.loads((tmp_path / "results.json").read_text())
    assert [line["method"] for line in lines] == ["lora_r1", "prompt"] and all(line["seeds"] == 2 for line in lines)
    assert lines[1]["trained"] == 16 * 96
    assert "prompt" in (tmp_path / "table.txt").read_text() and (tmp_path / "quality.png").stat().st_size > 10_000

    kept = trials[:-2]  # as if it had been killed before the last two
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(t) + "\n" for t in kept))
    compare_adapters.run(config, options)
    again = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    drop = lambda trial: {name: value for name, value in trial.items() if name != "seconds"}
    assert [drop(t) for t in again] == [drop(t) for t in trials]
    with pytest.raises(UserError, match="other settings"):
        compare_adapters.run(CompareConfig(**TINY | {"steps": 3}), options)


def test_every_method_can_be_made():
    import lmjax as lm

    policy = lm.Policy(lm.models.small(32, num_layers=1, embed_dim=16, num_heads=2))
    made = compare_adapters.methods(policy)
    assert set(made) == set(METHODS)
    variables = policy.init(jax.random.key(0))
    for name, (method, _) in made.items():
        assert method is None or len(method.init(jax.random.key(0), variables)) == 2, name


def test_the_synthetic_examples_are_what_they_say():
    batch = compare_tasks.word_batch(np.random.default_rng(0), 64, new=True)
    words = batch.tokens[:, 1:9] - compare_tasks.FIRST_LETTER
    results = batch.targets[:, 9:17] - compare_tasks.FIRST_LETTER
    np.testing.assert_array_equal(results, (words[:, ::-1] + 1) % compare_tasks.LETTERS)
    assert batch.mask.sum(axis=1).tolist() == [9.0] * 64 and not batch.mask[:, :9].any()
    known = compare_tasks.word_batch(np.random.default_rng(0), 256, new=False)
    assert set(known.tokens[:, 0]) == set(range(2, 7))
    assert known.tokens.max() < compare_tasks.VOCABULARY


def test_the_interval_is_students():
    trial = dict(task="t", method="m", rate=1.0, trained=5, choosing_loss=1.0, held_out_accuracy=0.5, seconds=1.0)
    line = compare_adapters.summary([trial | {"seed": s, "held_out_loss": v} for s, v in enumerate((1.0, 2.0, 6.0))])
    # scipy.stats.t.interval(0.95, 2, 3, scipy.stats.sem([1, 2, 6])) = 3 -+ 6.5724...
    assert line["loss"] == 3.0 and line["loss_interval"] == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(methods=("lora",)), "choose among full"),
        (dict(tasks=("instruct",)), "give --model and --data"),
        (dict(seeds=11), "at most 10"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(UserError, match=message):
        CompareConfig(**change)
