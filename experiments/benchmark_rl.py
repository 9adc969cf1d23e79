"""A GRPO step beside TRL on PyTorch, in one run: rollouts, rewards, and the update, by themselves and together.

    python -m experiments.benchmark_rl --rounds 3

The same random GPT-2 (6 layers, 384, float32), prompts, group size and forced lengths on both sides, each in a process
of its own; they take turns. TRL's side is its `GRPOTrainer` as users make it (generation by transformers, eager PyTorch
with SDPA, fused AdamW, no gradient checkpointing) on a tokenizer of plain words. A step samples 8 answers to each of 4
prompts, gives a reward that costs next to nothing, and makes one update, on policy. What is reported is the median over
rounds of ratios of neighbouring windows.

Needs the `dev` extra and TRL (`pip install trl`). Results are appended to `docs/benchmarks/rl.jsonl`.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import benchmarking

LAYERS, WIDTH, HEADS, WORDS = 6, 384, 6, 4096
PROMPTS, GROUP, WINDOW, LEARNING_RATE = 4, 8, 2, 1e-5
EOS, PAD = WORDS - 2, WORDS - 1


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    prompt, completion: tokens, of every prompt and every answer.
    """

    prompt: int
    completion: int


CASES = {"32+64": Case(32, 64), "32+256": Case(32, 256), "128+64": Case(128, 64)}


def prompts(case: Case, step: int) -> list[list[int]]:
    """Those of a step."""
    return np.random.default_rng(step).integers(0, EOS, (PROMPTS, case.prompt)).tolist()


def worth(tokens: Any) -> float:
    """A reward: the share of even ids."""
    return float(np.mean(np.asarray(tokens) % 2 == 0))


def prepare(folder: str) -> None:
    """Writes the model that both sides read."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=512, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


Step = Callable[[int], dict[str, float]]  # index -> seconds of its parts


def trl_side(name: str, folder: str) -> tuple[Step, dict[str, Any]]:
    """A step of TRL."""
    import datasets
    import torch
    import trl
    from transformers import GPT2LMHeadModel

    case = CASES[name]
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    text = lambda ids: " ".join(f"w{number}" for number in ids)
    options = trl.GRPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
        max_completion_length=case.completion, learning_rate=LEARNING_RATE, beta=0.0, loss_type="grpo",
        optim="adamw_torch_fused", gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[],
        generation_kwargs={"min_new_tokens": case.completion},
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa"),
        reward_funcs=lambda completion_ids, **others: [worth(ids) for ids in completion_ids],
        args=options,
        train_dataset=datasets.Dataset.from_list([{"prompt": text(ids)} for ids in prompts(case, 0)]),
        processing_class=benchmarking.word_tokenizer(WORDS),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    made, lengths = [0.0], [0]
    inner = trainer._generate_and_score_completions

    def generate(inputs: Any) -> Any:
        start = time.perf_counter()
        found = inner(inputs)
        made[0] = time.perf_counter() - start
        lengths[0] = int(found["completion_mask"].sum())
        return found

    trainer._generate_and_score_completions = generate

    def step(index: int) -> dict[str, float]:
        inputs = [{"prompt": text(ids)} for ids in prompts(case, index) for _ in range(GROUP)]
        start = time.perf_counter()
        trainer.model.train()
        trainer.training_step(trainer.model, inputs, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.state.global_step += 1
        whole = time.perf_counter() - start
        assert lengths[0] == PROMPTS * GROUP * case.completion, lengths
        return {"rollout": made[0], "update": whole - made[0]}

    return step, {"version": f"torch {torch.__version__}, trl {trl.__version__}"}


def lmjax_side(name: str, folder: str) -> tuple[Step, dict[str, Any]]:
    """The same through lmjax, from the same files."""
    import jax
    import optax

    import lmjax as lm
    from lmjax import rl

    case = CASES[name]
    config, variables = lm.interop.load_huggingface(folder)
    policy = lm.Policy(config)
    plan = rl.Plan(PROMPTS, GROUP, case.completion, case.prompt)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    step_fn = lm.training.make_step(policy, lm.objectives.grpo(), optimizer, clip_norm=1.0)
    state = lm.training.init_state(policy, optimizer, jax.random.key(0), variables=variables)
    spent = {"rollout": 0.0}
    index = [0]

    class Asked(rl.Prompts):
        """A step's prompts."""

        def take(self, count: int, weights: Any = None) -> list[int]:
            self.prompts = [lm.data.Prompt(np.array(ids, np.int32)) for ids in prompts(case, index[0])]
            return list(range(count))

    def roll_out(variables: Any, asked: Any, key: Any, **numbers: Any) -> Any:
        start = time.perf_counter()
        found = rl.roll_out(
            policy, variables, asked, key, samples=GROUP, max_new_tokens=case.completion, eos=None, **numbers
        )
        spent["rollout"] = time.perf_counter() - start
        return found

    judge = rl.Judge([rl.Reward("even", lambda rollout: worth(rollout.tokens))])
    experience = rl.Experience(
        policy, Asked([lm.data.Prompt(np.zeros(1, np.int32))]), plan, roll_out=roll_out, judge=judge,
        join=rl.join_scores, credit=rl.outcome_credit(rl.ESTIMATORS["trl_grpo"]), key=jax.random.key(1),
    )  # fmt: skip
    experience.follow(state.variables, 0)
    run = rl.following(step_fn, experience)

    def step(number: int) -> dict[str, float]:
        nonlocal state
        index[0] = number
        start = time.perf_counter()
        state, _ = run(state, next(experience))
        jax.block_until_ready(state)
        whole = time.perf_counter() - start
        assert experience.metrics["completions/min_length"] == case.completion
        return {"rollout": spent["rollout"], "update": whole - spent["rollout"]}

    return step, {"version": f"lmjax {lm.__version__}, jax {jax.__version__}", "compiled": step_fn.cache_size}


SIDES = {"lmjax": lmjax_side, "trl": trl_side}


def worker(side: str, threads: int, folder: str, pipe: Any) -> None:
    """Runs windows of steps on request; answers with times."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    library, name = side.split()
    if library == "trl":
        import torch

        torch.set_num_threads(threads)
    step, facts = SIDES[library](name, folder)
    for number in range(2):  # compiles
        step(number)
    compiled = facts.pop("compiled", lambda: 0)
    programs, number = compiled(), 2
    pipe.send(facts)
    while pipe.recv():
        parts: list[dict[str, float]] = []

        def work(first: int = number, parts: list[dict[str, float]] = parts) -> None:
            parts += [step(first + n) for n in range(WINDOW)]

        window = benchmarking.timed(work)
        number += WINDOW
        each = {key: statistics.mean(part[key] for part in parts) for key in parts[0]}
        pipe.send(window | {"wall": window["wall"] / WINDOW, "compiled_again": compiled() - programs} | each)


def main() -> None:
    parser = benchmarking.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="processors to use")
    options = parser.parse_args()
    for name in options.cases:
        sides = [f"lmjax {name}", f"trl {name}"]
        with tempfile.TemporaryDirectory() as folder:
            writer = multiprocessing.get_context("spawn").Process(target=prepare, args=(folder,))
            writer.start()
            writer.join()
            facts, windows = benchmarking.take_turns(worker, sides, (options.threads, folder), options.rounds)
        ours, peer = sides

        def median(side: str, key: str, windows: dict[str, Any] = windows) -> float:
            return statistics.median(window[key] for window in windows[side])

        ratios = {
            key: round(statistics.median(b[key] / a[key] for a, b in zip(windows[ours], windows[peer])), 2)
            for key in ("wall", "rollout", "update")
        }
        benchmarking.report(
            {
                "case": name,
                "shape": {"layers": LAYERS, "width": WIDTH, "vocab": WORDS, "prompts": PROMPTS, "group": GROUP},
                "ours": facts[ours]["version"],
                "peer": facts[peer]["version"],
                "speedup": ratios["wall"],
                "rollout_speedup": ratios["rollout"],
                "update_speedup": ratios["update"],
                **{
                    f"{whose}{key}_ms": round(1e3 * median(side, key), 1)
                    for whose, side in (("", ours), ("peer_", peer))
                    for key in ("wall", "rollout", "update")
                },
                "rollout_share": round(median(ours, "rollout") / median(ours, "wall"), 3),
                "compiled_again": int(sum(window["compiled_again"] for window in windows[ours])),
                "others": round(statistics.median(w["others"] for side in sides for w in windows[side]), 3),
                "rounds": options.rounds,
            },
            "rl",
            options.run_dir,
        )


if __name__ == "__main__":
    main()
