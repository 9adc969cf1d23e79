"""Generation from the command line: files of prompts in, JSON lines out, interrupted anywhere and gone on with."""

from __future__ import annotations

import dataclasses
import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmjax as lm
from experiments import generate
from experiments.generate_config import GenerateConfig, SamplingConfig
from experiments.prompt_files import Results, read_prompts
from experiments.support import all_processors, cache_spec, open_model, prompt_ids, sampling_processors
from lmjax import command_line
from lmjax.tokenizers import CharTokenizer

ALPHABET = string.ascii_lowercase + string.digits + '"[,]!?-:UA \n'
IDS, VOCAB, CONTEXT = 50, 56, 64  # the tokenizer has fewer ids than the model
TEXTS = ["the fox", "a", "over every hill", "and"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with an untrained model and a tokenizer of characters."""
    import jax

    folder = tmp_path_factory.mktemp("model")
    config = lm.models.llama(VOCAB, num_layers=1, embed_dim=16, num_heads=2, max_length=CONTEXT, init_std=0.3)
    lm.interop.save_huggingface(folder, config, lm.Policy(config).init(jax.random.key(0)))
    CharTokenizer(ALPHABET, bos="<|im_start|>", eos="<|im_end|>").save(folder)
    return folder


def _main(model: Path, folder: Path, *argv: Any) -> int:
    """Runs the script; few new tokens, so that rows end early or late."""
    given = ["--model", model, "--run-dir", folder, "--max-new-tokens", 12, "--slots", 3, "--seed", 1, *argv]
    try:
        command_line.main(generate.run, GenerateConfig(), argv=list(map(str, given)))
    except SystemExit as end:
        return end.code  # type: ignore[return-value]
    return 0


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()]


def _same(found: list[dict], expected: list[dict]) -> None:
    """Log-probabilities may differ in the last bits, where prompts were read in other groups."""
    plain = lambda rows: [{k: v for k, v in row.items() if "logprob" not in k} for row in rows]
    assert plain(found) == plain(expected)
    for a, b in zip(found, expected):
        assert a["mean_logprob"] == pytest.approx(b["mean_logprob"], abs=2e-5)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "prompts.txt"
    path.write_text("\n".join(TEXTS[:2]) + "\n\n" + "\n".join(TEXTS[2:]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert _main(model, folder, "--input", texts, "--samples", 2, "--logprobs") == 0
    assert {row["finish"] for row in _rows(folder)} == {"eos", "length"}
    return folder


def test_a_file_of_texts_is_continued_as_the_sampler_would(model: Path, whole: Path) -> None:
    import jax

    opened = open_model(str(model))
    tokenizer, rows = opened.tokenizer, _rows(whole)
    assert [(row["index"], row["sample"], row["prompt"]) for row in rows] == [
        (i, j, text) for i, text in enumerate(TEXTS) for j in range(2)
    ]
    found = lm.generation.generate(
        opened.policy,
        opened.variables,
        [[tokenizer.bos, *tokenizer.encode(text)] for text in TEXTS],
        jax.random.key(1),
        max_new_tokens=12,
        temperature=0.8,
        processors=[lm.generation.suppress(list(range(IDS, VOCAB)))],
        eos=tokenizer.eos,
        samples=2,
    )
    for b, row in enumerate(rows):
        n = int(found.lengths[b])
        ids = found.tokens[b, :n].tolist()
        assert row["ids"] == ids and row["tokens"] == n
        assert row["text"] == tokenizer.decode([i for i in ids if i != tokenizer.eos])
        assert row["finish"] == ("eos" if ids[-1] == tokenizer.eos else "length")
        np.testing.assert_allclose(row["logprobs"], found.logprobs[b, :n], atol=2e-5)
        assert row["mean_logprob"] == pytest.approx(float(np.mean(found.logprobs[b, :n])), abs=2e-5)


@pytest.mark.parametrize("cut", ["nothing", "torn first", "two lines", "torn fourth", "no line break", "all"])
def test_gone_on_with_equals_uninterrupted(cut: str, model: Path, texts: Path, whole: Path, tmp_path: Path) -> None:
    lines = (whole / "generations.jsonl").read_bytes().splitlines(keepends=True)
    left = {
        "nothing": b"",
        "torn first": lines[0][:20],
        "two lines": lines[5] + lines[2],  # rows are written as they finish
        "torn fourth": b"".join(lines[:3]) + lines[3][:-9],
        "no line break": b"".join(lines)[:-1],
        "all": b"".join(reversed(lines)),
    }[cut]
    (tmp_path / "generations.jsonl").write_bytes(left)
    (tmp_path / "generations.json").write_bytes((whole / "generations.json").read_bytes())
    assert _main(model, tmp_path, "--input", texts, "--samples", 2, "--logprobs") == 0
    _same(_rows(tmp_path), _rows(whole))
    assert not list(tmp_path.glob("generations-*"))
    kept = [line for line in left.splitlines(keepends=True) if line.endswith(b"\n")]
    assert set(kept) <= set((tmp_path / "generations.jsonl").read_bytes().splitlines(keepends=True))


def test_an_interrupt_leaves_what_was_finished(
    model: Path, texts: Path, whole: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    add = Results.add

    def add_and_interrupt(self, row):
        add(self, row)
        if len(self.rows) == 3:
            raise KeyboardInterrupt

    argv = ["--input", texts, "--samples", 2, "--logprobs"]
    monkeypatch.setattr(Results, "add", add_and_interrupt)
    assert _main(model, tmp_path, *argv) == 130
    assert "interrupted: 3 of 8 are in" in capsys.readouterr().out
    assert len(_rows(tmp_path)) == 3
    monkeypatch.setattr(Results, "add", add)
    assert _main(model, tmp_path, *argv) == 0
    said = capsys.readouterr()
    assert "resumed     3 of 8 were there already" in said.out
    assert re.search(r"^done 8/8  [\d,]+ tokens/s  left 0:00$", said.err, re.MULTILINE)
    _same(_rows(tmp_path), _rows(whole))


@pytest.mark.parametrize("other", ["temperature", "prompts", "model", "rule"])
def test_unfinished_results_of_another_run_are_left_alone(
    other: str, model: Path, texts: Path, whole: Path, tmp_path: Path, capsys
) -> None:
    left = b"".join((whole / "generations.jsonl").read_bytes().splitlines(keepends=True)[:3])
    (tmp_path / "generations.jsonl").write_bytes(left)
    (tmp_path / "generations.json").write_bytes((whole / "generations.json").read_bytes())
    argv = ["--input", texts, "--samples", 2, "--logprobs"]
    expected = f"with other {other}"
    if other == "temperature":
        argv, expected = [*argv, "--temperature", 0.5], "with temperature 0.8, not 0.5"
    elif other == "prompts":
        (tmp_path / "more.txt").write_text("\n".join([*TEXTS[:3], "or"]))
        argv[1] = tmp_path / "more.txt"
    elif other == "model":
        import jax

        config = open_model(str(model)).policy.config
        lm.interop.save_huggingface(tmp_path / "other", config, lm.Policy(config).init(jax.random.key(1)))
        open_model(str(model)).tokenizer.save(tmp_path / "other")
        model, expected = tmp_path / "other", "with another model"
    else:
        pytest.importorskip("llguidance")
        argv, expected = [*argv, "--regex", "[a-z]+"], 'with rule "", not "[a-z]+"'
    assert _main(model, tmp_path, *argv) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said and "3 of 8" in said and expected in said
    assert (tmp_path / "generations.jsonl").read_bytes() == left


def test_finished_results_of_another_run_are_kept(model: Path, whole: Path, tmp_path: Path, capsys) -> None:
    for name in ("generations.jsonl", "generations.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    assert _main(model, tmp_path, "--prompts", "the fox", "a") == 0
    said = capsys.readouterr().out
    assert "generations-1.jsonl" in said and "--- 2 of 2, " in said and "\nthe fox" in said
    assert (tmp_path / "generations-1.jsonl").read_bytes() == (whole / "generations.jsonl").read_bytes()
    assert [row["prompt"] for row in _rows(tmp_path)] == ["the fox", "a"]
    (tmp_path / "generations.jsonl").write_text('{"text": "of someone else"}\n')
    assert _main(model, tmp_path, "--prompts", "the fox", "a") == 0
    assert (tmp_path / "generations-2.jsonl").read_text() == '{"text": "of someone else"}\n'
    assert len(_rows(tmp_path)) == 2


def test_two_processes_do_not_write_one_file(model: Path, tmp_path: Path, capsys) -> None:
    from experiments.prompt_files import open_results

    with open_results(tmp_path, {}, 1):
        assert _main(model, tmp_path, "--prompts", "a") == 2
    assert "in use by process" in capsys.readouterr().err


def test_records_are_carried_along_and_conversations_answered(model: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    records = [{"question": "the fox", "id": 7}, {"messages": talk, "id": "x"}, {"question": "a"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    assert _main(model, tmp_path, "--input", tmp_path / "in.jsonl", "--prompt-field", "question") == 0
    rows = _rows(tmp_path)
    assert [row.get("record") for row in rows] == [{"id": 7}, {"id": "x"}, None]
    written = lm.data.template("chatml").render(talk, add_generation_prompt=True)
    assert [row["prompt"] for row in rows] == ["the fox", written, "a"] and rows[1]["messages"] == talk
    # A conversation's own template would write other ids.
    plain = tmp_path / "plain"
    argv = ["--input", tmp_path / "in.jsonl", "--prompt-field", "question", "--template", "plain"]
    assert _main(model, plain, *argv) == 0
    assert _rows(plain)[1]["prompt"] == "User: hi\nAssistant:"


def test_parquet_and_a_field_named_messages(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "messages": [1, 2]}), tmp_path / "in.parquet")
    found = read_prompts(str(tmp_path / "in.parquet"), conversations=False)
    assert [(prompt.text, prompt.record) for prompt in found] == [("a", {"messages": 1}), ("b", {"messages": 2})]
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    with pytest.raises(lm.UserError, match="not a Parquet file"):
        read_prompts(str(tmp_path / "in.parquet"))


def test_stop_texts_are_cut(model: Path, whole: Path, texts: Path, tmp_path: Path) -> None:
    before = _rows(whole)
    text = next(row["text"] for row in before if len(row["text"]) > 8)
    assert _main(model, tmp_path, "--input", texts, "--samples", 2, "--logprobs", "--stop", text[4:6]) == 0
    rows = _rows(tmp_path)
    assert any(row["finish"] == "stop" for row in rows)
    for row, old in zip(rows, before):
        cut = old["text"].partition(text[4:6])
        assert row["text"] == cut[0] and (row["finish"] == "stop") == bool(cut[1])
        assert row["ids"] == old["ids"][: row["tokens"]] and len(row["logprobs"]) == row["tokens"]
        assert row["tokens"] == (len(cut[0]) if cut[1] else old["tokens"])


def test_long_prompts_are_cut_on_request(model: Path, tmp_path: Path) -> None:
    import jax

    long = "the old fox " * 10
    assert _main(model, tmp_path / "long", "--prompts", long, "--truncate-left", "--temperature", 0) == 0
    opened = open_model(str(model))
    found = lm.generation.generate(
        opened.policy,
        opened.variables,
        [opened.tokenizer.encode(long)[-(CONTEXT - 12) :]],
        jax.random.key(0),
        max_new_tokens=12,
        temperature=0,
        processors=[lm.generation.suppress(list(range(IDS, VOCAB)))],
        eos=opened.tokenizer.eos,
    )
    row = _rows(tmp_path / "long")[0]
    ids = [i for i in found.tokens[0, : int(found.lengths[0])].tolist() if i != opened.tokenizer.eos]
    assert row["prompt"] == long and row["text"] == opened.tokenizer.decode(ids)


@pytest.mark.parametrize("rule", ["regex", "json_schema", "lark"])
def test_outputs_follow_a_grammar(rule: str, model: Path, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "array", "items": {"enum": [1, "x"]}, "minItems": 1, "maxItems": 2}
    (tmp_path / "json_schema").write_text(json.dumps(schema))
    (tmp_path / "lark").write_text('start: "go" ("!" | "?") /[0-9]/')
    given = "[ab]{3}-[0-9]{2}" if rule == "regex" else tmp_path / rule
    argv = ["--input", texts, "--samples", 2, "--max-new-tokens", 40, f"--{rule.replace('_', '-')}", given]
    assert _main(model, tmp_path / "out", *argv) == 0
    rows = _rows(tmp_path / "out")
    assert len({row["text"] for row in rows}) > 1
    for row in rows:
        assert row["finish"] == "eos", row
        if rule == "json_schema":
            value = json.loads(row["text"])
            assert 1 <= len(value) <= 2 and set(value) <= {1, "x"}
        else:
            assert re.fullmatch({"regex": given, "lark": "go[!?][0-9]"}[rule], row["text"])
    if rule != "regex":
        return
    # Its batches of three are made again as they were; only what is missing is written.
    lines = (tmp_path / "out" / "generations.jsonl").read_bytes().splitlines(keepends=True)
    marked = lines[4].replace(b'"text": "', b'"text": "kept ')
    (tmp_path / "out" / "generations.jsonl").write_bytes(lines[0] + marked + lines[5][:10])
    assert _main(model, tmp_path / "out", *argv) == 0
    _same(_rows(tmp_path / "out"), [json.loads(marked) if i == 4 else row for i, row in enumerate(rows)])


def test_each_option_is_the_processor_of_its_name() -> None:
    names = "repetition_penalty frequency_penalty presence_penalty no_repeat_ngram top_k top_p min_p typical".split()
    assert sampling_processors(SamplingConfig()) == []
    for name in names:
        value = 3 if name in ("no_repeat_ngram", "top_k") else 0.75
        (found,) = sampling_processors(dataclasses.replace(SamplingConfig(), **{name: value}))
        assert found.name == name
        assert float(next(iter(vars(found).values()))) == value


def test_what_depends_on_the_model(model: Path) -> None:
    opened = open_model(str(model))
    end = opened.tokenizer.eos
    chain = all_processors(SamplingConfig(min_new_tokens=5, top_k=4), opened, [lm.generation.top_k(4)], [end], 9)
    least, suppress, top_k = chain
    assert suppress.tokens.tolist() == list(range(IDS, VOCAB))  # ids without a text are never drawn
    assert (least.length, least.eos.tolist(), top_k.k) == (5, [end], 4)
    with pytest.raises(lm.UserError, match="min_new_tokens is 5"):
        all_processors(SamplingConfig(min_new_tokens=5), opened, [], [end], 4)
    policy = lm.Policy(lm.models.llama(8, num_layers=1, embed_dim=64, num_heads=2, max_length=8))
    wide = dataclasses.replace(opened, policy=policy)
    kinds = {name: cache_spec(name, wide) for name in ("dense", "int8", "kivi4", "kivi2")}
    assert [type(kind).__name__ for kind in kinds.values()] == ["Dense", "Int8", "Kivi", "Kivi"]
    assert (kinds["kivi4"].bits, kinds["kivi2"].bits) == (4, 2)


def test_a_document_begins_as_in_training() -> None:
    from lmjax.tokenizers import ByteTokenizer

    marked = ByteTokenizer(bos="<s>", eos="<e>")
    found = [prompt_ids(tokenizer, "a", markers).tolist() for tokenizer, markers in (
        (marked, True), (marked, False), (ByteTokenizer(eos="<e>"), True), (ByteTokenizer(), True))]  # fmt: skip
    assert found == [[256, 97], [97], [256, 97], [97]]
    assert prompt_ids(marked, "").tolist() == [256]
    with pytest.raises(lm.UserError, match="the prompt is empty"):
        prompt_ids(marked, "", markers=False)


BAD = {
    "no model": (["--model", "nowhere", "--prompts", "a"], "nowhere holds no model"),
    "no file": (["--input", "nowhere.txt"], "no file of prompts nowhere.txt"),
    "empty file": (["--input", "{tmp}/empty.txt"], "empty.txt holds no prompts"),
    "binary file": (["--input", "{tmp}/binary.txt"], "binary.txt is not UTF-8"),
    "both": (["--input", "{tmp}/empty.txt", "--prompts", "a"], "prompts and an input file"),
    "no field": (["--input", "{tmp}/field.jsonl"], "field.jsonl line 3 has no field 'prompt'"),
    "no text": (["--input", "{tmp}/number.jsonl"], "number.jsonl line 1: 'prompt' is not text but int"),
    "no JSON": (["--input", "{tmp}/broken.jsonl"], "broken.jsonl line 2 is not JSON"),
    "no object": (["--input", "{tmp}/list.jsonl"], "list.jsonl line 1 is a list"),
    "two kinds": (["--input", "{tmp}/both.jsonl"], "both.jsonl line 1 has 'prompt' and 'messages'"),
    "bad role": (["--input", "{tmp}/role.jsonl"], "role.jsonl line 1: message 0 has the role 'usr'"),
    "long prompt": (["--input", "{tmp}/long.txt"], "long.txt line 2 has 91 tokens"),
    "strange letter": (["--input", "{tmp}/strange.txt"], "strange.txt line 1: character 'é'"),
    "no room": (["--prompts", "a", "--max-new-tokens", "64"], "max_new_tokens is 64"),
    "template": (["--prompts", "a", "--template", "chatlm"], "did you mean 'chatml'?"),
    "marker": (["--input", "{tmp}/talk.jsonl", "--template", "llama3"], "talk.jsonl line 1: the chat template llama3"),
    "least": (["--prompts", "a", "--min-new-tokens", "13"], "min_new_tokens is 13"),
    "top_p": (["--prompts", "a", "--top-p", "1.5"], "top_p is 1.5"),
    "temperature": (["--prompts", "a", "--temperature", "-1"], "temperature is -1"),
    "two rules": (["--prompts", "a", "--regex", "a", "--lark", "b"], "regex and lark are both given"),
    "rule and stop": (["--prompts", "a", "--regex", "a", "--stop", "b"], "leave out one"),
    "no schema": (["--prompts", "a", "--json-schema", "nowhere.json"], "json_schema nowhere.json cannot be read"),
    "samples": (["--prompts", "a", "--samples", "0"], "samples is 0"),
    "cache": (["--prompts", "a", "--cache", "kivi4"], "Kivi cache cannot cut the head width"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case: str, model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "empty.txt": "\n\n",
        "field.jsonl": '{"prompt": "a"}\n\n{"text": "b"}\n',
        "number.jsonl": '{"prompt": 3}\n',
        "broken.jsonl": '{"prompt": "a"}\n{"prompt": \n',
        "list.jsonl": "[1]\n",
        "both.jsonl": '{"prompt": "a", "messages": []}\n',
        "role.jsonl": '{"messages": [{"role": "usr", "content": "a"}]}\n',
        "talk.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n',
        "long.txt": "short\n" + "long " * 18 + "\n",
        "strange.txt": "café\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    argv, sentence = BAD[case]
    assert _main(model, tmp_path / "out", *(part.format(tmp=tmp_path) for part in argv)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and sentence in said and "\n" not in said
    assert not (tmp_path / "out").exists()
