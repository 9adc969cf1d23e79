"""Prefix and prompt tuning: keys and values, or embeddings, of tokens that were never said."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lmjax.adapters.targets import Variables, refuse_second
from lmjax.errors import UserError
from lmjax.models.layout import layer_name, stack_layers
from lmjax.policy import Policy

KINDS = ("prefix", "prefix_network", "prompt")


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values of every layer before the first token (Li and Liang, arXiv:2101.00190). See `prefix`.

    Attributes:
      policy: the model, whose shapes they have.
      length: P.
      tokens: int [P], start with what these tokens leave in the layers; None: normal with deviation `std`.
      std: 0.02 unless given.
      network_width: train a table and a network of this width instead, and drop them with `flatten` after;
        None trains keys and values themselves.
    """

    policy: Policy
    length: int
    tokens: tuple[int, ...] | None = None
    std: float = 0.02
    network_width: int | None = None

    @property
    def trainable(self) -> tuple[str, ...]:
        """What `make_step` is to train."""
        return ("prefix" if self.network_width is None else "prefix_network",)

    def init(self, key: jax.Array, variables: Variables) -> Variables:
        """The variables with the prefix beside them.

        A prefix takes part of the attention whatever it holds, zeros too: the outputs are other ones from the start.
        """
        refuse_second(variables, *KINDS)
        config: Any = self.policy.config
        G, K, L, P = config.kv_heads, config.head_width, config.num_layers, self.length
        if self.network_width is not None:
            D = config.embed_dim
            keys = jax.random.split(key, 3)
            network = {
                "table": jax.random.normal(keys[0], (P, D)),
                "hidden": _dense(keys[1], D, self.network_width),
                "output": _dense(keys[2], self.network_width, L * 2 * G * K),
            }
            return variables | {"prefix_network": network}
        if self.tokens is not None:
            return variables | {"prefix": prefix_of_tokens(self.policy, variables, self.tokens)}
        normal = self.std * jax.random.normal(key, (L, 2, G, P, K))
        layers = {
            layer_name(index): {"attention": {"keys": normal[index, 0], "values": normal[index, 1]}}
            for index in range(L)
        }
        return variables | {"prefix": stack_layers(layers) if config.scanned else layers}


def _dense(key: jax.Array, into: int, out: int) -> Variables:
    """Drawn as PyTorch draws a linear layer: uniform in +-1/sqrt(in)."""
    draw = lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1) / into**0.5
    kernel_key, bias_key = jax.random.split(key)
    return {"kernel": draw(kernel_key, (into, out)), "bias": draw(bias_key, (out,))}


def prefix(
    policy: Policy,
    length: int | None = None,
    *,
    tokens: Any = None,
    std: float = 0.02,
    network_width: int | None = None,
) -> Prefix:
    """Prefix tuning. Give a length, or ids of tokens to start from; the other arguments are those of `Prefix`.

    >>> import lmjax as lm
    >>> policy = lm.Policy(lm.models.llama(vocab_size=32, num_layers=1, embed_dim=16, num_heads=2))
    >>> adapted = prefix(policy, 5).init(jax.random.key(1), policy.init(jax.random.key(0)))
    >>> adapted["prefix"]["layer_0"]["attention"]["keys"].shape
    (2, 5, 8)
    """
    ids = _ids(policy, length, tokens)
    if ids is not None and network_width is not None:
        raise UserError("a prefix that a network makes cannot start from tokens; leave out one of the two.")
    return Prefix(policy, length or len(ids or ()), ids, std, network_width)


def _ids(policy: Policy, length: int | None, tokens: Any) -> tuple[int, ...] | None:
    if tokens is None:
        if length is None or length < 1:
            raise UserError(f"the length is {length}; give at least 1, or tokens to start from.")
        return None
    ids = np.asarray(tokens, np.int32).reshape(-1)
    if not ids.size or ids.min() < 0 or ids.max() >= policy.config.vocab_size:
        raise UserError(f"tokens to start from must be ids from 0 to {policy.config.vocab_size - 1}, at least one.")
    if length is None:
        return tuple(ids.tolist())
    return tuple(np.resize(ids, length).tolist())  # a short text is repeated (Lester et al., as PEFT does)


def prefix_of_tokens(policy: Policy, variables: Variables, tokens: Any) -> Variables:
    """The "prefix" collection that makes a model go on as if these tokens [P] had come first."""
    table = variables["params"]["embed"]["embedding"]
    model = policy.model
    rest = model.resolve({name: tree for name, tree in variables.items() if name not in (*KINDS, "cache")})
    found: Variables = model.prefix_of(rest, table[np.asarray(tokens)])
    return found


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Embeddings of P virtual tokens before the first (Lester et al., arXiv:2104.08691). See `prompt`.

    Attributes:
      policy: the model.
      length: P.
      tokens: int [P], start with their embeddings; None: those of tokens drawn from the vocabulary.
      std: start from normal numbers of this deviation instead.
    """

    policy: Policy
    length: int
    tokens: tuple[int, ...] | None = None
    std: float | None = None

    @property
    def trainable(self) -> tuple[str, ...]:
        """What `make_step` is to train."""
        return ("prompt",)

    def init(self, key: jax.Array, variables: Variables) -> Variables:
        """The variables with the prompt beside them. It is read as tokens would be: the outputs are other ones."""
        refuse_second(variables, *KINDS)
        table = variables["params"]["embed"]["embedding"]
        if self.std is not None:
            rows = self.std * jax.random.normal(key, (self.length, table.shape[1]))
        elif self.tokens is not None:
            rows = table[np.asarray(self.tokens)]
        else:
            rows = table[jax.random.choice(key, table.shape[0], (self.length,), replace=self.length > table.shape[0])]
        return variables | {"prompt": {"embedding": rows}}


def prompt(policy: Policy, length: int | None = None, *, tokens: Any = None, std: float | None = None) -> Prompt:
    """Prompt tuning. Give a length, or ids of tokens to start from; the other arguments are those of `Prompt`."""
    ids = _ids(policy, length, tokens)
    if ids is not None and std is not None:
        raise UserError("a prompt starts from tokens or from normal numbers; leave out one of the two.")
    return Prompt(policy, length or len(ids or ()), ids, std)


def flatten(policy: Policy, variables: Variables) -> Variables:
    """A prompt, or a prefix that a network makes, as the plain "prefix" it amounts to: fast to decode with."""
    return policy.model.resolve(variables)
