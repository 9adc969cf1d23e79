"""Countdown: games can be won and are kept apart, attempts are right by chance only, and a run goes on."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import countdown, rungs
from experiments import countdown_games as games
from experiments.countdown_config import CountdownConfig
from experiments.rewards import open_rewards
from lmjax.command_line import Options
from lmjax.data.config import DataConfig
from lmjax.errors import UserError
from tests.rl.test_rewards import said

TINY = CountdownConfig(
    largest=6, documents=200, pretrain_steps=2, games=60, prompts=8, samples=2, grpo_steps=2, minibatches=1,
    max_new_tokens=12, held_out=20,
)  # fmt: skip
(REWARD,) = open_rewards([games.REWARD])


def _keys(path: Path) -> list[games.Key]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [games.Game(tuple(record["numbers"]), record["target"]).key for record in records]


@pytest.mark.parametrize("signs", ["+-", "+-*"])
def test_every_game_can_be_won_and_ways_are_worked_out_rightly(signs):
    for count in (2, 3):
        for numbers, target in games.all_games(count, 5, signs)[::3]:
            found = {text: value for order in itertools.permutations(numbers) for text, value in
                     games.ways(order, signs).items()}  # fmt: skip
            assert target in found.values()
            for text, value in found.items():
                answer = said(f"{games.MARK} {text}", numbers=list(numbers), target=target)
                assert REWARD.function(answer) == float(value == target) and eval(text) == value


def test_attempts_are_of_their_game_and_right_by_chance_only():
    random = np.random.default_rng(0)
    _, rest = games.split(random, 12, "+-", 40, 0.25)
    won = {2: [], 3: []}
    for game in games.draw(random, rest, 2000, 0.5):
        *lines, last = games.attempt(random, game, "+-", 5, 0.5).split("\n")
        assert 1 <= len(lines) <= 5 and len(set(lines)) == len(lines)
        for line in lines:
            sum_, verdict = line.split()
            assert verdict == ("yes" if int(sum_.split("=")[1]) == game.target else "no")
        right = REWARD.function(said("\n".join([*lines, last]), numbers=list(game.numbers), target=game.target))
        whole = last.removeprefix("=> ") == lines[-1].split("=")[0]
        assert right == float(whole and lines[-1].endswith("yes"))
        won[len(game.numbers)].append(right)
    assert 0.2 < np.mean(won[2]) < 0.35 and 0.08 < np.mean(won[3]) < 0.2


def test_no_held_out_game_is_in_what_is_learned_from(tmp_path):
    countdown.make_data(TINY, tmp_path)
    held_out, asked = _keys(tmp_path / rungs.HELD_OUT), _keys(tmp_path / "grpo.jsonl")
    assert len(held_out) == len(set(held_out)) == TINY.held_out and len(asked) == TINY.games
    told = set()
    for line in (tmp_path / "text.jsonl").read_text().splitlines():
        numbers, _, target = json.loads(line)["text"].split("\n")[0].partition("-> ")
        told.add(games.Game(tuple(map(int, numbers.split())), int(target)).key)
    assert len(told) > 50 and not set(held_out) & (told | set(asked))


def test_games_have_two_numbers_as_often_as_is_asked_for():
    random = np.random.default_rng(0)
    held_out, rest = games.split(random, 12, "+-", 256, 0.25)
    assert sum(len(game.numbers) == 2 for game in held_out) == 64 and len(held_out) == 256
    assert {game.key for game in held_out} | {game.key for game in rest} == {
        *games.all_games(2, 12, "+-"), *games.all_games(3, 12, "+-"),
    }  # fmt: skip
    drawn = games.draw(random, rest, 4000, 0.25)
    assert 0.22 < np.mean([len(game.numbers) == 2 for game in drawn]) < 0.28


def test_it_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(DataConfig, "cache_root", lambda self: str(tmp_path / "cache"))
    folder = tmp_path / "run"

    def play() -> str:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert countdown.run(TINY, Options(run_dir=str(folder))) == 0
        return text.getvalue()

    last = play().splitlines()[-1]
    assert last.startswith(f"run_dir={folder} before=0.") and " after=0." in last
    assert (folder / "countdown.png").exists() and (folder / "grpo" / "completions").is_dir()
    found = json.loads((folder / "countdown.json").read_text())
    assert set(found) == set(countdown.RUNGS)
    for rung in countdown.RUNGS:
        for way in countdown.WAYS:
            one = found[rung][way]
            assert one["all"]["low"] <= one["all"]["accuracy"] <= one["all"]["high"]
            assert one["all"]["accuracy"] * 20 == pytest.approx(
                one["two"]["accuracy"] * 5 + one["three"]["accuracy"] * 15
            )
            assert "->" in one["samples"][0]
    before = (folder / "pretrain" / "metrics.jsonl").read_bytes()
    del found["grpo"]
    (folder / "countdown.json").write_text(json.dumps(found))
    again = play()
    assert "== grpo" in again and "== pretrain" not in again and again.splitlines()[-1] == last
    assert (folder / "pretrain" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="other settings"):
        countdown.run(CountdownConfig(), Options(run_dir=str(folder)))


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(grpo_steps=0), "grpo_steps is 0"),
        (dict(two=1.0), "two is 1.0"),
        (dict(signs="+/"), "signs is"),
        (dict(careless=1.0), "careless is 1.0"),
        (dict(largest=1), "largest is 1"),
        (dict(samples=1), "samples is 1"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(max_new_tokens=8), "max_new_tokens is 8"),
    ],
)
def test_numbers_that_cannot_be(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        CountdownConfig(**wrong)


def test_more_held_out_games_than_there_are(tmp_path):
    with pytest.raises(UserError, match="games with two numbers"):
        countdown.make_data(CountdownConfig(largest=4, held_out=100), tmp_path)
