"""Continues prompts with a model from a run directory or a Hugging Face directory.

    python -m experiments.generate --model runs/mine --prompts "def read(" "class Node:" --max-new-tokens 100
    python -m experiments.generate --model runs/mine --input prompts.jsonl --samples 4 --run-dir runs/answers

Each continuation is a line of `generations.jsonl` in the run directory, written as soon as it is done. The same command
goes on with what an interrupted one left; what a continuation is depends on the seed and its own number alone. At the
end the lines are put in the order of the prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmjax as lm
from experiments.generate_config import GenerateConfig
from experiments.prompt_files import Prompt, open_results, read_prompts
from experiments.support import (
    OpenedModel,
    all_processors,
    cache_spec,
    open_model,
    output_folder,
    prompt_ids,
    sampling_processors,
    use_compilation_cache,
)
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """One continuation to make.

    Attributes:
      index, sample: of the prompt, and of its continuation.
      ids: int32 [n], what is continued.
      shown: the same as text.
      prompt: where it comes from.
      seed: its number among all.
    """

    index: int
    sample: int
    ids: Any
    shown: str
    prompt: Prompt
    seed: int


def run(config: GenerateConfig, options: command_line.Options) -> int:
    """Continues every prompt, and prints those that were given on the command line."""
    use_compilation_cache(DataConfig().cache_root())

    # All that can be wrong without the model.
    if config.input:
        prompts = read_prompts(config.input, config.prompt_field, config.template != "none")
    else:
        prompts = [Prompt(f"prompt {i}", text) for i, text in enumerate(config.prompts or ("",), 1)]
    if config.template not in ("auto", "none"):
        lm.data.template(config.template)
    processors = sampling_processors(config)
    rule = _rule(config)

    # The model, what ends its words, and the prompts as it reads them.
    model = open_model(
        config.model, step=config.step, average=config.average, tokenizer=config.tokenizer, adapter=config.adapter
    )
    stops: list[int | str] = [*config.stop, *([] if model.tokenizer.eos is None else [model.tokenizer.eos])]
    template = None
    if any(prompt.messages is not None for prompt in prompts):
        template = model.chat_template(config.template)
        stops += template.stops(model.tokenizer)
    eos = sorted({stop for stop in stops if isinstance(stop, int)})
    jobs = _jobs(config, model, template, prompts)
    sampling = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "processors": all_processors(config, model, processors, eos, config.max_new_tokens),
        "eos": eos,
        "cache": cache_spec(config.cache, model),
    }
    grammar = _grammar(config, rule, model, eos) if rule else None

    # Where the run left off, if it did.
    folder = output_folder(options.run_dir, config.model, "generate")
    settings = _settings(config, model, prompts, rule)
    started = time.perf_counter()
    with open_results(folder, settings, len(jobs)) as results:
        before = len(results.rows)
        left = [job for job in jobs if (job.index, job.sample) not in results.rows]
        print(f"model       {model.description}", flush=True)
        if results.kept:
            print(f"kept        what {results.path} held is now in {results.kept}")
        if before:
            print(f"resumed     {before} of {len(jobs)} were there already", flush=True)
        texts = () if rule else tuple(stop for stop in stops if isinstance(stop, str))
        shown = _Shown(len(jobs), before)
        try:
            if grammar is None:
                found = _served(config, model, jobs, left, sampling, texts, shown)
            else:
                found = _constrained(config, model, jobs, left, sampling, grammar)
            for job, result in found:
                row = _row(config, model, job, result, (*texts, *eos))
                results.add(row)
                shown.add(row)
        except KeyboardInterrupt:
            shown.close()
            print(f"interrupted: {len(results.rows)} of {len(jobs)} are in {results.path}; the same command goes on")
            return 130
        finally:
            shown.close()
        rows = results.finish()

    seconds = time.perf_counter() - started
    tokens = sum(row["tokens"] for row in rows)
    if left:
        speed = shown.tokens / seconds
        print(f"generated   {shown.tokens} tokens in {seconds:.1f} s, {speed:.0f} tokens/s, compilation included")
    if not config.input:
        for row in rows:
            number = row["index"] * config.samples + row["sample"] + 1
            mean = "" if row["mean_logprob"] is None else f", mean log-probability {row['mean_logprob']:.3f}"
            print(f"\n--- {number} of {len(rows)}, {row['tokens']} tokens, ended by {row['finish']}{mean}")
            print(row["prompt"] + row["text"])
        print()
    print(f"written     {len(rows)} continuations, {tokens} tokens, to {results.path}")
    return 0


def _jobs(config: GenerateConfig, model: OpenedModel, template: Any, prompts: list[Prompt]) -> list[Job]:
    """Every continuation to make, after checks that name the prompt's line."""
    context, jobs = model.context, []
    room = None if context is None else context - config.max_new_tokens
    if room is not None and room < 1:
        raise UserError(f"max_new_tokens is {config.max_new_tokens} but the model has {context} positions; lower it")
    for index, prompt in enumerate(prompts):
        try:
            if prompt.messages is None:
                shown = prompt.text or ""
                ids = prompt_ids(model.tokenizer, shown, model.markers)
            else:
                ids = template.prompt(model.tokenizer, prompt.messages)
                shown = template.render(prompt.messages, add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from None
        if ids.max() >= model.policy.config.vocab_size:
            raise UserError(
                f"{prompt.where}: the tokenizer makes the id {ids.max()} but the model's vocabulary is "
                f"{model.policy.config.vocab_size}; use the model's own tokenizer"
            )
        if room is not None and len(ids) > room:
            if not config.truncate_left:
                raise UserError(
                    f"{prompt.where} has {len(ids)} tokens, which with max_new_tokens {config.max_new_tokens} is more "
                    f"than the model's {context} positions; shorten one of them, or give --truncate-left"
                )
            ids = ids[-room:]
        for sample in range(config.samples):
            jobs.append(Job(index, sample, ids, shown, prompt, index * config.samples + sample))
    return jobs


def _served(
    config: GenerateConfig, model: OpenedModel, jobs: list[Job], left: list[Job], sampling: dict,
    texts: tuple[str, ...], shown: _Shown,
) -> Iterator[tuple[Job, Any]]:  # fmt: skip
    """What is left, each as it finishes, by continuous batching; a row that holds a stop text makes room."""
    import jax

    from lmjax.generation import batching

    reading: dict[int, tuple[Any, int]] = {}  # by request: its text, and how many tokens of it were read

    def stopped(number: int, tokens: Any) -> bool:
        stream, read = reading.get(number) or (lm.tokenizers.TextStream(model.tokenizer, texts), 0)
        stream.push(tokens[read:])
        reading[number] = stream, len(tokens)
        return stream.stopped is not None

    found = batching.serve(
        model.policy,
        model.variables,
        [batching.Request(job.ids, seed=job.seed) for job in left],
        jax.random.key(config.seed),
        slots=min(config.slots, len(jobs)),
        report=shown.report,
        until=stopped if texts else None,
        # Of all jobs, so that a resumed run has the shapes of one that was not interrupted.
        max_prompt=max(len(job.ids) for job in jobs),
        **sampling,
    )
    for result in found:
        reading.pop(result.number, None)
        yield left[result.number], result


def _constrained(
    config: GenerateConfig, model: OpenedModel, jobs: list[Job], left: list[Job], sampling: dict, grammar: Any
) -> Iterator[tuple[Job, Any]]:
    """What is left, each under the grammar, in batches that are the same however often the run was interrupted."""
    import jax

    from lmjax.generation.batching import Result

    rows, wanted = min(config.slots, len(jobs)), {job.seed for job in left}
    key, prepared = jax.random.key(config.seed), lm.generation.prepare(model.policy, model.variables, rows)
    for number in sorted({seed // rows for seed in wanted}):
        batch = jobs[number * rows : (number + 1) * rows]
        filled = batch + batch[-1:] * (rows - len(batch))  # of one size, so that nothing is compiled anew
        found = lm.generation.generate(
            model.policy,
            prepared,
            [job.ids for job in filled],
            jax.random.fold_in(key, number),
            constraints=[grammar.fresh() for _ in filled],
            **sampling,
        )
        found = jax.device_get(found)
        for b, job in enumerate(batch):
            n = int(found.lengths[b])
            parts = found.tokens[b, :n], found.logprobs[b, :n], found.sampling_logprobs[b, :n], int(found.finish[b])
            if job.seed in wanted:
                yield job, Result(job.seed, *parts)


def _row(config: GenerateConfig, model: OpenedModel, job: Job, result: Any, stops: tuple[int | str, ...]) -> dict:
    """A line of the file. A stop text, and what came behind it, is neither in the text nor counted."""
    stream = lm.tokenizers.TextStream(model.tokenizer, stops)
    stream.push(result.tokens)
    stream.finish()
    finish, count = lm.generation.FINISH[result.finish], len(result.tokens)
    if isinstance(stream.stopped, str):
        finish, count = "stop", stream.kept
    logprobs = [round(float(value), 5) for value in result.logprobs[:count]]
    row: dict[str, Any] = {"index": job.index, "sample": job.sample, "prompt": job.shown, "text": stream.text}
    row |= {"tokens": count, "finish": finish}
    row["mean_logprob"] = round(sum(logprobs) / count, 5) if count else None
    if config.logprobs:
        row |= {"ids": result.tokens[:count].tolist(), "logprobs": logprobs}
    if job.prompt.messages is not None:
        row["messages"] = job.prompt.messages
    return row | ({"record": job.prompt.record} if job.prompt.record else {})


def _rule(config: GenerateConfig) -> str:
    """The text of the grammar that outputs have to follow; empty for none."""
    path = config.json_schema or config.lark
    try:
        return Path(path).expanduser().read_text(encoding="utf-8") if path else config.regex
    except (OSError, UnicodeDecodeError) as error:
        name = "json_schema" if config.json_schema else "lark"
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{name} {path} cannot be read ({reason}); give a file") from None


def _grammar(config: GenerateConfig, rule: str, model: OpenedModel, eos: list[int]) -> Any:
    kind = "json_schema" if config.json_schema else "lark" if config.lark else "regex"
    make = getattr(lm.generation, kind)
    return make(rule, model.tokenizer, model.policy.config.vocab_size, eos=eos)


def _settings(config: GenerateConfig, model: OpenedModel, prompts: list[Prompt], rule: str) -> dict[str, Any]:
    """All that settles the results: the config, with content in the place of paths."""
    import jax

    settings = dataclasses.asdict(config)
    elsewhere = "model step average tokenizer adapter prompts input prompt_field json_schema regex lark".split()
    for name in elsewhere if rule else [*elsewhere, "slots"]:
        del settings[name]
    hashed = hashlib.sha256()
    for prompt in prompts:
        hashed.update(json.dumps([prompt.text, prompt.messages, prompt.record], default=str).encode())
    some = jax.jit(lambda tree: [leaf.reshape(-1)[:8] for leaf in jax.tree.leaves(tree)])(model.variables)
    weights = hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.device_get(some)))
    weights.update(model.tokenizer.fingerprint().encode())
    return {
        "model": weights.hexdigest()[:16],
        "prompts": hashed.hexdigest()[:16],
        "rule": rule,
        **settings,
    }


class _Shown:
    """What a person sees meanwhile."""

    def __init__(self, total: int, before: int):
        from lmjax.training.progress import Progress

        self._progress = Progress(total, before, known_hardware=True, unit="done")
        self._done, self._began, self.tokens = before, time.perf_counter(), 0
        self._first: tuple[float, int] | None = None
        self._speed = 0.0

    def report(self, progress: Any) -> None:
        """Of `serve`: the speed is that of all rows, from the first look on, which came after compiling."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now, progress.used
        elif now > self._first[0]:
            self._speed = (progress.used - self._first[1]) / (now - self._first[0])
        self._progress.update(self._done, {"tokens_per_second": self._speed} if self._speed else {})

    def add(self, row: dict[str, Any]) -> None:
        self._done += 1
        self.tokens += row["tokens"]
        speed = self._speed or self.tokens / (time.perf_counter() - self._began)
        self._progress.update(self._done, {"tokens_per_second": speed})

    def close(self) -> None:
        self._progress.close()


if __name__ == "__main__":
    command_line.main(run, GenerateConfig())
