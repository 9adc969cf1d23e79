"""What fine-tuning adds to training: LoRA+'s two learning rates, and checkpoints without the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import training
from tests.models.small import FAMILIES, random_tokens, scanned, variables_of

RATIO = 16.0


def _adapted(config=FAMILIES["llama"], method="lora"):
    variables = jax.tree.map(jnp.asarray, variables_of(config))
    return getattr(lm.adapters, method)(rank=2).init(jax.random.key(0), variables)


@pytest.mark.parametrize(
    ("kind", "layers", "method"),
    [("sgd", "unrolled", "lora"), ("adamw", "scanned", "lora"), ("adamw", "unrolled", "dora")],
)
def test_lora_plus_is_two_optimizers_at_two_rates(kind, layers, method):
    config = FAMILIES["llama"] if layers == "unrolled" else scanned(FAMILIES["llama"])
    part = training.state.trainable_part(_adapted(config, method), (method,))
    described = training.OptimizerConfig(kind, weight_decay=0.1)
    schedule = training.make_schedule(training.ScheduleConfig("cosine", peak=0.1, warmup_steps=2), 10)
    ours = training.lora_plus(training.make_optimizer(described, schedule), RATIO)
    theirs = optax.partition(
        {
            "b": training.make_optimizer(described, lambda step: RATIO * schedule(step)),
            "rest": training.make_optimizer(described, schedule),
        },
        jax.tree_util.tree_map_with_path(lambda path, _: "b" if path[-1].key == "b" else "rest", part),
    )
    random = np.random.RandomState(0)
    results = []
    gradients = [jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), part) for _ in "123"]
    for optimizer in (ours, theirs):
        state, moved = optimizer.init(part), part
        for number, gradient in enumerate(gradients):
            updates, state = optimizer.update(gradient, state, moved, step=number)
            moved = optax.apply_updates(moved, updates)
        results.append(moved)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    plain = training.make_optimizer(described, schedule)
    first, _ = plain.update(gradients[0], plain.init(part), part, step=0)
    fast, _ = ours.update(gradients[0], ours.init(part), part, step=0)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(fast), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(a, b * (RATIO if path[-1].key == "b" else 1), rtol=1e-6)


def test_a_parameter_that_is_called_b_is_no_matrix_of_loras():
    optimizer = training.lora_plus(optax.sgd(1.0), 4.0)
    tree = {"params": {"b": jnp.ones(1)}, "lora": {"b": {"a": jnp.ones(1), "b": jnp.ones(1)}}}
    updates, _ = optimizer.update(tree, optimizer.init(tree))
    assert jax.tree.map(float, jax.tree.map(jnp.sum, updates)) == {
        "params": {"b": -1.0}, "lora": {"b": {"a": -1.0, "b": -4.0}}
    }  # fmt: skip


def test_a_ratio_must_be_positive():
    with pytest.raises(lm.UserError, match="ratio of LoRA"):
        training.lora_plus(optax.sgd(1.0), 0.0)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_a_checkpoint_of_a_part_restores_all_to_the_bit_and_does_not_hold_the_model(layers, tmp_path):
    config = FAMILIES["llama"] if layers == "unrolled" else scanned(FAMILIES["llama"])
    policy, variables = lm.Policy(config), _adapted(config)
    optimizer = training.lora_plus(training.make_optimizer(training.OptimizerConfig(), lambda step: 0.01))
    step = training.make_step(policy, lm.objectives.cross_entropy(), optimizer, trainable=("lora",))
    fresh = lambda: training.init_state(
        policy, optimizer, jax.random.key(0), variables=variables, trainable=("lora",)
    )
    batch = lm.batch.next_token_batch(random_tokens(2, 8))
    layout = dict(to_disk=lm.models.unstack_layers, from_disk=lm.models.stack_layers)
    state = fresh()
    with training.PartCheckpointer(tmp_path, collections=("lora",), **layout) as checkpointer:
        assert checkpointer.restore(fresh()) is None
        for number in (1, 2):
            state, _ = step(state, batch)
            checkpointer.save(number, state, {"place": number}, config={"a": 1})
    kinds = {name.split("/")[1] for name in training.read_metadata(tmp_path)["leaves"] if name.startswith("variables/")}
    assert kinds == {"lora"}
    checkpointer = training.PartCheckpointer(tmp_path, collections=("lora",), **layout)
    checkpointer.check(fresh())
    restored = checkpointer.restore(fresh())
    assert restored.data_state == {"place": 2} and restored.step == 2
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    other = training.init_state(
        policy, optimizer, jax.random.key(0), trainable=("lora",),
        variables=lm.adapters.lora(rank=3).init(jax.random.key(0), variables_of(config)),
    )  # fmt: skip
    with pytest.raises(lm.UserError, match="lora"):
        checkpointer.check(other)
