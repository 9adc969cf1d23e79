"""DPO beside TRL on PyTorch, in one run: time of a step, tokens a second, memory, losses.

    python -m experiments.benchmark_preferences --rounds 5

The same Llama (6 layers, 384, float32) and the same pairs on both sides, all in processes of their own that take turns.
TRL's side is its `DPOTrainer` as users make it, on a tokenizer of plain words: its own data preparation, collator and
`training_step` (which reports entropy and accuracy of tokens besides, as it always does), eager PyTorch with SDPA,
fused AdamW, no gradient checkpointing. What is reported is the median over rounds of ratios of neighbouring windows,
and how far the losses of the first steps, updates between them, lie apart.

Cases: all parameters or LoRA; the reference run in every step or its log-probabilities computed beforehand (`-cached`);
a vocabulary of 4,096 or 32,768 words (`wide-`); answers of one length, or of lengths as they come (`mixed-`: TRL pads
to the longest, lmjax packs pairs into rows). Memory is the growth of the resident set from after the libraries were
imported to its peak in the steps. The case `memory` needs no clock: bytes of the arguments and the temporary memory of
compiled steps, with a reference by LoRA, by a second model, and with 131,072 words.

Needs the `dev` extra and TRL (`pip install trl`). Results are appended to `docs/benchmarks/preferences.jsonl`.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import benchmarking

LAYERS, WIDTH, HEADS, MLP, RANK = 6, 384, 6, 1024, 16
BATCHES, STEPS, WINDOW = 4, 4, 2  # batches; steps whose losses are compared; steps of a timed window
LEARNING_RATE, BETA = 1e-4, 0.1
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MANY_WORDS = 2**17


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    lora: train low-rank matrices, and not all parameters.
    cached: the reference's log-probabilities are there before.
    words: size of the vocabulary.
    mixed: answers of many lengths.
    """

    lora: bool = False
    cached: bool = False
    words: int = 4096
    mixed: bool = False


CASES = {
    "full": Case(),
    "full-cached": Case(cached=True),
    "lora": Case(lora=True),
    "lora-cached": Case(lora=True, cached=True),
    "wide-full": Case(words=32768),
    "wide-full-cached": Case(cached=True, words=32768),
    "wide-lora": Case(lora=True, words=32768),
    "wide-lora-cached": Case(lora=True, cached=True, words=32768),
    "mixed-full": Case(mixed=True),
    "mixed-lora": Case(lora=True, mixed=True),
}
MEMORY = "memory"
Triple = tuple[list[int], list[int], list[int]]


def eos(words: int) -> int:
    """The marker at the end of answers; the id after it is for padding."""
    return words - 2


def pairs(case: Case) -> list[list[Triple]]:
    """Batches of prompts, chosen and rejected answers."""
    random = np.random.default_rng(0)
    size = 12 if case.mixed else 4
    marker = [eos(case.words)]

    def length(least: int, most: int) -> int:
        return int(np.exp(random.uniform(np.log(least), np.log(most)))) if case.mixed else most

    def draw(count: int) -> list[int]:
        return random.integers(0, eos(case.words), count).tolist()

    def triple() -> Triple:
        return draw(length(8, 64)), draw(length(8, 127)) + marker, draw(length(8, 127)) + marker

    return [[triple() for _ in range(size)] for _ in range(BATCHES)]


# The models that both sides read ------------------------------------------------------------------


def prepare(folder: str, words: int) -> None:
    """Writes the reference, a policy near it, and an adapter of the reference."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=words - 1,
        bos_token_id=None,
        eos_token_id=eos(words),
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(f"{folder}/reference")

    def move(parameters: Any, size: float) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(size * torch.randn_like(parameter))

    low_rank = peft.get_peft_model(model, _lora())
    move((p for name, p in low_rank.named_parameters() if "lora_B" in name), 0.002)
    low_rank.save_pretrained(f"{folder}/adapter")
    model = low_rank.unload()
    move(model.parameters(), 0.001)
    model.save_pretrained(f"{folder}/policy")


def _lora() -> Any:
    import peft

    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")


# TRL ----------------------------------------------------------------------------------------------


def trl_side(name: str, folder: str) -> tuple[Callable[[int], float], dict[str, Any]]:
    """A step of TRL."""
    import datasets
    import peft
    import torch
    import trl
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    case = CASES[name]
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    read = lambda: LlamaForCausalLM.from_pretrained(f"{folder}/reference", attn_implementation="sdpa")
    text = lambda ids: "".join(f" w{number}" for number in ids if number != eos(case.words))
    batches = pairs(case)
    records = [dict(prompt=text(p), chosen=text(c), rejected=text(r)) for batch in batches for p, c, r in batch]
    options = trl.DPOConfig(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=len(batches[0]),
        learning_rate=LEARNING_RATE,
        beta=BETA,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        precompute_ref_log_probs=case.cached,
    )
    start = time.perf_counter()
    trainer = trl.DPOTrainer(
        model=read(),
        ref_model=None if case.cached or case.lora else read(),
        args=options,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=benchmarking.word_tokenizer(case.words),
        peft_config=_lora() if case.lora else None,
    )
    made = time.perf_counter() - start
    if case.lora:
        weights = load_file(f"{folder}/adapter/adapter_model.safetensors")
        peft.set_peft_model_state_dict(trainer.model, weights)
    else:
        trainer.model.load_state_dict(load_file(f"{folder}/policy/model.safetensors"), strict=False)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    size = len(batches[0])
    rows = [[trainer.train_dataset[b * size + n] for n in range(size)] for b in range(BATCHES)]
    collated = [trainer.data_collator(batch) for batch in rows]
    meant = [sum(len(p) + len(answer) for p, *answers in batch for answer in answers) for batch in batches]
    assert [int(batch["attention_mask"].sum()) for batch in collated] == meant

    def step(index: int) -> float:
        loss = trainer.training_step(trainer.model, dict(collated[index]))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, {
        "version": f"torch {torch.__version__}, trl {trl.__version__}",
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "tokens": meant,
        "cells": collated[0]["input_ids"].numel(),
        "made_s": round(made, 2),
    }


# lmjax --------------------------------------------------------------------------------------------


def pair_batches(case: Case) -> list[Any]:
    """The same pairs as batches: a pair a row where all are of one length, else packed."""
    from lmjax.data.packing import best_fit
    from lmjax.data.preferences import Answer, Pair, pair_batch

    def answer(prompt: list[int], ids: list[int]) -> Answer:
        whole = np.array(prompt + ids, np.int32)
        return Answer(whole, np.arange(len(whole)) >= len(prompt))

    made = [[Pair(answer(p, c), answer(p, r)) for p, c, r in batch] for batch in pairs(case)]
    length = max(512 if case.mixed else 0, max(pair.length(True) for batch in made for pair in batch))
    packed = []
    for batch in made:
        order, starts = best_fit(np.array([pair.length(True) for pair in batch]), length)
        packed.append([[batch[n] for n in order[a:b]] for a, b in itertools.pairwise(starts)])
    rows, fullest = max(map(len, packed)), max(len(row) for batch in packed for row in batch)
    scored = max(sum(int(answer.learned.sum()) for pair in row for answer in (pair.first, pair.second))
                 for batch in packed for row in batch)  # fmt: skip
    return [
        pair_batch([*batch, *[[]] * (rows - len(batch))], length, fullest, shared=True, scored=scored)
        for batch in packed
    ]


def lmjax_side(name: str, folder: str) -> tuple[Callable[[int], float], dict[str, Any]]:
    """The same through lmjax, from the same files."""
    import jax
    import optax

    import lmjax as lm
    from lmjax import adapters
    from lmjax.evaluation.logprobs import token_logprobs

    case = CASES[name]
    config, reference = lm.interop.load_huggingface(f"{folder}/reference")
    policy = lm.Policy(config)
    batches = pair_batches(case)
    tokens = [sum(2 * len(p) + len(c) + len(r) for p, c, r in batch) for batch in pairs(case)]
    facts: dict[str, Any] = {}
    if case.cached:
        list(token_logprobs(policy, reference, batches[:1]))  # compiles
        start = time.perf_counter()
        found = list(token_logprobs(policy, reference, batches))
        facts["cache_ms"] = round(1e3 * (time.perf_counter() - start) / len(batches), 1)
        batches = [dataclasses.replace(b, reference_logprobs=x) for b, x in zip(batches, found, strict=True)]
    if case.lora:
        variables = adapters.load(f"{folder}/adapter", reference, policy)
    else:
        variables = lm.interop.load_huggingface(f"{folder}/policy")[1]
    roles = {} if case.cached else {"reference": adapters.without if case.lora else reference}
    trainable = ("lora",) if case.lora else ("params",)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    state = lm.training.init_state(policy, optimizer, jax.random.key(0), variables=variables, trainable=trainable)
    objective = dpo(case.cached)
    step_fn = lm.training.make_step(policy, objective, optimizer, trainable=trainable, roles=roles)
    facts |= {
        "version": f"lmjax {lm.__version__}, jax {jax.__version__}",
        "trained": sum(x.size for x in jax.tree.leaves(lm.training.state.trainable_part(variables, trainable))),
        "tokens": tokens,
        "cells": batches[0].tokens.size,
    }
    del variables, reference, roles

    def step(index: int) -> float:
        nonlocal state
        state, metrics = step_fn(state, batches[index])
        return float(metrics["loss"])

    return step, facts


def dpo(cached: bool) -> Any:
    """The objective, and where its reference comes from."""
    from lmjax.objectives import preferences, with_cached_reference

    return with_cached_reference(preferences.dpo(BETA)) if cached else preferences.dpo(BETA)


# Without a clock ----------------------------------------------------------------------------------


def memory() -> dict[str, Any]:
    """MiB of compiled DPO steps from shapes alone: what they are given, and what they take besides."""
    import jax
    import optax

    import lmjax as lm
    from lmjax import adapters
    from lmjax.objectives.algebra import Role

    mib = lambda number: round(number / 2**20, 2)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def numbers(lora: bool, words: int) -> dict[str, float]:
        config = lm.models.llama(
            words, num_layers=LAYERS, embed_dim=WIDTH, num_heads=HEADS, mlp_dim=MLP, tied_embeddings=True
        )
        policy, key = lm.Policy(config), jax.eval_shape(lambda: jax.random.key(0))
        base = jax.eval_shape(policy.model.init, key)
        variables = jax.eval_shape(lambda key, base: adapters.lora(RANK).init(key, base), key, base) if lora else base
        trainable = ("lora",) if lora else ("params",)
        optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
        begin = lambda variables: lm.training.init_state(
            policy, optimizer, jax.random.key(0), variables=variables, trainable=trainable
        )
        role: Any = adapters.without if lora else Role(base)
        step = lm.training.make_step(policy, dpo(False), optimizer, trainable=trainable, roles={"reference": role})
        batch = pair_batches(Case(words=words))[0]
        used = step.lower(jax.eval_shape(begin, variables), batch).compile().memory_analysis()
        return {
            "one_model": mib(size(base)),
            "arguments": mib(used.argument_size_in_bytes),
            "temporary": mib(used.temp_size_in_bytes),
            "all_logits": mib(batch.tokens.size * words * 4),
        }

    return {
        f"{name}-{words}-words": numbers(name == "lora", words)
        for name in ("full", "lora")
        for words in (CASES["full"].words, MANY_WORDS)
    }


# Turns --------------------------------------------------------------------------------------------

SIDES = {"lmjax": lmjax_side, "trl": trl_side}


def _resident(peak: bool = False) -> float:
    """MiB of this process, now or at most since the peak was forgotten."""
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def worker(side: str, threads: int, folder: str, pipe: Any) -> None:
    """Runs windows of steps of "lmjax lora" and the like on request; answers with times, losses and memory."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    library, name = side.split()
    if library == "trl":
        import peft  # noqa: F401 - before memory is counted
        import torch
        import trl

        trl.DPOTrainer, trl.DPOConfig  # noqa: B018 - they are imported at the first look
        torch.set_num_threads(threads)
    else:
        import optax  # noqa: F401

        import lmjax.training.step  # noqa: F401
    base = _resident()
    step, facts = SIDES[library](name, folder)
    losses = [step(0)]  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    losses += [step(number % BATCHES) for number in range(1, STEPS)]
    pipe.send(facts | {"losses": losses, "memory_mib": round(_resident(peak=True) - base, 1)})
    while pipe.recv():
        step(0)  # not timed: the process was idle while the others ran
        window = benchmarking.timed(lambda: [step(number % BATCHES) for number in range(WINDOW)])
        pipe.send(window | {"wall": window["wall"] / WINDOW})


def ratio(windows: dict[str, list[dict[str, Any]]], a: str, b: str) -> float:
    """The median of neighbouring windows' times of a over those of b."""
    return round(statistics.median(x["wall"] / y["wall"] for x, y in zip(windows[a], windows[b], strict=True)), 3)


def result_of(name: str, facts: dict[str, Any], windows: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The line of one case."""
    case, ours, peer = CASES[name], f"lmjax {name}", f"trl {name}"
    own, other = facts[ours], facts[peer]
    assert own["tokens"] == other["tokens"] and own["trained"] == other["trained"]
    seconds = {side: statistics.median(w["wall"] for w in windows[side]) for side in (ours, peer)}
    tokens = statistics.mean(own["tokens"][:WINDOW])
    gaps = [abs(a - b) / abs(b) for a, b in zip(own["losses"], other["losses"], strict=True)]
    found = {
        "case": name,
        "shape": {"layers": LAYERS, "width": WIDTH, "vocab": case.words, "pairs": len(pairs(case)[0])},
        "tokens": round(tokens),
        "cells": own["cells"],
        "peer_cells": other["cells"],
        "ours": own["version"],
        "peer": other["version"],
        "speedup": ratio(windows, peer, ours),
        "ms": round(1e3 * seconds[ours], 1),
        "peer_ms": round(1e3 * seconds[peer], 1),
        "tokens_per_s": round(tokens / seconds[ours]),
        "peer_tokens_per_s": round(tokens / seconds[peer]),
        "memory_mib": own["memory_mib"],
        "peer_memory_mib": other["memory_mib"],
        "loss_gaps": [float(f"{gap:.1e}") for gap in gaps],
        "others": round(statistics.median(w["others"] for side in (ours, peer) for w in windows[side]), 3),
        "rounds": rounds,
    }
    plain = name.removesuffix("-cached")
    if case.cached:
        found["cache_ms"] = own["cache_ms"]
        if f"lmjax {plain}" in windows:
            found["time_of_uncached"] = ratio(windows, ours, f"lmjax {plain}")
            found["peer_time_of_uncached"] = ratio(windows, peer, f"trl {plain}")
    return found


def main() -> None:
    parser = benchmarking.parser(__doc__)
    known = [*CASES, MEMORY]
    parser.add_argument("--cases", nargs="+", default=known, choices=known)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="processors to use")
    options = parser.parse_args()
    for words, mixed in dict.fromkeys((case.words, case.mixed) for case in CASES.values()):
        names = [n for n in CASES if n in options.cases and (CASES[n].words, CASES[n].mixed) == (words, mixed)]
        if not names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            writer = multiprocessing.get_context("spawn").Process(target=prepare, args=(folder, words))
            writer.start()
            writer.join()
            sides = [f"{side} {name}" for name in names for side in SIDES]
            facts, windows = benchmarking.take_turns(worker, sides, (options.threads, folder), options.rounds)
        for name in names:
            benchmarking.report(result_of(name, facts, windows, options.rounds), "preferences", options.run_dir)
    if MEMORY in options.cases:
        benchmarking.report({"case": MEMORY, "unit": "MiB", **memory()}, "preferences", options.run_dir)


if __name__ == "__main__":
    main()
