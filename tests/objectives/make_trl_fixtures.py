"""Computes the losses and gradients that tests of preferences compare with, by TRL's own trainers:

    pip install trl peft torch transformers datasets && python -m tests.objectives.make_trl_fixtures

Every trainer is made as its users make it, with a tokenizer of plain words, prepares its own data, and computes its
loss of one batch; the tests need none of that.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.objectives import trl_cases
from tests.objectives.trl_cases import CASES, EOS, LIKED, MARGINS, MODEL, PAD, Case


def _tokenizer() -> Any:
    """One word an id: "w0", "w1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {f"w{number}": number for number in range(EOS)} | {"<eos>": EOS, "<pad>": PAD}
    words = Tokenizer(models.WordLevel(names, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def _text(ids: list[int]) -> str:
    return "".join(f" w{number}" for number in ids if number != EOS)


def _records(trainer: str) -> list[dict[str, Any]]:
    """What TRL reads. It adds the markers itself."""
    found = []
    for number, (prompt, chosen, rejected, gold) in enumerate(trl_cases.records()):
        record: dict[str, Any] = {"prompt": _text(prompt)}
        if trainer == "kto":
            record |= {"completion": _text(chosen), "label": LIKED[number]}
        else:
            record |= {"chosen": _text(chosen), "rejected": _text(rejected)}
        if trainer == "tpo":
            record["reference"] = _text(gold)
        if trainer == "reward":
            record["margin"] = MARGINS[number]
        found.append(record)
    return found


def model(reference: bool = False, scores: bool = False) -> Any:
    """A Llama whose tensors are drawn from their names; with a head for scores in place of words if asked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    fields = {name: value for name, value in MODEL.items() if name != "model_type"}
    config = LlamaConfig(**fields, **dict(num_labels=1, pad_token_id=PAD) if scores else {})
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    made = kind.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.from_numpy(trl_cases.weight(name, tuple(parameter.shape), reference)))
    return made


def _trainer(case: Case, folder: str) -> Any:
    import datasets
    import trl
    from trl.experimental import cpo, orpo, tpo

    kinds = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "cpo": (cpo.CPOTrainer, cpo.CPOConfig),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
        "tpo": (tpo.TPOTrainer, tpo.TPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }
    kind, config = kinds[case.trainer]
    data = _records(case.trainer)
    arguments = config(
        output_dir=folder,
        per_device_train_batch_size=len(data),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        **case.options,
    )
    extra = {"ref_model": model(reference=True)} if case.trainer in ("dpo", "kto") else {}
    return kind(
        model=model(scores=case.trainer == "reward"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=_tokenizer(),
        **extra,
    )


def _as_read(trainer: Any, batch: Any) -> set[tuple[int, ...]]:
    """The sequences of a batch of TRL's, without padding."""
    found = set()
    for name in [name for name in batch if name.endswith("input_ids")]:
        for row, seen in zip(batch[name].tolist(), batch[name.replace("input_ids", "attention_mask")].tolist()):
            found.add(tuple(token for token, there in zip(row, seen) if there))
    return found


def _as_meant(trainer: str) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    streams = trl_cases.batches()
    names = {"kto": [trl_cases.JUDGED], "tpo": [trl_cases.PAIRS, trl_cases.GOLD]}.get(trainer, [trl_cases.PAIRS])
    for name in names:
        batch = streams[name]
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segments[row].max(initial=0) + 1):
                here = batch.segments[row] == segment
                found.add(tuple(batch.tokens[row][here].tolist()))
    return found


def compute(name: str) -> tuple[float, dict[str, np.ndarray]]:
    """TRL's loss and its gradient of every parameter."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _trainer(case, folder)
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        meant = _as_meant(case.trainer)
        read = {ids for ids in _as_read(trainer, batch) if case.trainer not in ("cpo", "orpo") or ids in meant}
        if read != meant and not (case.options.get("loss_type") == "apo_zero_unpaired" and read < meant):
            raise RuntimeError(f"{name}: TRL reads {sorted(read ^ meant)} otherwise than lmjax")
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    gradients = {key: p.grad for key, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), {key: gradient.numpy() for key, gradient in gradients.items()}


def main() -> None:
    import transformers
    import trl

    os.environ.setdefault("TQDM_DISABLE", "1")
    stored: dict[str, np.ndarray] = {}
    for name in CASES:
        loss, gradients = compute(name)
        largest = max(np.abs(gradient).max() for gradient in gradients.values())
        along = [trl_cases.along_directions(key, gradients[key]) for key in sorted(gradients)]
        stored[f"{name}/loss"], stored[f"{name}/largest"] = np.float64(loss), np.float64(largest)
        stored[f"{name}/along"] = np.array(along)
        print(f"{name}: {loss:.6f}, gradients up to {largest:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        made = model()
        made.config.architectures = [type(made).__name__]
        made.config.save_pretrained(folder)
        written = json.loads((Path(folder) / "config.json").read_text())
    about = {
        "config": written,
        "shapes": {key: list(parameter.shape) for key, parameter in made.named_parameters()},
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
    }
    stored["about"] = np.array(json.dumps(about))
    np.savez_compressed(trl_cases.FIXTURES, **stored)
    print(f"{trl_cases.FIXTURES}: {trl_cases.FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
