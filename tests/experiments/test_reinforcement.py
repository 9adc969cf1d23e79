"""Reinforcement learning from the command line, end to end: three experiments, resumption, rewards by name and file."""

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
from experiments import grpo, ppo, reinforce
from experiments.reinforcement_config import GrpoConfig, PpoConfig, ReinforceConfig
from experiments.rewards import open_rewards
from experiments.support import open_model
from lmjax.command_line import Options
from lmjax.data.config import DataConfig
from lmjax.data.prompt_config import PromptConfig
from lmjax.errors import UserError
from lmjax.rl.plan import Plan
from lmjax.tokenizers.simple import ByteTokenizer
from lmjax.training.config import CheckpointConfig, LoopConfig, ScheduleConfig
from tests.rl.test_rewards import said

MODEL = dict(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, max_length=64, init_std=0.2)
PLAN = Plan(prompts=8, samples=4, max_new_tokens=4, max_prompt=0)
REWARD = """
def vowels(rollout):
    if rollout.record["n"] == 3:
        raise ValueError("no answer")
    return sum(byte in b"aeiou" for byte in rollout.tokens.tolist()) / 4
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that says one of a few letters, and a file of prompts and a reward beside it."""
    folder = tmp_path_factory.mktemp("base")
    config = lm.models.llama(258, **MODEL)
    variables = lm.Policy(config).init(jax.random.key(0))
    lm.interop.save_huggingface(folder, config, variables)
    ByteTokenizer(bos="<s>", eos="</s>").save(folder)
    records = [{"prompt": "ab" * (n % 3 + 1), "n": n} for n in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "mine.py").write_text(REWARD)
    return folder


def _config(kind: Any, base: Path, **fields: Any) -> Any:
    return dataclasses.replace(
        kind(
            model=str(base),
            data=PromptConfig(path=str(base / "prompts.jsonl"), template="none", validation_fraction=0.2),
            rewards=(f"{base / 'mine.py'}:vowels",),
            rollout=PLAN,
            schedule=ScheduleConfig(kind="constant", peak=2e-2, warmup_steps=1),
            loop=LoopConfig(steps=12, log_every=1, eval_every=6, prefetch=0),
            checkpoint=CheckpointConfig(every=5, keep_last=3, keep_best=0),
        ),
        **fields,
    )


def _run(experiment: Any, config: Any, folder: Path) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert experiment.run(config, Options(run_dir=str(folder))) == 0
    return text.getvalue()


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward" in line]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataConfig, "cache_root", lambda self: str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "run"
    return folder, _run(grpo, _config(GrpoConfig, base, reference_kl=0.05, entropy=0.01), folder)


def test_it_learns_and_says_so(whole):
    folder, text = whole
    metrics = _metrics(folder)
    assert len(metrics) == 12
    assert np.mean([line["reward"] for line in metrics[-3:]]) > metrics[0]["reward"] + 0.1
    first = metrics[0]
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5) and first["loss/kl_reference"] == pytest.approx(0, abs=1e-6)
    assert {"rewards/vowels/mean", "completions/mean_length", "frac_reward_zero_std", "rollout/entropy"} <= set(first)
    assert "warning: the reward 'vowels'" in text and "raised" in text
    assert "reward=" in text.splitlines()[-1] and "accuracy=" in text.splitlines()[-1]
    lines = [json.loads(line) for line in (folder / "completions" / "iteration_000000.jsonl").read_text().splitlines()]
    assert len(lines) == 32 and {"prompt", "completion", "reward", "advantage", "finish"} <= set(lines[0])
    missing = [line for line in lines if line["reward"] is None]
    assert missing and all(line["advantage"] == 0 for line in missing)
    assert {"reward.png", "completions.png", "overview.png"} <= {path.name for path in (folder / "plots").iterdir()}
    assert (folder / "samples" / "step_00000012.txt").read_text().startswith("--- ab")
    assert open_model(str(folder)).policy.config.vocab_size == 258


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(whole, base, tmp_path):
    """Law 8 on the whole loop, in the middle of an iteration's minibatches too."""
    config = _config(
        GrpoConfig, base, curriculum=True, reference_kl=0.05,
        rollout=dataclasses.replace(PLAN, prompts=16, epochs=2, minibatches=2, stale=1),
    )  # fmt: skip
    _run(grpo, config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for path in (tmp_path / "part" / "checkpoints").iterdir():
        if path.name.endswith(("10", "12")):
            shutil.rmtree(path)
    text = _run(grpo, config, tmp_path / "part")
    assert "resumed     from step 5" in text
    ends = [open_model(str(tmp_path / name)).variables for name in ("whole", "part")]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    clocks = {"step_seconds", "tokens_per_second"}
    records = [[{k: v for k, v in line.items() if k not in clocks} for line in _metrics(tmp_path / name)]
               for name in ("whole", "part")]  # fmt: skip
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("experiment", "kind", "fields"),
    [
        (grpo, GrpoConfig, {"estimator": "pass_at_2"}),
        (reinforce, ReinforceConfig, {"baseline": "running", "whitened": True}),
        (reinforce, ReinforceConfig, {"baseline": "leave_one_out", "whitened": True, "reward_kl": 0.05,
                                      "target_kl": 1.0, "gamma": 0.98}),
        (reinforce, ReinforceConfig, {"baseline": "greedy", "slots": 8}),
        (ppo, PpoConfig, {"reward_kl": 0.05, "target_kl": 1.0, "position": "after_eos", "whiten_rewards": True}),
        (ppo, PpoConfig, {"critic": "model",
                          "rollout": dataclasses.replace(PLAN, prompts=16, samples=1, minibatches=2)}),
    ],
)  # fmt: skip
def test_the_other_experiments(experiment, kind, fields, base, tmp_path):
    loop = LoopConfig(steps=30, log_every=1, eval_every=0, prefetch=0)
    text = _run(experiment, _config(kind, base, **fields | {"loop": loop}), tmp_path / "run")
    metrics = _metrics(tmp_path / "run")
    assert np.mean([line["reward"] for line in metrics[-6:]]) > metrics[0]["reward"] + 0.05
    assert "reward=" in text.splitlines()[-1]
    if fields.get("baseline") == "greedy":
        line = json.loads((tmp_path / "run" / "completions" / "iteration_000000.jsonl").read_text().splitlines()[0])
        assert line["advantage"] == pytest.approx(line["reward"] - line["baseline"]) and "baseline/mean" in metrics[0]
    if kind is PpoConfig:
        assert {"value/error", "val/explained_variance", "loss/value_loss"} <= set(metrics[-1])
        assert metrics[-1]["loss/value_loss"] != metrics[0]["loss/value_loss"]


def test_an_adapter_learns_beside_its_reference(base, tmp_path):
    from experiments.adapter_config import AdapterConfig

    config = _config(GrpoConfig, base, adapter=AdapterConfig("lora", rank=4), reference_kl=0.05)
    text = _run(grpo, config, tmp_path / "run")
    assert "adapter" in text and _metrics(tmp_path / "run")[0]["loss/kl_reference"] == pytest.approx(0, abs=1e-6)


def test_rewards_by_name_and_by_file(base):
    number, half, own = open_rewards(
        ["exact_number(where='last')", "0.5 * ended()", f"-2 * {base / 'mine.py'}:vowels"]
    )
    assert (number.name, half.weight, own.name, own.weight) == ("exact_number", 0.5, "vowels", -2.0)
    assert number.function(said("it is 4", answer=4)) == 1.0
    apart = open_rewards([f"{base / 'mine.py'}:vowels"], timeout=5.0)[0]
    assert apart.apart and apart.timeout == 5.0


def test_penalties_by_name():
    long, end, short, again = open_rewards(
        ["0.5 * overlong(6, buffer=4)", "without_end(exact_number(where='last'), 1.0)",
         "cosine_length(function=exact_number(), limit=8, right=(2, 1))", "repetition(length=1)"]
    )  # fmt: skip
    assert [long.name, end.name, short.name, again.name] == ["overlong", "without_end", "cosine_length", "repetition"]
    right = said("it is 4", answer=4)
    assert long.weight == 0.5 and long.function(right) == -0.5
    assert end.function(right) == 1.0 and end.function(said("it is 4", finish="length", answer=4)) == 0.0
    assert short.function(right) == pytest.approx(1.5) and again.function(right) == 0.0


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["exact_nmber()"], "did you mean exact_number"),
        (["overlng(6, 4)"], "did you mean overlong"),
        (["overlong(4, 6)"], "the buffer is 6"),
        (["overlong()"], "does not work"),
        (["without_end(exact_nmber(), 1.0)"], "did you mean exact_number"),
        (["without_end(penalty, 1.0)"], "does not work"),
        (["exact_number(colour=1)"], "does not work"),
        (["exact_number"], "not understood"),
        (["nowhere.py:f"], "no file nowhere.py"),
        (["ended()", "ended()"], "called 'ended'"),
        (["x1 * ended()"], "not understood"),
    ],
)
def test_rewards_that_cannot_be(texts, sentence):
    with pytest.raises(UserError, match=sentence):
        open_rewards(texts)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (GrpoConfig, {"estimator": "best"}, "no estimator 'best'"),
        (GrpoConfig, {"estimator": "pass_at_5"}, "sample at least 5"),
        (GrpoConfig, {"rollout": dataclasses.replace(PLAN, max_new_tokens=100)}, "positions"),
        (GrpoConfig, {"rollout": dataclasses.replace(PLAN, max_prompt=2)}, "max_prompt is 2"),
        (GrpoConfig, {"objective": "grpoo()"}, "did you mean grpo"),
        (PpoConfig, {"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input(kind, fields, sentence, base, tmp_path):
    with pytest.raises(UserError, match=sentence):
        (grpo if kind is GrpoConfig else ppo).run(_config(kind, base, **fields), Options(run_dir=str(tmp_path / "run")))


def test_configs_that_cannot_be():
    with pytest.raises(UserError, match="prefetch"):
        GrpoConfig(loop=LoopConfig())
    for kind in (GrpoConfig, ReinforceConfig):
        with pytest.raises(UserError, match="single rollout"):
            kind(rollout=dataclasses.replace(PLAN, samples=1))
    with pytest.raises(UserError, match="no rewards"):
        GrpoConfig(rewards=())
    with pytest.raises(UserError, match="target needs"):
        PpoConfig(target_kl=1.0)
