"""Games in turns whose optimum is known, learned by a policy that can be written down (law 10)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import rl
from lmjax.data import Prompt
from lmjax.rl.advantages import ESTIMATORS
from lmjax.rl.environments import Calculator, GuessNumber

WORDS = ["go", "1", "2", "3", "higher", "lower", "right", "?", "end"]
END = len(WORDS) - 1
POLICY = lm.Policy(lm.models.bigram(vocab_size=len(WORDS)))
PROMPTS = [Prompt(np.array([0]), "go", {"most": 3}, number=n) for n in range(2)]


class Words:
    """A word is a token."""

    def encode(self, text: str) -> np.ndarray:
        return np.array([WORDS.index(word) for word in text.split()])

    def decode(self, ids: Any) -> str:
        return " ".join(WORDS[i] for i in ids)


def roll_out(variables: Any, prompts: Any, key: Any, samples: int = 48, **options: Any) -> list[rl.Rollout]:
    return rl.play(
        POLICY, variables, Words(), prompts, GuessNumber, key, samples=samples, turns=2, max_new_tokens=3,
        max_turn_tokens=1, ends=END, **options,
    )  # fmt: skip


def learn(credit: Any, seed: int, steps: int) -> tuple[Any, float]:
    """The policy, and how often it then finds the number when it says what is likeliest."""
    plan = rl.Plan(prompts=2, samples=48, max_new_tokens=3, max_prompt=1)
    optimizer = optax.adam(0.2)
    step = lm.training.make_step(POLICY, lm.objectives.reinforce(), optimizer)
    state = lm.training.init_state(POLICY, optimizer, jax.random.key(seed))
    with rl.Judge([rl.Reward("game", rl.turn_rewards)]) as judge:
        experience = rl.Experience(
            POLICY, rl.Prompts(PROMPTS, seed), plan, roll_out=roll_out, judge=judge, join=rl.join_scores,
            credit=credit, key=jax.random.key(seed + 10),
        )  # fmt: skip
        experience.follow(state.variables, 0)
        run = rl.following(step, experience)
        for _ in range(steps):
            state, _ = run(state, next(experience))
        found = judge(roll_out(state.variables, PROMPTS, jax.random.key(99), samples=64, temperature=0.0))()
    return state.variables, float(found.total.mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_guesses_for_three_numbers_are_enough(seed):
    """Who begins in the middle always finds the number; who ignores what is said finds it in two of three games."""
    variables, found = learn(rl.outcome_credit(ESTIMATORS["trl_rloo"]), seed, 60)
    assert found >= 0.95
    best = {WORDS[i]: WORDS[int(np.argmax(row))] for i, row in enumerate(variables["params"]["table"])}
    assert (best["go"], best["higher"], best["lower"]) == ("2", "3", "1")


def test_games_say_what_cannot_be_read():
    game = GuessNumber()
    game.reset({"most": 3}, 0)
    assert game.step("1" * 5000) == ("?", 0.0, False)
    with pytest.raises(ValueError, match="'many' is no number"):
        Calculator().reset({"answer": "many"}, 0)


def test_an_environment_that_cannot_be_made_is_counted():
    def make() -> Any:
        raise OSError("no sandbox")

    variables = POLICY.init(jax.random.key(0))
    options: dict[str, Any] = dict(samples=2, turns=2, max_new_tokens=3, max_turn_tokens=1, ends=END)
    rollouts = rl.play(POLICY, variables, Words(), PROMPTS, make, jax.random.key(0), **options)
    with rl.Judge([rl.Reward("game", rl.turn_rewards)]) as judge:
        (sentence,) = judge(rollouts)().report()
    assert sentence == "the environment of 4 of 4 rollouts failed, the first: OSError: no sandbox"
