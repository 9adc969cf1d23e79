"""Training speed beside a PyTorch GPT of the same shape and the same weights, in one run.

    python -m experiments.benchmark_train --cases nano char bpe --rounds 7

The two sides live in processes of their own and take turns, so that neither computes while the other is timed. Windows
in which anything else used the machine are left out. What is reported is the median over rounds of the ratio of the
two neighbouring windows; the losses of both sides are compared first, so the same thing is timed.

Needs the `dev` extra (PyTorch). Results are appended to `docs/benchmarks/train.jsonl`.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import benchmarking


@dataclasses.dataclass(frozen=True)
class Case:
    """A GPT-2 shape and a batch."""

    num_layers: int
    embed_dim: int
    num_heads: int
    length: int
    batch: int
    vocab_size: int
    window: int  # steps a timed window


CASES = {
    "nano": Case(4, 128, 4, 64, 12, 65, 40),
    "char": Case(6, 384, 6, 256, 4, 65, 5),
    "bpe": Case(4, 256, 4, 128, 4, 16384, 10),
}
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


def batches(case: Case, count: int = 8) -> np.ndarray:
    """Random token ids [count, B, T + 1]."""
    shape = (count, case.batch, case.length + 1)
    return np.random.default_rng(0).integers(0, case.vocab_size, shape, dtype=np.int32)


def initial_weights(case: Case) -> dict[str, np.ndarray]:
    """The same starting weights for both sides, under Hugging Face's GPT-2 names (kernels are [in, out])."""
    rng, D = np.random.default_rng(1), case.embed_dim
    normal = lambda *shape: np.asarray(0.02 * rng.standard_normal(shape), np.float32)
    weights = {"wte": normal(case.vocab_size, D), "wpe": normal(case.length, D)}
    for i in range(case.num_layers):
        weights |= {f"{i}.qkv": normal(D, 3 * D), f"{i}.out": normal(D, D)}
        weights |= {f"{i}.up": normal(D, 4 * D), f"{i}.down": normal(4 * D, D)}
    return weights


def torch_side(case: Case, threads: int, bf16: bool) -> tuple[Callable[[np.ndarray], float], str]:
    """A plain PyTorch GPT-2 (eager, SDPA, fused AdamW) and its step."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    D, H = case.embed_dim, case.num_heads

    class TorchBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x: Any) -> Any:
            B, T, _ = x.shape
            q, k, v = (y.view(B, T, H, D // H).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, D))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class TorchGPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(case.vocab_size, D), nn.Embedding(case.length, D)
            self.blocks = nn.ModuleList(TorchBlock() for _ in range(case.num_layers))
            self.norm = nn.LayerNorm(D)

        def forward(self, x: Any, y: Any) -> Any:
            h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
            for block in self.blocks:
                h = block(h)
            logits = F.linear(self.norm(h), self.wte.weight)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.reshape(-1))

    model, weights = TorchGPT(), initial_weights(case)
    with torch.no_grad():
        model.wte.weight.copy_(torch.from_numpy(weights["wte"]))
        model.wpe.weight.copy_(torch.from_numpy(weights["wpe"]))
        for i, block in enumerate(model.blocks):
            for name in ("qkv", "out", "up", "down"):
                getattr(block, name).weight.copy_(torch.from_numpy(weights[f"{i}.{name}"].T.copy()))
                getattr(block, name).bias.zero_()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)

    def step(ids: np.ndarray) -> float:
        tokens = torch.from_numpy(ids).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, f"torch {torch.__version__}" + (" bf16 autocast" if bf16 else "")


def lmjax_side(case: Case, threads: int, bf16: bool) -> tuple[Callable[[np.ndarray], float], str]:
    """The same through lmjax."""
    import jax
    import jax.numpy as jnp
    import optax

    import lmjax as lm
    from lmjax.batch import next_token_batch

    config = lm.models.gpt2(
        case.vocab_size,
        num_layers=case.num_layers,
        embed_dim=case.embed_dim,
        num_heads=case.num_heads,
        max_length=case.length,
        layers="unrolled",
    )
    policy, weights, D = lm.Policy(config), initial_weights(case), case.embed_dim
    params = jax.device_get(policy.init(jax.random.key(0)))["params"]
    params["embed"]["embedding"], params["position"]["embedding"] = weights["wte"], weights["wpe"]
    for i in range(case.num_layers):
        layer = params[f"layer_{i}"]
        for j, name in enumerate(("query", "key", "value")):
            layer["attention"][name]["kernel"] = weights[f"{i}.qkv"][:, j * D : (j + 1) * D]
        layer["attention"]["output"]["kernel"] = weights[f"{i}.out"]
        layer["mlp"]["up"]["kernel"], layer["mlp"]["down"]["kernel"] = weights[f"{i}.up"], weights[f"{i}.down"]
    optimizer = optax.adamw(
        LEARNING_RATE,
        *BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        mask=lambda tree: jax.tree.map(lambda p: p.ndim >= 2, tree),
    )
    variables = jax.tree.map(jnp.asarray, {"params": params})
    state = lm.training.init_state(policy, optimizer, jax.random.key(0), variables=variables)
    step_fn = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer)

    def step(ids: np.ndarray) -> float:
        nonlocal state
        state, metrics = step_fn(state, next_token_batch(ids))
        return float(metrics["loss"])

    return step, f"lmjax {lm.__version__}, jax {jax.__version__}"


SIDES = {"lmjax": lmjax_side, "torch": torch_side}


def worker(side: str, case: Case, threads: int, bf16: bool, pipe: Any) -> None:
    """Runs windows of steps on request; answers with times, losses and memory."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cpus)
    data = batches(case)
    step, version = SIDES[side](case, threads, bf16 and side == "torch")
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # model and optimizer are there, no step was taken yet
    losses = [step(data[i % len(data)]) for i in range(10)]
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    pipe.send({"version": version, "losses": losses, "memory_growth_mib": growth / 1024})
    while pipe.recv():
        step(data[0])  # not timed: the process was idle while the other side ran
        window = benchmarking.timed(lambda: [step(data[i % len(data)]) for i in range(case.window)])
        pipe.send(window | {name: window[name] / case.window for name in ("wall", "cpu")})


def compare(name: str, rounds: int, threads: int, bf16: bool, quiet: float) -> dict[str, Any]:
    """One case: both sides in turns, `rounds` times."""
    case = CASES[name]
    hello, windows = benchmarking.take_turns(worker, list(SIDES), (case, threads, bf16), rounds)
    ours, peer = windows["lmjax"], windows["torch"]
    calm = [i for i in range(rounds) if max(ours[i]["others"], peer[i]["others"]) < quiet]
    used = calm or range(rounds)
    tokens = case.batch * case.length
    ratio = lambda key: statistics.median(peer[i][key] / ours[i][key] for i in used)
    median = lambda side, key: statistics.median(windows[side][i][key] for i in used)
    gap = max(abs(a - b) for a, b in zip(hello["lmjax"]["losses"], hello["torch"]["losses"], strict=True))
    return {
        "case": name,
        "shape": dataclasses.asdict(case),
        "threads": threads,
        "peer": hello["torch"]["version"],
        "ours": hello["lmjax"]["version"],
        "speedup": round(ratio("wall"), 3),
        "cpu_speedup": round(ratio("cpu"), 3),
        "ms": {side: round(1e3 * median(side, "wall"), 2) for side in SIDES},
        "tokens_per_second": {side: round(tokens / median(side, "wall")) for side in SIDES},
        "memory_growth_mib": {side: round(hello[side]["memory_growth_mib"], 1) for side in SIDES},
        "largest_loss_gap_first_10_steps": float(f"{gap:.2e}"),
        "rounds": rounds,
        "calm_rounds": len(calm),
    }


def main() -> None:
    parser = benchmarking.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="processors to use")
    parser.add_argument("--torch-bf16", action="store_true", help="bfloat16 autocast on the PyTorch side")
    parser.add_argument("--quiet", type=float, default=0.05, help="leave out windows with more load from others")
    options = parser.parse_args()
    for name in options.cases:
        result = compare(name, options.rounds, options.threads, options.torch_bf16, options.quiet)
        benchmarking.report(result, "train", options.run_dir)


if __name__ == "__main__":
    main()
