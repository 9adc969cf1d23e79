"""Evaluating an objective: one forward a role and stream, one pass over the vocabulary, exact denominators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.losses.fused import token_loss
from lmjax.losses.logits import STATISTICS
from lmjax.models.decoder import Variables
from lmjax.objectives.algebra import Objective, Role, Term, coefficient_at
from lmjax.objectives.tracing import Trace, View, call, request, token_program, trace
from lmjax.policy import Outputs, Policy, scored, unscored

Sums = dict[str, tuple[jax.Array, jax.Array]]  # metric -> (total, weight): add over microbatches, then divide
Streams = dict[str, Batch]
DEFAULT_STREAM = "batch"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An objective on some batches.

    Attributes:
      loss: scalar, differentiable.
      sums: every metric as (total, weight), without gradient.
    """

    loss: jax.Array
    sums: Sums


jax.tree_util.register_dataclass(Evaluation, data_fields=["loss", "sums"], meta_fields=[])


def as_streams(batches: Batch | Mapping[str, Batch]) -> Streams:
    """A single batch is the only stream."""
    return dict(batches) if isinstance(batches, Mapping) else {DEFAULT_STREAM: batches}


def finalize(sums: Sums) -> dict[str, jax.Array]:
    """Metrics from their sums; 0 where nothing was counted."""
    return {name: total / jnp.where(weight == 0, 1.0, weight) for name, (total, weight) in sums.items()}


def evaluate(
    objective: Objective,
    policy: Policy,
    variables: Variables,
    batches: Batch | Mapping[str, Batch],
    *,
    roles: Mapping[str, Role] | None = None,
    step: jax.Array | int = 0,
    rng: jax.Array | None = None,
    train: bool = False,
    weights: list[jax.Array] | None = None,
) -> Evaluation:
    """The loss of an objective and its metrics.

    Terms that treat tokens independently get their gradients slice by slice while the logits are there
    (`losses.fused.token_loss`); if any term of a stream does not, that stream takes the general path.

    Args:
      objective: the sum of terms.
      policy, variables: the model that is trained.
      batches: one batch, or one a stream.
      roles: the other models by name; they get no gradient unless they are `trained`.
      step: for coefficients that are schedules.
      rng: key for dropout.
      train: whether dropout is on.
      weights: each term's denominator over the whole optimizer step, if this is a part of it; None: this batch's own.
    """
    batches = as_streams(batches)
    roles = check_roles(objective, roles or {})
    coefficients = [coefficient_at(coefficient, jnp.asarray(step)) for coefficient, _ in objective.terms]
    names = objective.streams(batches)
    traces = _trace(objective, policy, variables, batches, roles)
    loss = jnp.zeros(())
    sums: Sums = {}
    for number, stream in enumerate(sorted(set(names))):
        members = [index for index, name in enumerate(names) if name == stream]
        own_rng = None if rng is None else jax.random.fold_in(rng, number)
        outputs = _outputs(policy, variables, batches[stream], roles, own_rng, train)
        part, part_sums = _evaluate_stream(
            [objective.terms[i][1] for i in members],
            [objective.labels[i] for i in members],
            [coefficients[i] for i in members],
            [traces[i] for i in members],
            None if weights is None else [weights[i] for i in members],
            batches[stream],
            outputs,
        )
        loss, sums = loss + part, sums | part_sums
    sums["loss"] = (jax.lax.stop_gradient(loss), jnp.ones(()))
    return Evaluation(loss, sums)


def term_weights(
    objective: Objective,
    policy: Policy,
    variables: Variables,
    batches: Batch | Mapping[str, Batch],
    roles: Mapping[str, Role] | None = None,
) -> list[jax.Array]:
    """Each term's denominator over whole batches, from masks alone: no forward pass.

    Raises:
      UserError: a term couples rows, or its mask depends on the outputs, so that its batch cannot be split.
    """
    batches = as_streams(batches)
    roles = check_roles(objective, roles or {})
    found = []
    traces = _trace(objective, policy, variables, batches, roles)
    for (_, term), label, stream, seen in zip(
        objective.terms, objective.labels, objective.streams(batches), traces, strict=True
    ):
        if term.couples_rows or seen.mask_depends_on_outputs or seen.scalar:
            reason = (
                "couples the rows of a batch"
                if term.couples_rows
                else "has one value for the whole batch"
                if seen.scalar
                else "has a mask that depends on the outputs"
            )
            raise UserError(f"term {label!r} {reason}, so the batch cannot be split under it; set microbatches=1.")
        batch = batches[stream]
        empty = {name: jnp.zeros(batch.tokens.shape) for name in STATISTICS}
        shapes, outputs = _shapes(policy, variables, batch, roles), _outputs(policy, variables, batch, roles)
        views = {
            role: View(role, batch, empty, dataclasses.replace(seen.probe, shapes=shapes, outputs=outputs))
            for role in ("policy", *term.roles)
        }
        _, mask, _ = call(term, views, batch)
        found.append(term.reducer.coefficients(mask, batch.sequences)[1])
    return found


def check_roles(objective: Objective, roles: Mapping[str, Role]) -> dict[str, Role]:
    """Every role the objective takes, as `Role`s.

    Raises:
      UserError: one is missing.
    """
    known = {name: role if isinstance(role, Role) else Role(role) for name, role in roles.items()}
    if missing := [name for name in objective.roles if name not in known]:
        raise UserError(f"the objective needs the role {missing[0]!r}; pass roles={{{missing[0]!r}: variables}}.")
    return known


def role_variables(role: Role, variables: Variables) -> Variables:
    """A role's variables, without gradient unless it is trained."""
    found = role.variables(variables) if callable(role.variables) else role.variables
    return found if role.trained else jax.lax.stop_gradient(found)


def _outputs(
    policy: Policy,
    variables: Variables,
    batch: Batch,
    roles: Mapping[str, Role],
    rng: jax.Array | None = None,
    train: bool = False,
) -> dict[str, Outputs]:
    """Lazy outputs of the policy and of every role."""
    outputs = {"policy": policy(variables, batch, rng=rng, train=train)}
    for name, role in roles.items():
        outputs[name] = (role.policy or policy)(role_variables(role, variables), batch)
    return outputs


def _shapes(policy: Policy, variables: Variables, batch: Batch, roles: Mapping[str, Role]) -> Any:
    """(role, field) -> shapes of that field of the role's outputs."""

    @functools.cache
    def shapes(role: str, field: str) -> Any:
        def read(variables: Variables, batch: Batch) -> Any:
            return getattr(_outputs(policy, variables, batch, roles)[role], field)

        return jax.eval_shape(read, variables, batch)

    return shapes


def _trace(
    objective: Objective, policy: Policy, variables: Variables, batches: Streams, roles: Mapping[str, Role]
) -> list[Trace]:
    streams = objective.streams(batches)
    shapes = {name: _shapes(policy, variables, batches[name], roles) for name in set(streams)}
    outputs = {name: _outputs(policy, variables, batches[name], roles) for name in set(streams)}
    return [
        trace(term, batches[stream], shapes[stream], outputs[stream])
        for (_, term), stream in zip(objective.terms, streams, strict=True)
    ]


def _evaluate_stream(
    terms: list[Term],
    labels: list[str],
    coefficients: list[Any],
    traces: list[Trace],
    weights: list[jax.Array] | None,
    batch: Batch,
    outputs: dict[str, Outputs],
) -> tuple[jax.Array, Sums]:
    for name, output in outputs.items():
        output.expecting(request(traces, name), outputs)
    own = outputs["policy"]
    reading = [i for i, seen in enumerate(traces) if "policy" in seen.probe.statistics or "policy" in seen.probe.maps]
    wanted = request(traces, "policy")
    fused = bool(reading) and all(traces[i].tokenwise for i in reading) and not wanted.logits
    if fused and (length := own.slice_length) < batch.tokens.shape[1]:
        fused = all(traces[i].program == token_program(terms[i], batch, length) for i in reading)
    blank = {name: jnp.zeros(batch.tokens.shape) for name in STATISTICS}

    def reduced(index: int, views: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """Values, coefficients, weight and metrics of one term."""
        values, mask, metrics = call(terms[index], views, batch)
        share, weight = terms[index].reducer.coefficients(jax.lax.stop_gradient(mask), batch.sequences)
        return values, share, weight, metrics

    def share_and_weight(index: int) -> tuple[jax.Array, jax.Array]:
        """Of a term whose mask does not depend on the outputs."""
        views = {name: View(name, batch, blank) for name in ("policy", *terms[index].roles)}
        return reduced(index, views)[1:3]

    loss = jnp.zeros(())
    if fused:
        others = {
            name: {field: getattr(outputs[name], field) for field in sorted(output_request.statistics)}
            for name in outputs
            if name != "policy" and (output_request := request(traces, name)).statistics
        }
        shares = {}
        for i in reading:
            share, weight = share_and_weight(i)
            weight = weight if weights is None else weights[i]
            shares[i] = jax.lax.stop_gradient(coefficients[i] * share / jnp.where(weight == 0, 1.0, weight))

        def loss_of(statistics: dict[str, jax.Array], extras: Any) -> jax.Array:
            piece, others, shares = extras
            total = jnp.zeros(piece.tokens.shape)
            for i in reading:
                views = {"policy": View("policy", piece, _weighed(statistics, shares[i]))}
                views |= {name: View(name, piece, others.get(name, {})) for name in terms[i].roles}
                values = call(terms[i], views, piece)[0]
                total = total + jnp.where(shares[i] != 0, values, 0.0) * shares[i]
            return total

        loss, statistics = token_loss(
            own.head,
            scored(own.hidden, batch),
            scored(batch.targets, batch),
            loss_of,
            scored((dataclasses.replace(batch, scored=None), others, shares), batch),
            temperature_B=batch.temperature,
            wanted=sorted(wanted.statistics),
            elements=own.policy.chunk_elements,
        )
        own.with_statistics(unscored(statistics, batch))

    sums: Sums = {}
    for i, label in enumerate(labels):
        views: dict[str, Any] = outputs
        if traces[i].tokenwise and not fused:
            share, _ = share_and_weight(i)
            read = {name: getattr(own, name) for name in traces[i].probe.statistics.get("policy", ())}
            views = outputs | {"policy": View("policy", batch, _weighed(read, share))}
        values, share, weight, metrics = reduced(i, views)
        total = jnp.sum(jnp.where(share != 0, values, 0.0) * share)
        if not (fused and i in reading):
            denominator = jax.lax.stop_gradient(weight if weights is None else weights[i])
            loss = loss + coefficients[i] * total / jnp.where(denominator == 0, 1.0, denominator)
        sums[f"loss/{label}"] = jax.lax.stop_gradient((total, weight))
        prefix = label.rpartition("/")[0]
        for name, (value, mask) in metrics.items():
            mask = jnp.asarray(mask, jnp.float32)
            pair = (jnp.sum(jnp.where(mask != 0, value, 0.0) * mask), jnp.sum(mask))
            known = f"{prefix}/{name}" if prefix else name
            # The first term of a stream has the plain name; another that reports the same says whose it is.
            sums[known if known not in sums else f"{label}/{name}"] = jax.lax.stop_gradient(pair)
    return loss, sums


def _weighed(statistics: dict[str, jax.Array], share_BT: jax.Array) -> dict[str, jax.Array]:
    """Statistics through which tokens without weight get no gradient, be its factor infinite (0 * inf is NaN)."""
    return {
        name: jnp.where(share_BT != 0, value, jax.lax.stop_gradient(value)) for name, value in statistics.items()
    }
