"""The policy: a pure function of its variables, and the one door between models and everything above."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.losses.logits import STATISTICS, Head, Statistics, logits_of, statistics_of_logits
from lmjax.losses.slices import slice_length
from lmjax.losses.vocabulary import map_vocabulary, token_statistics
from lmjax.models.config import BigramConfig, DecoderConfig, ModelConfig
from lmjax.models.decoder import Decoder, ModelOutputs, Variables
from lmjax.models.table import Bigram

_BUILDERS: dict[type, Callable[[Any], Any]] = {DecoderConfig: Decoder, BigramConfig: Bigram}


def build_model(config: ModelConfig) -> Any:
    """The model of a config: an object with pure `init`, `apply`, `head`, `init_cache` and `logical_axes`."""
    return _BUILDERS[type(config)](config)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A language model as a pure function `policy(variables, batch) -> Outputs`.

    Attributes:
      model: a model, or the config of one.
      chunk_elements: the most logits (float32 numbers) that exist at once when log-probabilities are taken.
      embedding_noise: NEFTune's alpha: noise on the embeddings in training (`models.noise`); 0 for none.

    >>> import numpy as np, lmjax as lm
    >>> policy = lm.Policy(lm.models.bigram(vocab_size=4))
    >>> variables = policy.init(jax.random.key(0))
    >>> batch = lm.batch.next_token_batch(np.array([[0, 1, 2]]))
    >>> print(policy(variables, batch).logprobs)
    [[-1.3862944 -1.3862944]]
    """

    model: Any
    chunk_elements: int = 2**24
    embedding_noise: float = 0.0

    def __post_init__(self) -> None:
        if type(self.model) in _BUILDERS:
            object.__setattr__(self, "model", build_model(self.model))
        if self.embedding_noise < 0 or (self.embedding_noise and isinstance(self.config, BigramConfig)):
            raise UserError(
                f"embedding_noise is {self.embedding_noise}; give 0, or a positive number for a model with embeddings."
            )

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def init(self, key: jax.Array) -> Variables:
        """Fresh variables, a plain nested dict `{"params": ...}` of float32 arrays."""
        return jax.jit(self.model.init)(key)

    def __call__(
        self, variables: Variables, batch: Batch, *, rng: jax.Array | None = None, train: bool = False
    ) -> Outputs:
        """Outputs for a batch; nothing is computed before it is read.

        Args:
          variables: `{"params": ...}` and whatever other collections the layers read.
          batch: token sequences.
          rng: key for dropout.
          train: whether dropout is on.
        """
        return Outputs(self, variables, batch, rng, train)

    def next_logits(self, variables: Variables, hidden_BD: jax.Array) -> jax.Array:
        """Float32 logits [B, V] of a few hidden states, as decoding wants them: no temperature, no gradient in mind.

        A "decode" collection may hold the head as [D, V] besides (`generation.decoding.prepare`).
        """
        head = self.model.head(variables)
        if head.weight is None:
            return logits_of(head, hidden_BD)
        product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        hidden_BD = hidden_BD.astype(head.dtype)
        if "decode" in variables:
            z_BV = product(hidden_BD, variables["decode"]["head"].astype(head.dtype), (((1,), (0,)), ((), ())))
        else:
            # On CPU the product is faster with the words in front; the barrier keeps XLA from turning it around.
            z_VB = product(head.weight.astype(head.dtype), hidden_BD, (((1,), (1,)), ((), ())))
            z_BV = jax.lax.optimization_barrier(z_VB).T
        return logits_of(head._replace(weight=None), z_BV)

    def logical_axes(self, variables: Variables) -> Variables:
        """Logical axis names of every leaf (arrays or shapes), in a tree of the same structure."""
        return self.model.logical_axes(variables)

    def init_cache(self, batch_size: int, length: int, spec: Any = None, slack: int = 0) -> Variables:
        """An empty "cache" collection for `length` tokens a row. See `Decoder.init_cache`."""
        return self.model.init_cache(batch_size, length, spec, slack)


@dataclasses.dataclass(frozen=True)
class Request:
    """What will be read of one set of outputs, so that one pass over the vocabulary serves it all.

    Attributes:
      statistics: names out of `losses.logits.STATISTICS`.
      maps: (function of rows of logits, names of the other roles whose logits it takes), in the order they are read.
      logits: whether all logits are read as they are, so that statistics can be taken of those.
      layers, attentions: the layers of which `Outputs.layer` and `Outputs.attention` are read.
    """

    statistics: frozenset[str] = frozenset()
    maps: tuple[tuple[Callable[..., jax.Array], tuple[str, ...]], ...] = ()
    logits: bool = False
    layers: frozenset[int] = frozenset()
    attentions: frozenset[int] = frozenset()


class Outputs:
    """What a policy says about a batch, computed when read and once only.

    `hidden` [B, T, D], `logits` [B, T, V] float32 (the only thing here that holds a whole vocabulary a token),
    `values` [B, T] of a value head, `aux` named scalars of the model, `cache`; and the statistics of
    `losses.logits.STATISTICS`, float32 [B, T]: `logprobs` of the batch's targets, `logsumexp`, `entropy`,
    `sum_p2`, `mean_logits`, `correct`.

    Log-probabilities are of the tempered distribution where the batch has a temperature.
    """

    logprobs: jax.Array
    logsumexp: jax.Array
    entropy: jax.Array
    sum_p2: jax.Array
    mean_logits: jax.Array
    correct: jax.Array

    def __init__(self, policy: Policy, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool):
        self.policy = policy
        self.variables = variables
        self.batch = batch
        self._rng = rng
        self._train = train
        self._request, self._declared = Request(frozenset(STATISTICS)), False
        self._peers: dict[str, Outputs] = {}
        self._maps_read = 0

    def expecting(self, request: Request, peers: dict[str, Outputs]) -> Outputs:
        """Declares what will be read. Without this, the first statistic that is read computes all of them."""
        self._request, self._peers, self._declared = request, peers, True
        return self

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.policy.config

    @functools.cached_property
    def _model(self) -> ModelOutputs:
        return self._forward(self._request.layers, self._request.attentions)

    def _forward(self, layers: Iterable[int], attentions: Iterable[int]) -> ModelOutputs:
        batch = self.batch
        kinds = {"collect": layers, "attentions": attentions}
        wanted: dict[str, Any] = {kind: tuple(sorted(numbers)) for kind, numbers in kinds.items() if numbers}
        if self._train and self.policy.embedding_noise:
            wanted["embedding_noise"] = self.policy.embedding_noise
        if batch.fork is not None:
            wanted["fork"] = batch.fork
        if batch.shared is not None:
            wanted["shared"] = batch.shared
        return self.policy.model.apply(
            self.variables, batch.tokens, batch.segments, batch.positions, rng=self._rng, train=self._train, **wanted
        )

    def layer(self, number: int) -> jax.Array:
        """The residual stream [B, T, D] after so many layers: 0 for the embeddings. The final norm comes later.

        A read that was not declared (`expecting`) costs a forward of its own.

        Raises:
          UserError: see `check_layer`.
        """
        self.check_layer(number)
        return self._of_layer("layers", number)

    def attention(self, number: int) -> jax.Array:
        """Scores of the n-th layer (from 1) before the softmax: float32 [B, H, T, T], -inf where a key is not seen.

        They are computed once more for who reads them: attention itself never holds them. Declared as in `layer`.

        Raises:
          UserError: see `check_layer`; or prefixes, which are no tokens of the batch.
        """
        self.check_layer(number, attention=True)
        return self._of_layer("attentions", number)

    def _of_layer(self, kind: str, number: int) -> jax.Array:
        if number in getattr(self._request, kind):
            return getattr(self._model, kind)[number]
        if self._declared:
            raise RuntimeError(f"{kind} of layer {number} were read, but not when the objective was traced: a term "
                               "must read the same outputs every time it is called.")
        read = {"layers": (), "attentions": ()} | {kind: (number,)}
        return getattr(self._forward(**read), kind)[number]

    def check_layer(self, number: int, attention: bool = False) -> None:
        """Checks that a single layer can be read.

        Raises:
          UserError: the model has no such layer, or its layers are scanned.
        """
        config = self.config
        if not isinstance(config, DecoderConfig):
            raise UserError(f"a {type(config).__name__} has no layers to read; use a decoder, or read its logits.")
        if config.scanned:
            raise UserError("what single layers do can only be read with layers='unrolled'; change the model's config.")
        if not int(attention) <= number <= config.num_layers:
            what = "attention of" if attention else "stream after"
            raise UserError(
                f"the {what} layer {number} is asked for; this model counts from {int(attention)} to "
                f"{config.num_layers}."
            )
        if attention and (found := {"prefix", "prompt", "prefix_network"} & set(self.variables)):
            raise UserError(f"attention is compared between tokens, and these variables hold a {min(found)}; merge it "
                            "or leave it out.")

    def collection(self, name: str) -> Any:
        """A collection of the variables that belongs to a term and that no layer reads.

        Raises:
          UserError: the variables lack it.
        """
        if name not in self.variables:
            raise UserError(f"these variables have no {name!r}; add one, as lmjax.policy.add_{name}(...) does.")
        return self.variables[name]

    @property
    def hidden(self) -> jax.Array:
        return self._model.hidden

    @property
    def aux(self) -> dict[str, jax.Array]:
        return self._model.aux

    @property
    def cache(self) -> Any:
        return self._model.cache

    @property
    def head(self) -> Head:
        return self.policy.model.head(self.variables)

    @functools.cached_property
    def logits(self) -> jax.Array:
        temperature = self.batch.temperature
        return logits_of(self.head, self.hidden, None if temperature is None else temperature[:, None])

    @functools.cached_property
    def values(self) -> jax.Array:
        if "value" not in self.variables:
            raise UserError("these variables have no value head; add one with lmjax.policy.add_value_head(variables).")
        value = self.variables["value"]
        return (self.hidden.astype(jnp.float32) @ value["kernel"] + value["bias"])[..., 0]

    @functools.cached_property
    def _vocabulary(self) -> tuple[Statistics, list[jax.Array]]:
        """The one pass over the vocabulary: everything the request names, 0 where no target counts in any row."""
        return unscored(self._scored_vocabulary(), self.batch)

    def _scored_vocabulary(self) -> tuple[Statistics, list[jax.Array]]:
        request, batch = self._request, self.batch
        targets = scored(batch.targets, batch)
        wanted = sorted(request.statistics)
        if request.logits and not request.maps:
            rows = scored(self.logits, batch).reshape(targets.size, -1)
            statistics = statistics_of_logits(rows, jnp.ravel(targets), wanted)
            return {name: value.reshape(targets.shape) for name, value in statistics.items()}, []
        if not request.maps:
            statistics = token_statistics(
                self.head,
                scored(self.hidden, batch),
                targets,
                temperature_B=batch.temperature,
                wanted=wanted,
                elements=self.policy.chunk_elements,
            )
            return statistics, []
        names = sorted({name for _, others in request.maps for name in others})
        models = (self, *(self._peers[name] for name in names))
        operands = [(o.head, scored(o.hidden, batch), o.batch.temperature) for o in models]

        def positional(function: Callable[..., jax.Array], others: Sequence[str]) -> Callable[..., jax.Array]:
            return lambda own, *rest: function(own, *(rest[names.index(name)] for name in others))

        return map_vocabulary(
            [positional(function, others) for function, others in request.maps],
            operands,
            targets,
            wanted=wanted,
            elements=self.policy.chunk_elements,
        )

    @property
    def slice_length(self) -> int:
        """How many tokens of each row a slice of the pass over the vocabulary holds."""
        return slice_length(self.head, scored(self.hidden, self.batch), self.policy.chunk_elements)

    def with_statistics(self, statistics: Statistics) -> Outputs:
        """These outputs with statistics that were computed elsewhere."""
        self._vocabulary = (statistics, [])
        return self

    def __getattr__(self, name: str) -> jax.Array:
        if name not in STATISTICS:
            raise AttributeError(f"Outputs has no {name!r}")
        statistics, _ = self._vocabulary
        if name not in statistics:
            raise RuntimeError(f"{name} was read, but not when the objective was traced: a term must read the same "
                               "outputs every time it is called.")
        return statistics[name]

    def map_logits(self, function: Callable[..., jax.Array], *others: Outputs) -> jax.Array:
        """`function(own logits [N, V], logits of others [N, V] ...) -> [N]` for every token, as [B, T].

        Logits exist a slice at a time and are recomputed in the backward pass, in the same pass as the statistics when
        an objective reads both.
        """
        if self._request.maps:
            self._maps_read += 1
            return self._vocabulary[1][self._maps_read - 1]
        operands = [(o.head, o.hidden, o.batch.temperature) for o in (self, *others)]
        return map_vocabulary(
            [function], operands, self.batch.targets, elements=self.policy.chunk_elements
        )[1][0]


def scored(tree: Any, batch: Batch) -> Any:
    """What belongs to tokens of a batch, [B, T, ...], without the columns whose targets never count; all else whole."""
    shape, first, columns = batch.tokens.shape, batch.first_target, batch.scored
    if not first and columns is None:
        return tree

    def cut(leaf: jax.Array) -> jax.Array:
        if leaf.shape[:2] != shape:
            return leaf
        if columns is None:
            return leaf[:, first:]
        index = columns.reshape(*columns.shape, *[1] * (leaf.ndim - 2))
        return jnp.take_along_axis(leaf, index, axis=1, mode="fill", fill_value=0)

    return jax.tree.map(cut, tree)


def unscored(tree: Any, batch: Batch) -> Any:
    """The inverse of `scored` for arrays of tokens, with zeros."""
    shape, first, columns = batch.tokens.shape, batch.first_target, batch.scored
    if columns is not None:
        rows = jnp.arange(shape[0])[:, None]
        return jax.tree.map(lambda x: jnp.zeros(shape, x.dtype).at[rows, columns].set(x, mode="drop"), tree)
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (first, 0))) if first else leaf, tree)


def add_value_head(variables: Variables, key: jax.Array | None = None, std: float = 0.0) -> Variables:
    """Adds the "value" collection: a scalar read from every hidden state, 0 everywhere at first unless `std` > 0."""
    hidden_dim = _embedding_width(variables["params"])
    kernel = jnp.zeros((hidden_dim, 1)) if key is None else std * jax.random.normal(key, (hidden_dim, 1))
    return variables | {"value": {"kernel": kernel, "bias": jnp.zeros((1,))}}


def add_projection(variables: Variables, width: int, key: jax.Array) -> Variables:
    """Adds the "projection" collection: a linear map from hidden states to a teacher's `width`, as in TinyBERT.

    Train it beside "params"; it is not part of the model. See `lmjax.objectives.hidden_states`.
    """
    hidden_dim = _embedding_width(variables["params"])
    kernel = hidden_dim**-0.5 * jax.random.normal(key, (hidden_dim, width))
    return variables | {"projection": {"kernel": kernel}}


def _embedding_width(params: Variables) -> int:
    table = params["embed"]["embedding"] if "embed" in params else params["table"]
    return table.shape[-1]


def count_parameters(variables: Variables, collections: Iterable[str] = ("params",)) -> int:
    """How many numbers the given collections hold. Works on shapes too."""
    return sum(leaf.size for name in collections for leaf in jax.tree.leaves(variables[name]))
