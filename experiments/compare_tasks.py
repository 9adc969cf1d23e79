"""The tasks that `experiments.compare_adapters` compares fine-tuning methods on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import lmjax as lm
from experiments.compare_config import CompareConfig
from experiments.support import open_model
from lmjax.batch import Batch, next_token_batch
from lmjax.data.supervised_config import SupervisedConfig
from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, and examples that it is to learn.

    Attributes:
      name: for tables.
      steps: of a run.
      policy, variables: where every method starts.
      batch: (seed, step) -> training batch.
      choosing: held-out batches by which a learning rate is chosen.
      held_out: other ones, which are reported.
    """

    name: str
    steps: int
    policy: lm.Policy
    variables: Any
    batch: Callable[[int, int], Batch]
    choosing: Sequence[Batch]
    held_out: Sequence[Batch]


# Words of the synthetic task: the end, "=", the name of each operation, then letters.
END, EQUALS, FIRST_OPERATION, FIRST_LETTER, LETTERS, WORD = 0, 1, 2, 10, 22, 8
OPERATIONS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda w: w,
    lambda w: w[:, ::-1],
    lambda w: (w + 1) % LETTERS,
    lambda w: np.roll(w, WORD // 2, axis=1),
    lambda w: np.repeat(w[:, ::2], 2, axis=1),
)
NEW = lambda w: (w[:, ::-1] + 1) % LETTERS  # reversed and shifted: both known, never together
VOCABULARY = FIRST_LETTER + LETTERS


def word_batch(random: np.random.Generator, rows: int, new: bool) -> Batch:
    """Examples `operation word = result`, of the known operations or of the new one; the result is the target."""
    words = random.integers(0, LETTERS, (rows, WORD))
    if new:
        which, results = np.full(rows, len(OPERATIONS)), NEW(words)
    else:
        which = random.integers(0, len(OPERATIONS), rows)
        results = np.stack([operation(words) for operation in OPERATIONS])[which, np.arange(rows)]
    column = lambda value: np.broadcast_to(value, rows)[:, None]
    ids = np.concatenate(
        [
            column(FIRST_OPERATION + which),
            FIRST_LETTER + words,
            column(EQUALS),
            FIRST_LETTER + results,
            column(END),
        ],
        axis=1,
    )
    return next_token_batch(ids, mask=np.broadcast_to(np.arange(ids.shape[1]) > WORD + 1, ids.shape))


def synthetic(config: CompareConfig, say: Callable[[str], None]) -> Task:
    """A model that knows some operations on words, and one that it has not seen.

    The new operation's name stands in the vocabulary, untrained: methods that leave the embeddings alone must make do
    with where it started.
    """
    policy = lm.Policy(lm.models.small(VOCABULARY, num_layers=3, embed_dim=96, num_heads=4, max_length=64))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, config.base_steps // 20, config.base_steps)
    optimizer = optax.adamw(schedule, b2=0.99, weight_decay=0.01)
    state = lm.training.init_state(policy, optimizer, jax.random.key(config.seed))
    step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer, clip_norm=1.0)
    random = np.random.default_rng([config.seed, 0])
    for _ in range(config.base_steps):
        state, metrics = step(state, word_batch(random, 64, new=False))
    say(f"the model to start from: loss {float(metrics['loss']):.4f} on the operations it knows")
    held_out = [word_batch(np.random.default_rng([config.seed, 1, i]), 64, new=True) for i in range(8)]
    return Task(
        "synthetic",
        config.steps,
        policy,
        jax.device_get(state.variables),
        lambda seed, index: word_batch(np.random.default_rng([config.seed, 2, seed, index]), config.batch_size, True),
        held_out[:4],
        held_out[4:],
    )


def instruct(config: CompareConfig, say: Callable[[str], None]) -> Task:
    """Instructions from a file for a model from a run or Hugging Face directory; the answers are the targets."""
    model = open_model(config.model)
    source = SupervisedConfig(
        path=config.data,
        sequence_length=config.sequence_length,
        validation_fraction=0.25,
        loss_on="completion",
        prefetch=0,
        seed=config.seed,
    )
    data = lm.data.load_supervised(source, config.batch_size, model.tokenizer, template=model.chat_template())
    say(data.report())
    held_out = [batch for own in data.validation().values() for batch in own]
    if len(held_out) < 2:
        raise UserError("the held-out instructions fill less than two batches; lower --batch-size")
    return Task(
        "instruct",
        config.instruct_steps,
        model.policy,
        jax.device_get(model.variables),
        lambda seed, index: data.batch(seed * config.instruct_steps + index),
        held_out[::2],
        held_out[1::2],
    )
