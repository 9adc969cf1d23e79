"""Ways to learn from preferences, where the reward of every answer is known: reward against KL, with intervals.

    python -m experiments.compare_preferences --run-dir runs/preferences
    python -m experiments.compare_preferences --tasks overoptimisation --betas 3 0.3 0.03

`preferences` trains reward models, and every method from one starting model at several strengths. `overoptimisation`
lets online DPO follow a judge that is nearly right, further and further. `pluralistic` has a population whose beliefs
differ learned by DPO and by GDPO. See `preference_tasks` and `pluralistic_tasks`. Every run is a line in
`trials.jsonl`; a comparison that was interrupted goes on where it stopped. At the end `table.txt`, `results.json` and
the pictures are made anew: means and 95 % intervals (Student's t) over seeds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import lmjax as lm
from experiments import trials
from experiments.compare_preferences_config import ComparePreferencesConfig
from experiments.trials import Trial
from lmjax import command_line
from lmjax.data.config import DataConfig


class Method(NamedTuple):
    """Attributes:
    objective: made of a strength.
    strengths: those that are tried; beta, or the n of best-of-n.
    learns_from: "pairs", "answers" (liked or not), "own_pairs" or "own_best" (its own samples, judged as it learns).
    """

    objective: Callable[[float], Any]
    strengths: tuple[float, ...]
    learns_from: str


def methods() -> dict[str, Method]:
    """Every method of `preferences` by name. References are cached where pairs are there beforehand."""
    terms = lm.objectives
    cached = lm.objectives.with_cached_reference
    betas = (1.0, 0.3, 0.1)
    return {
        "dpo": Method(lambda b: cached(terms.dpo(b)), betas, "pairs"),
        "cdpo": Method(lambda b: cached(terms.dpo(b, label_smoothing=0.1)), betas, "pairs"),
        "robust_dpo": Method(lambda b: cached(terms.robust_dpo(b, label_smoothing=0.1)), betas, "pairs"),
        "ipo": Method(lambda b: cached(terms.ipo(b)), (0.3, 0.1, 0.03), "pairs"),
        "simpo": Method(lambda b: terms.simpo(b, gamma=0.3 * b), (10.0, 5.0, 2.0), "pairs"),
        "apo_zero": Method(lambda b: cached(terms.apo_zero(b)), betas, "pairs"),
        "kto": Method(lambda b: cached(terms.kto(b)), betas, "answers"),
        "online_dpo": Method(lambda b: terms.dpo(b), betas, "own_pairs"),
        "best_of_n": Method(lambda n: terms.cross_entropy(), (2, 4, 16), "own_best"),
    }


Batches = Callable[[int, Any], Any]  # (index, variables so far) -> batch


class Trainer:
    """Trains the starting model of a language under one objective, as often as asked; compiled once.

    Args:
      language: the model and the config.
      objective: what is trained.
      batches: seed -> batches of a run.
      reference: whether the objective asks the starting model at every step.
    """

    def __init__(self, language: Any, objective: Any, batches: Callable[[int], Batches], reference: bool = False):
        import jax
        import optax

        from experiments.preference_tasks import schedule

        config = language.config
        self._language, self._batches = language, batches
        self._optimizer = optax.adam(schedule(config.learning_rate, config.steps))
        roles = {"reference": jax.device_put(language.variables)} if reference else {}
        self._step = lm.training.make_step(language.policy, objective, self._optimizer, roles=roles, clip_norm=1.0)

    def run(self, seed: int) -> Any:
        """Variables after a run."""
        language, batches = self._language, self._batches(seed)
        return train(language, self._step, self._optimizer, language.variables, batches, language.config.steps, seed)


def train(
    language: Any,
    step: Any,
    optimizer: Any,
    variables: Any,
    batches: Batches,
    steps: int,
    seed: int,
    trainable: tuple[str, ...] = ("params",),
) -> Any:
    """Variables after so many steps."""
    import jax
    import jax.numpy as jnp

    own = jax.tree.map(jnp.asarray, variables)
    state = lm.training.init_state(
        language.policy, optimizer, jax.random.key(1000 + seed), variables=own, trainable=trainable
    )
    for index in range(steps):
        state, _ = step(state, batches(index, state.variables))
    return state.variables


def given(rows: Any, count: int, pairs: int, seed: int) -> Batches:
    """Batches of about `pairs` of the `count` pairs that lie in rows, in another order when all were seen."""
    import numpy as np

    from experiments.preference_tasks import chosen_rows

    total = len(rows.tokens)
    size = min(total, max(1, round(pairs * total / count)))

    def batch(index: int, variables: Any) -> Any:
        epoch, place = divmod(index, total // size)
        order = np.random.default_rng([seed, epoch]).permutation(total)
        return chosen_rows(rows, order[place * size : (place + 1) * size])

    return batch


def with_reference(language: Any, rows: Any) -> Any:
    """Rows of pairs with the starting model's log-probabilities."""
    (logprobs,) = lm.evaluation.token_logprobs(language.policy, language.variables, [rows])
    return dataclasses.replace(rows, reference_logprobs=logprobs)


def sampled(language: Any, judge: Any, learns_from: str, samples: int, seed: int) -> Batches:
    """Batches of judged samples: the model's own for pairs, the starting model's for best-of-n distillation."""
    import jax
    import numpy as np

    from experiments.preference_tasks import LENGTH, questions

    config = language.config
    start = jax.device_put(language.variables)

    def batch(index: int, variables: Any) -> Any:
        random = np.random.default_rng([config.seed, 6, seed, index])
        key = jax.random.key(int(random.integers(2**31)))
        asked = questions(random, config.batch_size)
        if learns_from == "own_pairs":
            found = language.samples(variables, asked, key, judge, samples)
            return lm.generation.online_pairs(found, 2 * LENGTH)
        return lm.generation.best_of_n_batch(language.samples(start, asked, key, judge, samples), LENGTH)

    return batch


class RewardModels:
    """An ensemble of reward models on the trunk of the starting model, trained when first asked for."""

    def __init__(self, language: Any):
        self._language = language

    @functools.cached_property
    def members(self) -> list[Any]:
        """Their variables; each learned from pairs of its own."""
        import jax
        import optax

        from experiments.preference_tasks import pair_rows, schedule
        from lmjax.policy import add_value_head

        language, config = self._language, self._language.config
        trainable = ("params", "value")
        optimizer = optax.adamw(schedule(1e-3, config.reward_steps), b2=0.98, weight_decay=0.01)
        step = lm.training.make_step(
            language.policy, lm.objectives.bradley_terry(center=0.01), optimizer, trainable=trainable, clip_norm=1.0
        )
        found = []
        for member in range(config.members):
            pairs = language.pairs([3, member], config.reward_pairs)
            variables = add_value_head(language.variables, jax.random.key(member), std=0.1)
            batches = given(pair_rows(pairs), len(pairs), 2 * config.batch_size, member)
            found.append(
                train(language, step, optimizer, variables, batches, config.reward_steps, member, trainable)
            )
        return found

    def judge(self) -> Any:
        """Their mean as a judge of answers."""
        if self._language.config.judge == "truth":
            from experiments.preference_tasks import true_reward

            return true_reward
        return lm.evaluation.reward_judge(self._language.policy, self.members)

    def trial(self) -> Trial:
        """How well they tell held-out pairs apart, and whether the probability they give can be believed."""
        import numpy as np

        pairs = self._language.pairs([4], 4 * self._language.config.samples)
        random = np.random.default_rng(0)
        better_first = random.random(len(pairs)) < 0.5
        sides = [(p.first, p.second) if first else (p.second, p.first) for p, first in zip(pairs, better_first)]
        scores = lm.evaluation.ensemble_scores(
            self._language.policy, self.members, [answer.ids for side in sides for answer in side]
        )
        gaps = scores.members[:, ::2] - scores.members[:, 1::2]  # [K, pairs]
        mean, spread = gaps.mean(axis=0), scores.spread.reshape(-1, 2).mean(axis=1)
        right = (mean > 0) == better_first
        bins = lm.evaluation.calibration(1 / (1 + np.exp(-mean)), better_first)
        return {
            "pairs": len(pairs),
            "accuracies": ((gaps > 0) == better_first).mean(axis=1).tolist(),
            "ensemble_accuracy": float(right.mean()),
            "spread_right": float(spread[right].mean()),
            "spread_wrong": float(spread[~right].mean()) if not right.all() else 0.0,
            "calibration_error": bins.error,
            "predicted": bins.predicted[bins.counts > 0].tolist(),
            "observed": bins.observed[bins.counts > 0].tolist(),
            "counts": bins.counts.tolist(),
        }


Ask = Callable[[Trial, Callable[[], Trial]], None]  # a label, and how to make the trial where it is not known
Measure = Callable[[Any, int], Trial]  # (variables, seed) -> numbers


def repeat(
    ask: Ask, task: str, method: str, strength: float, seeds: int, make: Callable[[], Trainer], measure: Measure
) -> None:
    """Trains a method at a strength with every seed, and measures it."""
    trainer = functools.cache(make)
    for seed in range(seeds):
        label: Trial = {"task": task, "method": method, "strength": strength, "seed": seed}
        ask(label, lambda seed=seed: measure(trainer().run(seed), seed))  # type: ignore[misc]


def measure_start(ask: Ask, task: str, seeds: int, measure: Callable[[int], Trial]) -> None:
    """The numbers of the starting model."""
    for seed in range(seeds):
        ask({"task": task, "method": "start", "strength": 0.0, "seed": seed}, functools.partial(measure, seed))


def preferences(config: ComparePreferencesConfig, ask: Ask, language: Callable[[], Any]) -> None:
    """The starting model, the reward models, and every method at every strength."""
    from experiments import preference_tasks as tasks

    models = functools.cache(lambda: RewardModels(language()))
    ask({"task": "preferences", "method": "reward_model", "strength": 0.0, "seed": 0}, lambda: models().trial())
    measure: Measure = lambda variables, seed: language().measured(variables, seed)
    measure_start(ask, "preferences", config.seeds, lambda seed: measure(language().variables, seed))

    @functools.cache
    def rows(kind: str, seed: int) -> Any:
        pairs = language().pairs([2, seed], config.pairs)
        made, count = (tasks.pair_rows, 1) if kind == "pairs" else (tasks.answer_rows, 2)
        return with_reference(language(), made(pairs)), count * len(pairs)

    def trainer(method: Method, strength: float) -> Trainer:
        def batches(seed: int) -> Batches:
            if method.learns_from in ("pairs", "answers"):
                own, count = rows(method.learns_from, seed)
                return given(own, count, config.batch_size, seed)
            samples = 2 if method.learns_from == "own_pairs" else int(strength)
            return sampled(language(), models().judge(), method.learns_from, samples, seed)

        return Trainer(language(), method.objective(strength), batches, method.learns_from == "own_pairs")

    for name in config.methods:
        method = methods()[name]
        for strength in method.strengths:
            make = functools.partial(trainer, method, strength)
            repeat(ask, "preferences", name, strength, config.seeds, make, measure)


def overoptimisation(config: ComparePreferencesConfig, ask: Ask, language: Callable[[], Any]) -> None:
    """Online DPO whose judge is nearly right, at every beta."""
    from experiments.preference_tasks import proxy_reward

    measure: Measure = lambda variables, seed: language().measured(variables, seed)
    measure_start(ask, "overoptimisation", config.seeds, lambda seed: measure(language().variables, seed))

    def trainer(beta: float) -> Trainer:
        batches = lambda seed: sampled(language(), proxy_reward, "own_pairs", 2, seed)
        return Trainer(language(), lm.objectives.dpo(beta), batches, reference=True)

    for beta in config.betas:
        make = functools.partial(trainer, beta)
        repeat(ask, "overoptimisation", "online_dpo", beta, config.seeds, make, measure)


def pluralistic(config: ComparePreferencesConfig, ask: Ask, language: Callable[[], Any]) -> None:
    """GDPO, what is left of it without its preferences, and DPO on pairs of two kinds."""
    from experiments import pluralistic_tasks as tasks

    cached, options = lm.objectives.with_cached_reference, tasks.BELIEFS
    dpo = lambda beta: cached(lm.objectives.dpo(beta))
    betas = config.population_betas
    ways: dict[str, tuple[Callable[[float], Any], Any, tuple[float, ...]]] = {
        "gdpo": (lambda beta: cached(lm.objectives.gdpo(options, beta)), tasks.belief_rows, betas),
        "gdpo_beliefs_only": (lambda _: lm.objectives.gdpo(options, preference=0.0), tasks.belief_rows, (0.0,)),
        "dpo_opposed_beliefs": (dpo, tasks.opposed_rows, betas),
        "dpo_same_belief": (dpo, tasks.same_belief_rows, betas),
    }
    pairs = functools.cache(lambda seed: tasks.voted_pairs(language(), [seed], config.pairs))
    held_out = functools.cache(
        lambda: with_reference(language(), tasks.belief_rows(tasks.voted_pairs(language(), [99], config.samples)))
    )
    measure: Measure = lambda variables, seed: tasks.measured(language(), variables, seed, held_out())
    # Its log-ratios are all zero: it prefers neither answer.
    start = lambda seed: measure(language().variables, seed) | {"accuracy": 0.5}
    measure_start(ask, "pluralistic", config.seeds, start)

    def trainer(objective: Any, rows_of: Callable[[Any], Any]) -> Trainer:
        def batches(seed: int) -> Batches:
            rows = with_reference(language(), rows_of(pairs(seed)))
            return given(rows, len(pairs(seed)), config.batch_size, seed)

        return Trainer(language(), objective, batches)

    for name, (objective, rows_of, strengths) in ways.items():
        for beta in strengths:
            make = functools.partial(trainer, objective(beta), rows_of)
            repeat(ask, "pluralistic", name, beta, config.seeds, make, measure)


EXPERIMENTS = {"preferences": preferences, "overoptimisation": overoptimisation, "pluralistic": pluralistic}


def run(config: ComparePreferencesConfig, options: command_line.Options) -> None:
    """Makes the runs that are missing, then the tables and the pictures."""
    from experiments import pluralistic_tasks, preference_report, preference_tasks
    from experiments.support import use_compilation_cache

    use_compilation_cache(DataConfig().cache_root())
    found: list[Trial] = []
    with trials.Trials(options.run_dir, "preferences", config) as book:
        language = functools.cache(lambda: preference_tasks.language(config, book.say))
        starts = {name: language for name in ("preferences", "overoptimisation")}
        starts["pluralistic"] = functools.cache(lambda: pluralistic_tasks.undecided(config, book.say))
        ask: Ask = lambda label, make: found.append(book.ask(label, make))
        for name in config.tasks:
            EXPERIMENTS[name](config, ask, starts[name])
        lines = trials.summary([trial for trial in found if trial["method"] != "reward_model"])
        models = next((trial for trial in found if trial["method"] == "reward_model"), None)
        preference_report.write_table(lines, models, book.folder)
        for path in preference_report.pictures(lines, models, book.folder):
            print(f"picture     {path}")
        print(f"run_dir={book.folder} took={book.took:.0f}s")


if __name__ == "__main__":
    command_line.main(run, ComparePreferencesConfig())
