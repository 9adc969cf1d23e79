"""ROME: one fact written into one weight of a model, as a function of its variables (Meng et al., arXiv:2202.05262).

The MLP's second layer is read as a memory: its input at the last token of a subject is a key, its output the value
found under it. The edit changes that one weight by a matrix of rank one, so that the subject's key finds another value
and keys that training has seen find what they found. `rome` is the whole; its parts can be used alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.adapters.folding import adapters_of
from lmjax.adapters.targets import Variables, at
from lmjax.adapters.weights import replaced
from lmjax.batch import Batch, next_token_batch
from lmjax.errors import UserError
from lmjax.models.config import DecoderConfig
from lmjax.models.layout import STACKED, layer_name, unstack_layers
from lmjax.modules.block import Block
from lmjax.modules.dense import Dense
from lmjax.policy import Policy


def rome(
    policy: Policy,
    variables: Variables,
    prompt: Any,
    subject: int,
    target: Any,
    *,
    layer: int,
    covariance: jax.Array,
    prefixes: Sequence[Any] = (),
    damping: float = 0.0,
    **options: Any,
) -> Variables:
    """The variables with a fact written into `mlp/down` of a layer; every other array is shared.

    Args:
      policy, variables: the model, without adapters.
      prompt: int [P], ids of a text about a subject, such as "The mother tongue of Danielle Darrieux is".
      subject: the index in it of the subject's last token.
      target: int [N], the ids that are to follow.
      layer: its number, from 0; the middle of the model serves (17 of 48 in GPT-2 XL).
      covariance: from `key_covariance` of this layer.
      prefixes: arrays of ids, texts of a few tokens to set before the prompt, such as samples of the model. The key is
        the mean over them and the prompt alone, in the numerator and the denominator of the update alike; the published
        code divides by that of the prompt alone, which blows up some edits.
      damping: see `insert`.
      options: those of `fact_value`.

    Raises:
      UserError: a layer or a position that there is not, ids outside the vocabulary, adapters, or quantized weights.
    """
    key = fact_key(policy, variables, prompt, subject, layer=layer, prefixes=prefixes)
    value = fact_value(policy, variables, prompt, subject, target, layer=layer, prefixes=prefixes, **options)
    stacked = STACKED in variables["params"]
    name = STACKED if stacked else layer_name(layer)
    down = variables["params"][name]["mlp"]["down"]
    own = jax.tree.map(lambda leaf: leaf[layer], down) if stacked else down
    kernel = insert(own["kernel"], key, value - own.get("bias", 0), covariance, damping=damping)
    kernel = jnp.asarray(down["kernel"]).at[layer].set(kernel) if stacked else kernel
    return replaced(variables, {f"{name}/mlp/down": {"kernel": kernel}})


def insert(
    kernel_FD: jax.Array, key_F: jax.Array, value_D: jax.Array, covariance_FF: jax.Array, *, damping: float = 0.0
) -> jax.Array:
    """`W' = W + (C^-1 k) (v - k W) / (k C^-1 k)`: the nearest W to have `k W' = v`, by what it does to keys of C.

    Keys orthogonal to `C^-1 k` find what they found before (equation 2 of the paper; its W is our transpose).

    Args:
      kernel_FD: W, as the layers multiply with it, x W.
      key_F: k.
      value_D: v.
      covariance_FF: C = E[k k^T], from `key_covariance`.
      damping: this times the mean of C's diagonal is added to it, for C of too few tokens.

    Raises:
      UserError: C is not positive definite.

    >>> W = insert(jnp.zeros((2, 1)), jnp.array([1.0, 0.0]), jnp.array([3.0]), jnp.eye(2))
    >>> print(W.ravel())
    [3. 0.]
    """
    f32 = jnp.float32
    W, k, v, C = (jnp.asarray(x, f32) for x in (kernel_FD, key_F, value_D, covariance_FF))
    C = C + damping * jnp.trace(C) / len(C) * jnp.eye(len(C))
    u = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(C), k)
    if not isinstance(u, jax.core.Tracer) and not (bool(jnp.all(jnp.isfinite(u))) and float(u @ k) > 0):
        raise UserError(
            "the covariance of the keys is not positive definite; take it of more tokens, or give a damping of 1e-3."
        )
    dot = functools.partial(jnp.matmul, precision="highest")
    return (W + jnp.outer(u / dot(u, k), v - dot(k, W))).astype(kernel_FD.dtype)


def key_covariance(policy: Policy, variables: Variables, batches: Iterable[Batch], layer: int) -> jax.Array:
    """`E[k k^T]` of the inputs of `mlp/down` of a layer, over all tokens that are no padding; not centred.

    The paper takes 100,000 texts of Wikipedia; it needs far more tokens than the layer has inputs.

    Returns:
      float32 [F, F].
    """
    model = _model(policy, variables, layer)
    total: Any = 0.0
    count = 0
    for batch in batches:
        part, tokens = _second_moment(model.policy, layer, model.variables, batch)
        total = total + np.asarray(part, np.float64)
        count += int(tokens)
    if not count:
        raise UserError("there are no tokens to take the covariance of; give at least one batch.")
    return jnp.asarray(total / count, jnp.float32)


def fact_key(
    policy: Policy, variables: Variables, prompt: Any, subject: int, *, layer: int, prefixes: Sequence[Any] = ()
) -> jax.Array:
    """k, float32 [F]: the mean input of `mlp/down` at the subject's last token, behind each prefix and behind none."""
    # Any target does: the keys stand before it.
    model, rows = _model(policy, variables, layer), _rows(policy, prompt, subject, [0], prefixes)
    keys_BTF = _seen(model.policy, layer, model.variables, rows.batch)
    return jnp.mean(keys_BTF[jnp.arange(len(rows.subjects)), rows.subjects].astype(jnp.float32), axis=0)


def fact_value(
    policy: Policy,
    variables: Variables,
    prompt: Any,
    subject: int,
    target: Any,
    *,
    layer: int,
    prefixes: Sequence[Any] = (),
    essence: Any = None,
    steps: int = 20,
    learning_rate: float = 0.5,
    kl: float = 0.0625,
    weight_decay: float = 0.5,
    clamp: float = 4.0,
    enough: float = 0.05,
) -> jax.Array:
    """v, float32 [D]: the output of `mlp/down` at the subject's last token that makes the target follow.

    `v = v0 + d`, v0 what the layer says in the prompt alone. Adam minimises over d, which is added at the subject's
    last token everywhere: `-log p(target)` a token, in the mean over prefixes, `+ kl KL(before || after)` of what
    follows the essence `+ weight_decay |d| / |v0|^2`.

    Args:
      policy, variables, prompt, subject, target, layer, prefixes: as in `rome`.
      essence: ids of a text that ends with the subject, whose next token is to stay what it was; None: the prompt up to
        the subject. The published code says "<subject> is a", and reads the same token of it.
      steps, learning_rate: of Adam.
      kl, weight_decay: as above.
      clamp: |d| is kept below this times |v0|.
      enough: no more steps once the loss is below.
    """
    model, rows = _model(policy, variables, layer), _rows(policy, prompt, subject, target, prefixes)
    ids = _ids(policy, "the essence", rows.batch.tokens[0, : rows.subjects[0] + 1] if essence is None else essence)
    numbers = {
        "kl": kl, "weight_decay": weight_decay, "clamp": clamp, "enough": enough, "learning_rate": learning_rate,
    }  # fmt: skip
    return _optimized(
        model.policy, layer, model.variables, rows.batch, jnp.asarray(rows.subjects),
        next_token_batch(np.pad(ids, (0, 1))[None]), jnp.int32(steps),
        {name: jnp.float32(x) for name, x in numbers.items()},
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _optimized(
    policy: Policy,
    layer: int,
    variables: Variables,
    batch: Batch,
    subjects_B: jax.Array,
    essence: Batch,
    steps: jax.Array,
    numbers: dict[str, jax.Array],
) -> jax.Array:
    def essence_logprobs(delta_D: jax.Array) -> jax.Array:
        # The essence ends with the subject.
        place = jnp.asarray([essence.tokens.shape[1] - 1])
        with _watched(layer, essence, add=(place, delta_D)):
            hidden = policy(variables, essence).hidden
        return jax.nn.log_softmax(policy.next_logits(variables, hidden[:, -1]))

    with _watched(layer, batch) as seen:
        policy(variables, batch).hidden  # noqa: B018
    start_D = seen["output"][0, subjects_B[0]].astype(jnp.float32)
    before = essence_logprobs(jnp.zeros_like(start_D))

    def loss(delta_D: jax.Array) -> jax.Array:
        with _watched(layer, batch, add=(subjects_B, delta_D)):
            logprobs = policy(variables, batch).logprobs
        nll = -jnp.sum(logprobs * batch.mask) / jnp.sum(batch.mask)
        kl = jnp.sum(jnp.exp(before) * (before - essence_logprobs(delta_D)))
        # The double where keeps the gradient of |d| at 0 from being NaN.
        square = jnp.sum(jnp.square(delta_D))
        length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        return nll + numbers["kl"] * kl + numbers["weight_decay"] * length / jnp.sum(jnp.square(start_D))

    optimizer = optax.adam(numbers["learning_rate"])
    most = numbers["clamp"] * jnp.linalg.norm(start_D)

    def step(_: Any, carry: Any) -> Any:
        delta_D, state, done = carry
        value, gradient = jax.value_and_grad(loss)(delta_D)
        done = done | (value < numbers["enough"])
        update, after = optimizer.update(gradient, state)
        moved = delta_D + update
        moved = moved * jnp.minimum(1, most / jnp.maximum(jnp.linalg.norm(moved), 1e-12))
        keep = lambda new, old: jnp.where(done, old, new)
        return keep(moved, delta_D), jax.tree.map(keep, after, state), done

    zero = jnp.zeros_like(start_D)
    return start_D + jax.lax.fori_loop(0, steps, step, (zero, optimizer.init(zero), jnp.bool_(False)))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _second_moment(policy: Policy, layer: int, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
    keys_BTF = _seen(policy, layer, variables, batch)
    real = jnp.ravel(jnp.asarray(batch.segments) > 0)
    keys_NF = jnp.where(real[:, None], keys_BTF.reshape(real.size, -1).astype(jnp.float32), 0)
    return jnp.matmul(keys_NF.T, keys_NF, precision="highest"), jnp.sum(real)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _seen(policy: Policy, layer: int, variables: Variables, batch: Batch) -> jax.Array:
    """The inputs of `mlp/down`, [B, T, F]."""
    with _watched(layer, batch) as seen:
        policy(variables, batch).hidden  # noqa: B018
    return seen["input"]


@contextlib.contextmanager
def _watched(
    layer: int, batch: Batch, add: tuple[jax.Array, jax.Array] | None = None
) -> Iterator[dict[str, jax.Array]]:
    """Within it, a forward keeps the input and output of `mlp/down` of a layer, [B, T, ...].

    `add`, places int [B] and a vector [D], is added to the output at that place of each row. Flax's interceptors do
    this without a word in the model's own code.
    """
    seen: dict[str, jax.Array] = {}
    B, T = batch.tokens.shape
    blocks = -1

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal blocks
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        blocks += isinstance(module, Block)
        found = call(*args, **kwargs)
        if blocks != layer or not isinstance(module, Dense) or module.path != ("mlp", "down"):
            return found
        seen["input"], seen["output"] = args[0].reshape(B, T, -1), found.reshape(B, T, -1)
        if add is None:
            return found
        places_B, vector_D = add
        return seen["output"].at[jnp.arange(B), places_B].add(vector_D.astype(found.dtype)).reshape(found.shape)

    with nn.intercept_methods(intercept):
        yield seen


class _Model(NamedTuple):
    policy: Policy
    variables: Variables


@functools.lru_cache(maxsize=16)
def _plain(policy: Policy) -> Policy:
    """With layers side by side and nothing computed twice: interceptors see each layer once."""
    config: Any = policy.config
    return dataclasses.replace(policy, model=dataclasses.replace(config, layers="unrolled", remat="none"))


def _model(policy: Policy, variables: Variables, layer: int) -> _Model:
    """The model with its layers side by side, checked."""
    config: Any = policy.config
    if not isinstance(config, DecoderConfig):
        raise UserError(f"a {type(config).__name__} has no MLP to edit; give a decoder.")
    if own := adapters_of(variables):
        raise UserError(f"these variables have a {next(iter(own))!r} adapter; fold it in with lmjax.adapters.merge.")
    if not 0 <= layer < config.num_layers:
        raise UserError(f"there is no layer {layer}; give a number from 0 to {config.num_layers - 1}.")
    apart = unstack_layers({name: tree for name, tree in variables.items() if name != "cache"})
    if at(apart["params"], [layer_name(layer), "mlp", "down", "kernel"]) is None:
        raise UserError(
            f"mlp/down of layer {layer} is kept quantized; dequantize the model first with lmjax.adapters.dequantize."
        )
    return _Model(_plain(policy), apart)


class _Rows(NamedTuple):
    """The prompt behind each prefix, the one without first, with the target behind.

    Attributes:
      batch: its mask is on the target's tokens.
      subjects: int [B], where the subject's last token is.
    """

    batch: Batch
    subjects: np.ndarray


def _rows(policy: Policy, prompt: Any, subject: int, target: Any, prefixes: Sequence[Any]) -> _Rows:
    prompt, target = _ids(policy, "the prompt", prompt), _ids(policy, "the target", target)
    if not -len(prompt) <= subject < len(prompt):
        raise UserError(f"the subject is at {subject} of a prompt of {len(prompt)} tokens; give a place within it.")
    subject = subject % len(prompt)
    before = [np.zeros((0,), np.int32)] + [_ids(policy, "a prefix", prefix) for prefix in prefixes]
    texts = [np.concatenate([prefix, prompt, target]) for prefix in before]
    longest = max(map(len, texts))
    pad = lambda text: np.pad(text, (0, longest - len(text)))
    ids = np.stack([pad(text) for text in texts])
    segments = np.stack([pad(np.ones_like(text)) for text in texts])
    mask = np.stack([pad(np.arange(len(text)) >= len(text) - len(target)) for text in texts])
    batch = next_token_batch(ids, segments, mask)
    return _Rows(batch, np.asarray([len(prefix) + subject for prefix in before], np.int32))


def _ids(policy: Policy, what: str, ids: Any) -> np.ndarray:
    config: Any = policy.config
    found = np.asarray(ids, np.int32).reshape(-1)
    if not found.size or found.min() < 0 or found.max() >= config.vocab_size:
        raise UserError(f"{what} must be ids from 0 to {config.vocab_size - 1}, at least one; it is {found.tolist()}.")
    return found
