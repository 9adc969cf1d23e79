"""The first terms. Each is a few lines over `lmjax.losses`."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.losses import divergences, tokens
from lmjax.objectives.algebra import Objective, Term
from lmjax.objectives.importance import Level, Weighing, least_certain, ratios
from lmjax.objectives.reducers import Reducer, token_mean


def _objective(name: str, function: Any, reducer: Reducer, roles: tuple[str, ...] = (), couples: bool = False):
    return Objective(((1.0, Term(name, function, reducer, roles, None, couples)),))


def cross_entropy(*, label_smoothing: float = 0.0, reducer: Reducer = token_mean) -> Objective:
    """Negative log-likelihood of the targets, in nats, with accuracy as a metric.

    Args:
      label_smoothing: share of the target spread evenly over the vocabulary, from 0 up to, not including, 1.
      reducer: see `lmjax.objectives.reducers`.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"label_smoothing is {label_smoothing}; give a number from 0 up to, not including, 1.")

    def function(outputs: Any, batch: Batch) -> Any:
        losses = -outputs.logprobs
        metrics = {"accuracy": (outputs.correct, batch.mask)}
        if label_smoothing:
            metrics["nll"] = (losses, batch.mask)
            losses = tokens.smoothed_cross_entropy(
                outputs.logprobs, outputs.mean_logits, outputs.logsumexp, label_smoothing
            )
        return losses, batch.mask, metrics

    return _objective("cross_entropy", function, reducer)


def z_loss(*, reducer: Reducer = token_mean) -> Objective:
    """`logsumexp(logits)^2`: keeps the softmax normaliser near 1 (PaLM uses 1e-4 of it)."""
    return _objective("z_loss", lambda outputs, batch: (jnp.square(outputs.logsumexp), batch.mask), reducer)


def entropy(*, top: float = 1.0, reducer: Reducer = token_mean) -> Objective:
    """Entropy of the next-token distribution, in nats. Subtract it to reward exploration.

    Args:
      top: of this share of the batch's tokens only, the least certain ones, as `Weighing.top_entropy` has it. Below 1
        it couples the rows of a batch.
      reducer: see `lmjax.objectives.reducers`.
    """
    if not 0.0 < top <= 1.0:
        raise UserError(f"top is {top}; give a share above 0 and up to 1.")

    def function(outputs: Any, batch: Batch) -> Any:
        mask = batch.mask if top == 1.0 else batch.mask * least_certain(outputs.entropy, batch, top)
        return outputs.entropy, mask

    return _objective("entropy", function, reducer, (), top < 1.0)


def kl(
    role: str = "reference",
    *,
    estimator: divergences.KLEstimator = "k3",
    gradient: Literal["own", "weighted", "k2", "weighted_k2"] = "own",
    level: Level = "token",
    cap: float | None = None,
    held: float | None = None,
    largest: float | None = None,
    reducer: Reducer = token_mean,
) -> Objective:
    """Estimate of KL(policy || role) from the batch's own tokens, which the policy should have sampled.

    Read `losses.kl_estimate` before choosing: as a loss, k1 has zero expected gradient, k2 that of KL(policy || role),
    and k3 that of KL(role || policy). The ways to the right gradient with another estimator's value are `gradient`s.

    Args:
      role: the other model's role.
      estimator: "k1", "abs", "k2" or "k3".
      gradient: "own": the estimate is differentiated. "weighted": so is the importance ratio that it is multiplied by,
        pi / pi_old where the batch has `old_logprobs` (TRL's bias correction; DeepSeek-V3.2): right for k1 and k3, on
        the policy's own tokens and on others. "k2": the value of the estimator with the gradient of k2 (verl's "k1+"
        and "k3+"), right on the policy's own tokens. "weighted_k2": that times the importance ratio, itself without
        gradient (OpenRLHF's unbiased gradient): right on others too.
      level: of the importance ratio, as in `Weighing` (TRL's GSPO: "sequence").
      cap: largest importance ratio; None for none.
      held, largest: bounds of the log-ratio and of the estimate; None for none.
      reducer: see `lmjax.objectives.reducers`.
    """
    if estimator not in ("k1", "abs", "k2", "k3"):
        raise UserError(f"no KL estimator is called {estimator!r}; there are k1, abs, k2 and k3.")
    if gradient not in ("own", "weighted", "k2", "weighted_k2"):
        raise UserError(f"a KL estimate has no gradient {gradient!r}; there are own, weighted, k2 and weighted_k2.")
    weighing = Weighing(level=level)

    def weight(outputs: Any, batch: Batch) -> jax.Array:
        if level != "token":
            found = ratios(outputs, batch, weighing).ratio
        else:
            old = getattr(batch, "old_logprobs", None)
            found = jnp.exp(outputs.logprobs - (jax.lax.stop_gradient(outputs.logprobs) if old is None else old))
        return found if cap is None else jnp.minimum(found, cap)

    def function(outputs: Any, batch: Batch, other: Any) -> Any:
        own = outputs.logprobs
        values = divergences.kl_estimate(own, other.logprobs, estimator, held, largest)
        if gradient == "weighted":
            values = values * weight(outputs, batch)
        elif gradient != "own":
            pull = divergences.kl_estimate(own, other.logprobs, "k2")
            if gradient == "weighted_k2":
                pull = jax.lax.stop_gradient(weight(outputs, batch)) * pull
            values = pull + jax.lax.stop_gradient(values - pull)
        return values, batch.mask

    return _objective(f"kl_{role}", function, reducer, (role,))


def divergence(
    role: str,
    kind: Literal["forward", "reverse", "js"] = "reverse",
    *,
    beta: float = 0.5,
    reducer: Reducer = token_mean,
) -> Objective:
    """Exact divergence from another role's next-token distribution, over the whole vocabulary, in nats.

    Args:
      role: the other model's role; its vocabulary must be the policy's.
      kind: "reverse" is KL(policy || role), "forward" KL(role || policy), "js" the Jensen-Shannon divergence of GKD.
      beta: weight of the role in the mixture of "js".
      reducer: see `lmjax.objectives.reducers`.
    """
    kinds = {
        "forward": divergences.forward_kl,
        "reverse": divergences.reverse_kl,
        "js": lambda own, other: divergences.jensen_shannon(own, other, beta),
    }
    if kind not in kinds:
        raise UserError(f"no divergence is called {kind!r}; there are forward, reverse and js.")
    if not 0.0 < beta < 1.0:
        raise UserError(f"beta is {beta}; give a number strictly between 0 and 1.")

    def function(outputs: Any, batch: Batch, other: Any) -> Any:
        return outputs.map_logits(kinds[kind], other), batch.mask

    return _objective(f"{kind}_kl_{role}" if kind != "js" else f"js_{role}", function, reducer, (role,))


def distillation(
    role: str = "teacher",
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    scaled: bool = True,
    top_k: int | None = None,
    reducer: Reducer = token_mean,
) -> Objective:
    """Divergence from a teacher's softened distribution, by default `t^2 KL(teacher_t || student_t)`.

    That is the cross-entropy to the teacher (arXiv:1503.02531) less its entropy, whose gradient is 0. With `beta` it is
    GKD's family (arXiv:2306.13649).

    Args:
      role: the teacher's role; its vocabulary must be the student's.
      beta: 0 for KL(teacher || student), 1 for KL(student || teacher), and between them the generalised Jensen-Shannon
        divergence `beta KL(teacher || m) + (1 - beta) KL(student || m)`, `m = (1 - beta) student + beta teacher`, which
        itself goes to 0 at both ends: the family jumps there.
      temperature: t, divides both logits.
      scaled: whether there is the factor t^2, which keeps gradients of one size as t changes. GKD has none.
      top_k: compare on the teacher's k likeliest tokens only, both renormalised.
      reducer: see `lmjax.objectives.reducers`.
    """
    if not 0.0 <= beta <= 1.0:
        raise UserError(f"beta is {beta}; give a number from 0 to 1.")
    if temperature <= 0:
        raise UserError(f"distillation temperature is {temperature}; give a positive number.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; give at least 1 token, or None for the whole vocabulary.")

    ends = {0.0: divergences.forward_kl, 1.0: divergences.reverse_kl}
    between = lambda own, teacher: divergences.jensen_shannon(own, teacher, beta)
    measure, factor = ends.get(beta, between), temperature**2 if scaled else 1.0

    def rows(own: Any, teacher: Any) -> Any:
        if top_k is not None:
            own, teacher = divergences.top_k_of_other(own, teacher, top_k)
        return factor * measure(own / temperature, teacher / temperature)

    def function(outputs: Any, batch: Batch, teacher: Any) -> Any:
        return outputs.map_logits(rows, teacher), batch.mask

    return _objective(f"distillation_{role}", function, reducer, (role,))


def agreement(role: str = "teacher", *, reducer: Reducer = token_mean) -> Objective:
    """1 at tokens where the role finds the same one likeliest, else 0. Without gradient: for evaluations.

    Args:
      role: the other model's role; its vocabulary must be the policy's.
      reducer: see `lmjax.objectives.reducers`.
    """

    def function(outputs: Any, batch: Batch, other: Any) -> Any:
        return outputs.map_logits(divergences.same_likeliest, other), batch.mask

    return _objective(f"agreement_{role}", function, reducer, (role,))


def auxiliary(name: str, *, couples_rows: bool = True) -> Objective:
    """A loss that the model's own layers report under `name`, such as a router's balance loss.

    Args:
      name: key of `outputs.aux`; the value is a scalar, or [B, T] per token.
      couples_rows: False for values per token, which may be split into microbatches.
    """

    def function(outputs: Any, batch: Batch) -> Any:
        if name not in outputs.aux:
            known = ", ".join(sorted(outputs.aux)) or "none"
            raise UserError(f"this model reports no auxiliary loss {name!r}; it reports {known}.")
        value = outputs.aux[name]
        return value, batch.mask if value.ndim == 2 else jnp.ones(())

    return _objective(name, function, token_mean, (), couples_rows)
