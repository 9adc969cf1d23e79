"""A policy's own continuations as a batch: what is kept of the text, and that the rest is the policy's."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax import UserError
from lmjax.generation import continued_batch, generate
from tests.models.small import FAMILIES, variables_of

CONFIG = FAMILIES["gpt2"]
POLICY, VARIABLES = lm.Policy(CONFIG), variables_of(CONFIG)
IDS = np.random.default_rng(0).integers(1, 19, (3, 13))
SEGMENTS = np.array([[1] * 13, [1] * 2 + [2] * 11, [1] * 3 + [2] * 4 + [0] * 6])
BATCH = lm.batch.next_token_batch(IDS, SEGMENTS)
STARTS, LENGTHS = (0, 2, 3), (5, 5, 3)  # the third row's longest document has 4 tokens, of which one is left to say


def test_a_row_is_the_beginning_of_its_longest_document_and_then_the_policys_own():
    key = jax.random.key(1)
    found = continued_batch(POLICY, VARIABLES, BATCH, key, prompt_tokens=5, eos=7, temperature=2.0)
    prompts = [IDS[b, STARTS[b] : STARTS[b] + LENGTHS[b]] for b in range(3)]
    said = generate(POLICY, VARIABLES, prompts, key, max_new_tokens=7, eos=7, temperature=2.0)
    assert found.tokens.shape == BATCH.tokens.shape
    for b, prompt in enumerate(prompts):
        whole = np.concatenate([prompt, said.tokens[b, : said.lengths[b]]])
        end = len(whole) - 1
        np.testing.assert_array_equal(found.tokens[b, : end + 1], whole[: found.tokens.shape[1]])
        np.testing.assert_array_equal(found.targets[b, :end], whole[1:])
        assert found.mask[b].tolist() == [0.0] * (len(prompt) - 1) + [1.0] * int(said.lengths[b]) + [0.0] * (12 - end)
        assert set(found.segments[b, : end + 1]) == {1} and not found.segments[b, end + 1 :].any()


def test_its_log_probabilities_are_those_it_was_sampled_with():
    found = continued_batch(POLICY, VARIABLES, BATCH, jax.random.key(2), prompt_tokens=4)
    prompts = [IDS[b, STARTS[b] : STARTS[b] + min(LENGTHS[b], 4)] for b in range(3)]
    said = generate(POLICY, VARIABLES, prompts, jax.random.key(2), max_new_tokens=8)
    logprobs = np.asarray(POLICY(VARIABLES, found).logprobs)
    for b in range(3):
        np.testing.assert_allclose(logprobs[b][found.mask[b] > 0], said.logprobs[b], atol=1e-5)


@pytest.mark.parametrize("prompt_tokens", [0, 12])
def test_prompts_that_leave_no_room(prompt_tokens):
    with pytest.raises(UserError, match=f"prompt_tokens is {prompt_tokens}; rows of 12 tokens have room for 1 to 11"):
        continued_batch(POLICY, VARIABLES, BATCH, jax.random.key(0), prompt_tokens=prompt_tokens)
