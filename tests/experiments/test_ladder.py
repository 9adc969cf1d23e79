"""The ladder: its data keep apart, every rung runs, and a climb that was interrupted goes on."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import arithmetic, ladder
from experiments.ladder_config import LadderConfig
from lmjax.command_line import Options
from lmjax.data.config import DataConfig
from lmjax.errors import UserError
from lmjax.rl import verifiers
from tests.rl.test_rewards import said

TINY = LadderConfig(
    documents=60, pretrain_steps=3, solutions=40, sft_steps=2, pairs=60, dpo_steps=2, grpo_steps=2, held_out=24
)


def test_solutions_are_right_and_wrong_ones_are_wrong():
    random = np.random.default_rng(0)
    check = verifiers.exact_number(where="whole", mark=arithmetic.MARK)
    for asked in arithmetic.questions(random, 50, 9):
        assert eval(asked.prompt[3:].partition("=")[0]) == asked.answer
        pair = arithmetic.preference(random, asked)
        assert check(said(pair["chosen"], answer=asked.answer)) == 1.0
        assert check(said(pair["rejected"], answer=asked.answer)) == 0.0


def test_rungs_share_no_question_with_what_is_held_out(tmp_path):
    ladder.make_data(TINY, tmp_path)
    prompts = {
        name: {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("sft", "dpo", "grpo", "held_out")
    }
    assert len(prompts["held_out"]) == 24 and len(prompts["sft"]) == 40
    assert not prompts["held_out"] & (prompts["sft"] | prompts["dpo"] | prompts["grpo"])
    assert not prompts["sft"] & prompts["dpo"]


def test_it_climbs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(DataConfig, "cache_root", lambda self: str(tmp_path / "cache"))
    monkeypatch.setattr(ladder, "accuracy", lambda folder, rung: dict(accuracy=0.5, low=0.4, high=0.6, samples=["?"]))
    folder = tmp_path / "ladder"

    def climb() -> str:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert ladder.run(TINY, Options(run_dir=str(folder))) == 0
        return text.getvalue()

    assert "grpo=0.5000" in climb().splitlines()[-1]
    assert (folder / "ladder.png").exists() and (folder / "grpo" / "completions").is_dir()
    found = json.loads((folder / "ladder.json").read_text())
    del found["grpo"]
    (folder / "ladder.json").write_text(json.dumps(found))
    again = climb()
    assert "== grpo" in again and "== dpo" not in again
    with pytest.raises(UserError, match="other settings"):
        ladder.run(LadderConfig(), Options(run_dir=str(folder)))


def test_ladders_that_cannot_be():
    with pytest.raises(UserError, match="ask fewer"):
        LadderConfig(largest=3)
    with pytest.raises(UserError, match="sft_steps is 0"):
        LadderConfig(sft_steps=0)


def test_the_accuracy_of_a_rung_is_that_of_its_answers(tmp_path):
    """On a model that knows nothing: all wrong, in an interval that says so."""
    import jax

    import lmjax as lm

    ladder.make_data(TINY, tmp_path / "data")
    config = lm.models.llama(257, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, max_length=64)
    lm.interop.save_huggingface(Path(tmp_path / "sft"), config, lm.Policy(config).init(jax.random.key(0)))
    lm.tokenizers.ByteTokenizer(eos="<|endoftext|>").save(tmp_path / "sft")
    found = ladder.accuracy(tmp_path, "sft")
    assert found["accuracy"] == 0.0 and found["low"] == pytest.approx(0.0, abs=1e-9) and 0.05 < found["high"] < 0.3
    assert found["samples"][0].startswith("Q: ")
