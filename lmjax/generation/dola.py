"""DoLa: decoding by contrasting the last layer with an earlier one that disagrees with it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmjax.errors import UserError
from lmjax.generation.decoding import Model, forward, next_logits
from lmjax.generation.engine import Generation, Rules, State, collect, say
from lmjax.generation.processors import Processor
from lmjax.generation.sampler import begin
from lmjax.models.config import DecoderConfig, ModelConfig
from lmjax.models.decoder import Variables
from lmjax.modules.cache import CacheSpec
from lmjax.policy import Policy
from lmjax.sharding.context import tracing_for

Layers = Literal["low", "high"] | Sequence[int]
Divergence = Literal["published", "js"]


def dola_search(
    policy: Policy,
    variables: Variables | Model,
    prompts: Sequence[Any],
    key: jax.Array | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    layers: Layers = "low",
    divergence: Divergence = "published",
    relative_top: float = 0.1,
    temperature: Any = 0.0,
    processors: Iterable[Processor] = (),
    eos: int | Sequence[int] | None = None,
    samples: int = 1,
    cache: CacheSpec | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continues each prompt by what the last layer says over an early one: see `contrast`.

    Chuang et al. 2024, arXiv:2309.03883. The reference is transformers 4.55, whose tokens it gives for a batch of one;
    there, a larger batch takes the layer that diverges most on average, here each row takes its own. It advises a
    repetition penalty of 1.2 beside. An early layer's logits are the head's of its residual stream, without the final
    norm; a model's softcap and scale of logits act on them too.

    Args:
      policy, variables, prompts, max_new_tokens, processors, eos, samples, cache, chunk, mesh: as in `generate`;
        processors act on the contrast.
      key: seeds the sampling; needed where a temperature is above 0.
      layers: which early layers may be contrasted with: numbers (0: the embeddings), or a bucket, see `early_layers`.
      divergence, relative_top: see `contrast`.
      temperature: divides the contrast; 0 takes the largest. A number, or one a prompt.

    Returns:
      As of `generate`. `logprobs` are the model's own, `sampling_logprobs` those of the contrast.

    Raises:
      UserError: as `generate`; a model without layers, or layers or options that are none.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.small(16, num_layers=4, embed_dim=8, num_heads=2, max_length=32))
    >>> found = dola_search(policy, policy.init(jax.random.key(0)), [[1, 2, 3]], max_new_tokens=5, layers="high")
    >>> found.tokens.shape
    (1, 5)
    """
    policy = variables.policy if isinstance(variables, Model) else policy
    candidates = early_layers(policy.config, layers)
    if divergence not in ("published", "js"):
        raise UserError(f'divergence is {divergence!r}; give "published" or "js".')
    if not 0 < relative_top <= 1:
        raise UserError(f"relative_top is {relative_top}; give a share above 0 and up to 1 of the largest probability.")
    if key is None:
        if np.any(np.asarray(temperature) != 0):
            raise UserError(f"temperature is {temperature} without a key; give a key to draw with, or temperature 0.")
        key = jax.random.key(0)
    model, rules, state, rows = begin(
        policy, variables, prompts, key, max_new_tokens=max_new_tokens, temperature=temperature, processors=processors,
        eos=eos, samples=samples, cache=cache, chunk=chunk, mesh=mesh,
    )  # fmt: skip
    top = np.float32(relative_top)
    return collect(_run(model, rules, state, top, layers=candidates, divergence=divergence, mesh=mesh), rows)


def early_layers(config: ModelConfig, layers: Layers) -> tuple[int, ...]:
    """The numbers of the layers that may be contrasted with the last.

    Of N layers, "low" takes every second from 0 up to half of them and "high" every second from there on, at most 20
    layers from either end. Where the head is the embedding, contrast with layer 0 would only forbid repetition: "low"
    starts with layer 2 there, or 1 of two.

    >>> import lmjax as lm
    >>> config = lm.models.llama(vocab_size=16, num_layers=8, embed_dim=8, num_heads=2)
    >>> early_layers(config, "low"), early_layers(config, "high"), early_layers(config, [1, 5])
    ((0, 2), (4, 6), (1, 5))
    """
    if not isinstance(config, DecoderConfig):
        raise UserError("this model has no layers to contrast; DoLa needs a transformer.")
    N = config.num_layers
    if not isinstance(layers, str):
        found = tuple(int(layer) for layer in layers)
    elif layers == "low":
        first = min(2, N - 1) if config.tied_embeddings else 0
        found = tuple(range(first, N // 2 if N <= 40 else 20, 2)) or (first,) * (first == N // 2)
    elif layers == "high":
        found = tuple(range(N // 2 if N <= 40 else N - 20, N, 2))
    else:
        raise UserError(f'layers is {layers!r}; give "low", "high", or numbers of layers.')
    if not found or min(found) < 0 or max(found) >= N:
        raise UserError(f"layers {layers!r} of a model of {N} are {list(found)}; name some from 0 to {N - 1}.")
    return found


def contrast(
    final_BV: jax.Array, early_CBV: jax.Array, *, divergence: Divergence = "published", relative_top: float = 0.1
) -> jax.Array:
    """log p(v) - log q(v), p the last layer's distribution, q that of the early layer that diverges most from it.

    Tokens of less than `relative_top` times the largest p are ruled out: there the difference says little.

    The divergence, with m = (p + q) / 2:

    - "published": KL(m || p) + KL(m || q), what the reference computes. It calls this Jensen-Shannon, but the
      arguments are the other way round; it grows without bound where either is small.
    - "js": KL(p || m) + KL(q || m), twice the Jensen-Shannon divergence, which the paper writes.

    Args:
      final_BV: float32 [B, V], logits of the last layer.
      early_CBV: float32 [C, B, V], logits of the candidates. Of equals the first is taken.
      divergence: which.
      relative_top: above 0 and up to 1.

    Returns:
      float32 [B, V], -inf where a token is ruled out.

    >>> p, q = jnp.log(jnp.array([[0.6, 0.39, 0.01]])), jnp.log(jnp.array([[[0.6, 0.1, 0.3]]]))
    >>> print(contrast(p, q).round(2))
    [[0.   1.36 -inf]]
    """
    final_BV, early_CBV = jax.nn.log_softmax(final_BV, axis=-1), jax.nn.log_softmax(early_CBV, axis=-1)
    chosen_BV = early_CBV[0]
    if early_CBV.shape[0] > 1:
        chosen_B = jnp.argmax(_divergence(final_BV, early_CBV, divergence), axis=0)
        chosen_BV = jnp.take_along_axis(early_CBV, chosen_B[None, :, None], axis=0)[0]
    floor_B1 = jnp.max(final_BV, axis=-1, keepdims=True) + jnp.log(relative_top)
    return jnp.where(final_BV >= floor_B1, final_BV - chosen_BV, -jnp.inf)


def _divergence(final_BV: jax.Array, early_CBV: jax.Array, divergence: Divergence) -> jax.Array:
    """[C, B]. Log-probabilities come in; tokens of probability 0 add nothing."""
    p, q = jnp.exp(final_BV), jnp.exp(early_CBV)
    m = (p + q) / 2
    log_m = jnp.log(jnp.where(m > 0, m, 1.0))
    if divergence == "published":
        terms = jnp.where(m > 0, m * (2 * log_m - final_BV - early_CBV), 0.0)
    else:
        terms = jnp.where(p > 0, p * (final_BV - log_m), 0.0) + jnp.where(q > 0, q * (early_CBV - log_m), 0.0)
    return jnp.sum(terms, axis=-1)


@functools.partial(jax.jit, static_argnames=("layers", "divergence", "mesh"), donate_argnames=("state",))
def _run(
    model: Model,
    rules: Rules,
    state: State,
    relative_top: Any,
    *,
    layers: tuple[int, ...],
    divergence: Divergence,
    mesh: Mesh | None,
) -> State:
    """Steps until every row is done."""

    def body(state: State) -> State:
        history, going_B = state.history, ~state.done
        last_B1 = jnp.take_along_axis(history.tokens, history.length[:, None] - 1, axis=1)
        going_B1 = going_B[:, None].astype(jnp.int32)
        read = forward(model, state.cache, last_B1, going_B1, state.cache["count"][:, None], collect=layers)
        z_BV = next_logits(model, read.hidden[:, 0])
        streams_ND = jnp.concatenate([read.layers[layer][:, 0] for layer in layers])
        early_CBV = next_logits(model, streams_ND).reshape(len(layers), *z_BV.shape)
        contrast_BV = contrast(z_BV, early_CBV, divergence=divergence, relative_top=relative_top)
        return say(rules, state, z_BV, contrast_BV, read.cache)

    with contextlib.nullcontext() if mesh is None else tracing_for(mesh):
        return jax.lax.while_loop(lambda state: ~jnp.all(state.done), body, state)
