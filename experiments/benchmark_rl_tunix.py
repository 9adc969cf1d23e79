"""A GRPO step beside google-tunix on JAX, in one run: rollouts, rewards, and the update, by themselves and together.

    python -m experiments.benchmark_rl_tunix --rounds 4

The same random Qwen2 (6 layers, 384, MLP 1024, float32: as many weights as the GPT-2 of `benchmark_rl`), prompts, group
size and forced lengths on both sides, each in a process of its own; they take turns. Tunix's side is its `GRPOLearner`
over an `RLCluster` as users make them: the vanilla rollout engine (a cache of exactly the tokens there are, drawing
without sorts), one update of all samples, actor and sampler sharing their weights, no mesh of more than one device. A
step samples 8 answers to each of 4 prompts, gives a reward that costs next to nothing, and makes one update, on policy.
What is reported is the median over rounds of ratios of neighbouring windows, by the clock and by processor time.

Both sides run from one environment, where Tunix (0.1.7) has the older safetensors that it asks for:

    python3 -m venv /tmp/tunix && /tmp/tunix/bin/pip install google-tunix chex tyro matplotlib
    /tmp/tunix/bin/pip install --no-deps -e .

Results are appended to `docs/benchmarks/rl_tunix.jsonl`.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np

from experiments import benchmark_rl, benchmarking
from experiments.benchmark_rl import CASES, GROUP, HEADS, LAYERS, LEARNING_RATE, PROMPTS, WIDTH, WINDOW, WORDS

MLP = 1024  # three products of 384 x 1024 are the two of 384 x 1536 that GPT-2 has


def prepare(folder: str) -> None:
    """Writes the model that both sides read."""
    import jax

    import lmjax as lm

    config = lm.models.qwen2(
        WORDS, num_layers=LAYERS, embed_dim=WIDTH, num_heads=HEADS, mlp_dim=MLP, max_length=512, rope_theta=1e4
    )
    lm.interop.save_huggingface(folder, config, lm.Policy(config).init(jax.random.key(0)))


class Numbers:
    """The tokenizer that Tunix's adapter asks for: ids as words. Eos and pad are never drawn."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        """None: no prompt is begun with one."""

    def eos_id(self) -> int:
        return WORDS

    def pad_id(self) -> int:
        return WORDS + 1


def tunix_side(name: str, folder: str) -> tuple[benchmark_rl.Step, dict[str, Any]]:
    """A step of Tunix, which pulls prompts from a data set: it pauses where it asks for those of the next step."""
    os.environ["TQDM_DISABLE"] = "1"
    import jax
    import optax
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    case = CASES[name]
    config = qwen2.ModelConfig(
        num_layers=LAYERS, vocab_size=WORDS, embed_dim=WIDTH, hidden_dim=MLP, num_heads=HEADS, head_dim=WIDTH // HEADS,
        num_kv_heads=HEADS, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True,
    )  # fmt: skip
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    adamw = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=params.create_model_from_safe_tensors(folder, config, mesh), tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in roles}, rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), adamw),
                eval_every_n_steps=10**6, max_steps=10**6,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=case.completion, max_prompt_length=case.prompt, temperature=1.0, top_p=1.0,
                kv_cache_size=case.prompt + case.completion,
            ),
        ),
    )  # fmt: skip
    made, lengths, inner = [0.0], [0], cluster.generate

    def reward(prompts: Any, completions: list[str], **others: Any) -> list[float]:
        return [benchmark_rl.worth([int(word) for word in text.split()]) for text in completions]

    def generate(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = inner(*arguments, **options)
        made[0] = time.perf_counter() - start
        lengths[0] = sum(len(tokens) for tokens in found.tokens)
        return found

    cluster.generate = generate
    algorithm = grpo_learner.GRPOConfig(num_generations=GROUP, num_iterations=1, beta=0.0)
    learner = grpo_learner.GRPOLearner(cluster, algorithm, reward)
    assert not learner.should_sync_weights  # the sampler reads what is trained
    asked, over = queue.Queue[int | None](), queue.Queue[BaseException | None]()

    def feed() -> Iterator[dict[str, Any]]:
        while (index := asked.get()) is not None:
            yield {"prompts": np.array([" ".join(map(str, ids)) for ids in benchmark_rl.prompts(case, index)])}
            over.put(None)

    def train() -> None:
        try:
            learner.train(feed())
        except BaseException as error:
            over.put(error)
            raise

    threading.Thread(target=train, daemon=True).start()

    def step(index: int) -> dict[str, float]:
        start = time.perf_counter()
        asked.put(index)
        if (error := over.get()) is not None:
            raise error
        whole = time.perf_counter() - start
        assert lengths[0] == PROMPTS * GROUP * case.completion, lengths
        return {"rollout": made[0], "update": whole - made[0]}

    version = f"google-tunix {metadata.version('google-tunix')}, jax {jax.__version__}"
    return step, {"version": version, "stop": lambda: asked.put(None)}


SIDES = {"lmjax": benchmark_rl.lmjax_side, "tunix": tunix_side}


def worker(side: str, threads: int, folder: str, pipe: Any) -> None:
    """Runs windows of steps on request; answers with times."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import jax

    compiled = [0]

    def listen(event: str, seconds: float, **others: Any) -> None:
        compiled[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    library, name = side.split()
    step, facts = SIDES[library](name, folder)
    for number in range(2):  # compiles
        step(number)
    number, stop = 2, facts.pop("stop", lambda: None)
    pipe.send({"version": facts["version"], "programs": compiled[0]})
    while pipe.recv():
        before, parts = compiled[0], list[dict[str, float]]()

        def work(first: int = number, parts: list[dict[str, float]] = parts) -> None:
            parts += [step(first + n) for n in range(WINDOW)]

        window = benchmarking.timed(work)
        number += WINDOW
        each = {key: statistics.mean(part[key] for part in parts) for key in parts[0]}
        mean = {key: window[key] / WINDOW for key in ("wall", "cpu")}
        pipe.send(window | mean | each | {"compiled_again": compiled[0] - before})
    stop()


def main() -> None:
    parser = benchmarking.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=["32+64", "128+64"], choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="processors to use")
    options = parser.parse_args()
    keys = ("wall", "cpu", "rollout", "update")
    for name in options.cases:
        ours, peer = sides = [f"lmjax {name}", f"tunix {name}"]
        with tempfile.TemporaryDirectory() as folder:
            writer = multiprocessing.get_context("spawn").Process(target=prepare, args=(folder,))
            writer.start()
            writer.join()
            facts, windows = benchmarking.take_turns(worker, sides, (options.threads, folder), options.rounds)
        pairs = list(zip(windows[ours], windows[peer]))
        ratios = {key: round(statistics.median(b[key] / a[key] for a, b in pairs), 2) for key in keys}
        result: dict[str, Any] = {
            "case": name,
            "shape": {"layers": LAYERS, "width": WIDTH, "mlp": MLP, "vocab": WORDS, "batch": [PROMPTS, GROUP]},
            "ours": facts[ours]["version"],
            "peer": facts[peer]["version"],
            "speedup": ratios["wall"],
            **{f"{key}_speedup": ratios[key] for key in keys[1:]},
            "speedups": [round(b["wall"] / a["wall"], 2) for a, b in pairs],
        }
        for whose, side in (("", ours), ("peer_", peer)):
            for key in keys:
                result[f"{whose}{key}_ms"] = round(1e3 * statistics.median(w[key] for w in windows[side]), 1)
            result[f"{whose}programs"] = facts[side]["programs"]
            result[f"{whose}compiled_again"] = int(sum(window["compiled_again"] for window in windows[side]))
        result["others"] = round(statistics.median(w["others"] for side in sides for w in windows[side]), 3)
        result |= {"load": round(os.getloadavg()[0], 2), "rounds": options.rounds}
        benchmarking.report(result, "rl_tunix", options.run_dir)


if __name__ == "__main__":
    main()
