"""Fine-tuning steps of every method beside PEFT on PyTorch, in one run: time, memory, operations.

    python -m experiments.benchmark_adapters --rounds 5

The same random Llama (6 layers, 384, 4,096 words, float32) is trained on the same batches by each method and on each
side, all in processes of their own that take turns. What is reported is the median over rounds of ratios of
neighbouring windows: to PEFT's step of the same method, and to our own step of all parameters. The losses of the first
steps are compared where both sides start from the same function.

Besides, without a clock: trained numbers, bytes of the optimizer's state, temporary memory of the compiled step, and
its operations beside those of the full step.

Needs the `dev` extra (PyTorch, Transformers, PEFT). Results are appended to `docs/benchmarks/adapters.jsonl`.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import benchmarking

VOCAB, LAYERS, WIDTH, HEADS, MLP = 4096, 6, 384, 6, 1024
BATCH, LENGTH, WINDOW, RANK, PREFIX = 4, 256, 4, 16, 16
LEARNING_RATE = 1e-3
METHODS = ("full", "lora", "dora", "prefix", "qlora")
PEER_METHODS = ("full", "lora", "dora", "prefix")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(count: int = 4) -> np.ndarray:
    """Random token ids [count, B, T + 1]."""
    return np.random.default_rng(0).integers(0, VOCAB, (count, BATCH, LENGTH + 1), dtype=np.int32)


def torch_model() -> Any:
    """The peer's model, the same each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def peft_side(method: str) -> tuple[Callable[[np.ndarray], float], dict[str, Any]]:
    """A step of PEFT (eager, SDPA attention, fused AdamW)."""
    import peft
    import torch

    model: Any = torch_model()
    if method != "full":
        low_rank = dict(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
        configs = {
            "lora": lambda: peft.LoraConfig(**low_rank),
            "dora": lambda: peft.LoraConfig(use_dora=True, **low_rank),
            "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=PREFIX, task_type="CAUSAL_LM"),
        }
        model = peft.get_peft_model(model, configs[method]())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()

    def step(ids: np.ndarray) -> float:
        tokens = torch.from_numpy(ids).long()
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, {
        "version": f"torch {torch.__version__}, peft {peft.__version__}",
        "trained": sum(p.numel() for p in trained),
    }


def lmjax_side(method: str) -> tuple[Callable[[np.ndarray], float], dict[str, Any]]:
    """The same through lmjax, from the peer's weights."""
    import jax
    import optax

    import lmjax as lm
    from lmjax import adapters
    from lmjax.batch import next_token_batch

    with tempfile.TemporaryDirectory() as folder:
        torch_model().save_pretrained(folder)
        config, variables = lm.interop.load_huggingface(folder)
    policy = lm.Policy(config)
    variables = jax.device_put(variables)
    made: Any = {
        "full": lambda: None,
        "lora": lambda: adapters.lora(RANK),
        "dora": lambda: adapters.dora(RANK),
        "prefix": lambda: adapters.prefix(policy, PREFIX),
        "qlora": lambda: adapters.lora(RANK),
    }[method]()
    if method == "qlora":
        variables = adapters.quantize(variables, "nf4")
    trainable = ("params",) if made is None else made.trainable
    variables = variables if made is None else made.init(jax.random.key(0), variables)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    state = lm.training.init_state(policy, optimizer, jax.random.key(0), variables=variables, trainable=trainable)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    step_fn = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer, trainable=trainable)
    compiled = step_fn.lower(state, next_token_batch(batches()[0])).compile()
    facts = {
        "version": f"lmjax {lm.__version__}, jax {jax.__version__}",
        "trained": sum(leaf.size for leaf in jax.tree.leaves(lm.training.state.trainable_part(variables, trainable))),
        "weights_bytes": size(variables),
        "optimizer_bytes": size(state.opt_state),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "step_flops": compiled.cost_analysis()["flops"],
    }
    del variables

    def step(ids: np.ndarray) -> float:
        nonlocal state
        state, metrics = step_fn(state, next_token_batch(ids))
        return float(metrics["loss"])

    return step, facts


SIDES = {"lmjax": lmjax_side, "peft": peft_side}


def worker(side: str, threads: int, pipe: Any) -> None:
    """Runs windows of steps of "lmjax lora" and the like on request; answers with times, losses and memory."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    library, method = side.split()
    if library == "peft":
        import torch

        torch.set_num_threads(threads)
    data = batches()
    step, facts = SIDES[library](method)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # model and optimizer are there, no step was taken yet
    losses = [step(data[i % len(data)]) for i in range(4)]
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    pipe.send(facts | {"losses": losses, "memory_growth_mib": round(growth / 1024, 1)})
    while pipe.recv():
        step(data[0])  # not timed: the process was idle while the others ran
        window = benchmarking.timed(lambda: [step(data[i % len(data)]) for i in range(WINDOW)])
        pipe.send(window | {"wall": window["wall"] / WINDOW})


def main() -> None:
    parser = benchmarking.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="processors to use")
    options = parser.parse_args()
    methods = ["full", *(method for method in options.methods if method != "full")]
    sides = [f"{side} {method}" for method in methods for side in SIDES if side == "lmjax" or method in PEER_METHODS]
    facts, windows = benchmarking.take_turns(worker, sides, (options.threads,), options.rounds)
    ratio = lambda a, b: round(
        statistics.median(x["wall"] / y["wall"] for x, y in zip(windows[a], windows[b], strict=True)), 3
    )
    for method in methods:
        ours, peer, full = f"lmjax {method}", f"peft {method}", "lmjax full"
        own = facts[ours]
        result: dict[str, Any] = {
            "method": method,
            "shape": {"layers": LAYERS, "width": WIDTH, "vocab": VOCAB, "batch": BATCH, "length": LENGTH},
            "ours": own["version"],
            "ms": round(1e3 * statistics.median(w["wall"] for w in windows[ours]), 1),
            "time_of_full": ratio(ours, full),
            "flops_of_full": round(own["step_flops"] / facts[full]["step_flops"], 3),
            "trained": own["trained"],
            "weights_mib": round(own["weights_bytes"] / 2**20, 2),
            "optimizer_mib": round(own["optimizer_bytes"] / 2**20, 3),
            "temporary_mib": round(own["temporary_bytes"] / 2**20, 1),
            "memory_growth_mib": own["memory_growth_mib"],
            "rounds": options.rounds,
        }
        if peer in facts:
            result |= {
                "peer": facts[peer]["version"],
                "speedup": ratio(peer, ours),
                "peer_ms": round(1e3 * statistics.median(w["wall"] for w in windows[peer]), 1),
                "peer_trained": facts[peer]["trained"],
                "peer_memory_growth_mib": facts[peer]["memory_growth_mib"],
                "first_loss_gap": abs(own["losses"][0] - facts[peer]["losses"][0]),
            }
        benchmarking.report(result, "adapters", options.run_dir)


if __name__ == "__main__":
    main()
