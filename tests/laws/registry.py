"""Every piece that the laws are tested on. A new preset, term or reducer is one line here; without it a test fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lmjax as lm
from lmjax.batch import Batch
from lmjax.models.config import ModelConfig
from lmjax.models.decoder import Decoder, ModelOutputs
from lmjax.objectives import Objective, Reducer, Role
from lmjax.objectives import matching as M
from lmjax.objectives import terms as T

VOCAB = 16
TINY = dict(vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_length=64, init_std=0.15)

MODELS: dict[str, Callable[[], ModelConfig]] = {
    "bigram": lambda: lm.models.bigram(VOCAB, init_std=1.0),
    "small": lambda: lm.models.small(**TINY),
    "gpt2": lambda: lm.models.gpt2(**TINY),
    "llama": lambda: lm.models.llama(**TINY, num_kv_heads=1),
    "mistral": lambda: lm.models.mistral(**TINY, window=3),
    "qwen2": lambda: lm.models.qwen2(**TINY),
    "qwen3": lambda: lm.models.qwen3(**TINY),
    "gemma2": lambda: lm.models.gemma2(**TINY | {"window": 3}),
    "gemma3": lambda: lm.models.gemma3(**TINY | {"window": 3, "window_pattern": (True, False)}),
    "scanned": lambda: lm.models.small(**TINY, layers="scanned"),
}
NOT_FAMILIES = {"preset"}  # functions of `models.presets` that build no family


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to use a term.

    Attributes:
      term: the exported function it is built by.
      build: reducer -> objective.
      fused: whether its gradient is taken in the forward pass over the vocabulary.
      splits: whether its value is a sum over rows.
    """

    term: str
    build: Callable[[Reducer], Objective]
    fused: bool = True
    splits: bool = True


def _case(function: Callable[..., Objective], *arguments: Any, fused: bool = True, **options: Any) -> Case:
    return Case(function.__name__, lambda reducer: function(*arguments, **options, reducer=reducer), fused)


TERMS: dict[str, Case] = {
    "cross_entropy": _case(T.cross_entropy),
    "label_smoothing": _case(T.cross_entropy, label_smoothing=0.1),
    "z_loss": _case(T.z_loss),
    "entropy": _case(T.entropy),
    "kl_k1": _case(T.kl, "reference", estimator="k1"),
    "kl_abs": _case(T.kl, "reference", estimator="abs"),
    "kl_k2": _case(T.kl, "reference", estimator="k2"),
    "kl_k3": _case(T.kl, "reference", estimator="k3"),
    "forward": _case(T.divergence, "reference", "forward", fused=False),
    "reverse": _case(T.divergence, "reference", "reverse", fused=False),
    "js": _case(T.divergence, "reference", "js", beta=0.3, fused=False),
    "distillation": _case(T.distillation, "teacher", temperature=2.0, fused=False),
    "distillation_top_k": _case(T.distillation, "teacher", top_k=3, fused=False),
    "distillation_reverse": _case(T.distillation, "teacher", beta=1.0, temperature=0.7, scaled=False, fused=False),
    "distillation_js": _case(T.distillation, "teacher", beta=0.4, fused=False),
    "agreement": _case(T.agreement, fused=False),
    "hidden_cosine": _case(M.hidden_states, "teacher", fused=False),
    "hidden_mse": _case(M.hidden_states, "teacher", "mse", layers="uniform", fused=False),
    "attention_scores": _case(M.attention_maps, "teacher", fused=False),
    "attention_probabilities": _case(M.attention_maps, "teacher", "probabilities", layers=((1, 1),), fused=False),
    "auxiliary": Case("auxiliary", lambda reducer: T.auxiliary("per_token", couples_rows=False), fused=False),
    "auxiliary_scalar": Case("auxiliary", lambda reducer: T.auxiliary("scalar"), fused=False, splits=False),
}

REDUCERS: dict[str, Reducer] = {
    "token_mean": lm.objectives.token_mean,
    "token_sum": lm.objectives.token_sum,
    "sequence_mean": lm.objectives.sequence_mean,
    "sequence_sum_mean": lm.objectives.sequence_sum_mean,
    "constant_horizon": lm.objectives.constant_horizon(7),
}

MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8))


class WithAuxiliary:
    """A decoder whose layers pretend to report router losses, and that reads the collection "delta" if there is one."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.inner = Decoder(config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def apply(self, variables: Any, *arguments: Any, **options: Any) -> ModelOutputs:
        delta = variables.get("delta", {"shift": 0.0})["shift"]
        plain = {name: tree for name, tree in variables.items() if name != "delta"}
        found = self.inner.apply(plain, *arguments, **options)
        hidden = found.hidden + delta
        per_token = jnp.mean(jnp.square(hidden), axis=-1)
        return found._replace(hidden=hidden, aux={"per_token": per_token, "scalar": jnp.mean(per_token)})


def tiny_policy(*, chunk_elements: int = 2**24, **fields: Any) -> lm.Policy:
    """One layer, a head with softcap and scale, heads and widths that eight devices divide."""
    config = lm.models.small(
        **TINY | {"num_layers": 1, "num_heads": 8, "head_dim": 2, "logit_softcap": 20.0, "logit_scale": 0.5} | fields
    )
    return lm.Policy(WithAuxiliary(config), chunk_elements)


def tiny_roles(policy: lm.Policy) -> dict[str, Role]:
    return {name: Role(policy.init(jax.random.key(seed))) for seed, name in ((7, "reference"), (8, "teacher"))}


def everything(*, fused: bool, product: bool = False) -> Objective:
    """The sum of all cases of a kind that split, coefficients all different. Terms are named `case:reducer`.

    Each case has one of the reducers in turn, and cross-entropy has all where it is fused; under `product` all have
    all. A term that is not fused takes the others along to the general path, so cross-entropy is in both sums.
    """
    found: list[Objective] = []
    cases = [name for name, case in TERMS.items() if case.splits and (case.fused == fused or name == "cross_entropy")]
    reducers = list(REDUCERS.items())
    for number, name in enumerate(cases):
        every = product or (fused and number == 0)
        for reducer_name, reducer in reducers if every else [reducers[number % len(reducers)]]:
            coefficient = 0.1 + 0.37 * (len(found) * 0.618 % 1.0)
            found.append(coefficient * TERMS[name].build(reducer).named(f"{name}:{reducer_name}"))
    return sum(found[1:], found[0])


@dataclasses.dataclass(frozen=True)
class Document:
    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray


def documents(lengths: tuple[int, ...], seed: int = 0) -> list[Document]:
    """Documents whose tokens weigh 0, 1/2, 1 or 2; each has at least one that counts, but for the last."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        mask = rng.choice([0.0, 0.5, 1.0, 2.0], length)
        mask[0] = 1.0
        tokens, targets = rng.integers(0, VOCAB, (2, length))
        found.append(Document(tokens, targets, mask))
    found[-1].mask[:] = 0.0
    return found


def lay_out(docs: list[Document], rows: list[list[int]], length: int, seed: int = 1) -> Batch:
    """A batch with the documents of each row one after the other, then padding: random ids that nothing may read."""
    rng = np.random.default_rng(seed)
    shape = (len(rows), length)
    tokens, targets = rng.integers(0, VOCAB, (2, *shape)).astype(np.int32)
    mask, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members):
            doc = docs[member]
            where = (row, slice(start, start := start + len(doc.tokens)))
            tokens[where], targets[where], mask[where] = doc.tokens, doc.targets, doc.mask
            segments[where], positions[where] = number + 1, np.arange(len(doc.tokens))
    return Batch(tokens, targets, mask, segments, positions, np.full(len(rows), 0.7, np.float32))


def random_batch(rows: int, length: int, seed: int = 0) -> Batch:
    """Rows of one or two documents with padding at the end, weights as in `documents`, each row its temperature."""
    rng = np.random.default_rng(seed)
    cut = max(1, length // 3)
    docs = documents((cut, length - cut - 1) * rows + (1,), seed)
    batch = lay_out(docs, [[2 * row, 2 * row + 1] for row in range(rows)], length, seed)
    return dataclasses.replace(batch, temperature=rng.uniform(0.5, 1.5, rows).astype(np.float32))


def assert_close(actual: Any, expected: Any, rtol: float = 2e-5, atol: float = 5e-6) -> None:
    """Two trees of arrays hold the same numbers, up to the order of sums in float32.

    `atol` is in units of the largest number of each leaf.
    """
    actual_leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(actual))
    expected_leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(expected))
    assert [path for path, _ in actual_leaves] == [path for path, _ in expected_leaves]
    for (path, a), (_, e) in zip(actual_leaves, expected_leaves):
        scale = max(float(np.max(np.abs(e), initial=0.0)), 1e-3)
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol * scale, err_msg=jax.tree_util.keystr(path))
