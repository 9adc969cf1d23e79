"""Episodes, letter by letter: turns, limits, stop strings, and environments that break in every way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax as lm
from lmjax import rl
from lmjax.data import Prompt
from lmjax.errors import UserError
from lmjax.rl.environments import Calculator, GuessNumber
from lmjax.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("abcdef", eos="<end>")
EOS = TOKENIZER.eos
COUNTING = lm.Policy(lm.models.bigram(vocab_size=7))
# After each letter comes the next one, after the last the end.
TABLE = {"params": {"table": 50 * jnp.roll(jnp.eye(7), 1, axis=1)}}
RANDOM = lm.Policy(lm.models.small(7, num_layers=1, embed_dim=16, num_heads=2, max_length=64, position="learned"))


class Scripted:
    """Says what its record says."""

    def reset(self, record: Any, seed: int) -> str:
        self.lines = list(record.get("lines", []))
        if record.get("first") == "raise":
            raise OSError("no connection")
        return record.get("first", "")

    def step(self, text: str) -> tuple[Any, Any, bool]:
        said, reward, done = self.lines.pop(0)
        if said == "raise":
            raise OSError("lost")
        return said, reward, done


def prompt(text: str, **record: Any) -> Prompt:
    return Prompt(TOKENIZER.encode(text), text, record)


def play(prompts: list[Prompt], make: Any = Scripted, **options: Any) -> list[rl.Rollout]:
    options = {"samples": 1, "turns": 4, "max_new_tokens": 16, "max_turn_tokens": 8, "ends": EOS} | options
    return rl.play(COUNTING, TABLE, TOKENIZER, prompts, make, jax.random.key(0), **options)


def letters(rollout: rl.Rollout) -> str:
    """The rollout with the environment's tokens as capitals, and the end as a dot."""
    text = (TOKENIZER.decode([int(token)]) if token != EOS else "." for token in rollout.tokens)
    return "".join(t if own else t.upper() for t, own in zip(text, rollout.own))


def test_turns_follow_each_other_and_are_told_apart():
    lines = [("bd", 0.25, False), ("", 0.5, False), ("f", 1.0, True)]
    (rollout,) = play([prompt("c", first="ac", lines=lines)], max_new_tokens=24)
    # Nothing said: the policy goes on behind its own end, after which it counts from "a" again.
    assert letters(rollout) == "ACdef.BDef.abcdef."
    assert rollout.text == "def\nef\nabcdef" and rollout.finish == "done" and rollout.ended
    assert rl.turn_rewards(rollout) == [(5, 0.25), (10, 0.5), (17, 1.0)]
    assert (rollout.logprobs[~rollout.own] == 0).all() and rollout.logprobs[rollout.own] == pytest.approx(0, abs=1e-5)
    with rl.Judge([rl.Reward("game", rl.turn_rewards, weight=2.0)]) as judge:
        scores = judge([rollout])()
    assert scores.total.tolist() == [3.5] and scores.steps[0] == ((5, 0.5), (10, 1.0), (17, 2.0))


@pytest.mark.parametrize(
    ("options", "lines", "said", "finish"),
    [
        ({"turns": 2}, [("a", 0, False)] * 9, "bcdef.Abcdef.", "turns"),
        ({"max_new_tokens": 9}, [("a", 0, False)] * 9, "bcdef.Abc", "length"),
        ({"max_new_tokens": 8}, [("aaa", 0, False)] * 9, "bcdef.", "length"),  # no room for what is said
        ({"max_turn_tokens": 3}, [("a", 0, False), ("e", 0, False), ("", 0, True)], "bcdAbcdEf.", "done"),
        ({"stop": ["cd", "f"]}, [("a", 0, False), ("e", 0, False), ("", 0, True)], "bcdAbcdEf", "done"),
        ({"stop": ["de"], "ends": ()}, [("a", 0, False), ("", 0, True)], "bcdeAbcde", "done"),
    ],
)
def test_limits_and_stops(options, lines, said, finish):
    (rollout,) = play([prompt("a", lines=lines)], **options)
    assert (letters(rollout), rollout.finish) == (said, finish)
    assert len(rollout.tokens) == len(rollout.own) == len(rollout.logprobs) == len(rollout.sampling_logprobs)


def test_environments_that_break_are_counted_and_the_others_go_on():
    prompts = [
        prompt("a", lines=[("raise", 0, False)]),
        prompt("a", lines=[("b", 0.5, False), ("", 1.0, True)]),
        prompt("a", first="raise"),
        prompt("a", first="b" * 40),
        prompt("a", lines=[("a", None, False)]),
        prompt("a", lines=[("?", 0, False)]),  # not in the alphabet
        prompt("a", lines=[("", float("nan"), True)]),
    ]
    rollouts = play(prompts)
    assert [rollout.finish for rollout in rollouts] == ["failed", "done", *["failed"] * 4, "done"]
    assert letters(rollouts[1]) == "bcdef.Bcdef." and letters(rollouts[2]) == ""
    metrics = rl.episode_metrics(rollouts)
    assert metrics["environment/failed_ratio"] == 5 / 7 and metrics["num_turns/max"] == 2
    assert metrics["num_turns/min"] == 0 and "tools/call_frequency" not in metrics
    with rl.Judge([rl.Reward("game", rl.turn_rewards)]) as judge:
        scores = judge(rollouts)()
    assert np.isnan(scores.total).tolist() == [True, False, *[True] * 5] and scores.total[1] == 1.5
    assert sorted(count for count, _ in scores.failures.values()) == [1, 5]
    assert "5 of 7 rollouts" in scores.report()[0] and "OSError: lost" in scores.report()[0]
    assert scores.failures["game", "not a number"][0] == 1
    credit = rl.outcome_credit(rl.Estimator("batch", "batch"))(rollouts, scores, lambda reading: [])
    assert credit.left_out == np.isnan(scores.total).tolist()
    batch = rl.rollout_batch(rollouts, rl.lay_out(rollouts, per_row=2), left_out=credit.left_out)
    assert batch.mask.sum() == rollouts[1].own.sum() == 11


def random_play(key: int = 3, **options: Any) -> tuple[Any, list[rl.Rollout]]:
    variables = RANDOM.init(jax.random.key(0))
    prompts = [prompt("abc"[: n + 1], lines=[("fab"[: n + 1], 1.0, False)] * 9) for n in range(3)]
    options = {"samples": 2, "turns": 3, "max_new_tokens": 24, "max_turn_tokens": 6, "ends": EOS} | options
    return variables, rl.play(RANDOM, variables, TOKENIZER, prompts, Scripted, jax.random.key(key), **options)


def test_the_trainer_gives_own_tokens_the_logprobs_that_were_recorded():
    variables, rollouts = random_play(temperature=0.7, stop=["ab"])
    assert [rollout.group for rollout in rollouts] == [0, 0, 1, 1, 2, 2]
    layout = rl.lay_out(rollouts, per_row=2)
    batch = rl.rollout_batch(rollouts, layout, temperature=0.7)
    found = layout.pick(RANDOM(variables, batch).logprobs)
    for rollout, logprobs, mask in zip(rollouts, found, layout.pick(batch.mask)):
        assert 0 < rollout.own.sum() < len(rollout.own) and np.array_equal(mask, rollout.own)
        np.testing.assert_allclose(logprobs[rollout.own], rollout.logprobs[rollout.own], atol=1e-5)


def test_an_episode_comes_of_its_key():
    same, again, other = ([letters(rollout) for rollout in random_play(key)[1]] for key in (3, 3, 4))
    assert same == again != other


def test_nobody_finds_the_number_sooner_than_by_bisection():
    game, turns = GuessNumber(), []
    for seed in range(64):
        low, high, count, done = 1, 15, 0, game.reset({"most": 15}, seed) != ""
        while not done:
            guess, count = (low + high) // 2, count + 1
            said, reward, done = game.step(str(guess))
            low, high = (guess + 1, high) if said == "higher" else (low, guess - 1)
        assert reward == 1.0
        turns.append(count)
    assert set(turns) == {1, 2, 3, 4}  # log2 of 15, rounded up
    assert game.step("") == game.step("٣") == game.step("-1") == ("?", 0.0, False)


def test_the_calculator_refuses_what_is_no_arithmetic():
    tool = Calculator()
    tool.reset({"answer": "7/2"}, 0)
    assert tool.step("so <<(3+4)/2>>") == ("7/2", 0.0, False)
    assert tool.step("<<9**9**9>>") == tool.step("<<os>>") == ("error", 0.0, False)
    assert tool.step("3.5") == ("", 1.0, True)
    assert tool.step("4") == tool.step("") == ("", 0.0, True)
    assert (tool.calls, tool.failures) == (3, 2)


def test_calls_of_tools_are_counted():
    class Tool(Scripted):
        calls = failures = 0

        def step(self, text: str) -> tuple[Any, Any, bool]:
            said, reward, done = super().step(text)
            self.calls, self.failures = self.calls + (not done), self.failures + (said == "e")
            return said, reward, done

    lines = [[("b", 0, False), ("e", 0, False), ("", 1, True)], [("", 0, True)], [("e", 0, False), ("", 0, True)]]
    prompts = [prompt("a", lines=own) for own in lines]
    found = rl.episode_metrics(play(prompts, make=Tool, max_new_tokens=24))
    assert found == {
        "num_turns/mean": 2.0, "num_turns/min": 1.0, "num_turns/max": 3.0, "environment/failed_ratio": 0.0,
        "tools/call_frequency": 1.0, "tools/failure_frequency": 2 / 3,
    }  # fmt: skip
    assert rl.episode_metrics([]) == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ends": ()}, "nothing ends a turn"),
        ({"stop": [""]}, "empty"),
        ({"turns": 0}, "at least 1"),
        ({"max_turn_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 60}, "learned positions"),
    ],
)
def test_episodes_that_cannot_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        random_play(**options)


def test_episodes_become_experience():
    def roll_out(variables: Any, prompts: Any, key: Any, **options: Any) -> list[rl.Rollout]:
        options |= {"samples": 2, "turns": 2, "max_new_tokens": 16, "max_turn_tokens": 6, "ends": EOS}
        return rl.play(RANDOM, variables, TOKENIZER, prompts, Scripted, key, **options)

    prompts = rl.Prompts([prompt("a", lines=[("b", 0.0, False), ("", 1.0, True)]) for _ in range(4)])
    plan = rl.Plan(prompts=2, samples=2, max_new_tokens=16, max_prompt=1)
    with rl.Judge([rl.Reward("game", rl.turn_rewards)]) as judge:
        experience = rl.Experience(
            RANDOM, prompts, plan, roll_out=roll_out, judge=judge, join=rl.join_scores, credit=rl.process_credit(),
            key=jax.random.key(1),
        )  # fmt: skip
        experience.follow(RANDOM.init(jax.random.key(0)), 0)
        batch = next(experience)
    assert 0 < batch.mask.sum() < np.asarray(batch.segments > 1).sum()
    assert experience.metrics["reward"] == 1.0 and experience.metrics["num_turns/mean"] == 2.0
