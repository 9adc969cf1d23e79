"""Prompts to be answered, with what is known of the answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.instructions import Conversation, conversation
from lmjax.data.prompt_config import PromptConfig
from lmjax.data.records import Record, read_records
from lmjax.data.supervised import open_template, prompt_hash, prompt_ids
from lmjax.data.templates import ChatTemplate
from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
      ids: int32 [P], at least one.
      text: the same, as it is shown.
      record: what else is known, such as the right answer.
      number: among all prompts.
    """

    ids: np.ndarray
    text: str = ""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    number: int = 0


class PromptData(NamedTuple):
    """Prompts to learn from, and others.

    Attributes:
      train, held_out: the prompts.
      left_out: how many were longer than the limit.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    left_out: int


def load_prompts(config: PromptConfig, tokenizer: Tokenizer, *, template: ChatTemplate | None = None) -> PromptData:
    """Reads and tokenizes prompts.

    Args:
      config: what to read and how.
      tokenizer: of the model.
      template: how conversations are written; None: the one that the config names.

    Raises:
      UserError: nothing to read, a malformed record, an empty prompt, or none short enough.
    """
    written = open_template(config.template, tokenizer) if template is None else template
    left_out = 0

    def read(path: str) -> Iterable[tuple[Conversation, Prompt]]:
        nonlocal left_out
        for record in itertools.islice(read_records(path), config.limit or None):
            talk = asked(record, config)
            ids = prompt_ids(tokenizer, written, talk.prompt, config.document_markers)
            if not len(ids):
                raise UserError(f"{talk.where} has an empty prompt: give it some text, or leave it out")
            if len(ids) > config.max_length:
                left_out += 1
                continue
            text = "\n".join(str(message.get("content", "")) for message in talk.prompt)
            yield talk, Prompt(ids, text, record.fields)

    train: list[Prompt] = []
    held_out: list[Prompt] = []
    for talk, prompt in read(config.path):
        hidden = not config.validation_path and prompt_hash(talk.prompt) < config.validation_fraction
        (held_out if hidden else train).append(prompt)
    if config.validation_path:
        held_out = [prompt for _, prompt in read(config.validation_path)]
    if not train:
        raise UserError(
            f"{config.path} leaves no prompt to learn from ({left_out} were longer than {config.max_length} tokens): "
            "raise data.max_length, or give more"
        )
    return PromptData(train, held_out, left_out)


def asked(record: Record, config: PromptConfig) -> Conversation:
    """The conversation whose prompt a record holds.

    >>> asked(Record("line 1", {"prompt": "1 + 1 =", "answer": 2}), PromptConfig()).prompt
    [{'role': 'user', 'content': '1 + 1 ='}]
    """
    answers = {name: "" for name in (config.completion_field, config.output_field)}
    return conversation(Record(record.where, record.fields | answers), config)
