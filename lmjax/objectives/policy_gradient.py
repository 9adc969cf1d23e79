"""Terms of reinforcement learning over rollouts: an importance ratio, a surrogate, weights, a reducer.

Every published name is a choice of these. What advantages are is another matter: they are data (`lmjax.rl`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmjax.batch import RolloutBatch
from lmjax.errors import UserError
from lmjax.losses import policy_gradient as losses
from lmjax.objectives.algebra import Objective, Role, Term
from lmjax.objectives.importance import (
    PLAIN,
    Clip,
    Ratios,
    Weighing,
    bounds_of,
    ratios,
    sampler_weights,
    sequence_lengths,
    sequence_totals,
    token_weights,
)
from lmjax.objectives.reducers import (
    Reducer,
    constant_horizon,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
)
from lmjax.policy import Outputs

SEQUENCE, SEQUENCE_TOKEN = Weighing(level="sequence"), Weighing(level="sequence_token")
HELD = Weighing(held=20.0)


def surrogate_term(
    name: str,
    surrogate: Callable[[Ratios, RolloutBatch], jax.Array],
    *,
    weighing: Weighing = PLAIN,
    reducer: Reducer = token_mean,
    clip: tuple[float, float] | None = None,
    dual: float | None = None,
    corrected: bool = True,
    couples_rows: bool = False,
) -> Objective:
    """A term from a loss of each token under its advantage.

    Args:
      name: of the term.
      surrogate: (ratios, batch) -> losses [B, T].
      weighing: how importance ratios are taken, and what tokens are weighed by.
      reducer: see `lmjax.objectives.reducers`.
      clip, dual: the ratio's bounds, for the shares of tokens beyond them that are reported.
      corrected: whether the correction is a weight; False where the surrogate sees to it.
      couples_rows: the surrogate looks at all rows at once, so that a batch cannot be split.
    """
    couples = couples_rows or weighing.top_entropy < 1.0

    def function(outputs: Outputs, batch: RolloutBatch) -> Any:
        found = ratios(outputs, batch, weighing)
        values = surrogate(found, batch)
        weight = token_weights(outputs, batch, weighing, found, corrected)
        if weight is not None:
            values = values * weight
        return values, found.mask, _metrics(jax.lax.stop_gradient(found), batch, weighing, clip, dual)

    return Objective(((1.0, Term(name, function, reducer, couples_rows=couples)),))


def _metrics(
    found: Ratios, batch: RolloutBatch, weighing: Weighing, clip: tuple[float, float] | None, dual: float | None
) -> Any:
    gap = found.logprobs - found.old
    values = {
        "ratio": found.ratio,
        "approx_kl": jnp.expm1(-gap) + gap,
        "policy/approxkl": jnp.square(gap) / 2,
    }
    if clip is not None:
        low = (found.ratio < clip[0]) & (found.advantages < 0)
        high = (found.ratio > clip[1]) & (found.advantages > 0)
        shares = {"low": low, "high": high, "region": low | high}
        if dual is not None:
            shares["dual"] = (found.ratio > dual) & (found.advantages < 0)
        values |= {f"clip_ratio/{side}": share.astype(jnp.float32) for side, share in shares.items()}
    if weighing.correct is not None:
        values["sampling/importance_sampling_ratio"] = sampler_weights(batch, weighing, found.old)
    return {name: (value, found.mask) for name, value in values.items()}


def reinforce(*, weighing: Weighing = PLAIN, reducer: Reducer = token_mean) -> Objective:
    """REINFORCE (Williams, 1992): `-A log pi`. Its baseline is in the advantages.

    Args:
      weighing: see `Weighing`; the importance ratio is not used.
      reducer: see `lmjax.objectives.reducers`.
    """
    surrogate = lambda found, batch: losses.reinforce(found.logprobs, found.advantages)
    return surrogate_term("reinforce", surrogate, weighing=weighing, reducer=reducer)


def gpg(*, weighing: Weighing = PLAIN) -> Objective:
    """GPG (arXiv:2504.02546): REINFORCE as a mean over tokens; the rest of it is in its advantages (`lmjax.rl`)."""
    surrogate = lambda found, batch: losses.reinforce(found.logprobs, found.advantages)
    return surrogate_term("gpg", surrogate, weighing=weighing)


def ppo(
    clip: Clip = 0.2,
    *,
    cap: float | None = None,
    dual: float | None = None,
    weighing: Weighing = PLAIN,
    reducer: Reducer = token_mean,
) -> Objective:
    """The clipped surrogate of PPO. See `losses.policy_gradient.clipped`.

    Args:
      clip: epsilon, or one below and one above.
      cap: largest ratio where A < 0 (two-sided clipping).
      dual: c of the dual clip; verl has 3.
      weighing, reducer: see `Weighing` and `lmjax.objectives.reducers`.
    """
    return _clipped("ppo", clip, cap, dual, weighing, reducer)


def _clipped(
    name: str, clip: Clip, cap: float | None, dual: float | None, weighing: Weighing, reducer: Reducer
) -> Objective:
    low, high = bounds_of(clip)
    if dual is not None and dual <= 1:
        raise UserError(f"dual is {dual}; the dual clip needs a number above 1.")

    def surrogate(found: Ratios, batch: RolloutBatch) -> jax.Array:
        return losses.clipped(found.ratio, found.advantages, low, high, cap, dual)

    clip_ratio = (1 - low, 1 + high)
    return surrogate_term(name, surrogate, weighing=weighing, reducer=reducer, clip=clip_ratio, dual=dual)


def grpo(
    clip: Clip = 0.2,
    *,
    cap: float | None = None,
    weighing: Weighing = PLAIN,
    reducer: Reducer = sequence_mean,
) -> Objective:
    """GRPO's surrogate (DeepSeekMath, arXiv:2402.03300): PPO's, as a mean over each rollout and then over rollouts."""
    return _clipped("grpo", clip, cap, None, weighing, reducer)


def bnpo(clip: Clip = 0.2, *, cap: float | None = None, weighing: Weighing = PLAIN) -> Objective:
    """GRPO's surrogate as a mean over tokens, TRL's `bnpo`, but for one thing.

    There it is a mean of the means of microbatches, which depends on how a batch is split. Here it is the mean over all
    tokens of the step, as every mean is, and the two are one where there is one microbatch on one device.
    """
    return _clipped("bnpo", clip, cap, None, weighing, token_mean)


def dapo(clip: Clip = (0.2, 0.28), *, weighing: Weighing = PLAIN) -> Objective:
    """DAPO's surrogate (arXiv:2503.14476): clips higher above, and every token counts alike.

    The mean is over all tokens of the step, microbatches and devices together.
    """
    return _clipped("dapo", clip, None, None, weighing, token_mean)


def dr_grpo(horizon: int, clip: Clip = 0.2, *, weighing: Weighing = PLAIN) -> Objective:
    """Dr. GRPO's surrogate (arXiv:2503.20783): a sum over tokens by (rollouts x horizon), free of length bias.

    Args:
      horizon: the most tokens of a rollout.
      clip, weighing: as in `ppo`.
    """
    return _clipped("dr_grpo", clip, None, None, weighing, constant_horizon(horizon))


def luspo(clip: Clip = 0.2, *, weighing: Weighing = SEQUENCE) -> Objective:
    """LUSPO (arXiv:2602.05261): GSPO's ratio, and a sequence counts by its length."""
    return _clipped("luspo", clip, None, None, weighing, sequence_sum_mean)


def gspo(
    clip: Clip = (3e-4, 4e-4), *, weighing: Weighing = SEQUENCE, reducer: Reducer = sequence_mean
) -> Objective:
    """GSPO (arXiv:2507.18071): one ratio a sequence, the geometric mean of its tokens'. Its clip is that narrow.

    Args:
      clip, reducer: as in `ppo`.
      weighing: of level "sequence".
    """
    return _clipped("gspo", clip, None, None, weighing, reducer)


def gspo_token(
    clip: Clip = (3e-4, 4e-4), *, weighing: Weighing = SEQUENCE_TOKEN, reducer: Reducer = sequence_mean
) -> Objective:
    """GSPO-token (arXiv:2507.18071): the sequence's ratio as a value, each token's own as the gradient.

    For advantages that differ within a rollout; where they do not, it is `gspo`. Arguments as there.
    """
    return _clipped("gspo_token", clip, None, None, weighing, reducer)


def rloo(clip: Clip = 0.2) -> Objective:
    """TRL's RLOO surrogate (arXiv:2402.14740): PPO's clip on the ratio of whole answers."""
    return _clipped("rloo", clip, None, None, Weighing(level="sequence_sum"), sequence_mean)


def cispo(
    bounds: tuple[float | None, float] = (None, 5.0), *, weighing: Weighing = PLAIN, reducer: Reducer = token_mean
) -> Objective:
    """CISPO (MiniMax-M1, arXiv:2506.13585): `-sg(clip(ratio)) A log pi`; clipped tokens keep their gradient.

    Args:
      bounds: of the ratio itself: (None, 5.0) is TRL's with epsilon_high 5, (None, 1.28) open-instruct's with 0.28, and
        (0.8, 1.2) verl's with 0.2.
      weighing, reducer: as in `ppo`.
    """
    low, high = bounds
    if (low or 0.0) >= high:
        raise UserError(f"the bounds of the ratio are {bounds}; the first must be below the second.")

    def surrogate(found: Ratios, batch: RolloutBatch) -> jax.Array:
        return losses.weighted_likelihood(jnp.clip(found.ratio, low, high), found.logprobs, found.advantages)

    return surrogate_term("cispo", surrogate, weighing=weighing, reducer=reducer, clip=(low or 0.0, high))


def sapo(
    positive: float = 1.0, negative: float = 1.05, *, weighing: Weighing = PLAIN, reducer: Reducer = sequence_mean
) -> Objective:
    """SAPO (arXiv:2511.20347): a soft gate in place of a clip, of temperatures by the sign of A."""
    surrogate = lambda found, batch: losses.soft_gate(found.ratio, found.advantages, positive, negative)
    return surrogate_term("sapo", surrogate, weighing=weighing, reducer=reducer)


def gmpo(clip: Clip = 0.4, *, weighing: Weighing = PLAIN) -> Objective:
    """GMPO (arXiv:2507.20673): the geometric mean of a sequence's clipped ratios times its mean advantage.

    Args:
      clip: bounds of each token's log-ratio, on the side its advantage pushes to.
      weighing: of level "token"; a correction is taken by its geometric mean, as verl does.
    """
    low, high = bounds_of(clip)

    def surrogate(found: Ratios, batch: RolloutBatch) -> jax.Array:
        lengths = jnp.maximum(sequence_lengths(batch), 1.0)
        mean = lambda values: sequence_totals(values, batch) / lengths
        held = losses.clamped_log_ratio(found.log_ratio, found.advantages, low, high)
        values = -mean(found.advantages) * jnp.exp(mean(held))
        if weighing.correct is not None:
            values = values * jnp.exp(mean(jnp.log(sampler_weights(batch, weighing, found.old) + 1e-10)))
        return values

    return surrogate_term("gmpo", surrogate, weighing=weighing, reducer=sequence_mean, corrected=False)


def vespo(
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    *,
    weighing: Weighing = PLAIN,
) -> Objective:
    """VESPO (arXiv:2602.10693): `-sg(phi) A log pi`, phi a gamma weight of the sequence's importance ratio.

    Args:
      positive, negative: (k, lambda) where A >= 0, and where A < 0.
      weighing: of level "token"; a correction of tokens joins the ratio.
    """

    def surrogate(found: Ratios, batch: RolloutBatch) -> jax.Array:
        log_weight = sequence_totals(jnp.clip(found.log_ratio, -20.0, 20.0), batch)
        if weighing.correct is not None:
            log_correction = jnp.log(jnp.maximum(sampler_weights(batch, weighing, found.old), 1e-8))
            log_weight = log_weight + sequence_totals(log_correction, batch)
        phi = losses.gamma_weight(log_weight, found.advantages, positive, negative)
        return losses.weighted_likelihood(phi, found.logprobs, found.advantages)

    return surrogate_term("vespo", surrogate, weighing=weighing, corrected=False)


def dppo(
    kind: Literal["tv", "kl"] = "tv",
    clip: Clip = 0.2,
    *,
    cap: float = 20.0,
    weighing: Weighing = HELD,
    reducer: Reducer = token_mean,
) -> Objective:
    """DPPO as verl has it: `-sg(min(ratio, cap)) A log pi`, of tokens whose probability has not gone too far.

    Args:
      kind: how far is measured by the change of the probability ("tv"), or a divergence of taking the token ("kl").
      clip: how far, below and above.
      cap: of the ratio.
      weighing, reducer: as in `ppo`.
    """
    if kind not in ("tv", "kl"):
        raise UserError(f"dppo has no kind {kind!r}; there are tv and kl.")
    low, high = bounds_of(clip)
    within = losses.within_variation if kind == "tv" else losses.within_divergence

    def surrogate(found: Ratios, batch: RolloutBatch) -> jax.Array:
        weight = jnp.minimum(found.ratio, cap) * within(found.logprobs, found.old, found.advantages, low, high)
        return losses.weighted_likelihood(weight, found.logprobs, found.advantages)

    return surrogate_term("dppo", surrogate, weighing=weighing, reducer=reducer)


def dro(beta: float, *, weighing: Weighing = PLAIN, reducer: Reducer = token_mean) -> Objective:
    """Direct reward optimisation: REINFORCE with a quadratic pull back to the old policy. `losses.dro`."""
    if beta <= 0:
        raise UserError(f"beta is {beta}; give a positive number.")
    surrogate = lambda found, batch: losses.dro(found.logprobs, found.log_ratio, found.advantages, beta)
    return surrogate_term("dro", surrogate, weighing=weighing, reducer=reducer)


def value_loss(clip: float | None = None, *, role: str | None = None, reducer: Reducer = token_mean) -> Objective:
    """`(V - R)^2 / 2` of a critic, clipped about the old values as PPO does. See `losses.value_error`.

    Args:
      clip: how far values may move for free; None for no clip.
      role: a trained role with a value head (a critic of its own); None: the policy's own value head.
      reducer: see `lmjax.objectives.reducers`.
    """
    if clip is not None and clip <= 0:
        raise UserError(f"clip is {clip}; give a positive number, or None.")

    def function(outputs: Outputs, batch: RolloutBatch, *others: Outputs) -> Any:
        if not isinstance(batch, RolloutBatch) or batch.returns is None or (clip is not None and batch.values is None):
            raise UserError("the batch has no returns (or old values) to learn values from; put them in its credit.")
        values = (others[0] if others else outputs).values
        mask = (batch.mask if batch.value_mask is None else batch.value_mask).astype(jnp.float32)
        old = values if batch.values is None else batch.values
        error = jnp.square(values - batch.returns)
        metrics: dict[str, Any] = {"value/mean": (values, mask), "value/error": (error, mask)}
        if clip is not None:
            held = jnp.clip(values, old - clip, old + clip)
            worse = jnp.square(held - batch.returns) > error
            metrics["val/clipfrac"] = (worse.astype(jnp.float32), mask)
        metrics = jax.lax.stop_gradient(metrics)
        return losses.value_error(values, batch.returns, old, clip), mask, metrics

    return Objective(((1.0, Term("value_loss", function, reducer, () if role is None else (role,))),))


def by_coefficient(name: str, objective: Objective) -> Objective:
    """An objective whose terms are multiplied by `batch.coefficients[name]`, which a controller sets from step to step.

    >>> import lmjax as lm
    >>> bonus = -1.0 * by_coefficient("entropy", lm.objectives.entropy())
    """

    def scaled(own: Term) -> Term:
        def function(outputs: Outputs, batch: RolloutBatch, *others: Outputs) -> Any:
            if name not in getattr(batch, "coefficients", {}):
                raise UserError(f"the batch has no coefficient {name!r}; have its credit set one.")
            values, mask, *rest = own.function(outputs, batch, *others)
            by_row = batch.coefficients[name]
            if values.ndim == 0:
                raise UserError(f"term {own.name!r} has one value for the whole batch and takes no coefficient by row.")
            return (by_row[:, None] if values.ndim == 2 else by_row) * values, mask, *rest

        return Term(own.name, function, own.reducer, own.roles, own.stream, own.couples_rows)

    return Objective(tuple((coefficient, scaled(own)) for coefficient, own in objective.terms))


def critic_role(collection: str = "critic") -> Role:
    """A critic of its own beside the policy, trained with it: its variables are a collection of the policy's.

    Give it as `roles={"critic": critic_role()}`, train the collection (`trainable=("params", "critic")`), and learn it
    by `value_loss(role="critic")`.
    """
    return Role(lambda variables: variables[collection], trained=True)
