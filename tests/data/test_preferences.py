"""Preference data: every form of record, what is left out and why, pairs that stay whole, however they are packed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lmjax.data.preference_config import PreferenceConfig
from lmjax.data.preferences import Answer, Pair, PairRows, judged, load_preferences, pair_batch
from lmjax.data.records import Record
from lmjax.errors import UserError
from lmjax.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer(eos="<|endoftext|>")
EOS = TOKENIZER.eos


def _config(path: Any = "", **fields: Any) -> PreferenceConfig:
    options = {"template": "none", "max_length": 24, "prefetch": 0, "validation_fraction": 0.0}
    return PreferenceConfig(path=str(path), **options | fields)


def _load(tmp_path, records, batch_size=2, **fields):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_preferences(_config(path, **fields), batch_size, TOKENIZER)


def _sums(count=30):
    return [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": str(2 * n + 1 + n % 3)} for n in range(count)]


def _said(ids, learned):
    return TOKENIZER.decode([int(i) for i in np.asarray(ids)[np.asarray(learned, bool)] if i != EOS])


U, A = "user", "assistant"
TALK = lambda *parts: [{"role": role, "content": content} for role, content in parts]
FORMS = {
    "texts": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    "messages": {"prompt": TALK((U, "1+1=")), "chosen": TALK((A, "2")), "rejected": TALK((A, "3"))},
    "whole conversations": {
        "chosen": TALK((U, "1+1="), (A, "2")),
        "rejected": TALK((U, "1+1="), (A, "3")),
    },
    "instruction": {"instruction": "1+1=", "input": "", "output": "2", "chosen": "2", "rejected": "3"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair(form):
    found = judged(Record("line 1", FORMS[form]), _config())
    assert found.second is not None and found.liked is None
    for talk, answer in ((found.first, "2"), (found.second, "3")):
        assert talk.prompt == TALK((U, "1+1=")) and talk.messages[talk.start :] == TALK((A, answer))


def test_answers_and_their_end_are_what_is_scored_and_the_last_token_is_read(tmp_path):
    data = _load(tmp_path, _sums(4), batch_size=1, shared_prompts=False)
    batch = data.rows().gather(np.array([0]))
    assert batch.pairs.shape == batch.mask[:, : batch.pairs.shape[1]].shape
    for number, segment in enumerate(range(1, 1 + 2 * int(batch.pairs.sum()))):
        inside = batch.segments[0] == segment
        tokens, targets, mask = (getattr(batch, name)[0][inside] for name in ("tokens", "targets", "mask"))
        text = TOKENIZER.decode(tokens[tokens != EOS].tolist())
        prompt, _, answer = text.partition("=")
        a, b = map(int, prompt.split("+"))
        assert a == b and (int(answer) == 2 * a) == (number % 2 == 0)
        assert _said(targets, mask) == answer
        assert targets[mask > 0][-1] == EOS, "the end is part of the answer"
        assert tokens[-1] == EOS and mask[-1] == 0, "a score is read at the end"
        assert batch.positions[0][inside].tolist() == list(range(inside.sum()))


def test_pairs_stay_whole_and_each_is_there_once(tmp_path):
    data = _load(tmp_path, _sums(30), sequence_length=64, shared_prompts=False)
    rows = data.rows()
    assert len(rows) < 30 and rows.pairs_per_row > 1
    batch = rows.gather(np.arange(len(rows)))
    assert batch.pairs.sum() == 30
    seen = []
    for b in range(len(rows)):
        for p in range(int(batch.pairs[b].sum())):
            first, second = (batch.tokens[b][batch.segments[b] == 2 * p + side] for side in (1, 2))
            texts = [TOKENIZER.decode([int(i) for i in ids if i != EOS]) for ids in (first, second)]
            prompts = [text.partition("=")[0] for text in texts]
            assert prompts[0] == prompts[1]
            seen.append(prompts[0])
    assert sorted(seen) == sorted(f"{n}+{n}" for n in range(30))


def test_what_cannot_be_learned_from_is_left_out_and_counted(tmp_path):
    odd = [
        {"prompt": "a=", "chosen": "1", "rejected": "1"},
        {"prompt": "b=", "chosen": " ", "rejected": "1"},
        {"prompt": "c" * 40, "chosen": "1", "rejected": "2"},
        {"prompt": "d=", "chosen": "1" * 50, "rejected": "2"},
    ]
    data = _load(tmp_path, [*_sums(3), *odd])
    assert data.left_out == {"equal answers": 1, "an empty answer": 1, "a prompt as long as the limit": 1}
    assert len(data.pairs) == 4 and data.cut == 1
    assert "left out: 1 with equal answers" in data.report() and "1 answers" in data.report()
    assert max(len(p.first.ids) for p in data.pairs) == 24


def test_the_split_is_by_prompt_and_validation_has_one_shape(tmp_path):
    records = [record for record in _sums(40) for _ in range(2)]
    data = _load(tmp_path, records, batch_size=4, validation_fraction=0.3)
    prompts = lambda pairs: {TOKENIZER.decode(p.first.ids[:4].tolist()) for p in pairs}
    assert data.held_out_pairs and not prompts(data.held_out_pairs) & prompts(data.pairs)
    batches = data.validation()
    assert {batch.tokens.shape for batch in batches} == {(4, 48)}
    assert sum(batch.pairs.sum() for batch in batches) == len(data.held_out_pairs)


def test_training_goes_on_bit_for_bit(tmp_path):
    data = _load(tmp_path, _sums(30))
    batches = data.train()
    first = [next(batches) for _ in range(5)]
    again = data.train()
    for _ in range(3):
        next(again)
    other = data.train()
    other.set_state(again.get_state())
    for batch in first[3:]:
        np.testing.assert_array_equal(next(other).tokens, batch.tokens)


def test_reference_log_probabilities_travel_with_their_rows(tmp_path):
    data = _load(tmp_path, _sums(30))
    rows = len(data.rows())
    cached = np.arange(rows, dtype=np.float32)[:, None] + np.zeros((rows, 48), np.float32)
    data.with_reference(cached)
    tokens = data.rows().gather(np.arange(rows)).tokens
    batch = next(data.train())
    for row, logprobs in zip(batch.tokens, batch.reference_logprobs, strict=True):
        np.testing.assert_array_equal(tokens[int(logprobs[0])], row)
    with pytest.raises(UserError, match="compute them again"):
        data.with_reference(cached[:-1])


def test_liked_and_disliked_answers_each_get_a_strangers_words(tmp_path):
    records = [{"prompt": f"{n}+{n}=", "completion": str(2 * n), "label": n % 2 == 0} for n in range(8)]
    data = _load(tmp_path, records)
    assert data.kind == "answers" and [pair.liked for pair in data.pairs] == [True, False] * 4
    for number, pair in enumerate(data.pairs):
        prompt, answer = TOKENIZER.decode([i for i in pair.second.ids.tolist() if i != EOS]).split("=")
        assert prompt == f"{number}+{number}" and answer == str(2 * ((number + 1) % 8))
    batch = data.rows().gather(np.arange(len(data.rows())))
    assert batch.desirable is not None and batch.desirable.sum() == 4 and batch.pairs.sum() == 8
    with pytest.raises(UserError, match="all answers are liked"):
        _load(tmp_path, [record | {"label": True} for record in records])


def test_margins():
    answer = Answer(np.array([1, 2]), np.array([False, True]))
    other = Answer(np.array([1, 3]), np.array([False, True]))
    batch = pair_batch([[Pair(answer, other, 0.5)], [Pair(answer, other)]], 4)
    assert batch.margins.tolist() == [[0.5], [0.0]]
    assert pair_batch([[Pair(answer, other)]], 4).margins is None
    with pytest.raises(UserError, match="does not fit 3"):
        pair_batch([[Pair(answer, other)]], 3)
    assert len(PairRows([Pair(answer, other)] * 5, 8)) == 3


BAD = {
    "no rejected": ([{"prompt": "a", "chosen": "b"}], {}, "no field 'rejected'"),
    "no prompt": ([{"chosen": "b", "rejected": "c"}], {}, "name its fields"),
    "nothing shared": (
        [{"chosen": TALK((U, "a"), (A, "b")), "rejected": TALK((U, "c"), (A, "d"))}],
        {},
        "do not share a prompt",
    ),
    "a label of words": ([{"prompt": "a", "completion": "b", "label": "good"}], {}, "give true or false"),
    "no margin": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"margin_field": "m"}, "no number in 'm'"),
    "only equal pairs": ([{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "1 with equal answers"),
    "one prompt": ([{"prompt": "a", "completion": c, "label": c == "b"} for c in "bc"], {}, "to one prompt"),
    "nothing held out": (_sums(2), {"validation_fraction": 1e-9}, "no pair was held out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path):
    records, fields, message = BAD[case]
    with pytest.raises(UserError, match=message):
        _load(tmp_path, records, **fields)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(_sums(1)[0]))
    with pytest.raises(UserError, match="no end-of-text marker"):
        load_preferences(_config(path), 1, ByteTokenizer())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="triples"), "use one of auto, pairs, answers"),
        (dict(sequence_length=40), "too short for a pair"),
        (dict(max_length=1), "at least 2"),
        (dict(validation_fraction=1.0), "lie in"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(UserError, match=message):
        _config(**fields)


def test_shared_prompts_are_there_once_and_scored_columns_are_those_of_answers(tmp_path):
    data, apart = (_load(tmp_path, _sums(30), sequence_length=64, shared_prompts=shared) for shared in (True, False))
    rows = data.rows()
    assert len(rows) < len(apart.rows())  # the same pairs in fewer rows
    batch = rows.gather(np.arange(len(rows)))
    beyond = 2 * batch.pairs.shape[1]
    assert batch.pairs.sum() == 30 and (batch.segments > beyond).any()
    assert batch.mask.sum() == sum(int(side.learned.sum()) for pair in data.pairs for side in (pair.first, pair.second))
    for b in range(len(rows)):
        for p in range(int(batch.pairs[b].sum())):
            prompt = batch.segments[b] == beyond + 2 * p + 1
            for side in (1, 2):
                own = batch.segments[b] == 2 * p + side
                assert set(batch.shared[b][own]) == {beyond + 2 * p + 1}
                assert batch.positions[b][own][0] == prompt.sum()  # it goes on where the prompt ended
        where = batch.scored[b][batch.scored[b] < batch.tokens.shape[1]]
        assert np.array_equal(where, np.flatnonzero(batch.mask[b]))
    assert _load(tmp_path, _sums(30), score_prompts=True).rows().scored is None
