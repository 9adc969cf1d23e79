"""Processors that cut the distribution a token is drawn from: temperature, top-k, top-p, min-p, typical, epsilon, eta.

Each cuts what the ones before it have left, and never the last token. From min-p to eta, and top-p, a row that is no
distribution (all -inf, or with a NaN or +inf) stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.generation.processor_base import TEMPERATURE, History, Processor, concrete, parameter

_SHARE = "give a number above 0, up to 1, which keeps every token"
_CUTOFF = "give a number from 0, which keeps every token, up to, not including, 1"


def _cutoff(x: np.ndarray) -> np.ndarray:
    return (x >= 0) & (x < 1)


def _share(x: np.ndarray) -> np.ndarray:
    return (x > 0) & (x <= 1)


def _cut(z_BV: jax.Array, out_BV: jax.Array) -> jax.Array:
    return jnp.where(out_BV, -jnp.inf, z_BV)


def _exponentials(z_BV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest logit [B, 1], `exp(z - largest)` and its sum [B, 1]; the sum is NaN for rows without a distribution."""
    top_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    e_BV = jnp.exp(z_BV - top_B1)
    return top_B1, e_BV, jnp.sum(e_BV, axis=-1, keepdims=True)


def _largest(x_BV: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k`: the largest values [B, size], descending, and where they stand; of ties the lower index first."""
    # Without the barrier a slice of the result, or a gather, may turn XLA's top-k into a full sort.
    return jax.lax.optimization_barrier(tuple(jax.lax.top_k(x_BV, size)))


@dataclasses.dataclass(frozen=True, eq=False)
class Temperature(Processor):
    """`z / t`. The sampler has a temperature of its own, which takes this place; give one or the other.

    Args:
      value: t, above 0.
    """

    order, name = TEMPERATURE, "temperature"
    value: Any = parameter(1.0, "give a number above 0", lambda x: x > 0)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        return z_BV / self.value[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class TopK(Processor):
    """Keeps the k likeliest tokens, and all that tie with the k-th: there may be more than k.

    Args:
      k: 0 keeps every token.
      bound: the largest k there may be; a power of two above k where None. Static.

    >>> history = History(jnp.zeros((1, 1), int), jnp.ones(1, int), jnp.ones(1, int))
    >>> top_k(2)(jnp.array([[1.0, 3.0, 2.0, 2.0]]), history).tolist()
    [[-inf, 3.0, 2.0, 2.0]]
    """

    order, name = 20, "top_k"
    k: Any = parameter(0, "give a whole number of at least 1, or 0 for all tokens", lambda x: x >= 0, dtype=np.int32)
    bound: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = concrete(self.k)
        if known is None and self.bound is None:
            raise UserError("top_k is not known while compiling; give the largest it may be, top_k(k, bound=...).")
        if known is not None and self.bound is not None and known.max() > self.bound:
            raise UserError(f"top_k is {known.max()}, above its bound of {self.bound}; raise the bound.")
        if self.bound is None and known is not None:
            object.__setattr__(self, "bound", 1 << max(int(known.max()) - 1, 0).bit_length())

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        size = min(self.bound or 1, z_BV.shape[-1])
        best_BK, _ = _largest(z_BV, size)
        kth_B1 = jnp.take_along_axis(best_BK, jnp.clip(self.k[:, None], 1, size) - 1, axis=1)
        return _cut(z_BV, (z_BV < kth_B1) & (self.k[:, None] > 0))


def _check_candidates(name: str, candidates: int) -> None:
    if candidates < 1:
        raise UserError(f"{name} looks at {candidates} candidates; give at least 1, such as 256.")


def _settled_or_sorted(
    settled_B1: jax.Array, few: tuple[jax.Array, ...], by_sorting: Callable[[], tuple[jax.Array, ...]]
) -> tuple[jax.Array, ...]:
    """What the candidates gave where they settled it, and what a full sort gives elsewhere; no sort where all did."""

    def full() -> tuple[jax.Array, ...]:
        return tuple(jnp.where(settled_B1, one, other) for one, other in zip(few, by_sorting()))

    return jax.lax.cond(jnp.all(settled_B1), lambda: few, full)


@dataclasses.dataclass(frozen=True, eq=False)
class TopP(Processor):
    """Keeps the likeliest tokens until their probabilities add up to p (nucleus, arXiv:1904.09751).

    Of tokens that tie at the edge, those with the higher ids stay, as a stable sort in ascending order gives. The
    `candidates` likeliest tokens decide wherever they hold enough of the probability; where some row needs more, the
    vocabulary is sorted. The result is the same.

    Args:
      p: above 0; 1 keeps every token.
      candidates: how many tokens are looked at before the vocabulary is sorted. Static.
    """

    order, name = 21, "top_p"
    p: Any = parameter(1.0, _SHARE, _share)
    candidates: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_candidates(self.name, self.candidates)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        V = z_BV.shape[-1]
        size = min(self.candidates, V)
        p_B1 = self.p[:, None]
        top_B1, _, total_B1 = _exponentials(z_BV)
        active_B1 = (p_B1 < 1) & jnp.isfinite(total_B1)

        def kept(z_BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """Of descending logits: how many stay, the last of them, and whether none behind these would stay."""
            probs_BC = jnp.exp(z_BC - top_B1) / total_B1
            sums_BC = jnp.cumsum(probs_BC, axis=-1)
            before_BC = jnp.pad(sums_BC[:, :-1], ((0, 0), (1, 0)))
            count_B1 = jnp.sum((before_BC < p_B1) & (probs_BC > 0), axis=-1, keepdims=True)
            last_B1 = jnp.take_along_axis(z_BC, jnp.maximum(count_B1 - 1, 0), axis=1)
            return count_B1, last_B1, (sums_BC[:, -1:] >= p_B1) | (probs_BC[:, -1:] == 0)

        def by_sorting() -> tuple[jax.Array, jax.Array]:
            count_B1, last_B1, _ = kept(jnp.sort(z_BV, axis=-1)[:, ::-1])
            ties_B1 = count_B1 - jnp.sum(z_BV > last_B1, axis=-1, keepdims=True)
            tie_BV = z_BV == last_B1
            rank_BV = jnp.cumsum(tie_BV[:, ::-1], axis=-1)[:, ::-1]  # 1 for the tie of the highest id
            return last_B1, jnp.argmax(tie_BV & (rank_BV == ties_B1), axis=-1, keepdims=True).astype(jnp.int32)

        # Backwards, so that of ties the higher ids come first; and without -0, which top_k puts behind 0.
        best_BC, back_BC = _largest(jnp.where(z_BV == 0, 0.0, z_BV)[:, ::-1], size)
        count_B1, last_B1, settled_B1 = kept(best_BC)
        index_B1 = V - 1 - jnp.take_along_axis(back_BC, jnp.maximum(count_B1 - 1, 0), axis=1)
        if size < V:
            last_B1, index_B1 = _settled_or_sorted(settled_B1 | ~active_B1, (last_B1, index_B1), by_sorting)
        out_BV = (z_BV < last_B1) | ((z_BV == last_B1) & (jnp.arange(V) < index_B1))
        return _cut(z_BV, active_B1 & out_BV)


@dataclasses.dataclass(frozen=True, eq=False)
class MinP(Processor):
    """Keeps tokens of at least `p` times the probability of the likeliest (arXiv:2407.01082; but see arXiv:2506.13681).

    Args:
      p: from 0, which keeps every token, up to 1.
    """

    order, name = 22, "min_p"
    p: Any = parameter(0.0, "give a number from 0, which keeps every token, up to 1", lambda x: (x >= 0) & (x <= 1))

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        top_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
        return _cut(z_BV, jnp.isfinite(top_B1) & (z_BV - top_B1 < jnp.log(self.p)[:, None]))


@dataclasses.dataclass(frozen=True, eq=False)
class Typical(Processor):
    """Keeps the tokens whose surprisal is nearest the entropy, until they hold `mass` (arXiv:2202.00666).

    Tokens whose distance ties with the last one's stay. The likeliest token may go.

    Args:
      mass: above 0; 1 keeps every token.
      candidates: how many tokens are looked at before the vocabulary is sorted. Static.
    """

    order, name = 23, "typical"
    mass: Any = parameter(1.0, _SHARE, _share)
    candidates: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_candidates(self.name, self.candidates)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        V = z_BV.shape[-1]
        size = min(self.candidates, V)
        mass_B1 = self.mass[:, None]
        logp_BV = jax.nn.log_softmax(z_BV, axis=-1)
        p_BV = jnp.exp(logp_BV)
        entropy_B1 = -jnp.sum(jnp.where(p_BV > 0, p_BV * logp_BV, 0.0), axis=-1, keepdims=True)
        distance_BV = jnp.abs(-logp_BV - entropy_B1)
        active_B1 = (mass_B1 < 1) & jnp.isfinite(jnp.max(logp_BV, axis=-1, keepdims=True))

        def edge(distance_BC: jax.Array, p_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Of ascending distances: the largest that stays, and the sum of all these probabilities."""
            sums_BC = jnp.cumsum(p_BC, axis=-1)
            last_B1 = jnp.sum(sums_BC < mass_B1, axis=-1, keepdims=True)
            last_B1 = jnp.minimum(last_B1, distance_BC.shape[-1] - 1)
            return jnp.take_along_axis(distance_BC, last_B1, axis=1), sums_BC[:, -1:]

        def by_sorting() -> tuple[jax.Array]:
            return (edge(*jax.lax.sort((distance_BV, p_BV), num_keys=1))[0],)

        nearest_BC, at_BC = _largest(-distance_BV, size)
        edge_B1, sum_B1 = edge(-nearest_BC, jnp.take_along_axis(p_BV, at_BC, axis=1))
        if size < V:
            settled_B1 = (sum_B1 >= mass_B1) | jnp.isinf(nearest_BC[:, -1:]) | ~active_B1
            (edge_B1,) = _settled_or_sorted(settled_B1, (edge_B1,), by_sorting)
        return _cut(z_BV, active_B1 & (distance_BV > edge_B1))


@dataclasses.dataclass(frozen=True, eq=False)
class Epsilon(Processor):
    """Keeps tokens of at least this probability, and always those that tie with the likeliest (arXiv:2210.15191).

    Args:
      epsilon: from 0, which keeps every token, up to, not including, 1.
    """

    order, name = 24, "epsilon"
    epsilon: Any = parameter(0.0, _CUTOFF, _cutoff)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        top_B1, e_BV, total_B1 = _exponentials(z_BV)
        return _cut(z_BV, (e_BV < self.epsilon[:, None] * total_B1) & (z_BV < top_B1))


@dataclasses.dataclass(frozen=True, eq=False)
class Eta(Processor):
    """As `epsilon`, at `min(epsilon, sqrt(epsilon) exp(-H))`, H the entropy of what is left (arXiv:2210.15191).

    Args:
      epsilon: from 0, which keeps every token, up to, not including, 1.
    """

    order, name = 25, "eta"
    epsilon: Any = parameter(0.0, _CUTOFF, _cutoff)

    def process(self, z_BV: jax.Array, history: History) -> jax.Array:
        top_B1, e_BV, total_B1 = _exponentials(z_BV)
        mean_B1 = jnp.sum(jnp.where(e_BV > 0, e_BV * (z_BV - top_B1), 0.0), axis=-1, keepdims=True) / total_B1
        entropy_B1 = jnp.log(total_B1) - mean_B1
        epsilon_B1 = self.epsilon[:, None]
        eta_B1 = jnp.minimum(epsilon_B1, jnp.sqrt(epsilon_B1) * jnp.exp(-entropy_B1))
        return _cut(z_BV, (e_BV < eta_B1 * total_B1) & (z_BV < top_B1))


temperature = Temperature
top_k = TopK
top_p = TopP
min_p = MinP
typical = Typical
epsilon = Epsilon
eta = Eta
