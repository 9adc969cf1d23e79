"""Any objective on held-out batches: what its terms and their metrics come to, gradients aside."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lmjax.batch import Batch
from lmjax.models.decoder import Variables
from lmjax.objectives.algebra import Objective, Role
from lmjax.objectives.evaluation import Sums, check_roles, evaluate, role_variables
from lmjax.policy import Policy
from lmjax.sharding.context import tracing_for
from lmjax.sharding.mesh import shard_batch
from lmjax.sharding.rules import DEFAULT_RULES, Rules

_AHEAD = 8  # batches given to the device before the result of the first is waited for


def evaluate_objective(
    objective: Objective,
    policy: Policy,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    roles: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> dict[str, tuple[float, float]]:
    """Total and weight of each metric over all batches; their quotient is its value.

    Compiles once for an objective (the same object) and each shape of batch. Sums are float32 within a batch and
    float64 over them.

    Args:
      objective: of one stream. Terms are reported before their coefficients, as "loss/<term>".
      policy, variables: the model.
      batches: any batches.
      roles: the objective's other models by name, as in `training.make_step`.
      mesh, rules: where the variables lie; each batch is spread over it.

    >>> import lmjax as lm, numpy as np
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = policy.init(jax.random.key(0))
    >>> batch = lm.batch.next_token_batch(np.array([[0, 1, 2]]))
    >>> roles = {"teacher": variables}
    >>> objective = lm.objectives.distillation() + lm.objectives.agreement()
    >>> sums = evaluate_objective(objective, policy, variables, [batch], roles=roles)
    >>> sums["loss/distillation_teacher"], sums["loss/agreement_teacher"]
    ((0.0, 2.0), (2.0, 2.0))
    """
    rules = tuple(rules)
    known = check_roles(objective, roles or {})
    frozen = {name: role_variables(role, variables) for name, role in known.items()}
    policies = tuple((name, known[name].policy or policy) for name in sorted(known))
    waiting: list[Any] = []
    totals: dict[str, tuple[float, float]] = {}

    def take(count: int) -> None:
        for found in jax.device_get([waiting.pop(0) for _ in range(count)]):
            for name, (total, weight) in found.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + float(total), before[1] + float(weight)

    for batch in batches:
        if mesh is not None:
            batch = shard_batch(batch, mesh, rules)
        waiting.append(_sums(objective, policy, policies, mesh, rules, variables, frozen, batch))
        if len(waiting) > _AHEAD:
            take(1)
    take(len(waiting))
    return totals


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sums(
    objective: Objective,
    policy: Policy,
    policies: tuple[tuple[str, Policy], ...],
    mesh: Mesh | None,
    rules: Any,
    variables: Variables,
    frozen: dict[str, Variables],
    batch: Batch,
) -> Sums:
    if mesh is not None:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        policy = dataclasses.replace(policy, chunk_elements=policy.chunk_elements * shards)
    with tracing_for(mesh, rules):
        roles = {name: Role(frozen[name], its) for name, its in policies}
        sums = evaluate(objective, policy, variables, batch, roles=roles).sums
        return {name: pair for name, pair in sums.items() if name != "loss"}
