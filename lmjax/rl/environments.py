"""Episodes in turns: a policy speaks, an environment answers, until one of them ends it.

An environment is plain Python with two methods. What it says is read by the policy and never learned: rollouts mark the
policy's own tokens (`Rollout.own`). Ids are never made again of text: what was drawn is what is learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lmjax.data.prompts import Prompt
from lmjax.errors import UserError
from lmjax.generation.decoding import check_prompts
from lmjax.generation.sampler import generate, stream
from lmjax.models.decoder import Variables
from lmjax.policy import Policy
from lmjax.rl.arithmetic import evaluate
from lmjax.rl.rewards import FAILED, FAILURE
from lmjax.rl.rollouts import Rollout
from lmjax.rl.verifiers import read_number, text_ends
from lmjax.tokenizers.base import Tokenizer

TURNS, CALLS = "turn_rewards", "tool_calls"  # in the record of an episode, as FAILURE is
LOOK = 16  # tokens from one look for stop strings to the next


class Environment(Protocol):
    """The other side of an episode. One that is a tool may count in `calls` and `failures` how often it was called, and
    how often in vain (`episode_metrics`)."""

    def reset(self, record: Mapping[str, Any], seed: int) -> str:
        """Begins an episode about a prompt's record; what it says first, behind the prompt, or nothing."""

    def step(self, text: str) -> tuple[str, float, bool]:
        """Takes what the policy said; gives what it says to that, a reward, and whether the episode is over."""


@dataclasses.dataclass
class _Episode:
    prompt: Prompt
    group: int
    environment: Any = None
    ids: list[int] = dataclasses.field(default_factory=list)
    own: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling: list[float] = dataclasses.field(default_factory=list)
    rewards: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    finish: str = ""
    failure: str = ""

    def listen(self, said: str, encode: Callable[[str], Any], limit: int) -> bool:
        """Takes in what the environment says, if there is room for it."""
        ids = [int(token) for token in encode(said)] if said else []
        room = len(self.ids) + len(ids) <= limit
        if room:
            self._hear(ids)
        return room

    def _hear(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.own += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.sampling += [0.0] * len(ids)

    def fail(self, error: Exception) -> None:
        self.finish, self.failure = FAILED, f"{type(error).__name__}: {error}"


def play(
    policy: Policy,
    variables: Variables,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    make: Callable[[], Environment],
    key: jax.Array,
    *,
    samples: int,
    turns: int,
    max_new_tokens: int,
    max_turn_tokens: int,
    ends: int | Sequence[int] = (),
    stop: Sequence[str] = (),
    temperature: float = 1.0,
    encode: Callable[[str], Sequence[int]] | None = None,
    first_group: int = 0,
    version: int = 0,
    **options: Any,
) -> list[Rollout]:
    """Plays `samples` episodes about each prompt.

    Args:
      policy, variables, tokenizer: the model.
      prompts: what episodes begin with.
      make: gives a fresh environment.
      key: seeds sampling and environments.
      samples: episodes of a prompt.
      turns: of the policy, at the most.
      max_new_tokens: of a whole episode behind its prompt, the environment's included.
      max_turn_tokens: of a turn.
      ends: the id or ids that end a turn; the environment does not see them.
      stop: texts that end a turn too. The token that completes one is the turn's last, and the environment sees it.
      temperature: divides the logits.
      encode: what an environment says, as ids; the tokenizer's if None. A chat template's turns go here.
      first_group, version, options: as in `roll_out`.

    Returns:
      Rollouts whose record holds "turn_rewards" besides, [(end of the turn, reward)], for `turn_rewards`; `finish` is
      "done", "turns", "length" or "failed" (an environment raised; see "environment_failure" in the record).

    Raises:
      UserError: nothing ends a turn but its length, numbers below 1, or episodes longer than the model's positions.
    """
    if turns < 1 or max_turn_tokens < 1:
        raise UserError(f"turns is {turns} and max_turn_tokens {max_turn_tokens}; give at least 1 of each.")
    stops = {ends} if isinstance(ends, int) else set(ends)
    if not stop and not stops:
        raise UserError("nothing ends a turn; give the ids that do as ends, or texts as stop.")
    if "" in stop:
        raise UserError("a stop string is empty, which would end every turn at once; leave it out.")
    check_prompts(policy, [prompt.ids for prompt in prompts], max_new_tokens - 1 + max_turn_tokens)
    encoded: Callable[[str], Any] = tokenizer.encode if encode is None else encode
    random = np.random.default_rng(np.ravel(jax.random.key_data(key)).tolist())
    seeds = random.integers(2**31, size=len(prompts) * samples)
    episodes = [_Episode(prompt, first_group + n) for n, prompt in enumerate(prompts) for _ in range(samples)]
    for episode, seed in zip(episodes, seeds):
        try:
            episode.environment = make()
            said = episode.environment.reset(episode.prompt.record, int(seed))
            if not episode.listen(said, encoded, max_new_tokens - 1):
                raise ValueError(f"what it says first leaves no room among {max_new_tokens} tokens")
        except Exception as error:
            episode.fail(error)
    for turn in range(turns):
        for episode in episodes:
            if not episode.finish and len(episode.ids) >= max_new_tokens:
                episode.finish = "length"
        if all(episode.finish for episode in episodes):
            break
        # Episodes that are over stay as rows of one token, so that nothing is compiled anew for those that go on.
        room = [1 if e.finish else min(max_turn_tokens, max_new_tokens - len(e.ids)) for e in episodes]
        asked = [e.prompt.ids[:1] if e.finish else np.concatenate([e.prompt.ids, e.ids]).astype(int) for e in episodes]
        found = _speak(
            policy, variables, asked, jax.random.fold_in(key, turn), stop, tokenizer, max_new_tokens=room,
            room=max_turn_tokens, temperature=temperature, eos=sorted(stops), **options,
        )  # fmt: skip
        for n, episode in enumerate(episodes):
            if not episode.finish:
                _take_turn(episode, found, n, stops, stop, tokenizer, encoded, max_new_tokens)
    return [_rollout(episode, version) for episode in episodes]


def _speak(
    policy: Policy, variables: Variables, asked: Sequence[Any], key: jax.Array, stop: Sequence[str],
    tokenizer: Tokenizer, **options: Any,
) -> Any:  # fmt: skip
    """A turn of all rows. It may go on behind a stop string, for what was drawn before does not depend on it."""
    if not stop:
        return jax.device_get(generate(policy, variables, asked, key, **options))
    looks = stream(policy, variables, asked, key, every=LOOK, **options)
    found = next(looks)
    while True:
        said = [found.tokens[n, :length].tolist() for n, length in enumerate(found.lengths)]
        over = np.array([_stopped(tokens, stop, tokenizer) is not None for tokens in said])
        try:
            found = looks.send(over)
        except StopIteration:
            return found


def _stopped(tokens: Sequence[int], stop: Sequence[str], tokenizer: Tokenizer) -> int | None:
    """The index of the token that completes a stop string first; None where there is none."""
    found = [ends[0] for text in stop if (ends := text_ends(tokens, text, tokenizer))]
    return min(found, default=None)


def _take_turn(
    episode: _Episode, found: Any, n: int, ends: set[int], stop: Sequence[str], tokenizer: Tokenizer, encoded: Any,
    limit: int,
) -> None:  # fmt: skip
    tokens = found.tokens[n, : int(found.lengths[n])].tolist()
    words = tokens[:-1] if tokens[-1] in ends else tokens
    last = _stopped(words, stop, tokenizer)
    if last is not None:
        tokens = words = words[: last + 1]
    length = len(tokens)
    episode.ids += tokens
    episode.own += [True] * length
    episode.logprobs += found.logprobs[n, :length].tolist()
    episode.sampling += found.sampling_logprobs[n, :length].tolist()
    text = tokenizer.decode(words)
    episode.texts.append(text)
    try:
        said, reward, done = episode.environment.step(text)
        episode.rewards.append((len(episode.ids) - 1, float(reward)))
        if done:
            episode.finish = "done"
        elif not episode.listen(said, encoded, limit):
            episode.finish = "length"
    except Exception as error:
        episode.fail(error)


def _rollout(episode: _Episode, version: int) -> Rollout:
    # What the environment said last is of no use to a policy that says nothing more.
    last = max((i for i, own in enumerate(episode.own) if own), default=-1) + 1
    record = dict(episode.prompt.record) | {TURNS: episode.rewards}
    calls, failures = (getattr(episode.environment, name, None) for name in ("calls", "failures"))
    if isinstance(calls, int) and isinstance(failures, int):
        record[CALLS] = [calls, failures]
    if episode.failure:
        record[FAILURE] = episode.failure
    return Rollout(
        prompt=np.asarray(episode.prompt.ids, np.int32),
        tokens=np.array(episode.ids[:last], np.int32),
        group=episode.group,
        logprobs=np.array(episode.logprobs[:last], np.float32),
        sampling_logprobs=np.array(episode.sampling[:last], np.float32),
        finish=episode.finish or "turns",
        own=np.array(episode.own[:last], bool),
        prompt_text=episode.prompt.text,
        text="\n".join(episode.texts),
        record=record,
        version=version,
        number=episode.prompt.number,
    )


def turn_rewards(rollout: Rollout) -> list[tuple[int, float]]:
    """The rewards of an episode's turns, for a `Reward`; raises what its environment raised."""
    if FAILURE in rollout.record:
        raise RuntimeError(str(rollout.record[FAILURE]))
    return [(int(end), float(reward)) for end, reward in rollout.record[TURNS]]


def episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What came of episodes, by the names of verl and TRL; nothing where there are none.

    Returns:
      "num_turns/mean", "/min" and "/max" of the turns that environments took; "environment/failed_ratio", the share of
      episodes whose environment raised; and of tools "tools/call_frequency", calls of an episode, and
      "tools/failure_frequency", the share of calls in vain.
    """
    episodes = [rollout for rollout in rollouts if TURNS in rollout.record]
    if not episodes:
        return {}
    turns = [len(rollout.record[TURNS]) for rollout in episodes]
    found = {
        "num_turns/mean": float(np.mean(turns)),
        "num_turns/min": float(min(turns)),
        "num_turns/max": float(max(turns)),
        "environment/failed_ratio": float(np.mean([rollout.finish == FAILED for rollout in episodes])),
    }
    counted = [rollout.record[CALLS] for rollout in episodes if CALLS in rollout.record]
    if counted:
        calls, failures = np.sum(counted, axis=0).tolist()
        found |= {"tools/call_frequency": calls / len(counted), "tools/failure_frequency": failures / max(calls, 1)}
    return found


class GuessNumber:
    """A number from 1 to `record["most"]` is to be guessed; answers are "higher" and "lower".

    Bisection needs log2 of it turns at the most. The reward is 1 for the right guess and 0 for others.

    >>> game = GuessNumber()
    >>> _ = game.reset({"most": 1}, seed=0)
    >>> game.step("1"), game.step("what?")
    (('right', 1.0, True), ('?', 0.0, False))
    """

    def reset(self, record: Mapping[str, Any], seed: int) -> str:
        self.number = int(np.random.default_rng(seed).integers(1, int(record["most"]) + 1))
        return ""

    def step(self, text: str) -> tuple[str, float, bool]:
        said = text.strip()
        if not (said.isascii() and said.isdigit() and len(said) < 20):  # longer ones Python refuses to read
            return "?", 0.0, False
        guess = int(said)
        if guess == self.number:
            return "right", 1.0, True
        return ("higher" if guess < self.number else "lower"), 0.0, False


class Calculator:
    """A tool: what stands between "<<" and ">>" is worked out; anything else is the answer, and ends the episode.

    The answer is right (1) if it is the number in `record["answer"]`.

    >>> tool = Calculator()
    >>> _ = tool.reset({"answer": 6}, seed=0)
    >>> tool.step("<<2*3>>"), tool.step("6")
    (('6', 0.0, False), ('', 1.0, True))
    """

    def reset(self, record: Mapping[str, Any], seed: int) -> str:
        self.answer = read_number(record["answer"])
        if self.answer is None:
            raise ValueError(f"the answer {record['answer']!r} is no number")
        self.calls = self.failures = 0
        return ""

    def step(self, text: str) -> tuple[str, float, bool]:
        if "<<" in text and ">>" in text:
            value = evaluate(text.partition("<<")[2].partition(">>")[0])
            self.calls, self.failures = self.calls + 1, self.failures + (value is None)
            return ("error" if value is None else str(value)), 0.0, False
        return "", float(read_number(text) == self.answer), True
