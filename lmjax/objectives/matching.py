"""Terms that bring the insides of a model near a teacher's: hidden states and attention."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from lmjax.batch import Batch
from lmjax.errors import UserError
from lmjax.losses import matching
from lmjax.models.depth import uniform_layers
from lmjax.objectives.algebra import Objective, Term
from lmjax.objectives.reducers import Reducer, token_mean

Layers = Literal["last", "uniform"] | tuple[tuple[int, int], ...]


def hidden_states(
    role: str = "teacher",
    kind: Literal["cosine", "mse"] = "cosine",
    *,
    layers: Layers = "last",
    project: bool = False,
    reducer: Reducer = token_mean,
) -> Objective:
    """Distance of hidden states from a teacher's, at each token that counts; pairs of layers add up.

    "cosine" of the last states is DistilBERT's (arXiv:1910.01108), "mse" of "uniform" layers through a projection is
    TinyBERT's (arXiv:1909.10351).

    Args:
      role: the teacher's role.
      kind: "cosine" is 1 - cos, "mse" the mean over the width of the squared difference.
      layers: "last": what the head reads, after the final norm. Else residual streams: "uniform" spreads the layers
        evenly over the teacher's, the embeddings beside its own (`models.uniform_layers`); or pairs (own, teacher's) of
        layers counted from 1, 0 for the embeddings.
      project: take the states through the collection "projection" (`policy.add_projection`), which is then to be
        trained beside "params". Needed where the widths differ.
      reducer: see `lmjax.objectives.reducers`.
    """
    kinds = {"cosine": matching.cosine_distance, "mse": matching.mean_squared_difference}
    if kind not in kinds:
        raise UserError(f"no distance of hidden states is called {kind!r}; there are cosine and mse.")
    _check_layers(layers, ("last", "uniform"))

    def function(outputs: Any, batch: Batch, teacher: Any) -> Any:
        if layers == "last":
            pairs = [(outputs.hidden, teacher.hidden)]
        else:
            numbers = _pairs(layers, outputs, teacher)
            pairs = [(outputs.layer(own), teacher.layer(other)) for own, other in numbers]
        values = jnp.zeros(batch.tokens.shape)
        for own, other in pairs:
            if project:
                own = own.astype(jnp.float32) @ outputs.collection("projection")["kernel"]
            if own.shape[-1] != other.shape[-1]:
                raise UserError(
                    f"hidden states {own.shape[-1]} wide cannot be compared with the {other.shape[-1]} of {role!r}; "
                    "use project=True and lmjax.policy.add_projection to that width."
                )
            values = values + kinds[kind](own, other)
        return values, batch.mask

    return Objective(((1.0, Term(f"hidden_{kind}_{role}", function, reducer, (role,))),))


def attention_maps(
    role: str = "teacher",
    of: Literal["scores", "probabilities"] = "scores",
    *,
    layers: Literal["uniform"] | tuple[tuple[int, int], ...] = "uniform",
    reducer: Reducer = token_mean,
) -> Objective:
    """Mean squared difference of attention from a teacher's, over heads and the keys a query sees; pairs of layers add.

    TinyBERT's (arXiv:1909.10351) for a model that sees only what came before. Holds [B, H, T, T] for each layer.

    Args:
      role: the teacher's role; it must have as many heads.
      of: "scores" before the softmax, as in TinyBERT, or "probabilities" after it.
      layers: "uniform", or pairs (own, teacher's) of layers counted from 1.
      reducer: see `lmjax.objectives.reducers`.
    """
    if of not in ("scores", "probabilities"):
        raise UserError(f"attention has no {of!r} to compare; there are scores and probabilities.")
    _check_layers(layers, ("uniform",))

    def function(outputs: Any, batch: Batch, teacher: Any) -> Any:
        values = jnp.zeros(batch.tokens.shape)
        for own, other in _pairs(layers, outputs, teacher):
            if own == other == 0:  # embeddings have no attention
                continue
            ours, theirs = outputs.attention(own), teacher.attention(other)
            if ours.shape[1] != theirs.shape[1]:
                raise UserError(
                    f"attention of {ours.shape[1]} heads cannot be compared with the {theirs.shape[1]} of {role!r}; "
                    "give the student as many heads."
                )
            values = values + matching.attention_difference(ours, theirs, of)
        return values, batch.mask

    return Objective(((1.0, Term(f"attention_{of}_{role}", function, reducer, (role,))),))


def _check_layers(layers: Any, names: tuple[str, ...]) -> None:
    if layers in names:
        return
    pairs = isinstance(layers, tuple) and layers and all(isinstance(pair, tuple) and len(pair) == 2 for pair in layers)
    if not pairs:
        raise UserError(f"layers is {layers!r}; give {' or '.join(map(repr, names))}, or pairs like ((1, 2), (2, 4)).")


def _pairs(layers: Any, outputs: Any, teacher: Any) -> tuple[tuple[int, int], ...]:
    if layers != "uniform":
        return layers
    for model in (outputs, teacher):
        model.check_layer(0)  # before its depth is read: not every model has one
    return uniform_layers(outputs.config.num_layers, teacher.config.num_layers)
