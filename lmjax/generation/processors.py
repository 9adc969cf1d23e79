"""The chain of logits processors: what is done to the logits before a token is drawn.

A processor is a small frozen pytree: its parameters are leaves, so that another value compiles nothing anew, and each
may be one value for the batch or one a row. It maps logits [B, V] and what each row has said so far to logits [B, V].
The kinds live in `penalties` (they read the history), `bans` (they rule tokens out or in) and `truncation` (they cut
the distribution); a new one is a subclass with a `process` of its own, or a function in `custom`.

The order of the chain is that of transformers' `_get_logits_processor`: classifier-free guidance 1, biases 2,
repetition 4 (then frequency and presence, which it does not have), n-grams 5, bad words 7, minimum lengths 8 and 9,
forced tokens 11, clean-up 13, exponential length penalty 14, suppressed tokens 15 and 16, yours 17, temperature 18,
top-k 20, top-p 21, min-p 22, typical 23, epsilon 24, eta 25.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.generation.bans import (
    bad_words,
    clean,
    forced,
    min_length,
    min_new_tokens,
    no_repeat_ngram,
    suppress,
    suppress_at_start,
)
from lmjax.generation.penalties import (
    exponential_length_penalty,
    frequency_penalty,
    logit_bias,
    presence_penalty,
    repetition_penalty,
    sequence_bias,
)
from lmjax.generation.processor_base import (
    FOREVER,
    TEMPERATURE,
    History,
    Parameter,
    Processor,
    concrete,
    custom,
    parameter,
    parameters,
    replaced,
    static_fields,
)
from lmjax.generation.truncation import epsilon, eta, min_p, temperature, top_k, top_p, typical

__all__ = [
    # The chain.
    "History", "Processor", "parameter", "arrange", "check", "per_row", "stack", "apply", "guide",
    # The kinds, in order.
    "sequence_bias", "logit_bias", "repetition_penalty", "frequency_penalty", "presence_penalty", "no_repeat_ngram",
    "bad_words", "min_length", "min_new_tokens", "forced", "clean", "exponential_length_penalty", "suppress",
    "suppress_at_start", "custom", "temperature", "top_k", "top_p", "min_p", "typical", "epsilon", "eta",
]  # fmt: skip


def per_row(processors: Iterable[Processor], batch_size: int) -> tuple[Processor, ...]:
    """The chain with a leading axis [B] on every leaf, so that `jax.tree.map(lambda x: x[rows], chain)` picks rows.

    Raises:
      UserError: a parameter has one value a row for another number of rows.
    """
    return tuple(processor.per_row(batch_size) for processor in processors)


def arrange(processors: Iterable[Processor]) -> tuple[Processor, ...]:
    """The chain in its order, whatever order it was given in.

    Raises:
      UserError: something that is no processor, two of a kind, numbers of rows that differ, or a contradiction.
    """
    given = tuple(processors)
    for processor in given:
        if not isinstance(processor, Processor):
            raise UserError(f"{processor!r} is no processor; wrap a function of (logits, history) in custom(...).")
    chain = tuple(sorted(given, key=lambda processor: processor.order))
    seen: set[Hashable] = set()
    rows: dict[int, str] = {}
    for processor in chain:
        if processor.kind in seen:
            raise UserError(f"{processor.name} is given twice; keep one of the two.")
        seen.add(processor.kind)
        for field, spec in parameters(type(processor)):
            shape = np.shape(getattr(processor, field))
            if len(shape) > spec.ndim:
                rows[shape[0]] = processor.name
    if len(rows) > 1:
        found = " and ".join(f"{name} for {count}" for count, name in rows.items())
        raise UserError(f"parameters are given by row, {found}; give one value, or one for each row of the batch.")
    for one in chain:
        for other in chain:
            if sentence := one.conflict(other):
                raise UserError(sentence)
    return chain


def check(processors: Iterable[Processor], vocab_size: int, max_new_tokens: Any) -> tuple[Processor, ...]:
    """The arranged chain, fit for a model and a length: use what it returns.

    Args:
      processors: in any order.
      vocab_size: V.
      max_new_tokens: an int, or int [B].

    Raises:
      UserError: as `arrange`; besides, ids outside the vocabulary, a minimum or a forced position that is not
        reached, or no token left to draw.
    """
    chain = arrange(processor.resolved(vocab_size, max_new_tokens) for processor in arrange(processors))
    for processor in chain:
        for field, spec in parameters(type(processor)):
            ids = concrete(getattr(processor, field)) if spec.ids else None
            if ids is not None and ids.max() >= vocab_size:
                raise UserError(
                    f"{processor.name} names the id {ids.max()}, outside the model's vocabulary of {vocab_size}; "
                    "encode it with the model's own tokenizer."
                )
    for place, where in ((0, "as the first new token"), (FOREVER - 1, "later")):
        gone = np.zeros(vocab_size, bool)
        for ban in filter(None, (processor.banned() for processor in chain)):
            here = (ban.first <= place) & (place < ban.end)
            ids = np.where(here[..., None] & (ban.ids >= 0), ban.ids, vocab_size)
            out = np.zeros((*ids.shape[:-1], vocab_size + 1), bool)
            np.put_along_axis(out, ids, True, axis=-1)
            gone = gone | out[..., :-1]
        if np.any(np.all(gone, axis=-1)):
            raise UserError(f"the processors leave no token of {vocab_size} that may be drawn {where}; ban fewer.")
    return chain


def stack(chains: Sequence[Iterable[Processor]]) -> tuple[Processor, ...]:
    """One arranged chain for a batch whose rows have chains of their own, of parameters without an axis of rows.

    A row without a kind that another row has gets that kind's neutral value.

    Args:
      chains: one for each row.
    """
    rows = [{processor.kind: processor for processor in arrange(chain)} for chain in chains]
    kinds = {kind: processor for row in rows for kind, processor in row.items()}
    stacked = []
    for kind, example in kinds.items():
        present = [row[kind] for row in rows if kind in row]
        changes: dict[str, Any] = {}
        for field in static_fields(type(example)):  # numbers are bounds: the largest serves every row
            values = {getattr(processor, field) for processor in present}
            changes[field] = values.pop() if len(values) == 1 else max(values)
        for field, spec in parameters(type(example)):
            found = [
                np.asarray(getattr(row[kind], field) if kind in row else _neutral(spec), spec.dtype) for row in rows
            ]
            if any(value.ndim != spec.ndim for value in found):
                raise UserError(f"{example.name} has {field} by row in the chain of a single row; give one value.")
            shape = [max(sizes) for sizes in zip(*(value.shape for value in found))]
            rows_BN = np.full((len(found), *shape), -1 if spec.ids else 0, spec.dtype)
            for b, value in enumerate(found):
                corner: Any = (b, *map(slice, value.shape))
                rows_BN[corner] = value
            changes[field] = rows_BN
        stacked.append(replaced(example, **changes))
    return arrange(stacked)


def _neutral(spec: Parameter) -> np.ndarray:
    return np.full((1,) * spec.ndim, spec.neutral)


def apply(
    z_BV: jax.Array, history: History, processors: Iterable[Processor], temperature_B: jax.Array | None = None
) -> jax.Array:
    """The logits after an arranged chain.

    Args:
      z_BV: float32 [B, V].
      history: what the rows have said so far.
      processors: from `arrange` or `check`.
      temperature_B: float32 [B], divides the logits at place 18. A row of temperature 0 is greedy: nothing from place
        18 on touches it (typical sampling, for one, may cut the likeliest token). None: no division, and the whole
        chain for every row.

    Returns:
      float32 [B, V], -inf where a token is ruled out.
    """
    chain = tuple(processors)
    for processor in chain:
        if processor.order < TEMPERATURE:
            z_BV = processor(z_BV, history)
    behind = [processor for processor in chain if processor.order >= TEMPERATURE]
    if temperature_B is None:
        return functools.reduce(lambda z, processor: processor(z, history), behind, z_BV)
    if any(processor.order == TEMPERATURE for processor in behind):
        raise UserError("the temperature is given twice, as a processor and to the sampler; keep one of the two.")
    greedy_B1 = temperature_B[:, None] == 0
    # Rows of -inf alone cost the truncations nothing: no greedy row makes them sort the vocabulary.
    drawn_BV = jnp.where(greedy_B1, -jnp.inf, z_BV / jnp.where(greedy_B1, 1.0, temperature_B[:, None]))
    drawn_BV = functools.reduce(lambda z, processor: processor(z, history), behind, drawn_BV)
    return jnp.where(greedy_B1, z_BV, drawn_BV)


def guide(conditional_BV: jax.Array, unconditional_BV: jax.Array, scale_B: jax.Array) -> jax.Array:
    """Classifier-free guidance, `u + s (c - u)` on log-probabilities (arXiv:2306.17806). The first of the chain.

    Args:
      conditional_BV, unconditional_BV: float32 [B, V], logits with the prompt and without it (or with a negative one).
      scale_B: float32 [B], s. 1 leaves a row's conditional logits as they are, above 1 leans on the prompt.

    Returns:
      float32 [B, V]. A token that is impossible given the prompt stays so.
    """
    c_BV = jax.nn.log_softmax(conditional_BV, axis=-1)
    u_BV = jax.nn.log_softmax(unconditional_BV, axis=-1)
    scale_B1 = scale_B[:, None]
    guided_BV = jnp.where(conditional_BV == -jnp.inf, -jnp.inf, u_BV + scale_B1 * (c_BV - u_BV))
    return jnp.where(scale_B1 == 1, conditional_BV, guided_BV)
