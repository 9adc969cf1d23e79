"""Negative log-likelihood of held-out text: nats a token, perplexity, bits a byte.

Bits a byte do not depend on the tokenizer: the total in nats, over ln 2, over the UTF-8 bytes that the scored
tokens stand for. Totals are summed over all batches before anything is divided.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmjax.batch import Batch
from lmjax.models.decoder import Variables
from lmjax.policy import Policy, Request
from lmjax.sharding.context import tracing_for
from lmjax.sharding.mesh import shard_batch
from lmjax.sharding.rules import DEFAULT_RULES, Rules

_AHEAD = 8  # batches given to the device before the result of the first is waited for


@dataclasses.dataclass(frozen=True)
class Score:
    """Totals over a text.

    Attributes:
      nats: total negative log-likelihood.
      tokens: how many targets were scored.
      correct: how many of them were the likeliest token.
      bytes: UTF-8 bytes that the targets stand for, or None where nobody counted.
    """

    nats: float
    tokens: float
    correct: float
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(self.tokens, 1.0)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.tokens, 1.0)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the bytes were not counted.

        >>> Score(nats=math.log(256) * 10, tokens=10, correct=0, bytes=10).bits_per_byte
        8.0
        """
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def metrics(self) -> dict[str, float]:
        """As a training loop records it: loss, perplexity, accuracy and, where known, bits_per_byte."""
        values = {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy}
        if self.bits_per_byte is not None:
            values["bits_per_byte"] = self.bits_per_byte
        return values


def evaluate_batches(
    policy: Policy,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Score:
    """Scores every target of the batches by its weight in the mask.

    Compiles once for each shape of batch. Sums are float32 within a batch and float64 over them.

    Args:
      policy, variables: the model.
      batches: any batches; if they have an attribute `bytes` (`Dataset.validation()`, `windows.TextBatches`),
        the score has bits a byte.
      mesh, rules: where the variables lie; each batch is spread over it.

    >>> import lmjax as lm, numpy as np
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> batch = lm.batch.next_token_batch(np.array([[0, 1, 2]]))
    >>> score = evaluate_batches(policy, policy.init(jax.random.key(0)), [batch])
    >>> round(score.perplexity, 4), score.tokens
    (4.0, 2.0)
    """
    rules = tuple(rules)
    waiting: list[Any] = []
    totals = [0.0, 0.0, 0.0]

    def take(count: int) -> None:
        for found in jax.device_get([waiting.pop(0) for _ in range(count)]):
            for i, value in enumerate(found):
                totals[i] += float(value)

    for batch in batches:
        if mesh is not None:
            batch = shard_batch(batch, mesh, rules)
        waiting.append(_totals(policy, mesh, rules, variables, batch))
        if len(waiting) > _AHEAD:
            take(1)
    take(len(waiting))
    nats, tokens, correct = totals
    return Score(nats, tokens, correct, getattr(batches, "bytes", None))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _totals(
    policy: Policy, mesh: Mesh | None, rules: Any, variables: Variables, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(nats, targets, hits) of a batch."""
    if mesh is not None:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        policy = dataclasses.replace(policy, chunk_elements=policy.chunk_elements * shards)
    with tracing_for(mesh, rules):
        outputs = policy(variables, batch).expecting(Request(frozenset({"logprobs", "correct"})), {})
        kept = batch.mask != 0
        nats = jnp.sum(jnp.where(kept, -outputs.logprobs, 0.0) * batch.mask)
        hits = jnp.sum(jnp.where(kept, outputs.correct, 0.0) * batch.mask)
        return nats, jnp.sum(batch.mask), hits
