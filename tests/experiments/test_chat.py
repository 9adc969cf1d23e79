"""Conversations from the command line: replies as they come, commands, what does not fit."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lmjax as lm
from experiments import chat
from experiments.chat_config import ChatConfig
from experiments.support import open_model
from lmjax import command_line
from lmjax.tokenizers import CharTokenizer

CONTEXT, LONGEST = 128, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with an untrained model and a tokenizer of characters."""
    import jax

    folder = tmp_path_factory.mktemp("model")
    config = lm.models.llama(38, num_layers=1, embed_dim=16, num_heads=2, max_length=CONTEXT, init_std=0.3)
    lm.interop.save_huggingface(folder, config, lm.Policy(config).init(jax.random.key(0)))
    alphabet = string.ascii_lowercase + "UAT: \n.,!/"
    CharTokenizer(alphabet, bos="<|im_start|>", eos="<|im_end|>").save(folder)
    return folder


@pytest.fixture
def talk(model: Path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the script on lines of input: its exit status, standard output and standard error."""

    def run(lines: str, *argv: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        given = ["--model", model, "--max-new-tokens", LONGEST, *argv]
        status = 0
        try:
            command_line.main(chat.run, ChatConfig(), argv=list(map(str, given)))
        except SystemExit as end:
            status = end.code  # type: ignore[assignment]
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def say(monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """Has the model say what is given, a look at a time, and keeps what it was asked. None is an interrupt."""
    asked: list[dict[str, Any]] = []
    replies: list[list[str | None]] = []

    def stream(policy, model, prompts, key, **options) -> Iterator[SimpleNamespace]:
        tokenizer = asked[0]["tokenizer"]
        asked.append({"text": tokenizer.decode(prompts[0]), **options})
        ids: list[int] = []
        looks = replies.pop(0)
        for i, look in enumerate(looks):
            if look is None:
                raise KeyboardInterrupt
            ids += tokenizer.encode(look, special=True).tolist()
            finish = 1 if ids[-1] == tokenizer.eos else 0
            assert i < len(looks) - 1 or finish or len(ids) >= options["max_new_tokens"] or "\n" in look
            yield SimpleNamespace(tokens=np.array([ids]), lengths=np.array([len(ids)]), finish=np.array([finish]))

    def start(model: Path, *given: list[str | None]) -> list[dict[str, Any]]:
        monkeypatch.setattr("lmjax.generation.sampler.stream", stream)
        asked[:] = [{"tokenizer": open_model(str(model)).tokenizer}]
        replies[:] = list(given)
        return asked

    return start


def test_two_turns_are_what_the_sampler_gives(model: Path, talk) -> None:
    import jax

    opened, template = open_model(str(model)), lm.data.template("chatml")
    messages = [{"role": "system", "content": "be nice"}]
    expected, said = [], []
    for number, text in enumerate(("hi", "go on")):
        messages.append({"role": "user", "content": text})
        found = lm.generation.generate(
            opened.policy,
            lm.generation.prepare(opened.policy, opened.variables, rows=1),
            [template.prompt(opened.tokenizer, messages)],
            jax.random.fold_in(jax.random.key(5), number),
            max_new_tokens=LONGEST,
            eos=opened.tokenizer.eos,
            temperature=0.7,
            processors=[lm.generation.top_k(20)],
        )
        ids = found.tokens[0, : int(found.lengths[0])].tolist()
        said += ids
        expected.append(opened.tokenizer.decode([i for i in ids if i < 36]))  # special tokens are not shown
        messages.append({"role": "assistant", "content": expected[-1]})
    assert opened.tokenizer.bos in said
    argv = ["--system", "be nice", "--seed", 5, "--temperature", 0.7, "--top-k", 20, "--every", 3]
    status, out, err = talk("hi\n\ngo on\n", *argv)
    assert (status, out) == (0, "".join(text + "\n" for text in expected))
    assert err.count(" tokens/s, the first after ") == 2 and "replies of up to 8 tokens" in err
    assert err.count("compiling") == 2  # up to 64 tokens of conversation, and up to 128


def test_replies_end_at_stop_strings_ids_lengths_and_interrupts(model: Path, talk, say) -> None:
    asked = say(
        model,
        ["he", "llo<|im_end|>"],
        ["one ", "tw", "o\n", "more"],
        ["eightletters"[:8]],
        ["half", None],
    )
    status, out, err = talk("a\nb\nc\nd\n", "--stop", "two\n", "--every", 2)
    assert (status, out) == (0, "hello\none \neightlet\nhalf\n")
    ends = [line.rpartition("ended by ")[2] for line in err.splitlines() if "ended by" in line]
    assert ends == ["eos", "stop", "length", "interrupt"]
    assert all(call["every"] == 2 and call["max_new_tokens"] == LONGEST for call in asked[1:])
    assert asked[-1]["text"].endswith("eightlet<|im_end|>\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n")


def test_plain_conversations_of_a_base_model(model: Path, talk, say) -> None:
    asked = say(model, [" ", " hi\nUs", "er: yes"], [" ok\nUsmall"[:8]])
    _, out, err = talk("a\nb\n", "--template", "plain")
    assert out == " hi\nok\nUsma\n"  # one space is the template's; what only begins a stop is given out at the end
    assert "ended by stop" in err
    assert asked[2]["text"] == "<|im_start|>User: a\nAssistant:  hi\nUser: b\nAssistant:"


def test_commands(model: Path, talk, say, tmp_path: Path) -> None:
    reply = lambda text: [f"{text}<|im_end|>"]
    asked = say(model, *map(reply, ("one", "two", "three", "four", "five", "six")))
    file = tmp_path / "talk.jsonl"
    lines = [
        "/undo", f"/save {file}", "a", "b", "/retry", "/undo", "/system be nice", "//c", f"/save {file}", "/save",
        "/nothing", "/reset", "d", f"/save {file}", "/system", "e", f"/save {tmp_path}/no/where", "/help", "/exit", "f",
    ]  # fmt: skip
    status, out, err = talk("\n".join(lines), "--run-dir", tmp_path / "run")
    assert (status, out) == (0, "one\ntwo\nthree\nfour\nfive\nsix\n")
    user = lambda text: {"role": "user", "content": text}
    assistant = lambda text: {"role": "assistant", "content": text}
    nice = {"role": "system", "content": "be nice"}
    saved = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    first = [nice, user("a"), assistant("one"), user("/c"), assistant("four")]
    assert saved == [first, [nice, user("d"), assistant("five")]]
    template = lm.data.template("chatml")
    seen = [call["text"] for call in asked[1:]]
    assert seen[1] == seen[2]  # the retry
    assert seen[3] == template.render(first[:4], add_generation_prompt=True)
    assert seen[5] == template.render([user("d"), assistant("five"), user("e")], add_generation_prompt=True)
    for sentence in ("nothing was said yet", "/save needs a file", "there is no command /nothing", "cannot write to",
                     "change the system message"):  # fmt: skip
        assert sentence in err
    kept = sorted((tmp_path / "run" / "chats").iterdir())
    assert [json.loads(path.read_text())["messages"] for path in kept] == [
        first,
        [user("d"), assistant("five"), user("e"), assistant("six")],
    ]


def test_a_conversation_that_becomes_too_long_loses_its_beginning(model: Path, talk, say) -> None:
    asked = say(model, *([f"{letter}<|im_end|>"] for letter in "vwxy"))
    lines = ["a" * 30, "b" * 40, "c" * 120, "d", "e" * 40]
    status, out, err = talk("\n".join(lines) + "\n", "--system", "nice")
    assert (status, out) == (0, "v\nw\nx\ny\n")
    assert [("nice" in call["text"], "aaa" in call["text"], "bbb" in call["text"]) for call in asked[1:]] == [
        (True, True, False),
        (True, False, True),
        (True, False, True),
        (True, False, False),
    ]
    noted = [line.split()[-2] for line in err.splitlines() if "no longer sees its first" in line]
    assert noted == ["2", "4"]
    # What does not fit is not part of the conversation. Its tokens: 14 + 128 + 11.
    assert f"the message takes 153 tokens with what belongs to it, and {CONTEXT - LONGEST} fit beside" in err


def test_control_characters_do_not_reach_a_terminal(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    speaker: Any = object.__new__(chat.Speaker)
    speaker.template = lm.data.template("chatml")
    for kind, shown in ((Terminal, "a\ufffd[2Jb\n"), (io.StringIO, "a\x1b[2Jb\n")):
        monkeypatch.setattr("sys.stdout", kind())
        assert speaker._show(SimpleNamespace(text="a\x1b[2Jb\n"), "") == "a\x1b[2Jb\n"
        assert chat.sys.stdout.getvalue() == shown


BAD = {
    "template": (["--template", "chatlm"], "did you mean 'chatml'?"),
    "marker": (["--template", "llama3"], "the chat template llama3 writes <|begin_of_text|>"),
    "long system": (["--system", "nice " * 24], "shorten it"),
    "no model": (["--model", "nowhere"], "nowhere holds no model"),
    "least": (["--min-new-tokens", "9"], "min_new_tokens is 9"),
    "every": (["--every", "0"], "every is 0"),
    "letters": (["--system", "Ω"], "character 'Ω'"),
    "cache": (["--cache", "kivi2"], "Kivi cache cannot cut the head width"),
    "min_p": (["--min-p", "2"], "min_p is 2.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case: str, talk) -> None:
    argv, sentence = BAD[case]
    status, out, err = talk("hi\n", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and sentence in err and "\n" not in err.strip()
