"""From a `SupervisedConfig` to batches: conversations written by a chat template, with a mask of what is learned."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np

from lmjax.batch import Batch
from lmjax.data.buckets import BucketRows
from lmjax.data.chat_turns import Message, Piece
from lmjax.data.instructions import Conversation, conversation
from lmjax.data.loader import BatchIterator, BatchPlan
from lmjax.data.order import mixing_rates
from lmjax.data.packing import PackedRows, Rows
from lmjax.data.records import read_records
from lmjax.data.supervised_config import ConversationSource, SupervisedConfig
from lmjax.data.templates import ChatTemplate, for_tokenizer, template
from lmjax.data.validation import Validation
from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer, digest


def _write_joined(messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Piece]:
    roles = [message["role"] for message in messages]
    if roles[:1] != ["user"] or roles[1:] not in ([], ["assistant"]):
        raise UserError("the template 'none' joins a prompt and a completion and has no turns: choose a chat template")
    return [Piece(str(message["content"]), message["role"] == "assistant") for message in messages]


JOINED = ChatTemplate("none", _write_joined, document=True)


def open_template(name: str, tokenizer: Tokenizer, directory: str | None = None) -> ChatTemplate:
    """The template that a config names: "auto" for the tokenizer's own, "none" for texts joined as they are."""
    if name == "none":
        return JOINED
    return for_tokenizer(tokenizer, directory) if name == "auto" else template(name)


def encode(
    talk: Conversation, tokenizer: Tokenizer, written: ChatTemplate, loss_on: str = "assistant", markers: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as ids, and which of them are learned.

    Args:
      talk: the conversation.
      tokenizer, written: how it is written.
      loss_on: as in `SupervisedConfig`.
      markers: whether the template "none" marks where a document begins and ends.

    Returns:
      (ids int32 [n], learned bool [n]).

    Raises:
      UserError: the template does not take the conversation, or loses the words that should be learned.
    """
    spoken = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
    try:
        if loss_on != "all" and (not spoken or (loss_on == "completion" and spoken[-1] < talk.start)):
            raise UserError("there is no message of the assistant's to learn: add one, or set data.loss_on to 'all'")
        ids, learned = written.encode(tokenizer, talk.messages)
        if written is JOINED and markers:
            ids, learned = _marked(ids, learned, tokenizer)
        if loss_on == "all":
            return ids, np.ones(len(ids), bool)
        _check_span(talk.messages, spoken[-1], written)
        if loss_on != "assistant" and written is not JOINED:
            first = spoken[-1] if loss_on == "last" else next(i for i in spoken if i >= talk.start)
            before = written.prompt(tokenizer, talk.messages[:first])
            if not np.array_equal(before, ids[: len(before)]):
                raise UserError(
                    f"the chat template {written.name} writes the prompt otherwise once a reply follows it, so the "
                    "reply cannot be told from it: set data.loss_on to 'assistant', or use a built-in template"
                )
            learned = learned & (np.arange(len(ids)) >= len(before))
    except UserError as error:
        raise UserError(f"{talk.where}: {error}") from None
    return ids, learned


def _check_span(messages: Sequence[Message], last: int, written: ChatTemplate) -> None:
    """Refuses a template that does not write the end of the assistant's last message as something to learn."""
    content = messages[last].get("content")
    word = content.split()[-1:] if isinstance(content, str) else []
    text = "".join(piece.text for piece in written.write(messages, False) if piece.learned)
    if not text or (word and word[0] not in text):
        raise UserError(
            f"the chat template {written.name} loses the assistant's words, so there is nothing to learn: mend the "
            "template, or use a built-in one"
        )


def prompt_ids(tokenizer: Tokenizer, template: ChatTemplate, prompt: list[Message], markers: bool) -> np.ndarray:
    """int32 [n], what the answer to a prompt is generated from.

    Args:
      tokenizer, template: how it is written.
      prompt: messages.
      markers: template "none" puts the marker that begins a document before it.
    """
    ids = template.prompt(tokenizer, prompt)
    if template is not JOINED or not markers or tokenizer.eos is None:
        return ids
    return _marked(ids, np.zeros(len(ids), bool), tokenizer)[0][:-1]


def _marked(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Between the marks of a document; the last one is learned, the first (bos is there already) is not."""
    start = [] if tokenizer.bos is not None or tokenizer.eos is None else [tokenizer.eos]
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    ids = np.concatenate([start, ids, end]).astype(np.int32)
    return ids, np.concatenate([[False] * len(start), learned, [True] * len(end)]).astype(bool)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The tokenized conversations of one domain.

    Attributes:
      tokens: int32 [N], end to end.
      learned: bool [N].
      ends: int64 [D].
      cut: how many were cut to length.
      left_out: how many were left out, too long or with nothing to learn within the length.
    """

    tokens: np.ndarray
    learned: np.ndarray
    ends: np.ndarray
    cut: int = 0
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def targets(self) -> int:
        """Tokens that are learned; the first of a conversation has nothing before it."""
        starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])[: len(self.ends)]
        return int(self.learned.sum()) - int(self.learned[starts].sum())

    @classmethod
    def of(cls, encoded: Iterable[tuple[np.ndarray, np.ndarray]], sequence_length: int, too_long: str) -> Examples:
        """Those that have a target within the length."""
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        cut = left_out = 0
        for ids, learned in encoded:
            longer = len(ids) > sequence_length + 1
            ids, learned = ids[: sequence_length + 1], learned[: sequence_length + 1]
            if (longer and too_long == "drop") or not learned[1:].any():
                left_out += 1
                continue
            cut += longer
            kept.append((ids, learned))
        lengths = [len(ids) for ids, _ in kept]
        tokens = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in kept)])
        learned = np.concatenate([np.zeros(0, bool), *(learned for _, learned in kept)])
        return cls(tokens, learned, np.cumsum(lengths, dtype=np.int64), cut, left_out)

    @classmethod
    def join(cls, parts: Sequence[Examples]) -> Examples:
        """Several, end to end."""
        offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.learned for part in parts]),
            np.concatenate([part.ends + offset for part, offset in zip(parts, offsets)]),
            sum(part.cut for part in parts),
            sum(part.left_out for part in parts),
        )


def load_supervised(
    config: SupervisedConfig,
    batch_size: int,
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> SupervisedData:
    """Reads and tokenizes conversations; they are held in memory.

    Args:
      config: what to read and how.
      batch_size: rows of a global batch; each process gets batch_size // process_count of them.
      tokenizer: of the model.
      template: how conversations are written; None: the one that the config names.
      process_index, process_count: this process among all.

    Raises:
      UserError: nothing to read, a record that is no conversation, a template that loses what should be learned,
        nothing that fits the length.
    """
    written = open_template(config.template, tokenizer) if template is None else template
    held_out_source = dataclasses.replace(config.sources()[0], path=config.validation_path)
    talks: dict[str, list[Conversation]] = {}
    held_out: dict[str, list[Conversation]] = {}
    weights: dict[str, float] = {}
    for source in config.sources():
        for talk in _read(source):
            hidden = not config.validation_path and prompt_hash(talk.prompt) < config.validation_fraction
            (held_out if hidden else talks).setdefault(talk.domain, []).append(talk)
            if weights.setdefault(talk.domain, source.weight) != source.weight:
                raise UserError(f"two sources of the domain {talk.domain!r} have different weights: name them apart")
    if config.validation_path:
        for talk in _read(held_out_source):
            held_out.setdefault(talk.domain, []).append(talk)

    def examples(found: list[Conversation]) -> Examples:
        encoded = (encode(talk, tokenizer, written, config.loss_on, config.document_markers) for talk in found)
        return Examples.of(encoded, config.sequence_length, config.too_long)

    train = {domain: examples(found) for domain, found in sorted(talks.items())}
    aside = {domain: examples(found) for domain, found in sorted(held_out.items())}
    return SupervisedData(
        config, batch_size, tokenizer, written, train, aside, held_out, weights, process_index, process_count
    )


def _read(source: ConversationSource) -> list[Conversation]:
    found = [conversation(record, source) for record in read_records(source.path)]
    if not found:
        raise UserError(f"{source.path} holds no conversations: give it at least one record")
    return found


def prompt_hash(messages: Sequence[Message]) -> float:
    """A number in [0, 1): the answers to one prompt fall on the same side of a split."""
    raw = json.dumps(messages, sort_keys=True, default=str).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2**64


class SupervisedData:
    """Conversations as batches. From `load_supervised`.

    Attributes:
      config, tokenizer, template: what it was made with.
      train_examples, held_out_examples: the tokenized conversations by domain.
      held_out: the held-out conversations by domain, to be answered.
      cut, left_out: conversations that were cut to length, and left out: too long, or nothing to learn within it.
      rates: how often each domain is drawn, by conversations.
      plan: which rows each batch holds.
    """

    def __init__(
        self,
        config: SupervisedConfig,
        batch_size: int,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        train_examples: dict[str, Examples],
        held_out_examples: dict[str, Examples],
        held_out: dict[str, list[Conversation]],
        weights: dict[str, float],
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.config, self.batch_size, self.tokenizer, self.template = config, batch_size, tokenizer, template
        self.train_examples = {domain: each for domain, each in train_examples.items() if len(each)}
        self.held_out_examples = {domain: each for domain, each in held_out_examples.items() if len(each)}
        self.held_out = held_out
        everything = [*train_examples.values(), *held_out_examples.values()]
        self.cut, self.left_out = sum(each.cut for each in everything), sum(each.left_out for each in everything)
        self._process = (process_index, process_count)
        if not self.train_examples:
            raise UserError(
                f"none of the training conversations has anything to learn within "
                f"{config.sequence_length} tokens: raise data.sequence_length"
            )
        if config.validation_fraction > 0 and not self.held_out_examples:
            raise UserError(
                "no conversation was held out for validation: raise data.validation_fraction, or set it to 0 to go "
                "without"
            )
        domains = list(self.train_examples)
        parts = list(self.train_examples.values())
        sizes = [len(part) for part in parts]
        rates = mixing_rates(sizes, config.temperature, config.limit, [weights[domain] for domain in domains])
        self.rates = dict(zip(domains, rates))
        # In proportion to their sizes all domains are one, and an epoch has each conversation once.
        if np.allclose(rates, mixing_rates(sizes), rtol=1e-12):
            parts, sizes, rates = [Examples.join(parts)], [sum(sizes)], [1.0]
        T = config.sequence_length
        rows: list[Rows]
        if config.packing == "best_fit":
            packed = [PackedRows(part.tokens, T, part.ends, part.learned) for part in parts]
            # Rows are drawn, but conversations are what the rates count.
            rates = [rate * len(row) / size for rate, row, size in zip(rates, packed, sizes)]
            rows = list(packed)
        else:
            whole = Examples.join(parts)
            rows = [BucketRows(whole.tokens, whole.learned, whole.ends, sizes, config.edges(), batch_size, rates)]
        self.rows = sum(len(row) for row in rows)
        self.plan = BatchPlan(rows, batch_size, rates if len(rows) > 1 else None, config.seed, *self._process)
        content = [[digest(array.tobytes()) for array in (part.tokens, part.learned, part.ends)] for part in parts]
        shape = [config.packing, T] if config.packing == "best_fit" else ["padded", batch_size, list(config.edges())]
        self.fingerprint = digest([content, rates, config.seed, shape])

    def train(self) -> BatchIterator:
        """A new endless iterator of training batches, from the beginning; `set_state` moves it."""
        return BatchIterator(self.plan, self.fingerprint, self.config.prefetch)

    def batch(self, step: int) -> Batch:
        """Training batch number `step`, counted from 0, as the iterator gives it."""
        return self.plan.batch(step)

    def validation(self, batch_size: int | None = None, max_batches: int | None = None) -> dict[str, Validation]:
        """The held-out conversations of each domain in fixed packed batches, each target once.

        Args:
          batch_size: rows of a global batch; the training batch size by default.
          max_batches: only the first so many of each domain.
        """
        T, size = self.config.sequence_length, batch_size or self.batch_size
        return {
            domain: Validation(
                [PackedRows(each.tokens, T, each.ends, each.learned)],
                (),
                self.tokenizer,
                size,
                max_batches,
                *self._process,
                True,
            )
            for domain, each in self.held_out_examples.items()
        }

    def prompt_ids(self, talk: Conversation) -> np.ndarray:
        """int32 [n], what the completion of a conversation is generated from."""
        return prompt_ids(self.tokenizer, self.template, talk.prompt, self.config.document_markers)

    def report(self) -> str:
        """What there is to learn from, in lines."""
        lines = []
        for domain, each in self.train_examples.items():
            aside = self.held_out_examples.get(domain)
            share = f", {self.rates[domain]:.1%} of the mixture" if len(self.train_examples) > 1 else ""
            lines.append(
                f"{domain}: {len(each):,} conversations, {len(each.tokens):,} tokens, {each.targets:,} of them "
                f"learned; {len(aside) if aside else 0:,} held out{share}"
            )
        if self.cut or self.left_out:
            lines.append(
                f"{self.cut:,} were longer than {self.config.sequence_length} tokens and cut; {self.left_out:,} left "
                "out: nothing to learn within the length, or too long"
            )
        return "\n".join(lines)
