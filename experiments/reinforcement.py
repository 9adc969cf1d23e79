"""What experiments in reinforcement learning share: all but the objective and how credit is given.

Each iteration: prompts, rollouts, rewards, advantages, minibatches (`lmjax.rl.Experience`); the loop is that of all
training. A run directory holds its config, metrics, plots, samples, and every rollout as a line of `completions/`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lmjax as lm
from experiments import finetuning
from experiments.answers import compare
from experiments.reinforcement_config import ReinforcementConfig, TokenRewardConfig
from experiments.rewards import open_rewards
from experiments.support import OpenedModel, use_compilation_cache
from lmjax import command_line, rl
from lmjax.data.config import DataConfig
from lmjax.errors import UserError


class Method(NamedTuple):
    """What one experiment does that others do not.

    Attributes:
      objective: of the policy.
      credit: (config, how the reference's log-probabilities are read) -> how credit is given, and what of it has a
        state.
      roles: the objective's other models.
      also_trained: collections that are trained beside the policy.
      beside: variables -> variables with those collections.
      last_token: values are read behind the last token too.
      likeliest: the likeliest answer to each prompt is rolled out and judged too, to compare with.
    """

    objective: Any
    credit: Callable[[Any, rl.Reading], tuple[Any, dict[str, Any]]]
    roles: tuple[tuple[str, Any], ...] = ()
    also_trained: tuple[str, ...] = ()
    beside: Callable[[Any], Any] | None = None
    last_token: bool = False
    likeliest: bool = False


def run(config: ReinforcementConfig, options: command_line.Options, method: Method, name: str) -> int:
    """Learns, evaluates and shows; the last line printed has `reward=` and `accuracy=`, both of held-out prompts."""
    import jax
    import numpy as np

    started = time.monotonic()
    use_compilation_cache(DataConfig().cache_root())
    mesh = finetuning.make_mesh(config)
    rewards = open_rewards(config.rewards, config.reward_timeout)

    # The model to start from, and the prompts as it reads them.
    model = finetuning.open_base(config)
    config = dataclasses.replace(config, model=str(Path(config.model).expanduser().absolute()))
    named = model.template if config.data.template == "auto" else config.data.template
    template = lm.data.open_template(named, model.tokenizer, model.tokenizer_path)
    data = lm.data.load_prompts(config.data, model.tokenizer, template=template)
    plan = _plan(config, data, model, method)
    stops = [stop for stop in template.stops(model.tokenizer) if isinstance(stop, int)]
    if not stops:
        raise UserError("the tokenizer has no end-of-text marker, so rollouts would have no end: choose a template")

    # What is learned, beside what.
    folder = finetuning.run_folder(options, name)
    objective = _objective(config, method)
    roles = {"reference": _reference(config, model)} | dict(method.roles)
    beside = method.beside
    training = finetuning.set_up(
        config, model, objective, mesh, folder, roles={n: roles[n] for n in objective.roles},
        beside=None if beside is None else lambda variables, trained: beside(variables),
        also_trained=method.also_trained,
    )  # fmt: skip
    if options.plan:
        print(f"{training.plan.table}\n\n{training.plan.summary}")
        return 0
    policy, key = training.policy, jax.random.key(config.seed)
    beyond = list(range(model.tokenizer.vocab_size, policy.config.vocab_size))  # they have no text
    sampling: dict[str, Any] = dict(
        max_new_tokens=config.rollout.max_new_tokens, eos=stops, tokenizer=model.tokenizer,
        processors=[lm.generation.suppress(beyond)] if beyond else [], mesh=mesh if mesh.size > 1 else None,
    )  # fmt: skip

    def roll_out(variables: Any, prompts: Any, key: Any, **numbers: Any) -> list[Any]:
        say = functools.partial(
            rl.roll_out, policy, variables, prompts, key, slots=config.slots or None, **sampling, **numbers
        )
        found = say(samples=plan.samples, temperature=plan.temperature)
        return rl.with_likeliest(found, say(samples=1, temperature=0.0)) if method.likeliest else found

    with rl.Judge(rewards) as judge:
        asked = data.held_out[: config.evaluations or None]

        def score(variables: Any) -> tuple[dict[str, float], list[Any]]:
            """Likeliest answers to held-out prompts."""
            if not asked:
                return {}, []
            found = rl.roll_out(policy, variables, asked, key, samples=1, temperature=0.0, **sampling)
            scores = judge(found)()
            first = scores.values[0]
            return {
                "reward": float(np.nan_to_num(scores.total).mean()),
                "accuracy": float((first >= 1.0).mean()),
                "length": sum(len(rollout.tokens) for rollout in found) / len(found),
                "ended": sum(rollout.ended for rollout in found) / len(found),
            }, found

        credit, parts = method.credit(config, rl.Reading("logprobs", roles["reference"]))
        weights: Callable[[], Any] = lambda: None
        if config.curriculum:
            curriculum = parts["curriculum"] = rl.Curriculum(len(data.train))
            weights = curriculum.weights
        shown: list[Any] = []
        book = _Book(folder / "completions", config, shown, parts.get("curriculum"))
        experience = rl.Experience(
            policy, rl.Prompts(data.train, config.seed), plan, roll_out=roll_out, judge=judge, join=rl.join_scores,
            credit=credit, key=jax.random.fold_in(key, 1), teaches=rl.scores_differ, parts=parts, weights=weights,
            report=book.write, mesh=mesh,
        )  # fmt: skip

        fresh = training.begin()
        before = score(fresh.variables)
        state, start = lm.training.resume(training.checkpointer, fresh, experience)
        training = dataclasses.replace(training, begin=None)  # the state has its own arrays
        model = dataclasses.replace(model, variables=None)
        del fresh
        experience.follow(state.variables, start)
        step = rl.following(training.step, experience)
        settings = command_line.format_config(config)
        with training.checkpointer, lm.training.RunDirectory.open(folder, config, settings) as directory:
            directory.truncate(start)
            book.truncate(start // plan.steps)
            finetuning.save_model_files(folder, policy, model)
            print(
                f"model       {model.description}\nprompts     {len(data.train):,}, {len(data.held_out):,} held out"
                + (f", {data.left_out:,} too long" if data.left_out else "")
                + f"\nrewards     {', '.join(config.rewards)}\nobjective   {', '.join(objective.labels)}\n"
                f"iteration   {plan.prompts} prompts x {plan.samples} rollouts, {plan.steps} updates\n"
                f"{training.plan.summary}\nrun         {folder}"
                + (f"\nresumed     from step {start:,}" if start else ""),
                flush=True,
            )
            watch = _Watch()
            result = lm.training.run(
                step,
                state,
                experience,
                config=config.loop,
                checkpointer=training.checkpointer,
                run_directory=directory,
                writers=[*finetuning.writers(config, folder), watch],
                evaluate=(lambda state: score(state.variables)[0]) if asked else None,
                sample=lambda state: "\n\n".join(map(_shown, shown)),
            )
            if finetuning.interrupted(result, folder):
                return result.exit_code
            variables = result.state.variables
            after = score(variables)
            few = range(min(config.samples_shown, len(asked)))
            rows = [
                {"prompt": asked[i].text, "before": before[1][i].text, "after": after[1][i].text} for i in few
            ]
            compare(before[0], after[0], rows, directory.path, "held-out prompts, likeliest answers")
            if training.method is not None:
                print(finetuning.save_adapter(folder, variables))
            print("plots       " + ", ".join(str(path) for path in directory.plot()))
            print(f"took        {time.monotonic() - started:.0f} s")
            scores = "".join(f" {name}={after[0][name]:.4f}" for name in ("reward", "accuracy") if name in after[0])
            print(f"run_dir={folder} step={result.step}{scores}", flush=True)
    return 0


def reward_kl(config: TokenRewardConfig, reference: rl.Reading) -> tuple[Any, dict[str, Any]]:
    """The cost of the KL in the reward, or None, and what of it has a state."""
    if not config.reward_kl:
        return None, {}
    if not config.target_kl:
        return rl.KLReward(reference, config.reward_kl), {}
    follows = rl.AdaptiveKL(config.reward_kl, config.target_kl)
    return rl.KLReward(reference, follows), {"kl": follows}


def _plan(config: ReinforcementConfig, data: Any, model: OpenedModel, method: Method) -> rl.Plan:
    """The plan with room for the longest prompt, which the model must have positions for."""
    longest = config.rollout.max_prompt or max(len(prompt.ids) for prompt in data.train)
    if (most := max(len(prompt.ids) for prompt in data.train)) > longest:
        raise UserError(f"a prompt has {most} tokens, and rollout.max_prompt is {longest}; raise it, or lower "
                        "data.max_length")  # fmt: skip
    whole = longest + config.rollout.max_new_tokens
    if model.context is not None and whole > model.context:
        raise UserError(
            f"prompts of {longest} tokens and rollouts of {config.rollout.max_new_tokens} need {whole} positions, and "
            f"the model has {model.context}; lower rollout.max_new_tokens or data.max_length"
        )
    return dataclasses.replace(config.rollout, max_prompt=longest, last_token=method.last_token)


def _objective(config: ReinforcementConfig, method: Method) -> Any:
    objective = method.objective
    if config.reference_kl:
        objective = objective + config.reference_kl * lm.objectives.kl("reference", gradient="weighted")
    if config.entropy:
        objective = objective - config.entropy * lm.objectives.entropy()
    return objective


def _reference(config: ReinforcementConfig, model: OpenedModel) -> Any:
    """The model before training: without the adapter, or a copy."""
    if config.adapter.kind == "full":
        return model.variables
    own = tuple(model.variables)
    return lambda variables: {name: variables[name] for name in own}


class _Book:
    """Writes every rollout of an iteration as a line, and keeps some to show."""

    def __init__(self, folder: Path, config: ReinforcementConfig, shown: list[Any], curriculum: Any):
        self._folder, self._count, self._shown, self._curriculum = folder, config.samples_shown, shown, curriculum

    def truncate(self, iterations: int) -> None:
        for path in self._folder.glob("iteration_*.jsonl"):
            if int(path.stem.partition("_")[2]) >= iterations:
                path.unlink()

    def write(self, number: int, rollouts: list[Any], scores: Any, credit: Any) -> None:
        total = scores.total
        if self._curriculum is not None:
            self._curriculum.update([rollout.number for rollout in rollouts], total)
        self._shown[:] = [(r, float(s)) for r, s in list(zip(rollouts, total))[: self._count]]
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"iteration_{number:06d}.jsonl").open("w", encoding="utf-8") as file:
            for i, rollout in enumerate(rollouts):
                gain = credit.advantages[i]
                line = {
                    "prompt": rollout.prompt_text, "completion": rollout.text, "reward": _number(total[i]),
                    **{f"rewards/{n}": _number(values[i]) for n, values in zip(scores.names, scores.values)},
                    **({} if scores.given is None else {"baseline": _number(scores.given[i])}),
                    "advantage": _number(gain if isinstance(gain, float) else gain.mean() if len(gain) else 0.0),
                    "tokens": len(rollout.tokens), "finish": rollout.finish, "version": rollout.version,
                }  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for sentence in scores.report():
            print(f"warning: {sentence}", flush=True)


class _Watch:
    """Says what is wrong, once each, from the metrics as they are recorded."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def write(self, step: int, values: dict[str, float]) -> None:
        if "completions/mean_length" not in values:
            return
        for sentence in rl.diagnose(values, first=step == 1):
            kind = sentence.split("(")[0][:40]
            if kind not in self._said:
                self._said.add(kind)
                print(f"note        step {step}: {sentence}", flush=True)


def _number(value: Any) -> float | None:
    value = float(value)
    return None if value != value else round(value, 6)


def _shown(pair: Any) -> str:
    rollout, score = pair
    return f"--- {rollout.prompt_text}\n--- rollout, reward {score:.3f}, {rollout.finish}\n{rollout.text}"
