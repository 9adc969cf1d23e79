"""Laws 1, 2 and 7 for terms over rollouts. A new term is one line in `ROLLOUT_TERMS`."""

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
from lmjax import rl
from lmjax.batch import RolloutBatch, positions_within_segments
from lmjax.errors import UserError
from lmjax.objectives import Objective, Weighing, covariance, evaluate, finalize
from lmjax.objectives import policy_gradient as G
from lmjax.policy import add_value_head
from lmjax.sharding import shard_batch
from lmjax.training.state import init_state
from lmjax.training.step import make_step
from tests.laws.counting import forwards, vocabulary_products
from tests.laws.registry import VOCAB, assert_close, tiny_policy
from tests.laws.test_registry import _public_functions

CORRECTED = Weighing(correct="token_truncate", low=0.5, high=2.0, off_policy=0.2)
SEQUENCES = Weighing(correct="sequence_mask", high=3.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    build: makes the objective.
    splits: whether batches may be split under it.
    fused: whether it treats every token for itself, without old log-probabilities too.
    """

    build: Callable[[], Objective]
    splits: bool = True
    fused: bool = True


ROLLOUT_TERMS: dict[str, Case] = {
    "reinforce": Case(lambda: G.reinforce()),
    "gpg": Case(lambda: G.gpg()),
    "bnpo": Case(lambda: G.bnpo(0.1)),
    # All of the band is taken: which few of it would be depends on the batch's layout.
    "clip_cov": Case(lambda: covariance.clip_cov(share=1.0, band=(0.3, 2.0)), splits=False, fused=False),
    "kl_cov": Case(lambda: covariance.kl_cov(share=0.2), splits=False, fused=False),
    "ppo": Case(lambda: G.ppo(0.1, dual=1.5, cap=1.2)),
    "grpo": Case(lambda: G.grpo((0.1, 0.2))),
    "dapo": Case(lambda: G.dapo()),
    "dr_grpo": Case(lambda: G.dr_grpo(9)),
    "luspo": Case(lambda: G.luspo(0.01), fused=False),
    "gspo": Case(lambda: G.gspo((0.01, 0.02)), fused=False),
    "gspo_token": Case(lambda: G.gspo_token(0.01), fused=False),
    "rloo": Case(lambda: G.rloo(), fused=False),
    "cispo": Case(lambda: G.cispo((None, 1.1))),
    "sapo": Case(lambda: G.sapo()),
    "gmpo": Case(lambda: G.gmpo(0.1), fused=False),
    "gmpo_corrected": Case(lambda: G.gmpo(0.1, weighing=SEQUENCES), fused=False),
    "vespo": Case(lambda: G.vespo(), fused=False),
    "dppo": Case(lambda: G.dppo("tv", 0.05)),
    "dppo_kl": Case(lambda: G.dppo("kl", 0.01)),
    "dro": Case(lambda: G.dro(0.5)),
    "value_loss": Case(lambda: G.value_loss(0.2), fused=False),
    "corrected": Case(lambda: G.dapo(weighing=CORRECTED), fused=False),
    "corrected_sequences": Case(lambda: G.dapo(weighing=SEQUENCES), fused=False),
    "top_entropy": Case(lambda: G.dapo(weighing=Weighing(top_entropy=0.5)), splits=False, fused=False),
    "by_coefficient": Case(lambda: G.by_coefficient("entropy", lm.objectives.entropy())),
    "kl_weighted": Case(lambda: lm.objectives.kl("reference", estimator="k3", gradient="weighted")),
    "kl_k2_gradient": Case(lambda: lm.objectives.kl("reference", estimator="k3", gradient="k2", held=5.0)),
    "kl_weighted_k2": Case(lambda: lm.objectives.kl("reference", estimator="k1", gradient="weighted_k2", cap=2.0)),
    "kl_sequence": Case(lambda: lm.objectives.kl("reference", gradient="weighted", level="sequence"), fused=False),
    "entropy_top": Case(lambda: lm.objectives.entropy(top=0.5), splits=False, fused=False),
}
ELSEWHERE = {"surrogate_term", "critic_role"}  # what they are made of; in tests/experiments/test_reinforcement.py


def test_every_term_is_registered():
    known = _public_functions(G) | _public_functions(covariance)
    assert known - ELSEWHERE <= set(ROLLOUT_TERMS)
    assert known <= set(lm.objectives.__all__)


@functools.cache
def rollouts() -> list[rl.Rollout]:
    random = np.random.default_rng(4)
    found = []
    for group, length in enumerate((1, 4, 2, 5)):
        prompt = random.integers(0, VOCAB, length)
        for _ in range(3):
            n = int(random.integers(2, 6))
            logprobs = -random.random(n).astype(np.float32) * 3
            own = np.arange(n) != 1 if n > 3 else np.ones(n, bool)  # one token is an environment's
            ids = random.integers(0, VOCAB, n).astype(np.int32)
            found.append(rl.Rollout(prompt, ids, group, logprobs, logprobs - 0.2 * random.normal(size=n), "eos", own))
    return found


def _batch(layout: str) -> RolloutBatch:
    """The same rollouts: one a row, padded; forked; or several prompts in a row, packed."""
    made, random = rollouts(), np.random.default_rng(9)
    advantages = random.normal(size=len(made))
    tokens = lambda: [random.normal(size=len(rollout.tokens)) for rollout in made]
    values, returns = tokens(), tokens()
    per_row, rows = {"alone": (1, 12), "padded": (1, 16), "forked": (3, 8), "halves": (2, 8)}.get(layout, (1, 12))
    place = rl.lay_out(made, per_row=per_row, rows=rows)
    batch = rl.rollout_batch(made, place, temperature=0.8, advantages=list(advantages), sampling=True)
    batch = dataclasses.replace(
        batch, values=place.place(values), returns=place.place(returns),
        coefficients={"entropy": np.full(rows, 0.3, np.float32)},
    )  # fmt: skip
    return _packed(batch) if layout == "packed" else batch


def _packed(batch: RolloutBatch) -> RolloutBatch:
    """Rows of single rollouts, three behind each other in a row, without forks."""
    fields = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if field.name in ("fork", "shared", "scored", "temperature", "coefficients") or value is None:
            continue
        fields[field.name] = value.reshape(4, -1)
    segments = batch.segments > 0
    number = np.tile(np.arange(1, 4)[None, :, None], (4, 1, batch.tokens.shape[1])).reshape(4, -1)
    fields["segments"] = (segments.reshape(4, -1) * number).astype(np.int32)
    # A prompt and its rollout stand apart by padding here; positions go on behind it all the same.
    return RolloutBatch(
        **fields,
        temperature=np.full(4, 0.8, np.float32),
        coefficients={"entropy": np.full(4, 0.3, np.float32)},
    )


@functools.cache
def _setting() -> Any:
    policy = tiny_policy(chunk_elements=5 * 16 * 8)
    variables = add_value_head(policy.init(jax.random.key(0)), jax.random.key(1), std=0.3)
    return policy, variables, {"reference": policy.init(jax.random.key(7))}


def _objective(fused: bool, splits: bool = True) -> Objective:
    built = [
        (0.1 + 0.07 * n) * case.build().named(name)
        for n, (name, case) in enumerate(ROLLOUT_TERMS.items())
        if case.splits == splits and (not splits or case.fused == fused)
    ]
    return sum(built[1:], built[0])


@functools.cache
def _compiled(fused: bool, splits: bool) -> Any:
    policy, _, roles = _setting()
    objective = _objective(fused, splits)

    @jax.jit
    def run(variables: Any, batch: Any) -> Any:
        def loss(variables: Any) -> Any:
            found = evaluate(objective, policy, variables, batch, roles=roles)
            return found.loss, finalize(found.sums)

        return jax.value_and_grad(loss, has_aux=True)(variables)

    return run


@pytest.mark.parametrize("layout", ["padded", "forked", "halves", "packed"])
@pytest.mark.parametrize(("fused", "splits"), [(True, True), (False, True), (False, False)])
def test_padding_packing_and_forks(layout, fused, splits):
    run, variables = _compiled(fused, splits), _setting()[1]
    assert_close(run(variables, _batch(layout)), run(variables, _batch("alone")), rtol=5e-5)


def _step(objective: Objective, batch: Any, *, mesh: Any = None, microbatches: int = 1) -> Any:
    policy, variables, roles = _setting()
    options = dict(mesh=mesh, trainable=("params", "value"))
    state = init_state(policy, optax.sgd(0.1), jax.random.key(0), variables=variables, **options)
    step = make_step(policy, objective, optax.sgd(0.1), roles=roles, microbatches=microbatches, **options)
    state, metrics = step(state, batch if mesh is None else shard_batch(batch, mesh))
    return jax.device_get((state.variables, metrics))


def test_microbatches_and_meshes(make_test_mesh):
    objective, batch = _objective(True) + _objective(False), _batch("halves")
    whole = _step(objective, batch)
    assert_close(_step(objective, batch, microbatches=4), whole, rtol=1e-4)
    assert_close(_step(objective, batch, mesh=make_test_mesh((2, 2, 2))), whole, rtol=1e-4)


def test_what_couples_rows_refuses_to_be_split():
    with pytest.raises(UserError, match="couples the rows"):
        _step(ROLLOUT_TERMS["top_entropy"].build(), _batch("halves"), microbatches=2)


def test_one_forward_a_role_and_the_fewest_passes_over_the_vocabulary():
    policy = tiny_policy(vocab_size=131, num_heads=2, mlp_dim=40)  # no other axis is as long
    variables = add_value_head(policy.init(jax.random.key(0)), jax.random.key(1))
    roles = {"reference": policy.init(jax.random.key(7))}
    table = (131, 16)

    def count(objective: Objective, batch: RolloutBatch) -> tuple[int, int]:
        loss = lambda v: evaluate(objective, policy, v, batch, roles=roles).loss
        jaxpr = jax.make_jaxpr(jax.grad(loss))(variables)
        return forwards(jaxpr, table), vocabulary_products(jaxpr, 131)

    batch = _batch("forked")
    fresh = dataclasses.replace(batch, old_logprobs=None)
    for name, case in ROLLOUT_TERMS.items():
        if case.fused and "kl" not in name:
            assert count(case.build(), batch) == count(case.build(), fresh) == (1, 3), name
        elif name == "kl_cov" or ("kl" not in name and name != "value_loss"):
            assert count(case.build(), batch) == (1, 4), name
    kl = ROLLOUT_TERMS["kl_weighted"].build()
    whole = G.grpo() + 0.04 * kl - 0.001 * lm.objectives.entropy() + 0.1 * G.value_loss(0.2)
    assert count(whole, batch) == (2, 4)  # with the reference's logits
    assert count(lm.objectives.with_cached_reference(G.grpo() + kl), dataclasses.replace(
        batch, reference_logprobs=batch.old_logprobs)) == (1, 3)  # fmt: skip


def test_the_ratio_is_one_before_any_update():
    policy, variables, _ = _setting()
    prompts = [lm.data.Prompt(np.arange(1, n + 2)) for n in range(3)]
    made = rl.roll_out(
        policy, variables, prompts, jax.random.key(2), samples=2, max_new_tokens=6, eos=3, temperature=0.8
    )
    batch = rl.rollout_batch(made, rl.lay_out(made, per_row=2), temperature=0.8, advantages=[1.0] * len(made))
    metrics = finalize(evaluate(G.ppo() + G.gspo(), policy, variables, batch).sums)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5) and metrics["approx_kl"] == pytest.approx(0.0, abs=1e-8)
    assert metrics["gspo/clip_ratio/region"] == 0.0


def test_positions_of_packed_rows():
    batch = _batch("packed")
    assert batch.fork is None and set(np.unique(batch.segments)) == {0, 1, 2, 3}
    assert not np.array_equal(positions_within_segments(batch.segments), batch.positions)
