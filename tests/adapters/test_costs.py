"""What adapters save, read off the program: no gradient of a frozen weight, and no optimizer state for it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

import lmjax as lm
from lmjax import adapters
from lmjax.adapters.targets import leaves
from lmjax.batch import next_token_batch
from tests.laws.counting import equations, product_flops

# Widths that no two kernels share, and none the batch.
POLICY = lm.Policy(
    lm.models.llama(
        vocab_size=50, num_layers=2, embed_dim=48, num_heads=4, num_kv_heads=2, mlp_dim=80, layers="unrolled"
    )
)
BATCH = next_token_batch(np.ones((32, 9), np.int32))
METHODS = {
    "full": lambda: None,
    "lora": lambda: adapters.lora(1),
    "dora": lambda: adapters.dora(1),
    "ia3": lambda: adapters.ia3(),
    "prefix": lambda: adapters.prefix(POLICY, 3),
    "prompt": lambda: adapters.prompt(POLICY, 3),
    "bottleneck": lambda: adapters.houlsby(reduction=48),
}


def _step(method: str) -> Any:
    made, variables = METHODS[method](), POLICY.init(jax.random.key(0))
    trainable = ("params",) if made is None else made.trainable
    variables = variables if made is None else made.init(jax.random.key(1), variables)
    state = lm.training.new_state(variables, optax.adam(1e-3), jax.random.key(0), trainable=trainable)
    step = lm.training.make_step(POLICY, lm.objectives.cross_entropy(), optax.adam(1e-3), trainable=trainable)
    return jax.make_jaxpr(lambda state: step(state, BATCH))(state), state, variables


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_the_gradient_of_a_frozen_weight_is_never_computed(method):
    jaxpr, _, variables = _step(method)
    frozen = {tuple(leaf.shape) for path, leaf in leaves(variables["params"]) if leaf.ndim == 2}
    frozen |= {shape[::-1] for shape in frozen}
    assert not frozen & _sums_over_tokens(jaxpr)
    assert len(frozen & _sums_over_tokens(_step("full")[0])) >= 5  # the check sees them where they are


def _sums_over_tokens(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of the products that sum over all tokens, as gradients of weights do."""
    tokens = BATCH.tokens.size
    found = set()
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            if [equation.invars[0].aval.shape[axis] for axis in contracted] == [tokens]:
                found.add(equation.outvars[0].aval.shape)
    return found


def test_a_step_of_lora_takes_two_thirds_of_the_products():
    """Forward, and back through the activations: 4 products a weight in place of 6, and the thin ones."""
    full, lora = (product_flops(_step(method)[0]) for method in ("full", "lora"))
    assert lora <= (2 / 3 + 0.05) * full


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_the_optimizer_keeps_state_for_the_adapter_only(method):
    _, state, variables = _step(method)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * adapters.count(variables)


def test_rank_16_takes_two_percent_of_a_models_optimizer_state():
    policy = lm.Policy(lm.models.preset("qwen2.5-0.5b"))

    def sizes(key: jax.Array) -> Any:
        variables = adapters.lora(16).init(key, policy.init(key))
        return variables["params"], adapters.adapters_of(variables)

    params, own = jax.eval_shape(sizes, jax.random.key(0))
    assert adapters.count(own) <= 0.02 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_sums_of_weight_and_update_are_not_kept_for_the_backward_pass():
    """They would be a second copy of the model. Of eight layers, a LoRA step holds little more than an IA3 step."""
    policy = lm.Policy(
        lm.models.llama(50, num_layers=8, embed_dim=256, num_heads=4, mlp_dim=512, layers="unrolled", max_length=32)
    )

    def temporary(method: Any) -> int:
        variables = jax.eval_shape(lambda key: method.init(key, policy.init(key)), jax.random.key(0))
        state = jax.eval_shape(
            lambda v: lm.training.new_state(v, optax.sgd(0.1), jax.random.key(0), trainable=method.trainable), variables
        )
        step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optax.sgd(0.1), trainable=method.trainable)
        compiled = step.lower(state, next_token_batch(np.ones((8, 33), np.int32))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    weights = 8 * (4 * 256 * 256 + 3 * 256 * 512) * 4
    assert temporary(adapters.lora(2)) - temporary(adapters.ia3()) < weights / 4
