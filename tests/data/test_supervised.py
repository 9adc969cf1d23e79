"""Supervised data: what is learned of each form of record, the same targets whichever packing, resumed bit for bit."""

from __future__ import annotations

import collections
import gzip
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lmjax as lm
from lmjax.data import ConversationSource, SupervisedConfig, load_supervised
from lmjax.data.buckets import BucketRows
from lmjax.data.chat_jinja import from_jinja
from lmjax.data.instructions import Conversation, conversation
from lmjax.data.packing import PackedRows
from lmjax.data.records import Record, read_records
from lmjax.data.supervised import JOINED, Examples, encode
from lmjax.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer(bos="<|im_start|>", eos="<|im_end|>")
PLAIN = ByteTokenizer()
U, A, S = "user", "assistant", "system"


def _talk(*parts: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in parts]


def _write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def _sums(count: int = 40, seed: int = 0) -> list[dict[str, str]]:
    random = np.random.RandomState(seed)
    pairs = [(int(random.randint(0, 10 ** random.randint(1, 6))), int(random.randint(0, 99))) for _ in range(count)]
    return [{"prompt": f"{a}+{b}?", "completion": str(a + b)} for a, b in pairs]


def _config(path: str, **fields: Any) -> SupervisedConfig:
    return SupervisedConfig(path=path, **{"sequence_length": 64, "prefetch": 0} | fields)


# Records


def test_the_three_forms_of_a_record_are_one_conversation():
    source = ConversationSource(domain="d")
    wanted = _talk((U, "Add.\n\n1 1"), (A, "2"))
    forms = [
        {"messages": wanted},
        {"prompt": "Add.\n\n1 1", "completion": "2"},
        {"prompt": wanted[:1], "completion": wanted[1:]},
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Add.\n\n1 1", "input": "", "output": "2"},
        {"messages": [{"from": "human", "value": "Add.\n\n1 1"}, {"from": "gpt", "value": "2"}]},
    ]
    for fields in forms:
        assert conversation(Record("r", fields), source) == Conversation(wanted, 1, "d", "r")


def test_names_of_fields_system_prefix_and_tags_are_read():
    source = ConversationSource(
        prompt_field="q", completion_field="a", system="Be brief.", prefix="[{domain}] ", domain_field="task"
    )
    found = conversation(Record("r", {"q": "Why?", "a": "So.", "task": "philosophy"}), source)
    assert found == Conversation(
        _talk((S, "Be brief."), (U, "[philosophy] Why?"), (A, "So.")), 2, "philosophy", "r"
    )
    own = {"messages": _talk((S, "Mine."), (U, "x"), (A, "y"))}
    assert conversation(Record("r", own), ConversationSource(system="Be brief.")).messages == own["messages"]


def test_files_of_every_kind_hold_the_same_records(tmp_path):
    import pyarrow
    from pyarrow import parquet

    records = _sums(7)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text("\n\n" + lines + "\n")
    (tmp_path / "b.json").write_text("\n " + json.dumps(records, indent=1))
    (tmp_path / "c.json").write_text(lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz", "e.parquet"):
        assert [record.fields for record in read_records(str(tmp_path / name))] == records
    assert len(list(read_records(str(tmp_path)))) == 5 * 7
    assert next(read_records(str(tmp_path / "a.jsonl"))).where.endswith("a.jsonl line 3")


def test_parquet_messages_lose_the_keys_that_others_have(tmp_path):
    import pyarrow
    from pyarrow import parquet

    talks = [_talk((U, "a"), (A, "b")), [{"role": U, "content": "c", "name": "N"}, *_talk((A, "d"))]]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk} for talk in talks]), tmp_path / "t.parquet")
    records = read_records(str(tmp_path / "t.parquet"))
    assert [conversation(record, ConversationSource()).messages for record in records] == talks


# What is learned

TALK = Conversation(_talk((S, "s"), (U, "q1"), (A, "a1"), (U, "q2"), (A, "a2")), 4, "d", "r")


@pytest.mark.parametrize(
    ("loss_on", "wanted"),
    [("assistant", "a1<|im_end|>a2<|im_end|>"), ("last", "a2<|im_end|>"), ("completion", "a2<|im_end|>")],
)
def test_what_is_learned(loss_on, wanted):
    ids, learned = encode(TALK, TOKENIZER, lm.data.template("chatml"), loss_on)
    assert TOKENIZER.decode(ids[learned]) == wanted


def test_a_completion_of_several_turns_is_learned_whole_and_its_prompt_is_not():
    talk = TALK._replace(start=2)
    for loss_on, wanted in (("completion", "a1<|im_end|>a2<|im_end|>"), ("last", "a2<|im_end|>")):
        ids, learned = encode(talk, TOKENIZER, lm.data.template("chatml"), loss_on)
        assert TOKENIZER.decode(ids[learned]) == wanted
    ids, learned = encode(talk._replace(start=3), TOKENIZER, lm.data.template("chatml"), "completion")
    assert TOKENIZER.decode(ids[learned]) == "a2<|im_end|>"


def test_all_is_learned():
    ids, learned = encode(TALK, TOKENIZER, lm.data.template("chatml"), "all")
    assert learned.all() and TOKENIZER.decode(ids).startswith("<|im_start|>system\ns")


def test_without_a_template_texts_are_joined_between_marks():
    talk = Conversation(_talk((U, "1+1="), (A, "2")), 1, "d", "r")
    ids, learned = encode(talk, TOKENIZER, JOINED)
    assert TOKENIZER.decode(ids) == "<|im_start|>1+1=2<|im_end|>" and TOKENIZER.decode(ids[learned]) == "2<|im_end|>"
    only_eos = ByteTokenizer(eos="<e>")
    ids, learned = encode(talk, only_eos, JOINED)
    assert only_eos.decode(ids) == "<e>1+1=2<e>" and only_eos.decode(ids[learned]) == "2<e>"
    ids, learned = encode(talk, only_eos, JOINED, markers=False)
    assert only_eos.decode(ids) == "1+1=2" and only_eos.decode(ids[learned]) == "2"


LOSING = {
    "an order that is not the conversation's": "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
    "no content": "{% for m in messages %}<{{ m.role }}>{% endfor %}",
    "an empty generation block": (
        "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("case", LOSING)
def test_a_template_that_loses_the_assistants_words_is_refused(case):
    with pytest.raises(lm.UserError, match=r"^r: the chat template .*(loses the assistant|does not tell)"):
        encode(TALK, TOKENIZER, from_jinja(LOSING[case], {}))


BAD = {
    "no path": ({"path": ""}, "no conversations are named"),
    "no file": ({"path": "{tmp}/none.jsonl"}, "does not exist"),
    "no records": ({"path": "{tmp}/empty.jsonl"}, "holds no conversations"),
    "not json": ({"path": "{tmp}/broken.jsonl"}, "broken.jsonl line 2 is not JSON"),
    "not an object": ({"path": "{tmp}/numbers.json"}, "numbers.json record 0 is a int"),
    "other fields": ({"path": "{tmp}/other.jsonl"}, r"has neither .*\(it has: question\)"),
    "another type": ({"path": "{tmp}/typed.jsonl", "format": "completion"}, "'completion' is not text but int"),
    "no tag": ({"domain_field": "task"}, "has no tag in 'task'"),
    "no assistant": ({"path": "{tmp}/asked.jsonl"}, "asked.jsonl line 1: there is no message of the assistant's"),
    "a role that is none": ({"path": "{tmp}/roles.jsonl"}, "roles.jsonl line 1: message 1 has the role 'robot'"),
    "nothing fits": ({"sequence_length": 3}, "none of the training conversations"),
    "nothing held out": ({"validation_fraction": 1e-9}, "no conversation was held out"),
    "a template without its tokens": ({"template": "chatml"}, "writes <|im_start|>, which is no special token"),
    "an unknown template": ({"template": "chatmll"}, "did you mean 'chatml'"),
    "turns without a template": ({"path": "{tmp}/turns.jsonl", "template": "none"}, "has no turns"),
    "unknown loss": ({"loss_on": "user"}, "loss_on 'user' is unknown"),
    "buckets of packed rows": ({"buckets": (64,)}, "read by packing 'padded' only"),
    "buckets too short": ({"packing": "padded", "buckets": (8, 16)}, "ends at 16"),
    "buckets that fall": ({"packing": "padded", "buckets": (64, 8)}, "increase"),
    "temperature": ({"temperature": 0.0}, "must be a positive number"),
    "two names of a domain": ({"domain": "a", "domain_field": "b"}, "leave out one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, tmp_path):
    _write(tmp_path / "sums.jsonl", _sums())
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt\n')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    _write(tmp_path / "other.jsonl", [{"question": "a"}])
    _write(tmp_path / "typed.jsonl", [{"prompt": "a", "completion": 2}])
    _write(tmp_path / "asked.jsonl", [{"messages": _talk((U, "a"))}] * 20)
    _write(tmp_path / "roles.jsonl", [{"messages": _talk((U, "a"), ("robot", "b"), (A, "c"))}] * 20)
    _write(tmp_path / "turns.jsonl", [{"messages": _talk((U, "a"), (A, "b"), (U, "c"), (A, "d"))}] * 20)
    fields, message = BAD[case]
    fields = {"path": "{tmp}/sums.jsonl"} | fields
    with pytest.raises(lm.UserError, match=message) as caught:
        load_supervised(_config(**fields | {"path": fields["path"].format(tmp=tmp_path)}), 4, PLAIN)
    assert "\n" not in str(caught.value)


# Lengths


def test_long_conversations_are_cut_or_left_out_and_counted(tmp_path):
    texts = [("ab", "c" * 5), ("ab", "c" * 60), ("q" * 80, "never seen")]
    path = _write(tmp_path / "t.jsonl", [{"prompt": a, "completion": b} for a, b in texts for _ in range(5)])
    for too_long, (kept, cut, left_out) in {"cut": (10, 5, 5), "drop": (5, 0, 10)}.items():
        data = load_supervised(_config(path, too_long=too_long, validation_fraction=0.0), 4, PLAIN)
        examples = data.train_examples["t"]
        assert (len(examples), data.cut, data.left_out) == (kept, cut, left_out)
        assert np.diff(examples.ends, prepend=0).max() <= 65
        assert f"{cut} were longer than 64 tokens and cut; {left_out} left out" in data.report()


# Rows


def _targets(batches: Any) -> collections.Counter:
    """How often each (document, place, target) is learned."""
    found: collections.Counter = collections.Counter()
    for batch in batches:
        for row in range(len(batch.tokens)):
            for segment in set(batch.segments[row].tolist()) - {0}:
                own = batch.segments[row] == segment
                document = tuple(batch.tokens[row][own].tolist())
                assert batch.positions[row][own].tolist() == list(range(own.sum()))
                for place in np.flatnonzero(batch.mask[row][own]):
                    found[document, int(place), int(batch.targets[row][own][place])] += 1
        assert not batch.mask[batch.segments == 0].any()
    return found


@pytest.fixture
def sums(tmp_path: Path) -> str:
    records = _sums(37)
    records = [record for i, record in enumerate(records) if record not in records[:i]]
    assert len(records) > 30
    return _write(tmp_path / "sums.jsonl", records)


@pytest.mark.parametrize(
    "fields",
    [{}, {"packing": "padded"}, {"packing": "padded", "buckets": (34, 38, 64)}],
    ids=["best_fit", "padded", "edges"],
)
def test_an_epoch_has_each_target_once(sums, fields):
    data = load_supervised(_config(sums, validation_fraction=0.0, **fields), 1, PLAIN)
    found = _targets(data.batch(step) for step in range(data.rows))
    assert set(found.values()) == {1}
    assert sum(found.values()) == data.train_examples["sums"].targets
    answers = sorted(json.loads(line)["completion"] for line in Path(sums).read_text().splitlines())
    said: dict[Any, list[int]] = {}
    for document, _, target in sorted(found):
        said.setdefault(document, []).append(target)
    assert sorted(PLAIN.decode(ids) for ids in said.values()) == sorted(f" {answer}\nUser:" for answer in answers)


def test_batches_of_a_bucket_are_of_one_length_and_of_few(sums):
    data = load_supervised(_config(sums, packing="padded", buckets=(34, 37, 40, 64), validation_fraction=0.0), 4, PLAIN)
    batches = [data.batch(step) for step in range(60)]
    lengths = {batch.tokens.shape[1] for batch in batches}
    assert len(lengths) > 1 and lengths <= {34, 37, 40, 64}
    assert {batch.tokens.shape[0] for batch in batches} == {4}
    # Padding is little: short conversations stand in short rows.
    assert sum(batch.segments.sum() for batch in batches) > 0.8 * sum(batch.segments.size for batch in batches)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 200])
def test_buckets_give_every_example_once_in_a_window(count):
    random = np.random.RandomState(count)
    lengths = random.randint(2, 34, count)
    ends = np.cumsum(lengths)
    rows = BucketRows(np.arange(ends[-1]), np.ones(ends[-1], bool), ends, [count], (4, 16, 32, 64), 4)
    window = -(-count // 4) * 4
    drawn = rows.draw(np.arange(3 * window), 7)
    assert (rows.draw(np.arange(3 * window)[::-1], 7)[::-1] == drawn).all()
    seen = collections.Counter((drawn % count).tolist())
    assert max(seen.values()) - min(seen.values()) <= 1
    for batch in drawn.reshape(-1, 4):
        assert len(set((batch // count).tolist())) == 1
        made = rows.gather(batch)
        assert made.tokens.shape[1] >= max(lengths[batch % count]) - 1
        np.testing.assert_array_equal(made.segments.sum(1), lengths[batch % count] - 1)


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_two_processes_share_the_batches_of_one(sums, packing):
    config = _config(sums, packing=packing, buckets=(34, 38, 64) if packing == "padded" else ())
    whole = load_supervised(config, 4, PLAIN)
    parts = [load_supervised(config, 4, PLAIN, process_index=i, process_count=2) for i in range(2)]
    for step in range(12):
        joined = np.concatenate([part.batch(step).tokens for part in parts])
        np.testing.assert_array_equal(joined, whole.batch(step).tokens)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_resumed_bit_for_bit(sums, packing, prefetch):
    config = _config(sums, packing=packing, prefetch=prefetch)
    iterator = load_supervised(config, 4, PLAIN).train()
    for _ in range(9):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator) for _ in range(15)]
    again = load_supervised(config, 4, PLAIN).train()
    again.set_state(state)
    for expected in rest:
        found = next(again)
        for name in ("tokens", "targets", "mask", "segments", "positions"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    iterator.close(), again.close()
    other = load_supervised(_config(sums, packing=packing, seed=1), 4, PLAIN).train()
    with pytest.raises(lm.UserError, match="taken on other data"):
        other.set_state(state)


def test_packed_padded_and_split_rows_have_the_same_loss_and_gradient(sums):
    """Law 1."""
    policy = lm.Policy(lm.models.small(256, num_layers=1, embed_dim=16, num_heads=2, max_length=64, init_std=0.3))
    variables = policy.init(jax.random.key(0))
    data = load_supervised(_config(sums, validation_fraction=0.0), 4, PLAIN)
    examples = data.train_examples["sums"]
    packed = PackedRows(examples.tokens, 64, examples.ends, examples.learned)
    padded = BucketRows(examples.tokens, examples.learned, examples.ends, [len(examples)], (64,), len(examples))

    def loss(variables, batch):
        return lm.objectives.evaluation.evaluate(lm.objectives.cross_entropy(), policy, variables, batch).loss

    results = [
        jax.jit(jax.value_and_grad(loss))(variables, rows.gather(np.arange(len(rows)))) for rows in (packed, padded)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(results[1][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# Mixtures and held-out conversations


def _tagged(tmp_path: Path, sizes: dict[str, int]) -> str:
    records = [
        {"prompt": f"{name} {i}?", "completion": name[0], "task": name} for name, n in sizes.items() for i in range(n)
    ]
    return _write(tmp_path / "mixed.jsonl", records)


def _shares(data: Any, steps: int) -> dict[str, float]:
    counts: collections.Counter = collections.Counter()
    for step in range(steps):
        batch = data.batch(step)
        for row, segments in zip(batch.tokens, batch.segments):
            text = PLAIN.decode(row[segments > 0])
            for name in data.rates:
                counts[name] += text.count(f"User: {name} ")
    return {name: count / sum(counts.values()) for name, count in counts.items()}


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_a_mixture_is_drawn_as_t5_says(tmp_path, packing):
    sizes = {"large": 90, "middle": 40, "tiny": 10}
    path = _tagged(tmp_path, sizes)
    for temperature, limit in ((1.0, 0), (2.0, 0), (4.0, 40), (1.0, 40)):
        config = _config(
            path, domain_field="task", temperature=temperature, limit=limit, packing=packing, validation_fraction=0.0
        )
        data = load_supervised(config, 4, PLAIN)
        raw = {name: min(n, limit or n) ** (1 / temperature) for name, n in sizes.items()}
        for name, share in _shares(data, 400).items():
            assert data.rates[name] == pytest.approx(raw[name] / sum(raw.values()))
            assert share == pytest.approx(data.rates[name], abs=0.02)


def test_sources_of_a_mixture_have_their_own_forms_and_weights(tmp_path):
    first = _write(tmp_path / "one.jsonl", [{"q": f"one {i}?", "a": "x"} for i in range(30)])
    second = _write(tmp_path / "two.jsonl", [{"messages": _talk((U, f"two {i}?"), (A, "y"))} for i in range(30)])
    config = SupervisedConfig(
        path=first, prompt_field="q", completion_field="a", mixture=(ConversationSource(second, weight=3.0),),
        sequence_length=64, prefetch=0, validation_fraction=0.2,
    )  # fmt: skip
    data = load_supervised(config, 4, PLAIN)
    n = {name: len(each) for name, each in data.train_examples.items()}
    assert data.rates["two"] == pytest.approx(3 * n["two"] / (n["one"] + 3 * n["two"]))
    assert _shares(data, 300)["two"] == pytest.approx(data.rates["two"], abs=0.02)
    assert set(data.validation()) == {"one", "two"} == set(data.held_out)


def test_held_out_conversations_are_no_training_conversations(tmp_path):
    records = [{"prompt": f"{i % 60}?", "completion": str(i)} for i in range(120)]  # two answers a prompt
    path = _write(tmp_path / "t.jsonl", records)
    data = load_supervised(_config(path, validation_fraction=0.25, loss_on="last"), 4, PLAIN)
    held_out = {talk.prompt[0]["content"] for talk in data.held_out["t"]}
    assert 6 <= len(held_out) <= 26 and len(data.held_out["t"]) == 2 * len(held_out)
    texts = "".join(PLAIN.decode(row) for step in range(data.rows // 4 + 1) for row in data.batch(step).tokens)
    assert not any(f"User: {prompt}" in texts for prompt in held_out)
    batches = data.validation(batch_size=3)["t"]
    assert batches.targets == data.held_out_examples["t"].targets == sum(int(b.mask.sum()) for b in batches)
    wanted = sum(len(f" {talk.messages[-1]['content']}\nUser:") for talk in data.held_out["t"])
    assert batches.bytes == wanted
    more = load_supervised(_config(path, validation_path=path), 4, PLAIN)
    assert len(more.held_out["t"]) == len(records) == len(more.train_examples["t"])


def test_the_prompt_of_a_sample_is_what_was_trained_on(tmp_path):
    path = _write(tmp_path / "t.jsonl", [{"prompt": f"{i}?", "completion": "x"} for i in range(40)])
    for tokenizer, template in ((TOKENIZER, "auto"), (PLAIN, "plain"), (ByteTokenizer(eos="<e>"), "none")):
        data = load_supervised(_config(path, template=template), 4, tokenizer)
        talk = data.held_out["t"][0]
        ids, learned = encode(talk, tokenizer, data.template)
        prompt = data.prompt_ids(talk)
        np.testing.assert_array_equal(prompt, ids[: len(prompt)])
        assert int(np.flatnonzero(learned)[0]) == len(prompt)


def test_examples_without_a_target_are_left_out():
    encoded = [(np.arange(5), np.array([True] + 4 * [False])), (np.arange(5), np.ones(5, bool))]
    found = Examples.of(encoded, 8, "cut")
    assert (len(found), found.left_out, found.targets) == (1, 1, 4)
