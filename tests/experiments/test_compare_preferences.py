"""The comparison of ways to learn from preferences: its parts, a run too short to mean anything, and a real one."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

import lmjax as lm
from experiments import compare_preferences, pluralistic_tasks, preference_tasks, trials
from experiments.compare_preferences_config import METHODS, ComparePreferencesConfig
from experiments.preference_tasks import ASK, ASKED, END, FIRST_BELIEF, FIRST_LETTER, LETTERS, Language
from lmjax.batch import BeliefBatch
from lmjax.command_line import Options
from lmjax.errors import UserError

TINY = dict(
    methods=("kto", "best_of_n"),
    betas=(1.0,),
    population_betas=(1.0,),
    seeds=2,
    pairs=16,
    steps=1,
    batch_size=4,
    members=2,
    reward_pairs=16,
    reward_steps=1,
    supervised_steps=1,
    supervised_examples=8,
    samples=8,
)


@pytest.fixture
def one_strength(monkeypatch):
    known = compare_preferences.methods()
    short = {name: method._replace(strengths=method.strengths[:1]) for name, method in known.items()}
    monkeypatch.setattr(compare_preferences, "methods", lambda: short)
    policy = lm.Policy(lm.models.small(preference_tasks.VOCABULARY, num_layers=1, embed_dim=16, num_heads=2))
    monkeypatch.setattr(preference_tasks, "small_policy", lambda: policy)
    monkeypatch.setattr(pluralistic_tasks, "small_policy", lambda: policy)


def test_a_comparison_is_written_and_gone_on_with(tmp_path, one_strength, capsys):
    config, options = ComparePreferencesConfig(**TINY), Options(run_dir=str(tmp_path))
    compare_preferences.run(config, options)
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines]
    count = {task: sum(t["task"] == task for t in trials) for task in config.tasks}
    assert count == {"preferences": 1 + 2 + 2 * 2, "overoptimisation": 2 + 2, "pluralistic": 2 + 4 * 2}
    results = json.loads((tmp_path / "results.json").read_text())
    assert [line["seeds"] for line in results["lines"]] == [2] * len(results["lines"])
    assert len(results["reward_models"]["accuracies"]) == 2 and sum(results["reward_models"]["counts"]) > 8
    table = (tmp_path / "table.txt").read_text()
    assert all(name in table for name in ("best_of_n", "dpo_opposed_beliefs", "JS distance", "reward models"))
    for name in ("frontier", "overoptimisation", "pluralistic", "calibration"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000

    (tmp_path / "trials.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # as if killed before the last one
    compare_preferences.run(config, options)
    again = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    drop = lambda trial: {name: value for name, value in trial.items() if name != "seconds"}
    assert [drop(t) for t in again] == [drop(t) for t in trials]
    with pytest.raises(UserError, match="other settings"):
        compare_preferences.run(ComparePreferencesConfig(**TINY | {"steps": 2}), options)


def test_every_method_is_known():
    assert set(compare_preferences.methods()) == set(METHODS)


def test_what_is_said_is_worth_what_it_says():
    random = np.random.default_rng(0)
    prompts = preference_tasks.questions(random, 200)
    answers = preference_tasks.spoken(random, prompts)
    assert all(len(set(prompt.tolist())) == ASKED + 1 and prompt[-1] == ASK for prompt in prompts)
    assert all(answer[-1] == END and len(answer) >= 2 for answer in answers)
    true, proxy = preference_tasks.true_reward(prompts, answers), preference_tasks.proxy_reward(prompts, answers)
    assert (proxy >= true).all() and 0.5 < np.corrcoef(true, proxy)[0, 1] < 0.99
    best = [np.append(prompt[:ASKED], END) for prompt in prompts]
    assert set(preference_tasks.true_reward(prompts, best)) == {ASKED}
    gamed = [np.append(np.repeat(prompt[:ASKED], 2), END) for prompt in prompts]
    assert set(preference_tasks.true_reward(prompts, gamed)) == {0}
    assert set(preference_tasks.proxy_reward(prompts, gamed)) == {2 * ASKED}


@pytest.fixture(scope="module")
def language():
    policy = lm.Policy(lm.models.small(preference_tasks.VOCABULARY, num_layers=1, embed_dim=16, num_heads=2))
    config = ComparePreferencesConfig(samples=64)
    return Language(policy, jax.device_get(policy.init(jax.random.key(0))), config)


def test_pairs_are_better_first_and_packed_whole(language):
    pairs = language.pairs([0], 64)
    for pair in pairs:
        prompt = pair.first.ids[: ASKED + 1]
        np.testing.assert_array_equal(prompt, pair.second.ids[: ASKED + 1])
        said = [answer.ids[answer.learned] for answer in (pair.first, pair.second)]
        scores = preference_tasks.true_reward([prompt] * 2, said) - [answer[-1] != END for answer in said]
        assert scores[0] > scores[1]
    rows = preference_tasks.pair_rows(pairs)
    assert rows.pairs.sum() == len(pairs) and rows.pairs.shape[1] > 1
    liked = preference_tasks.answer_rows(pairs)
    assert liked.pairs.sum() == 2 * len(pairs) and liked.desirable.sum() == len(pairs)
    seen = {compare_preferences.given(rows, len(pairs), 8, 0)(i, None).tokens.tobytes() for i in range(4)}
    assert len(seen) == 4


def test_the_starting_model_is_nowhere_from_itself(language):
    found = language.measured(language.variables, 0)
    assert found["kl"] == 0 and 1 <= found["length"] <= preference_tasks.LONGEST


def test_beliefs_stand_where_they_come_next(language):
    pairs = pluralistic_tasks.voted_pairs(language, [0], 64)
    rows = pluralistic_tasks.belief_rows(pairs)
    assert isinstance(rows, BeliefBatch)
    there = rows.belief_mask > 0
    assert there.sum() == 2 * len(pairs) and (rows.mask[there] == 0).all()
    assert set(rows.targets[there]) <= set(preference_tasks.BELIEFS)
    np.testing.assert_allclose(rows.beliefs.sum(axis=-1), rows.belief_mask, rtol=1e-6)
    for b, t in np.argwhere(there)[:20]:
        low = rows.tokens[b, t - ASKED] < FIRST_LETTER + LETTERS // 2
        np.testing.assert_allclose(rows.beliefs[b, t], (0.7, 0.3) if low else (0.3, 0.7), rtol=1e-6)

    pair = pairs[0]
    opposed, same = pluralistic_tasks.opposed_rows([pair]), pluralistic_tasks.same_belief_rows([pair])
    for batch, differ in ((opposed, True), (same, False)):
        place = (batch.positions == ASKED) & (batch.segments > 0)
        assert batch.mask[place].tolist() == [1, 1]
        assert (len(set(batch.targets[place])) == 2) == differ
    assert pair.second.ids[ASKED + 1] == pair.first.ids[ASKED + 1], "making rows changes no pair"


def test_believers_like_different_answers():
    prompt = np.array([2, 3, 4, 5, ASK])
    for_first, for_second = np.array([2, 3, END]), np.array([8, 9, END])
    for belief, liked in ((FIRST_BELIEF, for_first), (FIRST_BELIEF + 1, for_second)):
        scores = pluralistic_tasks.belief_reward([np.append(prompt, belief)] * 2, [for_first, for_second])
        assert sorted(scores) == [-2, 2] and (scores[0] == 2) == (liked is for_first)
    random = np.random.default_rng(0)
    prompts = [np.array([FIRST_LETTER, 3, 4, 5, ASK])] * 4000
    held = [prompt[-1] == FIRST_BELIEF for prompt in pluralistic_tasks.believed(random, prompts)]
    assert abs(np.mean(held) - 0.7) < 0.03


def test_the_interval_is_students():
    runs = [dict(task="t", method="m", strength=1.0, seed=s, reward=v) for s, v in enumerate((1.0, 2.0, 6.0))]
    (line,) = trials.summary(runs)
    assert line["reward"] == 3.0 and line["reward_interval"] == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(methods=("ppo",)), "choose among dpo"),
        (dict(tasks=("rl",)), "choose among preferences"),
        (dict(judge="me"), "choose among reward_model, truth"),
        (dict(seeds=11), "at most 10"),
        (dict(steps=0), "at least 1"),
        (dict(betas=(1.0, 0.0)), "all positive"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(UserError, match=message):
        ComparePreferencesConfig(**change)


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Law 10, as it is run, with fewer strengths and one seed: rewards rise, a judge is gamed, beliefs are kept."""
    config = ComparePreferencesConfig(
        methods=("dpo", "ipo", "apo_zero", "kto", "online_dpo"),
        betas=(3.0, 1.0, 0.1),
        population_betas=(1.0,),
        seeds=1,
        members=1,
    )
    compare_preferences.run(config, Options(run_dir=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    lines = {task: [x for x in results["lines"] if x["task"] == task] for task in config.tasks}

    assert results["reward_models"]["ensemble_accuracy"] >= 0.95
    start = next(x for x in lines["preferences"] if x["method"] == "start")["reward"]
    for method in config.methods:  # nobody else's: rewards are of fresh samples, out of 4 at the most
        best = max((x for x in lines["preferences"] if x["method"] == method), key=lambda x: x["reward"])
        assert best["reward"] > start + 1 and 0.3 < best["kl"] < 10, method

    curve = sorted(lines["overoptimisation"], key=lambda x: x["kl"])
    assert [x["strength"] for x in curve] == [0.0, 3.0, 1.0, 0.1]
    rewards, judged = ([x[name] for x in curve] for name in ("reward", "proxy"))
    assert rewards[0] + 0.4 < max(rewards[1:-1]), "the truth rises first"
    assert rewards[-1] < rewards[0] - 1, "and falls far below where it began"
    assert judged == sorted(judged), "while the judge sees better and better answers"

    by_name = {x["method"]: x for x in lines["pluralistic"]}
    assert by_name["gdpo"]["js_distance"] < 0.05 < 3 * 0.05 < by_name["dpo_opposed_beliefs"]["js_distance"]
    assert abs(by_name["gdpo"]["majority"] - 0.7) < 0.05
    assert by_name["gdpo"]["accuracy"] > 0.8 and by_name["gdpo"]["reward"] > by_name["start"]["reward"] + 0.5
