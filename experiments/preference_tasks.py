"""A small language in which the reward of every answer is known, and a model that speaks it with noise.

A prompt is four different letters and a question mark. An answer is letters. It is worth one for each different letter
of the prompt that it says, less one for each letter besides. A judge that is only nearly right counts a letter of the
prompt as often as it is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import lmjax as lm
from experiments.compare_preferences_config import ComparePreferencesConfig
from lmjax.batch import Batch, PairBatch
from lmjax.data.preferences import Answer, Pair, PairRows
from lmjax.evaluation import sequence_log_ratios
from lmjax.generation import answers_batch, best_and_worst, judged_samples
from lmjax.generation.judged import Judge

END, ASK, FIRST_LETTER, LETTERS, ASKED, LONGEST = 0, 1, 2, 10, 4, 10
FIRST_BELIEF = FIRST_LETTER + LETTERS
BELIEFS = (FIRST_BELIEF, FIRST_BELIEF + 1)
VOCABULARY = FIRST_BELIEF + len(BELIEFS)
LENGTH = ASKED + 2 + LONGEST  # of a prompt, a belief and an answer
ROW = 4 * LENGTH  # of pairs, as many as fit

Ids = Sequence[np.ndarray]


def questions(random: np.random.Generator, count: int) -> list[np.ndarray]:
    """Prompts."""
    return [np.append(FIRST_LETTER + random.permutation(LETTERS)[:ASKED], ASK).astype(np.int32) for _ in range(count)]


def spoken(random: np.random.Generator, prompts: Ids) -> list[np.ndarray]:
    """What the starting model learns to say: half of its letters were asked for, few are said again, then it ends."""
    answers = []
    for prompt in prompts:
        answer: list[int] = []
        while len(answer) < LONGEST - 1 and (not answer or random.random() > 0.25):
            asked = random.random() < 0.5
            letter = int(random.choice(prompt[:ASKED]) if asked else FIRST_LETTER + random.integers(LETTERS))
            if letter not in answer or random.random() > 0.9:
                answer.append(letter)
        answers.append(np.array([*answer, END], np.int32))
    return answers


def true_reward(prompts: Ids, answers: Ids) -> np.ndarray:
    """One for each different letter that was asked for, less one for each letter besides.

    >>> true_reward([np.array([2, 3, 4, 5, ASK])], [np.array([2, 3, 3, 9, END])]).tolist()
    [0.0]
    """
    return np.array([worth(prompt[:ASKED], answer) for prompt, answer in zip(prompts, answers, strict=True)])


def proxy_reward(prompts: Ids, answers: Ids) -> np.ndarray:
    """The same, but that a letter said again counts as if it were new.

    >>> proxy_reward([np.array([2, 3, 4, 5, ASK])], [np.array([2, 3, 3, 9, END])]).tolist()
    [2.0]
    """
    return np.array([worth(prompt[:ASKED], answer, 1.0) for prompt, answer in zip(prompts, answers, strict=True)])


def worth(wanted: np.ndarray, answer: np.ndarray, repeated: float = -1.0) -> float:
    """One for each different letter of some that are wanted, so much for each said again, less one for each other."""
    letters = [letter for letter in answer.tolist() if letter != END]
    hits = [letter for letter in letters if letter in wanted]
    new = len(set(hits))
    return new + repeated * (len(hits) - new) - (len(letters) - len(hits))


def supervised(
    policy: lm.Policy, config: ComparePreferencesConfig, examples: Callable[[np.random.Generator], Batch]
) -> tuple[Any, float]:
    """Variables of a policy that was taught examples, on the host, and its last loss."""
    steps = config.supervised_steps
    optimizer = optax.adamw(schedule(5e-3, steps), b2=0.99, weight_decay=0.01)
    state = lm.training.init_state(policy, optimizer, jax.random.key(config.seed))
    step = lm.training.make_step(policy, lm.objectives.cross_entropy(), optimizer, clip_norm=1.0)
    random = np.random.default_rng([config.seed, 0])
    for _ in range(steps):
        state, metrics = step(state, examples(random))
    return jax.device_get(state.variables), float(metrics["loss"])


def schedule(peak: float, steps: int) -> Any:
    """Up over the first tenth, down to nothing along a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 10, 1), max(steps, 2))


def small_policy() -> lm.Policy:
    """A decoder of two layers, 64 wide."""
    return lm.Policy(lm.models.small(VOCABULARY, num_layers=2, embed_dim=64, num_heads=4, max_length=64, init_std=0.1))


@dataclasses.dataclass(frozen=True)
class Language:
    """The model that all methods start from, and what is asked of it.

    Attributes:
      policy, variables: the model, which is the reference too.
      config: of the comparison.
    """

    policy: lm.Policy
    variables: Any
    config: ComparePreferencesConfig

    def samples(self, variables: Any, prompts: Ids, key: jax.Array, judge: Judge, count: int) -> Any:
        """So many judged answers to each prompt."""
        return judged_samples(
            self.policy,
            variables,
            prompts,
            key,
            judge,
            samples=count,
            max_new_tokens=LONGEST,
            eos=END,
            missing_eos_penalty=self.config.missing_eos_penalty,
        )

    def pairs(self, label: Sequence[int], count: int, judge: Judge = true_reward) -> list[Pair]:
        """Two samples of the starting model to each of `count` prompts, the better one first; ties are dropped."""
        random = np.random.default_rng([self.config.seed, *label])
        found: list[Pair] = []
        for first in range(0, count, 1024):
            prompts = questions(random, min(1024, count - first))
            key = jax.random.key(int(random.integers(2**31)))
            found += best_and_worst(self.samples(self.variables, prompts, key, judge, 2))
        return [dataclasses.replace(pair, margin=0.0) for pair in found]

    def measured(self, variables: Any, seed: int) -> dict[str, float]:
        """Fresh samples: their rewards, how far the policy is from where it started (nats an answer), their length."""
        random = np.random.default_rng([self.config.seed, 5, seed])
        prompts = questions(random, self.config.samples)
        found = self.samples(variables, prompts, jax.random.key(int(random.integers(2**31))), true_reward, 1)
        said = [answers[0] for answers in found.answers]
        missing = self.config.missing_eos_penalty * ~found.ended[:, 0]
        ratios = sequence_log_ratios(self.policy, variables, self.variables, [answers_batch(prompts, said, LENGTH)])
        return {
            "reward": float(found.scores.mean()),
            "proxy": float((proxy_reward(prompts, said) - missing).mean()),
            "kl": float(ratios.mean()),
            "length": float(np.mean([len(answer) for answer in said])),
            "ended": float(found.ended.mean()),
        }


def language(config: ComparePreferencesConfig, say: Callable[[str], None]) -> Language:
    """Trains the starting model."""
    policy = small_policy()

    def examples(random: np.random.Generator) -> Batch:
        prompts = questions(random, config.supervised_examples)
        return answers_batch(prompts, spoken(random, prompts), LENGTH)

    variables, loss = supervised(policy, config, examples)
    say(f"the model to start from: loss {loss:.4f} a token")
    return Language(policy, variables, config)


def pair_rows(pairs: Sequence[Pair]) -> PairBatch:
    """All pairs, packed into rows."""
    rows = PairRows(pairs, ROW)
    return rows.gather(np.arange(len(rows)))


def answer_rows(pairs: Sequence[Pair]) -> PairBatch:
    """The same answers one by one, liked or not, each beside a stranger's answer behind its own prompt (KTO)."""
    found = []
    for number, pair in enumerate(pairs):
        other = pairs[(number + 1) % len(pairs)]
        for own, strange, liked in ((pair.first, other.first, True), (pair.second, other.second, False)):
            prompt, answer = own.ids[~own.learned], strange.ids[strange.learned]
            ids = np.concatenate([prompt, answer])
            stranger = Answer(ids, np.arange(len(ids)) >= len(prompt))
            found.append(Pair(own, stranger, liked=liked))
    return pair_rows(found)


def chosen_rows(rows: Any, index: np.ndarray) -> Any:
    """Some rows of a batch."""
    return jax.tree.map(lambda leaf: leaf[index], rows)
