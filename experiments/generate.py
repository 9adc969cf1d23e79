"""Continues prompts with a model from a run directory or a Hugging Face directory.

python -m experiments.generate --model runs/mine --prompts "def read(" "class Node:" --max-new-tokens 100
"""

from __future__ import annotations

import json
import time

import lmjax as lm
from experiments.generate_config import GenerateConfig
from experiments.support import completion_text, open_model, output_folder, prompt_ids, use_compilation_cache
from lmjax import command_line
from lmjax.data.config import DataConfig


def run(config: GenerateConfig, options: command_line.Options) -> None:
    """Prints each prompt with its continuations, and writes them as JSON lines."""
    import jax

    use_compilation_cache(DataConfig().cache_root())
    model = open_model(config.model, step=config.step, average=config.average, tokenizer=config.tokenizer)
    folder = output_folder(options.run_dir, config.model, "generate")
    prompts = [prompt for prompt in config.prompts for _ in range(config.samples)]
    ids = [prompt_ids(model.tokenizer, prompt) for prompt in prompts]
    started = time.perf_counter()
    found = lm.generation.generate(
        model.policy,
        model.variables,
        ids,
        jax.random.key(config.seed),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        eos=model.tokenizer.eos,
    )
    found = jax.device_get(found)
    seconds = time.perf_counter() - started
    print(f"model       {model.description}")
    print(f"sampled     {found.lengths.sum()} tokens in {seconds:.1f} s, compilation included")
    rows = []
    for b, prompt in enumerate(prompts):
        text = completion_text(model.tokenizer, found.tokens[b], found.lengths[b])
        count = int(found.lengths[b])
        mean = float(found.logprobs[b, :count].mean())
        rows.append({"prompt": prompt, "text": text, "tokens": count, "mean_logprob": mean})
        print(f"\n--- {b + 1} of {len(prompts)}, {count} tokens, mean log-probability {mean:.3f}\n{prompt}{text}")
    path = folder / "generations.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    command_line.main(run, GenerateConfig())
