"""Log-probabilities of whole data sets, kept on disk: a frozen reference need not run in every step."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.models.decoder import Variables
from lmjax.policy import Policy, Request
from lmjax.sharding.context import tracing_for
from lmjax.sharding.mesh import shard_batch
from lmjax.sharding.rules import DEFAULT_RULES, Rules


def token_logprobs(
    policy: Policy,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Iterable[np.ndarray]:
    """The log-probability of every target of each batch, float32 [B, T], one after the other.

    Args:
      policy, variables: the model.
      batches: any batches.
      mesh, rules: where the variables lie.
    """
    for batch in batches:
        placed = batch if mesh is None else shard_batch(batch, mesh, rules)
        yield np.asarray(_logprobs(policy, mesh, tuple(rules), variables, placed), np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _logprobs(policy: Policy, mesh: Mesh | None, rules: Any, variables: Variables, batch: Batch) -> jax.Array:
    with tracing_for(mesh, rules):
        return policy(variables, batch).expecting(Request(frozenset({"logprobs"})), {}).logprobs


def kept_on_disk(path: Path, shape: tuple[int, int], compute: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """Rows of numbers out of a file, computed and written first where there is none.

    Args:
      path: of the file, an `.npy`; its name should say what the numbers depend on.
      shape: [N, T].
      compute: gives blocks of rows; those beyond N are left out.

    Returns:
      float32 [N, T], read as needed.

    Raises:
      UserError: the file holds another shape, or is damaged.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        found = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        done = 0
        for block in compute():
            block = block[: shape[0] - done]
            found[done : done + len(block)] = block
            done += len(block)
        found.flush()
        os.replace(partial, path)
    try:
        kept: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and it is computed again") from None
    if kept.shape != shape:
        raise UserError(f"{path} holds {kept.shape} numbers and {shape} are wanted; remove it")
    return kept
