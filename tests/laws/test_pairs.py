"""Laws 1 and 2 for terms over pairs of answers. A new term is one line in `PAIR_TERMS`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax.batch import BeliefBatch
from lmjax.data import Answer, Pair, pair_batch
from lmjax.errors import UserError
from lmjax.objectives import Objective, evaluate, finalize, pluralistic, preferences, reward_models
from lmjax.objectives.pairs import LogRatio
from lmjax.policy import add_value_head
from lmjax.sharding import shard_batch
from lmjax.training.state import init_state
from lmjax.training.step import make_step
from tests.laws.counting import forwards, vocabulary_products
from tests.laws.registry import VOCAB, assert_close, documents, lay_out, tiny_policy
from tests.laws.test_registry import _public_functions

P = preferences


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    build: makes the objective.
    splits: whether batches may be split under it.
    answers: K of the batch.
    """

    build: Callable[[], Objective]
    splits: bool = True
    answers: int = 2


PAIR_TERMS: dict[str, Case] = {
    "dpo": Case(lambda: P.dpo()),
    "dpo_smoothed": Case(lambda: P.dpo(label_smoothing=0.1)),
    "dpo_mean": Case(lambda: P.dpo(ratio=LogRatio(mean=True))),
    "dpo_forward_kl": Case(lambda: P.dpo(ratio=LogRatio(divergence="forward_kl"))),
    "dpo_js": Case(lambda: P.dpo(ratio=LogRatio(divergence="js"))),
    "dpo_alpha": Case(lambda: P.dpo(ratio=LogRatio(divergence="alpha"))),
    "dpo_excess": Case(lambda: P.dpo(ratio=LogRatio(excess=0.3))),
    "dpo_weighted": Case(lambda: P.dpo(ratio=LogRatio(weighted=True))),
    "dpo_cached": Case(lambda: lm.objectives.with_cached_reference(P.dpo())),
    "robust_dpo": Case(lambda: P.robust_dpo()),
    "hinge": Case(lambda: P.hinge()),
    "ipo": Case(lambda: P.ipo()),
    "exo": Case(lambda: P.exo()),
    "nca": Case(lambda: P.nca()),
    "bco": Case(lambda: P.bco(shift=0.2)),
    "sppo": Case(lambda: P.sppo()),
    "apo_zero": Case(lambda: P.apo_zero()),
    "apo_down": Case(lambda: P.apo_down()),
    "discopop": Case(lambda: P.discopop()),
    "simpo": Case(lambda: P.simpo()),
    "alphapo": Case(lambda: P.alphapo()),
    "cpo": Case(lambda: P.cpo()),
    "orpo": Case(lambda: P.orpo()),
    "chosen_nll": Case(lambda: P.chosen_nll()),
    "unlikelihood": Case(lambda: P.unlikelihood()),
    "aot": Case(lambda: P.aot(), splits=False),
    "aot_unpaired": Case(lambda: P.aot(unpaired=True), splits=False),
    "kto": Case(lambda: P.kto(undesirable_weight=1.5), splits=False),
    "apo_zero_unpaired": Case(lambda: P.kto(reference_point=False)),
    "bradley_terry": Case(lambda: reward_models.bradley_terry(center=0.01)),
    "plackett_luce": Case(lambda: reward_models.plackett_luce(), answers=3),
    "process_reward": Case(lambda: reward_models.process_reward()),
    "gdpo": Case(lambda: pluralistic.gdpo((2, 5))),
}
ELSEWHERE = {"belief_kl", "belief_nll", "tpo"}  # in gdpo; below


def test_every_term_is_registered():
    known = {name for module in (P, reward_models, pluralistic) for name in _public_functions(module)}
    assert known - ELSEWHERE <= set(PAIR_TERMS)
    assert known <= set(lm.objectives.__all__)


DOCS = documents((4, 3, 6, 2, 5, 4, 3, 7, 2, 4, 3, 5, 2), seed=3)[:-1]
GROUPS = {2: [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]], 3: [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]}
ROWS = {
    "separate": lambda n: [[g] for g in range(n)],
    "padded": lambda n: [[0], [], *([g] for g in range(1, n)), []],
    "packed": lambda n: [list(range(0, n, 2)), [], list(range(1, n, 2))],
}


def _batch(layout: str, answers: int = 2) -> BeliefBatch:
    """Groups of answers in rows; what belongs to a group (margin, label, beliefs) goes where it goes."""
    groups = GROUPS[answers]
    rows = ROWS[layout](len(groups))
    members = [[doc for group in row for doc in groups[group]] for row in rows]
    longest = max(sum(len(DOCS[doc].tokens) for doc in row) for row in members) + 2
    plain = lay_out(DOCS, members, longest, seed=len(layout))
    mask = (plain.mask > 0).astype(np.float32)
    width = max(map(len, rows))
    pairs, margins, liked = np.zeros((3, len(rows), width), np.float32)
    reference, beliefs = np.zeros(mask.shape, np.float32), np.zeros((*mask.shape, 2), np.float32)
    for b, row in enumerate(rows):
        for p, group in enumerate(row):
            pairs[b, p], margins[b, p], liked[b, p] = 1 + group % 2, 0.1 * group, group % 2
            for k, doc in enumerate(groups[group]):
                at = plain.segments[b] == answers * p + k + 1
                reference[b, at] = -1 - 0.05 * np.arange(at.sum()) * (1 + doc)
                beliefs[b, np.flatnonzero(at)[0]] = (0.7, 0.3) if group % 2 else (0.2, 0.8)
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    return BeliefBatch(
        **fields | {"mask": mask},
        pairs=pairs,
        answers=answers,
        margins=margins,
        desirable=liked,
        reference_logprobs=reference,
        beliefs=beliefs,
        belief_mask=mask * (plain.positions == 1),
    )


@functools.cache
def _setting():
    policy = tiny_policy(chunk_elements=3 * 16 * 8)
    variables = add_value_head(policy.init(jax.random.key(0)), jax.random.key(1), std=0.3)
    return policy, variables, {"reference": policy.init(jax.random.key(7))}


def _objective(answers: int, splits: bool) -> Objective:
    built = [
        (0.1 + 0.07 * n) * term
        for n, case in enumerate(PAIR_TERMS.values())
        if case.answers == answers and case.splits == splits
        for term in [case.build()]
    ]
    return sum(built[1:], built[0])


@functools.cache
def _compiled(answers: int, splits: bool):
    policy, _, roles = _setting()
    objective = _objective(answers, splits)

    @jax.jit
    def run(variables, batch):
        def loss(variables):
            found = evaluate(objective, policy, variables, batch, roles=roles)
            return found.loss, finalize(found.sums)

        return jax.value_and_grad(loss, has_aux=True)(variables)

    return run


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("answers", "splits"), [(2, True), (2, False), (3, True)])
def test_padding_and_packing(layout, answers, splits):
    run, variables = _compiled(answers, splits), _setting()[1]
    found, expected = (run(variables, _batch(name, answers)) for name in (layout, "separate"))
    if answers == 3:  # what shifts all scores alike has no gradient, but for rounding
        for _, gradient in (found, expected):
            assert abs(float(gradient["value"].pop("bias")[0])) < 1e-6
    assert_close(found, expected, rtol=5e-5)
    losses = [float(v) for name, v in expected[0][1].items() if name.startswith("loss/")]
    assert all(abs(loss) > 1e-3 for loss in losses) and np.isfinite(losses).all()


def _step(objective: Objective, batch: Any, *, mesh: Any = None, microbatches: int = 1) -> Any:
    policy, variables, roles = _setting()
    options = dict(mesh=mesh, trainable=("params", "value"))
    state = init_state(policy, optax.sgd(0.1), jax.random.key(0), variables=variables, **options)
    step = make_step(policy, objective, optax.sgd(0.1), roles=roles, microbatches=microbatches, **options)
    state, metrics = step(state, batch if mesh is None else shard_batch(batch, mesh))
    return jax.device_get((state.variables, metrics))


EIGHT = _batch("padded")  # six rows of pairs, two without any


def test_microbatches_and_meshes(make_test_mesh):
    objective = _objective(2, True)
    whole = _step(objective, EIGHT)
    assert_close(_step(objective, EIGHT, microbatches=4), whole, rtol=1e-4)
    assert_close(_step(objective, EIGHT, mesh=make_test_mesh((2, 2, 2))), whole, rtol=1e-4)


def test_terms_that_couple_rows_are_the_same_on_a_mesh(make_test_mesh):
    objective = _objective(2, False)
    assert_close(_step(objective, EIGHT, mesh=make_test_mesh((2, 2, 2))), _step(objective, EIGHT), rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, case in PAIR_TERMS.items() if not case.splits])
def test_terms_that_couple_rows_refuse_to_be_split(name):
    objective = PAIR_TERMS[name].build()
    assert objective.terms[0][1].couples_rows
    with pytest.raises(UserError, match="couples the rows"):
        _step(objective, EIGHT, microbatches=2)


def test_one_forward_a_role_and_one_pass_over_the_vocabulary():
    policy = tiny_policy(vocab_size=131, num_heads=2, mlp_dim=40)  # no other axis is as long
    variables = add_value_head(policy.init(jax.random.key(0)), jax.random.key(1))
    roles = {"reference": policy.init(jax.random.key(7))}
    batch, table = _batch("packed"), (131, 16)

    def count(objective: Objective) -> tuple[int, int]:
        loss = lambda v: evaluate(objective, policy, v, batch, roles=roles).loss
        jaxpr = jax.make_jaxpr(jax.grad(loss))(variables)
        return forwards(jaxpr, table), vocabulary_products(jaxpr, 131)

    # Policy: logits, again, d hidden, d weight; the reference: its logits.
    mixed = P.dpo() + 0.2 * P.bco() + P.chosen_nll() + lm.objectives.kl("reference", estimator="k3")
    assert count(P.dpo()) == (2, 5) and count(mixed) == (2, 5)
    assert count(P.simpo() + lm.objectives.with_cached_reference(P.dpo())) == (1, 4)
    assert count(reward_models.bradley_terry()) == (1, 0)


def test_tpo_is_a_pair_and_gold_answers_of_another_stream():
    policy, variables, _ = _setting()
    batches = {"pairs": _batch("packed"), "gold": lm.batch.next_token_batch(np.arange(12).reshape(2, 6) % VOCAB)}
    own = P.tpo(alpha=0.5)
    assert own.labels == ("tpo", "gold/cross_entropy")
    found = evaluate(own, policy, variables, batches).loss
    apart = evaluate(P.simpo(0.01, gamma=0.5), policy, variables, batches["pairs"]).loss
    gold = evaluate(lm.objectives.cross_entropy(), policy, variables, batches["gold"]).loss
    np.testing.assert_allclose(found, apart + 0.5 * gold, rtol=1e-6)


@pytest.mark.parametrize("answers_only", [False, True])
def test_prompts_that_are_shared_and_columns_that_are_scored(answers_only):
    """A prompt computed once for both of its answers, and the vocabulary's pass over answers only, change nothing."""
    policy, variables, roles = _setting()
    random = np.random.default_rng(5)

    def answer(prompt: np.ndarray) -> Answer:
        ids = np.concatenate([prompt, random.integers(0, VOCAB, random.integers(1, 5))])
        return Answer(ids, np.arange(len(ids)) >= len(prompt))

    prompts = [random.integers(0, VOCAB, n) for n in (1, 4, 2, 6, 3)]
    pairs = [Pair(answer(prompt), answer(prompt), 0.1 * len(prompt), liked=bool(len(prompt) % 2)) for prompt in prompts]
    assert [pair.shared for pair in pairs] == [0, 3, 1, 5, 2]
    others = {"gdpo", "dpo_cached", "process_reward"} | ({"orpo"} if answers_only else set())
    names = [name for name, case in PAIR_TERMS.items() if case.answers == 2 and name not in others]
    for splits in (True, False):
        terms = [(0.1 + 0.07 * n) * PAIR_TERMS[name].build() for n, name in enumerate(names)
                 if PAIR_TERMS[name].splits == splits]  # fmt: skip

        def loss(variables: Any, batch: Any, objective: Objective = sum(terms[1:], terms[0])) -> Any:  # noqa: B008
            return evaluate(objective, policy, variables, batch, roles=roles).loss

        gradient = jax.jit(jax.value_and_grad(loss))
        expected = gradient(variables, pair_batch([[pair] for pair in pairs], 24))
        options = dict(shared=True, scored=16 if answers_only else None)
        found = gradient(variables, pair_batch([pairs[:2], [], pairs[2:]], 40, **options))
        assert_close(found, expected, rtol=5e-5)
    if answers_only:
        with pytest.raises(UserError, match="score_prompts"):
            evaluate(P.orpo(), policy, variables, pair_batch([pairs[:2]], 40, **options), roles=roles)
        with pytest.raises(UserError, match="columns for 3"):
            pair_batch([pairs], 100, scored=3)
