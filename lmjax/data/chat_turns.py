"""How families of chat models write their turns: messages to pieces of text, as data and small functions.

Each family writes what the Jinja template published with it writes for conversations without tools to offer (checked
in tests/data/test_templates.py). Where a published template passes over an order of roles that its model never saw,
such as a tool's turn given to Gemma, the family here refuses it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.errors import UserError

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
NO_THOUGHTS = "<think>\n\n</think>\n\n"


class Piece(NamedTuple):
    """A stretch of a rendered conversation.

    Attributes:
      text: the characters.
      learned: whether the assistant must learn to produce them; None where the template does not tell.
    """

    text: str
    learned: bool | None


class Turn(NamedTuple):
    """A message on its way to text; `learned` counts for the assistant's only."""

    role: str
    content: str
    learned: bool = True


Step = Callable[[list[Turn]], list[Turn]]


def check_messages(messages: Sequence[Message], roles: Sequence[str] = ROLES) -> list[Message]:
    """The messages, each a mapping with one of the roles.

    Raises:
      UserError: anything else, or none at all.
    """
    if isinstance(messages, str | bytes | Mapping):
        raise UserError('a conversation is a list of messages: give [{"role": "user", "content": "..."}]')
    messages = list(messages)
    if not messages:
        raise UserError('the conversation is empty: give at least one message, {"role": "user", "content": "..."}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f'message {i} is a {type(message).__name__}: give {{"role": ..., "content": ...}}')
        role = message.get("role")
        if role not in roles:
            near = difflib.get_close_matches(str(role), roles, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(roles)}"
            raise UserError(f"message {i} has the role {role!r}, which is none: {hint}")
    return messages


def _turns(messages: Sequence[Message]) -> list[Turn]:
    turns = []
    for i, message in enumerate(check_messages(messages)):
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {i} ({message['role']}) has no content: give it a text, be it empty")
        extra = sorted(key for key in message if key not in ("role", "content") and message[key] is not None)
        if extra:
            raise UserError(
                f"message {i} has {extra[0]!r}, which the built-in chat templates do not write: use the Jinja template "
                "of the model's own directory"
            )
        turns.append(Turn(message["role"], message["content"]))
    return turns


@dataclasses.dataclass(frozen=True)
class Family:
    """Turns between special tokens: `header`, content, `end`, `after`."""

    header: str
    """Opens a turn, with {role} in it."""
    end: str
    """Ends a turn; the assistant must learn to produce it."""
    after: str = ""
    """Follows `end` and is not learned: generation has stopped by then."""
    bos: str = ""
    names: tuple[tuple[str, str], ...] = ()
    """Roles that go by another name: (role, name)."""
    opening: str = ""
    """What the generation prompt adds behind the assistant's header."""
    steps: tuple[Step, ...] = ()
    """Applied to the turns, in order, before they are written."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Piece]:
        """The pieces of a conversation."""
        turns = _turns(messages)
        for step in self.steps:
            turns = step(turns)
        written = [Piece(self.bos, False)]
        for role, content, learned in turns:
            head = self.header.format(role=dict(self.names).get(role, role))
            if role == "assistant" and self.opening and content.startswith(self.opening):
                head, content = head + self.opening, content.removeprefix(self.opening)
            written += [
                Piece(head, False),
                Piece(content + self.end, role == "assistant" and learned),
                Piece(self.after, False),
            ]
        if add_generation_prompt:
            name = dict(self.names).get("assistant", "assistant")
            written.append(Piece(self.header.format(role=name) + self.opening, False))
        return written


def trim(turns: list[Turn]) -> list[Turn]:
    """Contents without the white space around them (Llama 3, Gemma)."""
    return [turn._replace(content=turn.content.strip()) for turn in turns]


def qwen_system(turns: list[Turn]) -> list[Turn]:
    """Qwen2.5's own system message, where the conversation does not begin with one."""
    return turns if turns[0].role == "system" else [Turn("system", QWEN_SYSTEM), *turns]


def qwen_tools(turns: list[Turn]) -> list[Turn]:
    """Tools answer in the user's name: a run of their turns is one user turn of <tool_response> blocks."""
    merged: list[Turn] = []
    for i, turn in enumerate(turns):
        if turn.role != "tool":
            merged.append(turn)
            continue
        response = f"<tool_response>\n{turn.content}\n</tool_response>"
        if i and turns[i - 1].role == "tool":
            merged[-1] = merged[-1]._replace(content=f"{merged[-1].content}\n{response}")
        else:
            merged.append(Turn("user", response))
    return merged


def qwen3_thoughts(turns: list[Turn]) -> list[Turn]:
    """Qwen3 drops the thoughts of turns before the user's last question, and gives an answer without thoughts none.

    A turn whose thoughts were dropped is not what the model was to write there, so it is not learned.
    """

    def asks(turn: Turn) -> bool:
        wrapped = turn.content.startswith("<tool_response>") and turn.content.endswith("</tool_response>")
        return turn.role == "user" and not wrapped

    question = max((i for i, turn in enumerate(turns) if asks(turn)), default=len(turns) - 1)
    told: list[Turn] = []
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            thoughts, content = "", turn.content
            if "</think>" in content:
                thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
                content = content.split("</think>")[-1].lstrip("\n")
            if i > question and (i == len(turns) - 1 or thoughts):
                content = f"<think>\n{thoughts}\n</think>\n\n" + content.lstrip("\n")
            turn = Turn("assistant", content, learned=i > question)
        told.append(turn)
    return told


def alternate(turns: list[Turn]) -> list[Turn]:
    """Refuses any order of roles but user, assistant, user, ... behind an optional system message (Gemma)."""
    talk = turns[1:] if turns[0].role == "system" else turns
    for i, turn in enumerate(talk):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise UserError(
                f"message {i + len(turns) - len(talk)} is the {turn.role}'s where Gemma expects the {expected}'s: let "
                "user and assistant alternate, the user first"
            )
    if not talk:
        raise UserError("the conversation has a system message only: add the user's")
    return turns


def refuse_system(turns: list[Turn]) -> list[Turn]:
    """Gemma 1 and 2 were trained without system messages."""
    if turns[0].role == "system":
        raise UserError("Gemma 1 and 2 have no system role: put its text into the user's first message")
    return turns


def fold_system(turns: list[Turn]) -> list[Turn]:
    """Gemma 3 writes the system message at the head of the user's first one. Comes after `trim`, which spares it."""
    if turns[0].role != "system":
        return turns
    system, first, *rest = turns
    return [first._replace(content=f"{system.content}\n\n{first.content}"), *rest]


def trim_talk(turns: list[Turn]) -> list[Turn]:
    """`trim`, but for the system message (Gemma 3)."""
    return [turn if turn.role == "system" else turn._replace(content=turn.content.strip()) for turn in turns]


_LABELS = {"user": "User:", "assistant": "Assistant:", "tool": "Tool:"}
PLAIN_STOP = tuple(f"\n{label}" for label in _LABELS.values())


def write_plain(messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Piece]:
    """`User: ...` and `Assistant: ...` lines, the system message a paragraph before them.

    An assistant's turn ends with the line break and the label of whoever speaks next, the user unless the
    conversation says otherwise: that is what a model without special tokens must learn to write, and what
    `PLAIN_STOP` stops at.
    """
    turns = _turns(messages)
    if any(turn.role == "system" for turn in turns[1:]):
        raise UserError("the chat template plain takes a system message at the beginning only: move it there")
    written: list[Piece] = []
    label_written = False
    for i, (role, content, _) in enumerate(turns):
        if role == "system":
            written.append(Piece(f"{content}\n\n", False))
            continue
        written.append(Piece("" if label_written else _LABELS[role], False))
        label_written = role == "assistant"
        if label_written:
            last = "assistant" if add_generation_prompt else "user"
            next_role = turns[i + 1].role if i + 1 < len(turns) else last
            written.append(Piece(f" {content}\n{_LABELS[next_role]}", True))
        else:
            written.append(Piece(f" {content}\n", False))
    if add_generation_prompt and not label_written:
        written.append(Piece(_LABELS["assistant"], False))
    return written
