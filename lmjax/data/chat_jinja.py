"""The Jinja chat template of a tokenizer's directory, rendered as `transformers` renders it.

Needs `jinja2` (extra `chat`). The template comes with a downloaded model, so it runs in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmjax.data.chat_encoding import unused_characters
from lmjax.data.chat_turns import ROLES, Message, Piece, check_messages
from lmjax.data.templates import ChatTemplate
from lmjax.errors import UserError

_Render = Callable[[Sequence[Message], bool], str]


def has_template(directory: str | os.PathLike) -> bool:
    """Whether a tokenizer's directory holds a chat template."""
    return bool(_read(directory)[0])


def template_text(directory: str | os.PathLike) -> str | None:
    """The Jinja in a tokenizer's directory, its default one; None without."""
    return _read(directory)[0].get("default")


def _read(directory: str | os.PathLike) -> tuple[dict[str, str], dict[str, str]]:
    """(templates by name, special tokens by role such as "bos_token") of a directory, or of one of its files."""
    directory = os.path.dirname(directory) if os.path.isfile(directory) else directory
    path = os.path.join(directory, "tokenizer_config.json")
    config: Any = {}
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON ({error}): copy it again") from None
    said = config.get("chat_template") or {}
    try:
        named = {"default": said} if isinstance(said, str) else said
        named = named if isinstance(named, dict) else {each["name"]: each["template"] for each in named}
    except (TypeError, KeyError):
        raise UserError(f"chat_template in {path} is neither a text nor a list of named ones: copy it again") from None
    # Files beside the config stand above what it says.
    files = {"default": os.path.join(directory, "chat_template.jinja")}
    extra = os.path.join(directory, "additional_chat_templates")
    for name in sorted(os.listdir(extra)) if os.path.isdir(extra) else ():
        files[name.removesuffix(".jinja")] = os.path.join(extra, name)
    for name, file_path in files.items():
        if os.path.exists(file_path):
            with open(file_path, encoding="utf-8") as file:
                named[name] = file.read()
    tokens = {}
    for role, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(text, str):
            tokens[role] = text
    return named, tokens


def from_tokenizer_config(path: str | os.PathLike, name: str = "default", **variables: Any) -> ChatTemplate:
    """The chat template of a tokenizer's directory.

    The assistant's words are those in the template's {% generation %} blocks. A template without any is rendered
    up to each assistant turn and through it: what was added are its words, as long as the text before stays as it
    was. Where it does not, the template still renders and prompts, but has no mask. The white space behind the mark
    that ends a turn is not the assistant's.

    Args:
      path: a directory with `chat_template.jinja`, or with `chat_template` in its `tokenizer_config.json`.
      name: which one, where there are several.
      variables: what else the template reads, such as enable_thinking=False.

    Returns:
      A template whose `stop` are the eos token and the mark that it writes behind an assistant's words.

    Raises:
      UserError: there is no such template, it is not Jinja, or jinja2 is missing or older than 3.1.6.
    """
    named, tokens = _read(path)
    if name not in named:
        known = f"it has {', '.join(named)}" if named else "use a built-in one, lmjax.data.template(name)"
        raise UserError(f"{os.fspath(path)} holds no chat template {name!r}: {known}")
    return from_jinja(named[name], tokens | variables, os.path.basename(os.path.abspath(path)))


def from_jinja(source: str, variables: Mapping[str, Any], name: str = "jinja") -> ChatTemplate:
    """The chat template of a Jinja text.

    Args:
      source: the text.
      variables: what it reads besides the messages: bos_token, eos_token and others.
      name: what errors call it.

    Raises:
      UserError: see `from_tokenizer_config`.

    >>> source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    >>> from_jinja(source, {}).render([{"role": "user", "content": "hi"}])
    '[user]hi'
    """
    compiled = _compile(source, name)
    marked = re.search(r"{%-?\+?\s*generation\b", source) is not None

    def run(messages: Sequence[Message], add_generation_prompt: bool, marks: tuple[str, str]) -> str:
        try:
            return compiled.render(
                messages=[{k: v for k, v in message.items() if v is not None} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                generation_marks=marks,
                **variables,
            )
        except Exception as error:  # a template can raise whatever Python can
            raise UserError(f"the chat template {name} refuses this conversation: {error}") from None

    def write(messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Piece]:
        messages = _check(messages)
        if not marked:
            return _by_prefixes(lambda some, prompt: run(some, prompt, ("", "")), messages, add_generation_prompt)
        unused = unused_characters(messages)
        marks = next(unused), next(unused)
        parts = re.split(f"([{marks[0]}{marks[1]}])", run(messages, add_generation_prompt, marks))
        learned, written = False, []
        for part in parts:
            if part in marks:
                learned = part == marks[0]
            else:
                written.append(Piece(part, learned))
        return written

    return ChatTemplate(name, write, stop=_stop(write, variables.get("eos_token")))


def _compile(source: str, name: str) -> Any:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("Jinja chat templates need the package jinja2: pip install 'lmjax[chat]'") from None
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise UserError(f"jinja2 {jinja2.__version__} lets a template out of its sandbox: pip install 'jinja2>=3.1.6'")
    from jinja2.ext import Extension

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: puts the two `generation_marks` around what stands inside."""

        tags = {"generation"}  # noqa: RUF012, as Jinja asks

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, context: Any, caller: Any) -> str:
            begin, end = context["generation_marks"]
            return begin + caller() + end

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    # Jinja's own filter escapes HTML.
    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise UserError(f"the chat template {name} is not Jinja (line {error.lineno}: {error.message})") from None


def _check(messages: Sequence[Message]) -> list[Message]:
    checked = check_messages(messages, (*ROLES, "developer"))
    for i, message in enumerate(checked):
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise UserError(f"message {i} ({message['role']}) has no content: give it a text, be it empty")
    return checked


def _by_prefixes(render: _Render, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    """The pieces of a template that does not tell: the assistant's are what each of its turns adds to a prompt."""
    whole = render(messages, add_generation_prompt)
    written, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before, after = render(messages[:i], True), render(messages[: i + 1], False)
        except UserError:  # it does not take the conversation up to here
            return [Piece(whole, None)]
        if not (done <= len(before) and after.startswith(before) and whole.startswith(after)):
            return [Piece(whole, None)]
        words = after[len(before) :]
        content = message.get("content")
        text = content.strip() if isinstance(content, str) else ""
        tail = words.partition(text)[2] if text else words
        end = len(after) - (len(tail) - len(tail.rstrip()) if tail.strip() else 0)
        written += [Piece(whole[done : len(before)], False), Piece(whole[len(before) : end], True)]
        done = end
    return [*written, Piece(whole[done:], False)]


def _stop(write: Callable[[Sequence[Message]], list[Piece]], eos: str | None) -> tuple[str, ...]:
    """The texts that end a turn: the first word written behind an assistant's, and the eos token."""
    talk = [{"role": "user", "content": "Ready?"}, {"role": "assistant", "content": "Certainly."}]
    try:
        text = "".join(piece.text for piece in write(talk))
    except UserError:  # it wants another conversation than this one
        text = ""
    end = text.rpartition("Certainly.")[2].split()[:1] if "Certainly." in text else []
    return tuple(dict.fromkeys([*end, *([eos] if eos else [])]))
