"""A conversation with a model from a run directory or a Hugging Face directory.

    python -m experiments.chat --model runs/mine --system "Answer briefly." --temperature 0.7

Replies appear as they are generated. Ctrl-C ends a reply, Ctrl-D the conversation; /help lists the commands. Without a
terminal, each line of standard input is a message, and standard output has the replies alone. With --run-dir, every
conversation is kept in a file under `chats/` there, written anew after each reply.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lmjax as lm
from experiments.chat_config import ChatConfig
from experiments.support import (
    OpenedModel,
    all_processors,
    cache_spec,
    open_model,
    output_folder,
    sampling_processors,
    use_compilation_cache,
)
from lmjax import command_line
from lmjax.data.config import DataConfig
from lmjax.errors import UserError
from lmjax.tokenizers.base import write_file

HELP = """/reset        begin a new conversation, with the same system message
/system TEXT  change the system message; without a text, leave it out
/undo         take back the last message and its reply
/retry        have the last reply written anew
/save FILE    add the conversation to a file of JSON lines
/exit         end, as Ctrl-D does; Ctrl-C ends a reply
A message that begins with a slash is written with two."""

Message = dict[str, str]
_CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)], "\ufffd")  # would steer a terminal


def run(config: ChatConfig, options: command_line.Options) -> None:
    """Answers each line, or does what it commands, until there are no more."""
    use_compilation_cache(DataConfig().cache_root())
    if config.template != "auto":
        lm.data.template(config.template)
    processors = sampling_processors(config)
    model = open_model(
        config.model, step=config.step, average=config.average, tokenizer=config.tokenizer, adapter=config.adapter
    )
    speaker = Speaker(config, model, processors)
    folder = output_folder(options.run_dir, config.model, "chat") / "chats" if options.run_dir else None
    chat = Chat(speaker, config.system, folder)
    note(f"{model.description}; template {speaker.template.name}; replies of up to {speaker.longest} tokens; /help")
    while (line := read_line()) is not None:
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/exit":
                break
            elif command == "/help":
                note(HELP)
            elif command == "/reset":
                chat = Chat(speaker, chat.system, folder)
            elif command == "/system":
                chat.instruct(rest.strip())
            elif command == "/undo":
                chat.undo()
            elif command == "/retry":
                chat.retry()
            elif command == "/save":
                chat.save(rest.strip())
            elif command.startswith("/") and not command.startswith("//"):
                raise UserError(f"there is no command {command}; /help lists them")
            elif command:
                chat.say(line[1:] if command.startswith("//") else line)
        except UserError as error:
            note(str(error))


class Chat:
    """A conversation.

    Args:
      speaker: who answers.
      system: what it is told before; empty for nothing.
      folder: where the conversation is kept, or None.

    Attributes:
      system: what the model was told last.
      talk: the messages of the two, in turn.
    """

    def __init__(self, speaker: Speaker, system: str, folder: Path | None):
        self._speaker, self._folder, self._left_out = speaker, folder, 0
        self._file: Path | None = None
        self.talk: list[Message] = []
        self.system = ""
        self.instruct(system)

    def instruct(self, system: str) -> None:
        """Changes the system message, if the template and the model have room for it."""
        self._speaker.fit(system, [{"role": "user", "content": "."}])
        self.system = system

    def say(self, text: str) -> None:
        """Has the model answer."""
        asked = [*self.talk, {"role": "user", "content": text}]
        ids, left_out = self._speaker.fit(self.system, asked)
        if left_out > self._left_out:
            note(f"the conversation has become too long: the model no longer sees its first {left_out} messages")
        self._left_out = left_out
        reply = self._speaker.answer(ids)
        self.talk = [*asked, {"role": "assistant", "content": reply.text}]
        self._keep()
        note(
            f"{reply.tokens} tokens, {reply.speed:.1f} tokens/s, the first after {reply.wait:.2f} s, "
            f"ended by {reply.finish}"
        )

    def undo(self) -> str:
        """Takes back the last message and its reply; returns the message."""
        if not self.talk:
            raise UserError("nothing was said yet")
        asked, self.talk = self.talk[-2]["content"], self.talk[:-2]
        return asked

    def retry(self) -> None:
        """Has the last message answered again."""
        self.say(self.undo())

    def save(self, path: str) -> None:
        """Adds the conversation to a file, as a line of JSON."""
        if not path or not self.talk:
            raise UserError("nothing was said yet" if path else "/save needs a file, as in /save talk.jsonl")
        try:
            with open(Path(path).expanduser(), "a", encoding="utf-8") as file:
                file.write(self._line())
        except OSError as error:
            raise UserError(f"cannot write to {path} ({error.strerror}); name another file") from None
        note(f"added to {path}")

    def _keep(self) -> None:
        if self._folder is None:
            return
        if self._file is None:
            self._folder.mkdir(exist_ok=True)
            began, number = time.strftime("%Y%m%d-%H%M%S"), 1
            while (file := self._folder / f"{began}-{number}.jsonl").exists():
                number += 1
            self._file = file
        write_file(self._file, self._line())

    def _line(self) -> str:
        return json.dumps({"messages": _messages(self.system, self.talk)}) + "\n"


class Reply(NamedTuple):
    """What the model said.

    Attributes:
      text: without what ended it.
      tokens: how many it took.
      finish: what ended it.
      wait: seconds to its beginning.
      speed: tokens a second from there on.
    """

    text: str
    tokens: int
    finish: str
    wait: float
    speed: float


class Speaker:
    """A model that answers conversations.

    Attributes:
      template: how they are written.
      longest: the most tokens of a reply.
    """

    def __init__(self, config: ChatConfig, model: OpenedModel, processors: Sequence[Any]):
        import jax

        self.template = model.chat_template(config.template)
        stops = (*config.stop, *self.template.stops(model.tokenizer))
        eos = [stop for stop in stops if isinstance(stop, int)]
        context = model.context
        self.longest = config.max_new_tokens if context is None else min(config.max_new_tokens, context // 2)
        self._options = {
            "max_new_tokens": self.longest,
            "temperature": config.temperature,
            "processors": all_processors(config, model, processors, eos, self.longest),
            "eos": eos,
            "cache": cache_spec(config.cache, model),
            "every": config.every,
        }
        self._policy, self._tokenizer, self._stops = model.policy, model.tokenizer, stops
        # Special tokens in the midst of a reply are no text of it: as text, they would be read otherwise.
        self._hidden = set(model.tokenizer.specials.values()) - set(eos)
        self._model = lm.generation.prepare(model.policy, model.variables, rows=1)
        self._room = None if context is None else context - self.longest
        self._key, self._replies = jax.random.key(config.seed), 0
        self._compiled: set[int] = set()

    def fit(self, system: str, talk: list[Message]) -> tuple[Any, int]:
        """A conversation as ids, and how many of its first messages had to be left out for it to fit.

        Raises:
          UserError: not even the last message fits, or the template does not take the conversation.
        """
        for left_out in range(0, len(talk), 2):
            ids = self.template.prompt(self._tokenizer, _messages(system, talk[left_out:]))
            if self._room is None or len(ids) <= self._room:
                return ids, left_out
        raise UserError(
            f"the message takes {len(ids)} tokens with what belongs to it, and {self._room} fit beside a reply of "
            f"{self.longest}; shorten it, or lower --max-new-tokens"
        )

    def answer(self, ids: Any) -> Reply:
        """Writes a reply to standard output while it is generated; an interrupt ends it."""
        import jax

        from lmjax.generation.slots import bucket

        if (length := bucket(len(ids))) not in self._compiled:
            note(f"compiling for conversations of up to {length} tokens")
            self._compiled.add(length)
        key = jax.random.fold_in(self._key, self._replies)
        self._replies += 1
        stream, text = lm.tokenizers.TextStream(self._tokenizer, self._stops), ""
        if sys.stdin.isatty():
            print("model> ", end="", flush=True)
        began, first = time.perf_counter(), None
        said, finish = 0, "interrupt"
        looks = lm.generation.stream(self._policy, self._model, [ids], key, **self._options)
        try:
            for look in looks:
                n = int(look.lengths[0])
                stream.push(i for i in look.tokens[0, said:n].tolist() if i not in self._hidden)
                said, text = n, self._show(stream, text)
                first = first or (time.perf_counter(), n)
                if stream.stopped is not None:
                    break
            finish = "stop" if isinstance(stream.stopped, str) else lm.generation.FINISH[int(look.finish[0])]
        except KeyboardInterrupt:
            pass
        finally:
            looks.close()
        stream.finish()
        text = self._show(stream, text)
        print(flush=True)
        now = time.perf_counter()
        wait = (first[0] if first else now) - began
        start, before = first if first and said > first[1] else (began, 0)
        return Reply(text, said, finish, wait, (said - before) / (now - start))

    def _show(self, stream: Any, before: str) -> str:
        """Prints what is new in a stream, and returns all of its text."""
        text = stream.text
        if self.template.document:  # `Assistant:` and a space come before a reply
            text = text.removeprefix(" ")
        new = text[len(before) :]
        print(new.translate(_CONTROL) if sys.stdout.isatty() else new, end="", flush=True)
        return text


def _messages(system: str, talk: list[Message]) -> list[Message]:
    return [*([{"role": "system", "content": system}] if system else []), *talk]


def note(text: str) -> None:
    """A line that is not part of the conversation."""
    from rich.console import Console

    Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def read_line() -> str | None:
    """The next line, None at the end. On a terminal an interrupt only empties it."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, edits and recalls lines
    while True:
        try:
            return input("you> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            note("Ctrl-D or /exit ends the conversation")


if __name__ == "__main__":
    command_line.main(run, ChatConfig())
