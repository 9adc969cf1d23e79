"""Losses and gradients of a small model's rollouts by TRL's trainers and verl's losses, kept as `rollout_models.npz`:

    pip install trl verl torch transformers datasets && python -m tests.objectives.make_model_fixtures

Trainers are made as their users make them; they are given rollouts in place of sampling some.
"""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import numpy as np

from tests.objectives import model_cases, trl_cases
from tests.objectives.make_trl_fixtures import _tokenizer, model
from tests.objectives.model_cases import ADVANTAGES, CASES, LONGEST, TEMPERATURE
from tests.objectives.trl_cases import PAD, SCORE


def _trainer(kind: str, options: dict[str, Any], folder: str) -> Any:
    import datasets
    import trl

    policy = model()
    if options.get("beta"):
        model(reference=True).save_pretrained(f"{folder}/reference")
        policy.config._name_or_path = f"{folder}/reference"  # where trainers take the reference from
    trainer, config = {"rloo": (trl.RLOOTrainer, trl.RLOOConfig)}.get(kind, (trl.GRPOTrainer, trl.GRPOConfig))
    arguments = config(
        output_dir=folder, per_device_train_batch_size=len(ADVANTAGES), num_generations=2, temperature=TEMPERATURE,
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], **options,
    )  # fmt: skip
    return trainer(
        model=policy, reward_funcs=lambda completions, **rest: [0.0] * len(completions), args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "w0"}] * len(ADVANTAGES)), processing_class=_tokenizer(),
    )  # fmt: skip


def _rows(pad_left: bool, arrays: list[np.ndarray], fill: int) -> Any:
    import torch

    longest = max(len(row) for row in arrays)
    sides = lambda row: (longest - len(row), 0) if pad_left else (0, longest - len(row))
    return torch.tensor(np.stack([np.pad(row, sides(row), constant_values=fill) for row in arrays]).astype(np.int64))


def _inputs() -> dict[str, Any]:
    import torch

    prompts, answers, own, _ = map(list, zip(*model_cases.conversations(), strict=True))
    ones = lambda rows: [np.ones(len(row)) for row in rows]
    mask, tools = _rows(False, ones(answers), 0), _rows(False, own, 0)
    return {
        "prompt_ids": _rows(True, prompts, PAD), "prompt_mask": _rows(True, ones(prompts), 0),
        "completion_ids": _rows(False, answers, PAD), "completion_mask": mask, "tool_mask": tools,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float32), "num_items_in_batch": tools.sum(),
    }  # fmt: skip


def _logprobs(trainer: Any, policy: Any, inputs: dict[str, Any]) -> Any:
    import torch

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(policy, ids, seen, LONGEST)[0]


def old_logprobs() -> np.ndarray:
    """What the rollouts' tokens are said to have had, [6, 6]: close to what they have."""
    import torch

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        trainer = _trainer("grpo", {}, folder)
        return _logprobs(trainer, trainer.model, _inputs()).numpy() + model_cases.shifts()["old"]


def compute(name: str, old: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The peer's loss and its gradient of every parameter."""
    import torch

    case = CASES[name]
    options = dict(case.options)
    on_policy = options.pop("on_policy", False)
    mode = options.get("vllm_importance_sampling_mode")
    inputs, number = _inputs(), lambda values: torch.tensor(np.asarray(values), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _trainer(case.trainer, {} if case.trainer == "ppo" else options, folder)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        if case.trainer == "ppo":
            loss, score = _ppo(trainer, inputs, number, old, **options)
        else:
            if options.get("beta"):
                with torch.no_grad():
                    inputs["ref_per_token_logps"] = _logprobs(trainer, trainer.ref_model, inputs)
            if case.trainer == "rloo":
                inputs["old_logps"] = (number(old) * inputs["completion_mask"]).sum(1)
            elif not on_policy:
                inputs["old_per_token_logps"] = number(old)
            sampling = model_cases.shifts()["sampling"]
            if mode is not None:
                trainer.use_vllm = True  # it is told so where rollouts are sampled, which they are not here
                inputs["sampling_per_token_logps"] = number(old + sampling)
                weight = torch.exp(number(-sampling))
                assert mode == "token_mask"
                outside = weight > options["vllm_importance_sampling_clip_max"]
                inputs["importance_sampling_ratio"] = weight.masked_fill(outside, 0.0)
            loss, score = trainer._compute_loss(trainer.model, inputs), None
        loss.backward()
    found = {key: p.grad.numpy() for key, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found | ({} if score is None else {SCORE: score.grad.numpy()})


def _ppo(trainer: Any, inputs: dict[str, Any], number: Any, old: np.ndarray, **options: Any) -> tuple[Any, Any]:
    """verl's loss of the actor and half that of a critic on the same trunk, as a linear function of its last states."""
    import torch
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    given, mask = model_cases.shifts(), inputs["tool_mask"]
    score = number(trl_cases.weight(SCORE, (1, trainer.model.config.hidden_size))).requires_grad_()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    states = trainer.model.model(input_ids=ids, attention_mask=seen).last_hidden_state
    values = (states @ score[0])[:, -LONGEST - 1 : -1]
    most = options.pop("cliprange_value")
    critic, _ = core_algos.compute_value_loss(values, number(given["returns"]), number(given["values"]), mask, most)
    clip = options.pop("clip_ratio")
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=clip, clip_ratio_low=clip,
        clip_ratio_high=clip,
    )  # fmt: skip
    advantages = inputs["advantages"][:, None] * mask
    logprobs = _logprobs(trainer, trainer.model, inputs)
    vanilla = core_algos.get_policy_loss_fn("vanilla")
    return vanilla(number(old), logprobs, advantages, mask, "token-mean", config)[0] + 0.5 * critic, score


def main() -> None:
    import trl

    old = old_logprobs()
    stored: dict[str, np.ndarray] = {"old": old, "trl": np.array(trl.__version__)}
    for name in CASES:
        loss, gradients = compute(name, old)
        largest = max(np.abs(gradient).max() for gradient in gradients.values())
        along = [trl_cases.along_directions(key, gradients[key]) for key in sorted(gradients)]
        stored |= {f"{name}/loss": np.float64(loss), f"{name}/largest": np.float64(largest)}
        stored[f"{name}/along"] = np.array(along)
        print(f"{name}: {loss:.6f}, gradients up to {largest:.3f}")
    np.savez_compressed(model_cases.FIXTURES, **stored)
    print(f"{model_cases.FIXTURES}: {model_cases.FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
