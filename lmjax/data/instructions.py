"""Records of instruction data as conversations, whichever of the usual forms they come in."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from lmjax.data.chat_turns import Message
from lmjax.data.records import Record
from lmjax.data.supervised_config import ConversationSource
from lmjax.errors import UserError

# Names of roles that other collections use, ShareGPT's first.
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


class Conversation(NamedTuple):
    """A conversation to learn from.

    Attributes:
      messages: who says what, the assistant last (unless the loss is on all of it).
      start: the number of the message that the completion begins with.
      domain: its tag.
      where: how errors call it.
    """

    messages: list[Message]
    start: int
    domain: str
    where: str

    @property
    def prompt(self) -> list[Message]:
        """What comes before the completion."""
        return self.messages[: self.start]


def conversation(record: Record, source: ConversationSource) -> Conversation:
    """The conversation that a record stands for.

    Raises:
      UserError: fields are missing or are not what they should be.

    >>> record = Record("line 1", {"instruction": "Add.", "input": "1 1", "output": "2"})
    >>> conversation(record, ConversationSource(domain="sums")).messages
    [{'role': 'user', 'content': 'Add.\\n\\n1 1'}, {'role': 'assistant', 'content': '2'}]
    """
    where, fields = record
    kind = _format(record, source)
    if kind == "messages":
        messages = messages_of(fields.get(source.messages_field), where, source.messages_field)
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        start = spoken[-1] if spoken else len(messages)
    else:
        if kind == "completion":
            prompt = _either(fields, source.prompt_field, "user", where)
            completion = _either(fields, source.completion_field, "assistant", where)
        else:
            asked, given = _text(fields, source.instruction_field, where), fields.get(source.input_field)
            if given:
                asked += "\n\n" + _text(fields, source.input_field, where)
            prompt = [{"role": "user", "content": asked}]
            completion = [{"role": "assistant", "content": _text(fields, source.output_field, where)}]
        messages, start = [*prompt, *completion], len(prompt)
    domain = _domain(record, source)
    if source.system and messages[0]["role"] != "system":
        messages, start = [{"role": "system", "content": source.system}, *messages], start + 1
    if source.prefix:
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None or not isinstance(messages[first].get("content"), str):
            raise UserError(f"{where} has no user's message to put data.prefix before: leave the prefix out")
        text = source.prefix.replace("{domain}", domain) + messages[first]["content"]
        messages[first] = {**messages[first], "content": text}
    return Conversation(messages, start, domain, where)


def _format(record: Record, source: ConversationSource) -> str:
    if source.format != "auto":
        return source.format
    keys = {
        "messages": (source.messages_field,),
        "completion": (source.prompt_field, source.completion_field),
        "instruction": (source.instruction_field, source.output_field),
    }
    for kind, names in keys.items():
        if all(record.fields.get(name) is not None for name in names):
            return kind
    have = ", ".join(record.fields) or "nothing"
    wanted = ", or ".join(" and ".join(map(repr, names)) for names in keys.values())
    raise UserError(f"{record.where} has neither {wanted} (it has: {have}): name its fields, as in data.prompt_field")


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(fields.get(name), str):
        what = type(fields[name]).__name__ if name in fields else f"missing (there are: {', '.join(fields)})"
        raise UserError(f"{where}: the field {name!r} is not text but {what}: mend the record or name another field")
    return fields[name]


def _either(fields: dict[str, Any], name: str, role: str, where: str) -> list[Message]:
    """A text in a role's name, or a list of messages."""
    if isinstance(fields.get(name), list):
        return messages_of(fields[name], where, name)
    return [{"role": role, "content": _text(fields, name, where)}]


def messages_of(value: Any, where: str, name: str) -> list[Message]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UserError(f'{where}: {name!r} is no list of messages: give [{{"role": ..., "content": ...}}, ...]')
    messages: list[Message] = []
    for message in value:
        kept = {key: part for key, part in message.items() if part is not None}  # Parquet has every key everywhere
        if "role" not in kept and "from" in kept:  # ShareGPT
            kept = {"role": kept["from"], "content": kept.get("value")}
        messages.append({**kept, "role": _ROLES.get(str(kept.get("role")), kept.get("role"))})
    return messages


def _domain(record: Record, source: ConversationSource) -> str:
    if source.domain_field:
        tag = record.fields.get(source.domain_field)
        if not isinstance(tag, str | int) or isinstance(tag, bool) or tag == "":
            raise UserError(f"{record.where} has no tag in {source.domain_field!r}: set data.domain_field to another")
        return str(tag)
    name = os.path.basename(source.path.rstrip("/")).split("*")[0].split(".")[0]
    return source.domain or name or "all"
