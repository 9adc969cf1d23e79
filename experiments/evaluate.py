"""Perplexity and bits a byte of a model on any text.

    python -m experiments.evaluate --model runs/mine --path book.txt --stride 64 --run-dir runs/mine

The model comes from a run directory or from a Hugging Face directory. Bits a byte compare models of different
tokenizers. A document begins with the tokenizer's marker, if it has one and the model was trained so.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable

import lmjax as lm
from experiments.evaluate_config import EvaluateConfig
from experiments.support import open_model, output_folder, use_compilation_cache
from lmjax import command_line
from lmjax.data.config import DataConfig, SourceConfig
from lmjax.errors import UserError
from lmjax.models.config import DecoderConfig


def run(config: EvaluateConfig, options: command_line.Options) -> None:
    """Prints the score of the text, and writes it as JSON."""
    import numpy as np

    use_compilation_cache(DataConfig().cache_root())
    source = lm.data.open_source(SourceConfig(config.kind, config.path, config.text_field, config.separator))
    model = open_model(
        config.model, step=config.step, average=config.average, tokenizer=config.tokenizer, adapter=config.adapter
    )
    tokenizer = model.tokenizer
    folder = output_folder(options.run_dir, config.model, "evaluate")

    # The documents as ids, each behind its marker.
    texts = first_bytes(source.read(), config.max_bytes)
    marker = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    begin = [marker] if model.markers and marker is not None else []
    documents = [np.concatenate([begin, ids]).astype(np.int32) for ids in tokenizer.encode_batch(texts)]
    largest = max((int(ids.max()) for ids in documents if ids.size), default=0)
    if largest >= model.policy.config.vocab_size:
        raise UserError(
            f"the tokenizer makes the id {largest} but the model's vocabulary is {model.policy.config.vocab_size}; "
            "use the model's own tokenizer"
        )

    # The batches, by the way the model is to read.
    longest = model.policy.config.max_length if isinstance(model.policy.config, DecoderConfig) else None
    table = tokenizer.token_bytes()
    window = config.window or longest or 1024
    stride = config.stride or max(window // 2, 1)
    if config.mode == "document":
        batches = lm.evaluation.document_batches(
            documents, batch_size=config.batch_size, max_length=longest, bytes_of=table
        )
    else:
        if longest is not None and window > longest:
            raise UserError(f"window is {window} but the model's positions end at {longest}; shorten it")
        batches = lm.evaluation.sliding_batches(
            documents, window=window, stride=stride, batch_size=config.batch_size, bytes_of=table
        )
    if table is None:  # ids without a fixed length: all the text, less the tokens that nothing predicts
        unscored = [] if begin else [tokenizer.decode([int(ids[0])]) for ids in documents if ids.size]
        count = sum(len(text.encode()) for text in texts) - sum(len(text.encode()) for text in unscored)
        batches = dataclasses.replace(batches, bytes=count)

    started = time.perf_counter()
    score = lm.evaluation.evaluate_batches(model.policy, model.variables, batches)
    result = {
        "model": model.description,
        "text": source.name,
        "documents": len(documents),
        "mode": config.mode,
        **({"window": window, "stride": stride} if config.mode == "sliding" else {}),
        "tokens": int(score.tokens),
        "bytes": score.bytes,
        **score.metrics(),
        "seconds": time.perf_counter() - started,
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):14}{f'{value:,.4f}' if isinstance(value, float) else value}")
    path = folder / "evaluation.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")
    print(f"loss={score.loss:.4f} perplexity={score.perplexity:.4f} bits_per_byte={score.bits_per_byte or 0:.4f}")


def first_bytes(texts: Iterable[str], count: int) -> list[str]:
    """The texts up to so many UTF-8 bytes in all; 0 for all of them.

    >>> first_bytes(["abc", "déf"], 5)
    ['abc', 'd']
    """
    kept: list[str] = []
    left = count
    for text in texts:
        raw = text.encode("utf-8", errors="surrogatepass")
        if count and len(raw) >= left:
            kept.append(raw[:left].decode("utf-8", errors="ignore"))
            break
        kept.append(text)
        left -= len(raw)
    return kept


if __name__ == "__main__":
    command_line.main(run, EvaluateConfig())
