"""Held-out prompts answered before, during and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmjax as lm


def answers(
    policy: Any,
    variables: Any,
    prompts: Sequence[Any],
    tokenizer: Any,
    template: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """What the model answers to prompts of ids, without what ends it."""
    import jax

    if not prompts:
        return []
    stops = template.stops(tokenizer)
    beyond = list(range(tokenizer.vocab_size, policy.config.vocab_size))  # they have no text
    found = lm.generation.generate(
        policy,
        variables,
        prompts,
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        processors=[lm.generation.suppress(beyond)] if beyond else [],
        eos=[stop for stop in stops if isinstance(stop, int)],
    )
    texts = []
    for tokens, length in zip(found.tokens, found.lengths):
        stream = lm.tokenizers.TextStream(tokenizer, stops)
        stream.push(tokens[: int(length)].tolist())
        stream.finish()
        texts.append(stream.text.strip())
    return texts


def said(messages: Sequence[Any]) -> str:
    """The words of some messages."""
    return "\n".join(str(message.get("content", "")) for message in messages)


def compare(
    before: dict[str, float], after: dict[str, float], rows: Sequence[dict[str, str]], folder: Path, title: str
) -> None:
    """Prints scores and answers before and after, and writes them as `comparison.json`.

    Args:
      before, after: scores by name.
      rows: a dict of texts for each prompt, all with the same keys.
      folder: the run directory.
      title: what was scored.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if after:
        table = Table(title=title, title_justify="left")
        for name in ("", "before", "after"):
            table.add_column(name, justify="right" if name else "left")
        for name, value in after.items():
            table.add_row(name, f"{before[name]:.4f}", f"{value:.4f}")
        console.print(table)
    if rows:
        table = Table(title="held-out prompts", title_justify="left", show_lines=True)
        for name in rows[0]:
            table.add_column(name, ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*(Text(text) for text in row.values()))  # square brackets are no markup
        console.print(table)
    comparison = {"before": before, "after": after, "samples": list(rows)}
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=2, ensure_ascii=False) + "\n", "utf-8")
