"""From records with a chosen and a rejected answer, or a liked or disliked one, to batches of pairs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lmjax.batch import PairBatch
from lmjax.data.instructions import Conversation, conversation, messages_of
from lmjax.data.loader import BatchIterator, BatchPlan
from lmjax.data.packing import Shuffled, best_fit
from lmjax.data.preference_config import PreferenceConfig
from lmjax.data.records import Record, read_records
from lmjax.data.supervised import encode, open_template, prompt_hash
from lmjax.data.templates import ChatTemplate
from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer, digest


class Answer(NamedTuple):
    """A prompt and an answer.

    Attributes:
      ids: int32 [n].
      learned: bool [n], the tokens of the answer.
    """

    ids: np.ndarray
    learned: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a prompt; or an answer, and behind the same prompt the answer to another one.

    Attributes:
      first, second: the chosen and the rejected one; or the answer and the stranger's.
      margin: by how much the first is better; 0 where nobody says.
      liked: whether the first is liked, where that is what is known.
    """

    first: Answer
    second: Answer
    margin: float = 0.0
    liked: bool | None = None

    @property
    def shared(self) -> int:
        """How many tokens of the prompt can be a segment of their own that both see: all but the last, if there are."""
        (first, learned), (second, also_learned) = self.first, self.second
        n = min(len(first), len(second))
        differ = (first[:n] != second[:n]) | learned[:n] | also_learned[:n]
        return max(int(np.argmax(differ)) if differ.any() else n, 1) - 1

    def length(self, shared: bool = False) -> int:
        """Tokens of a row that it takes, its prompt once if that is shared."""
        return len(self.first.ids) + len(self.second.ids) - (self.shared if shared else 0)


class Judged(NamedTuple):
    """A record as conversations.

    Attributes:
      first: with the chosen answer, or the only one.
      second: with the rejected answer, or None.
      margin, liked: as in `Pair`.
    """

    first: Conversation
    second: Conversation | None
    margin: float
    liked: bool | None


def judged(record: Record, config: PreferenceConfig) -> Judged:
    """What a record says.

    Raises:
      UserError: fields are missing or are not what they should be.

    >>> record = Record("line 1", {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"})
    >>> found = judged(record, PreferenceConfig())
    >>> [message["content"] for message in found.second.messages]
    ['1 + 1 =', '3']
    """
    where, fields = record
    if kind_of(record, config) == "answers":
        liked = fields.get(config.label_field)
        if not isinstance(liked, bool | int) or liked not in (0, 1):
            raise UserError(f"{where}: the field {config.label_field!r} is {liked!r}; give true or false")
        return Judged(conversation(record, config), None, 0.0, bool(liked))
    for name in (config.chosen_field, config.rejected_field):
        if fields.get(name) is None:
            raise UserError(f"{where} has no field {name!r} (it has: {', '.join(fields)}): name it in data")
    margin = fields.get(config.margin_field) if config.margin_field else 0.0
    if not isinstance(margin, int | float):
        raise UserError(f"{where} has no number in {config.margin_field!r}: set data.margin_field to another")
    first, second = (_with_answer(record, config, name) for name in (config.chosen_field, config.rejected_field))
    return Judged(first, second, float(margin), None)


def kind_of(record: Record, config: PreferenceConfig) -> str:
    """Whether a record is one of "pairs" or of "answers"."""
    if config.kind != "auto":
        return config.kind
    return "answers" if config.label_field in record.fields and config.chosen_field not in record.fields else "pairs"


def _with_answer(record: Record, config: PreferenceConfig, name: str) -> Conversation:
    """The conversation that ends with the answer in a field."""
    where, fields = record
    if fields.get(config.prompt_field) is None and isinstance(fields[name], list):
        first, second = (messages_of(fields[n], where, n) for n in (config.chosen_field, config.rejected_field))
        shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
        if not shared:
            raise UserError(f"{where}: its two conversations do not share a prompt; give the prompt, or mend them")
        whole = messages_of(fields[name], where, name)
        record = Record(where, fields | {config.prompt_field: whole[:shared], name: whole[shared:]})
    return conversation(record, dataclasses.replace(config, completion_field=name, output_field=name))


EQUAL, LONG_PROMPT, EMPTY = "equal answers", "a prompt as long as the limit", "an empty answer"


class PairEncoder:
    """Tokenizes what was judged, and counts what is left out.

    Args:
      config, tokenizer, template: how it is written.

    Attributes:
      left_out: reason -> how many.
      cut: how many answers were cut.
    """

    def __init__(self, config: PreferenceConfig, tokenizer: Tokenizer, template: ChatTemplate):
        self._config, self._tokenizer, self._template = config, tokenizer, template
        self.left_out: Counter[str] = Counter()
        self.cut = 0

    def answer(self, talk: Conversation) -> Answer | str:
        """The tokens of a conversation, or why it is left out."""
        completion = talk.messages[talk.start :]
        if not any(str(message.get("content") or "").strip() for message in completion):
            return EMPTY
        ids, learned = encode(
            talk, self._tokenizer, self._template, "completion", self._config.document_markers
        )
        longest = self._config.max_length
        if not learned[:longest].any():
            return LONG_PROMPT
        self.cut += len(ids) > longest
        return Answer(ids[:longest], learned[:longest])

    def pairs(self, found: Sequence[Judged]) -> list[Pair]:
        """The pairs of records that have two answers."""
        kept = []
        for record in found:
            assert record.second is not None
            first, second = self.answer(record.first), self.answer(record.second)
            if isinstance(first, str) or isinstance(second, str):
                self.left_out[first if isinstance(first, str) else str(second)] += 1
            elif np.array_equal(first.ids, second.ids):
                self.left_out[EQUAL] += 1
            else:
                kept.append(Pair(first, second, record.margin))
        return kept

    def answers(self, found: Sequence[Judged]) -> list[Pair]:
        """Answers that are liked or not, each with the next one's words behind its own prompt (for KTO's KL)."""
        kept = []
        known = []
        for record in found:
            own = self.answer(record.first)
            if isinstance(own, str):
                self.left_out[own] += 1
            else:
                known.append((record, own))
        for number, (record, own) in enumerate(known):
            following = (known[(number + step) % len(known)][0].first for step in range(1, len(known)))
            other = next((talk for talk in following if talk.prompt != record.first.prompt), None)
            if other is None:
                raise UserError("all answers are to one prompt, so none can be set behind another; give more prompts")
            words = [*record.first.prompt, *other.messages[other.start :]]
            stranger = self.answer(record.first._replace(messages=words))
            if isinstance(stranger, str):
                self.left_out[stranger] += 1
            else:
                kept.append(Pair(own, stranger, liked=record.liked))
        return kept


class PairRows(Shuffled):
    """Rows that hold as many whole pairs as fit, best fit first.

    Args:
      pairs: none longer than a row.
      sequence_length: T.
      reference_logprobs: float32 [rows, T], computed beforehand, or None.
      shared: prompts are computed once for both answers.
      score_prompts: terms may learn prompts too; else the vocabulary's pass leaves them out.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        sequence_length: int,
        reference_logprobs: np.ndarray | None = None,
        shared: bool = False,
        score_prompts: bool = False,
    ):
        self.sequence_length = sequence_length
        self._pairs, self._reference, self._shared = pairs, reference_logprobs, shared
        lengths = np.array([pair.length(shared) for pair in pairs], np.int64)
        self._order, self._starts = best_fit(lengths, sequence_length)
        self.pairs_per_row = int(np.diff(self._starts).max(initial=1))
        self.scored = None
        if not score_prompts:  # few enough columns to leave the others out, and as many for every batch
            answers = np.array([sum(int(a.learned.sum()) for a in (p.first, p.second)) for p in pairs], np.int64)
            most = np.add.reduceat(answers[self._order], self._starts[:-1]).max(initial=1) if len(pairs) else 1
            self.scored = min(-(-int(most) // 16) * 16, sequence_length)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def gather(self, index: np.ndarray) -> PairBatch:
        index = np.asarray(index, np.int64)
        members = [self._order[self._starts[row] : self._starts[row + 1]] for row in index]
        batch = pair_batch(
            [[self._pairs[pair] for pair in row] for row in members],
            self.sequence_length,
            self.pairs_per_row,
            shared=self._shared,
            scored=self.scored,
        )
        return batch if self._reference is None else dataclasses.replace(
            batch, reference_logprobs=np.asarray(self._reference[index], np.float32)
        )


def pair_batch(
    rows: Sequence[Sequence[Pair]],
    sequence_length: int,
    pairs_per_row: int | None = None,
    *,
    shared: bool = False,
    scored: int | None = None,
) -> PairBatch:
    """Rows of pairs as arrays. See `PairBatch`.

    Args:
      rows: the pairs of each row.
      sequence_length: T.
      pairs_per_row: P; as many as the fullest row has if None.
      shared: prompts are computed once for both answers.
      scored: S, columns for the tokens of answers, so that the vocabulary's pass leaves out all others; None: it
        does not.

    Raises:
      UserError: a row is longer than T.

    >>> answer = lambda *ids: Answer(np.array([7, *ids]), np.array([False] + [True] * len(ids)))
    >>> batch = pair_batch([[Pair(answer(1, 2), answer(3))]], sequence_length=6)
    >>> batch.tokens.tolist(), batch.segments.tolist(), batch.mask.tolist()
    ([[7, 1, 2, 7, 3, 0]], [[1, 1, 1, 2, 2, 0]], [[1.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    """
    B, P = len(rows), pairs_per_row or max(map(len, rows))
    tokens, targets, segments, positions, seen = np.zeros((5, B, sequence_length), np.int32)
    mask = np.zeros((B, sequence_length), np.float32)
    weights, margins, desirable = np.zeros((3, B, P), np.float32)
    everything = [pair for row in rows for pair in row]
    for b, row in enumerate(rows):
        start = 0
        for p, pair in enumerate(row):
            weights[b, p], margins[b, p], desirable[b, p] = 1, pair.margin, pair.liked or 0
            s = pair.shared if shared else 0
            if (end := start + pair.length(shared)) > sequence_length:
                raise UserError(f"a row of {end} tokens does not fit {sequence_length}; give it fewer pairs")
            at = slice(start, start + s)
            tokens[b, at], targets[b, at] = pair.first.ids[:s], pair.first.ids[1 : s + 1]
            segments[b, at], positions[b, at] = 2 * P + 2 * p + 1, np.arange(s)
            start += s
            for side, (ids, learned) in enumerate((pair.first, pair.second)):
                stop = start + len(ids) - s
                at, before = slice(start, stop), slice(start, stop - 1)
                tokens[b, at], segments[b, at], positions[b, at] = ids[s:], 2 * p + side + 1, np.arange(s, len(ids))
                targets[b, before], mask[b, before] = ids[s + 1 :], learned[s + 1 :]
                seen[b, at] = 2 * P + 2 * p + 1 if s else 0
                start = stop
    return PairBatch(
        tokens,
        targets,
        mask,
        segments,
        positions,
        shared=seen if shared else None,
        scored=None if scored is None else columns(mask, scored),
        pairs=weights,
        margins=margins if any(pair.margin for pair in everything) else None,
        desirable=desirable if any(pair.liked is not None for pair in everything) else None,
    )


def columns(mask: np.ndarray, count: int) -> np.ndarray:
    """int32 [B, S], the columns of each row with a mask, then T.

    Raises:
      UserError: a row has more than S.

    >>> columns(np.array([[0, 1, 0, 1], [1, 0, 0, 0]]), 2).tolist()
    [[1, 3], [0, 4]]
    """
    found = np.full((len(mask), count), mask.shape[1], np.int32)
    for b, row in enumerate(mask):
        where = np.flatnonzero(row)
        if len(where) > count:
            raise UserError(f"a row has {len(where)} tokens to score and columns for {count}; give more.")
        found[b, : len(where)] = where
    return found


class PreferenceData:
    """Preferences as batches. From `load_preferences`.

    Attributes:
      config, tokenizer, template: what it was made with.
      pairs, held_out_pairs: the tokenized pairs.
      held_out: the held-out records, to be answered.
      kind: "pairs" or "answers".
      left_out: reason -> how many records were left out.
      cut: answers that were cut to length.
    """

    def __init__(
        self,
        config: PreferenceConfig,
        batch_size: int,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        train: Sequence[Judged],
        held_out: Sequence[Judged],
        kind: str,
    ):
        self.config, self.batch_size, self.tokenizer, self.template = config, batch_size, tokenizer, template
        encoder = PairEncoder(config, tokenizer, template)
        make = encoder.pairs if kind == "pairs" else encoder.answers
        self.pairs, self.held_out_pairs = make(train), make(held_out) if held_out else []
        self.held_out, self.kind = held_out, kind
        self.left_out, self.cut = encoder.left_out, encoder.cut
        if not self.pairs:
            reasons = ", ".join(f"{count} with {reason}" for reason, count in self.left_out.items())
            raise UserError(f"no pair is left to learn from ({reasons or 'there are none'}): give other records")
        if kind == "answers" and len({pair.liked for pair in self.pairs}) < 2:
            what = "liked" if self.pairs[0].liked else "disliked"
            raise UserError(f"all answers are {what}, and KTO needs both kinds: add some of the other")
        if config.validation_fraction > 0 and not config.validation_path and not self.held_out_pairs:
            raise UserError("no pair was held out: raise data.validation_fraction, or set it to 0 to go without")
        self.fingerprint = digest(
            [[digest(a.ids.tobytes() + a.learned.tobytes()) for a in (p.first, p.second)] for p in self.pairs]
            + [config.row_length, config.seed, config.shared_prompts]
        )
        self._reference: np.ndarray | None = None

    def rows(self) -> PairRows:
        """The training rows."""
        config = self.config
        return PairRows(self.pairs, config.row_length, self._reference, config.shared_prompts, config.score_prompts)

    def with_reference(self, logprobs: np.ndarray) -> None:
        """Has batches carry these log-probabilities of the reference, float32 [rows, T] in the order of `rows`."""
        if logprobs.shape != (len(self.rows()), self.config.row_length):
            raise UserError(f"reference log-probabilities {logprobs.shape} are not of this data; compute them again")
        self._reference = logprobs

    def train(self) -> BatchIterator:
        """A new endless iterator of training batches, from the beginning; `set_state` moves it."""
        plan = BatchPlan([self.rows()], self.batch_size, None, self.config.seed)
        return BatchIterator(plan, self.fingerprint, self.config.prefetch)

    def validation(self, batch_size: int | None = None) -> list[PairBatch]:
        """The held-out pairs in batches of one shape; rows that are missing at the end hold no pairs."""
        if not self.held_out_pairs:
            return []
        config, size = self.config, batch_size or self.batch_size
        rows = PairRows(self.held_out_pairs, config.row_length, None, config.shared_prompts, config.score_prompts)
        found = []
        for first in range(0, len(rows), size):
            batch = rows.gather(np.arange(first, min(first + size, len(rows))))
            found.append(_padded(batch, size))
        return found

    def report(self) -> str:
        """What there is to learn from, in lines."""
        what = "pairs" if self.kind == "pairs" else "answers"
        text = f"{len(self.pairs):,} {what} in {len(self.rows()):,} rows; {len(self.held_out_pairs):,} held out"
        lines = [text] + [f"left out: {count:,} with {reason}" for reason, count in self.left_out.items()]
        if self.cut:
            lines.append(f"cut to {self.config.max_length} tokens with their prompt: {self.cut:,} answers")
        return "\n".join(lines)


def _padded(batch: PairBatch, rows: int) -> PairBatch:
    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.zeros((rows - len(leaf), *leaf.shape[1:]), leaf.dtype)])

    return jax.tree.map(pad, batch)


def load_preferences(
    config: PreferenceConfig, batch_size: int, tokenizer: Tokenizer, *, template: ChatTemplate | None = None
) -> PreferenceData:
    """Reads and tokenizes preferences; they are held in memory.

    Args:
      config: what to read and how.
      batch_size: rows of a batch; a row holds as many pairs as fit.
      tokenizer: of the model.
      template: how conversations are written; None: the one that the config names.

    Raises:
      UserError: nothing to read, a malformed record, a tokenizer without an end-of-text marker where the template
        needs one, no pair that fits, or answers that are all liked, or none.
    """
    written = open_template(config.template, tokenizer) if template is None else template
    if config.template == "none" and config.document_markers and tokenizer.eos is None:
        raise UserError(
            "the tokenizer has no end-of-text marker, so answers would have no end to learn: choose a chat template, "
            "or set data.document_markers to False"
        )
    records = list(read_records(config.path))
    if not records:
        raise UserError(f"{config.path} holds no records: give it at least one")
    kind = kind_of(records[0], config)
    config = dataclasses.replace(config, kind=kind)
    train: list[Judged] = []
    held_out: list[Judged] = []
    for record in records:
        found = judged(record, config)
        hidden = not config.validation_path and prompt_hash(found.first.prompt) < config.validation_fraction
        (held_out if hidden else train).append(found)
    if config.validation_path:
        held_out = [judged(record, config) for record in read_records(config.validation_path)]
    return PreferenceData(config, batch_size, tokenizer, written, train, held_out, kind)
