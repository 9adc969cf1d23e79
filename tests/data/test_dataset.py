"""`load`: from a config to batches, splits and byte counts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from lmjax.data import DataConfig, SourceConfig, load, stream
from lmjax.errors import UserError
from lmjax.tokenizers import ByteTokenizer, TokenizerConfig

WORDS = ["alpha", "beta", "gamma", "delta", "é漢🙂", "epsilon"]


def documents(count=120, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(WORDS, size=rng.integers(1, 30))) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file with one document, one with 120, another with 40 of another kind, and a root for caches."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "one.txt").write_text(" ".join(documents(40)))
    (root / "many.txt").write_text("<|end|>".join(documents()))
    (root / "other.txt").write_text("<|end|>".join(t.upper() for t in documents(40, 1)))
    (root / "few.txt").write_text("<|end|>".join(documents(3)))
    return root


def make(folder, name="many.txt", batch_size=4, load_with=None, **kwargs):
    defaults = dict(
        path=str(folder / name),
        separator="<|end|>",
        sequence_length=32,
        cache_dir=str(folder / "cache"),
        tokenizer=TokenizerConfig("byte", eos="<e>"),
        prefetch=0,
    )
    return load(DataConfig(**{**defaults, **kwargs}), batch_size, progress=False, **(load_with or {}))


def text_of(ids):
    return bytes(np.asarray(ids)[np.asarray(ids) < 256].astype(np.uint8))


def test_hash_split_partitions_the_documents(folder):
    data = make(folder)
    train, held_out = text_of(data.train_ids()), data.validation_text()
    assert text_of(data.validation_ids()) == held_out
    assert len(train) == data.train_bytes and 0.02 < len(held_out) / len(train) < 0.3
    sides = [
        {text_of(part).decode() for part in np.split(ids, data.caches[0].ends(split)[:-1])}
        for split, ids in (("train", data.train_ids()), ("validation", data.validation_ids()))
    ]
    assert sides[0] | sides[1] == set(documents()) and not sides[0] & sides[1]


def test_position_split_is_nanogpts(folder):
    data = make(folder, "one.txt", separator=None, tokenizer=TokenizerConfig("char"))
    text = (folder / "one.txt").read_text()
    cut = int(len(text) * 0.9)
    assert data.tokenizer.decode(data.train_ids()) == text[:cut]
    assert data.validation_text().decode() == text[cut:]
    few = make(folder, "few.txt")  # three documents: by hash, none might be held out
    whole = "".join(documents(3))
    assert few.validation_text().decode() == whole[int(len(whole) * 0.9) :]


def test_a_validation_path_holds_nothing_of_the_source_out(folder):
    data = make(folder, validation_path=str(folder / "other.txt"))
    assert data.train_bytes == sum(len(t.encode()) for t in documents())
    assert data.validation_text() == "".join(t.upper() for t in documents(40, 1)).encode()


TOKENIZERS = {
    "byte": TokenizerConfig("byte"),
    "byte with marks": TokenizerConfig("byte", bos="<b>", eos="<e>"),
    "char": TokenizerConfig("char", eos="<e>"),
    "bpe": TokenizerConfig("bpe", 300),
    "bpe without marks": TokenizerConfig("bpe", 300, eos=None),
    "unigram": TokenizerConfig("unigram", 300),
}


@pytest.mark.parametrize("packing", ["stream", "best_fit", "crop"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_validation_covers_the_text_once_and_counts_its_bytes(folder, tokenizer, packing):
    data = make(folder, tokenizer=TOKENIZERS[tokenizer], packing=packing)
    validation = data.validation()
    targets = np.concatenate([b.targets[b.mask > 0] for b in validation])
    assert all(b.tokens.shape == (4, 32) for b in validation)
    assert len(targets) == validation.targets
    # Exactly the ids that have something before them, each once.
    ids, ends = data.validation_ids(), data.caches[0].ends("validation")
    starts = np.concatenate([[0], ends[:-1]]) if packing != "crop" else np.array([0])
    np.testing.assert_array_equal(np.sort(targets), np.sort(np.delete(ids, starts)))
    # Two ways to count, from ids and from document lengths, agree; with marks every byte is predicted.
    assert validation.bytes == validation.text_bytes()
    if data.tokenizer.eos is not None or data.tokenizer.bos is not None:
        assert validation.bytes == len(data.validation_text())
    else:
        assert 0 < len(data.validation_text()) - validation.bytes <= 6 * len(starts)
    parts = [data.validation(max_batches=n) for n in range(1, len(validation))]
    assert [len(p) for p in parts] == list(range(1, len(validation)))
    assert all(a.bytes < b.bytes <= validation.bytes for a, b in itertools.pairwise(parts))


def test_bytes_of_a_tokenizer_without_fixed_lengths(folder):
    data = make(folder, tokenizer=TokenizerConfig("wordpiece", 200))
    assert data.tokenizer.token_bytes() is None
    whole = data.validation()
    assert whole.bytes == len(data.validation_text())
    half = data.validation(max_batches=len(whole) // 2)
    assert half.bytes == round(whole.bytes * half.targets / whole.targets)


def test_validation_is_shared_by_processes_and_indexes_like_a_list(folder):
    whole = make(folder).validation()
    parts = [make(folder, load_with=dict(process_index=p, process_count=2)).validation() for p in range(2)]
    assert parts[0].bytes == whole.bytes and len(parts[0]) == len(whole)
    for i in range(len(whole)):
        both = np.concatenate([p[i].tokens for p in parts])
        np.testing.assert_array_equal(both, whole[i].tokens)
    np.testing.assert_array_equal(whole[-1].tokens, whole[len(whole) - 1].tokens)
    assert len(whole[1:3]) == 2
    with pytest.raises(IndexError):
        whole[len(whole)]


def test_streaming_reads_the_training_documents_without_a_cache(folder, tmp_path):
    config = DataConfig(
        path=str(folder / "many.txt"),
        separator="<|end|>",
        sequence_length=32,
        cache_dir=str(tmp_path),
        tokenizer=TokenizerConfig("byte", eos="<e>"),
    )
    ids = make(folder).train_ids()
    batches = stream(config, 4)
    count = (len(ids) - 1) // (4 * 32)  # the batches that the first pass fills
    got = [next(batches) for _ in range(count)]
    flat = np.concatenate([b.tokens.reshape(-1) for b in got])
    np.testing.assert_array_equal(flat, ids[: len(flat)])
    assert not list(tmp_path.iterdir())
    for p in range(2):
        assert next(stream(config, 4, process_index=p, process_count=2)).tokens.shape == (2, 32)
    with pytest.raises(UserError, match="one source"):
        stream(dataclasses.replace(config, packing="crop"), 4)
    with pytest.raises(UserError, match="does not divide"):
        stream(config, 4, process_count=3)


def test_an_empty_file_is_named(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for kind in ("byte", "char"):
        with pytest.raises(UserError, match="is empty"):
            make(folder, path=str(tmp_path / "empty.txt"), tokenizer=TokenizerConfig(kind))
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8"):
        make(folder, path=str(tmp_path / "bad.txt"))


def test_a_mixture_draws_by_weight_and_validates_on_all(folder):
    other = SourceConfig(path=str(folder / "other.txt"), separator="<|end|>", weight=3.0)
    data = make(folder, mixture=(other,), packing="crop", tokenizer=TokenizerConfig("byte"))
    rows = np.concatenate([data.batch(s).tokens for s in range(10)])
    lower = ((rows >= 97) & (rows < 123)).any(axis=1)
    assert lower.sum() == 10  # one row of four
    assert len(data.validation_text()) == sum(len(c.validation_text()) for c in data.caches)


def test_resume_through_the_dataset(folder):
    data = make(folder, prefetch=2)
    iterator = data.train()
    got = [next(iterator) for _ in range(7)]
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    fresh = make(folder, prefetch=0).train()
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh).tokens, data.batch(7).tokens)
    np.testing.assert_array_equal(got[3].tokens, data.batch(3).tokens)
    with pytest.raises(UserError, match="other data"):
        make(folder, seed=1).train().set_state(state)


def test_a_state_holds_on_a_copy_of_the_data_and_not_on_changed_text(folder, tmp_path):
    state = make(folder).train().get_state()
    text = (folder / "many.txt").read_text()
    (tmp_path / "copy.txt").write_text(text)
    copy = make(folder, path=str(tmp_path / "copy.txt"))
    assert copy.cache_path != make(folder).cache_path
    copy.train().set_state(state)
    (tmp_path / "copy.txt").write_text(text.replace("alpha", "alphb"))
    with pytest.raises(UserError, match="other data"):
        make(folder, path=str(tmp_path / "copy.txt")).train().set_state(state)


CHANGES = {
    "kind": dict(kind="jsonl"),
    "path": dict(path="other.txt"),
    "text_field": dict(text_field="body"),
    "separator": dict(separator=" "),
    "validation_path": dict(validation_path="other.txt"),
    "seed": dict(seed=1),
    "validation_fraction": dict(validation_fraction=0.3),
    "split": dict(split="position"),
    "max_bytes": dict(max_bytes=900),
    "tokenizer": dict(tokenizer=TokenizerConfig("char", eos="<e>")),
    "sequence_length": dict(sequence_length=16),
    "packing": dict(packing="best_fit"),
    "document_markers": dict(document_markers=False),
    "prefetch": dict(prefetch=3),
    "cache_dir": dict(cache_dir="elsewhere"),
    "weight": dict(weight=3.0),
    "mixture": dict(mixture=()),
    "subset": None,
}


def test_the_table_of_changes_names_every_field():
    assert set(CHANGES) == {f.name for f in dataclasses.fields(DataConfig)}


@pytest.mark.parametrize("field", [f for f, change in CHANGES.items() if change is not None])
def test_every_field_matters(folder, field):
    """Changing a field changes the batches, the held-out text, where the cache lies or how batches are made."""
    lines = "\n".join(json.dumps({"text": t, "body": t[::-1]}) for t in documents())
    (folder / "many.jsonl").write_text(lines)
    base = dict(mixture=(SourceConfig(path=str(folder / "other.txt"), separator="<|end|>"),))
    if field in ("text_field", "kind"):
        base |= dict(path=str(folder / "many.jsonl"), kind="text" if field == "kind" else "jsonl")
    change = {k: str(folder / v) if k.endswith(("path", "dir")) else v for k, v in CHANGES[field].items()}

    def outcome(**kwargs):
        data = make(folder, **kwargs)
        iterator = data.train()
        batches = [next(iterator) for _ in range(3)]
        threads = iterator._worker._ready.maxsize if iterator._worker else 0
        iterator.close()
        leaves = [getattr(b, f).tolist() for b in batches for f in ("tokens", "targets", "mask", "segments")]
        return json.dumps([leaves, threads, data.cache_path, len(data.validation()), data.validation().bytes])

    assert outcome(**base) == outcome(**base)
    assert outcome(**base) != outcome(**{**base, **change})


def test_the_subset_of_a_dataset_matters(folder):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": documents()})
    saved = str(folder / "saved")
    datasets.DatasetDict({"train": table, "test": table.select(range(30))}).save_to_disk(saved)
    sizes = [
        make(folder, path=saved, kind="huggingface", subset=s, split="position").train_bytes for s in ("train", "test")
    ]
    assert sizes[0] > sizes[1] > 0


def test_the_standard_library_loads_by_default(tmp_path):
    data = load(DataConfig(cache_dir=str(tmp_path), max_bytes=1 << 20), 8, progress=False)
    assert data.train_bytes + len(data.validation_text()) == pytest.approx(1 << 20, abs=4)
    assert data.vocab_size == 256 and next(iter(data.validation())).tokens.shape == (8, 256)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        (dict(load_with=dict(vocab_size=100)), "257 ids but the model's vocabulary only 100"),
        (dict(sequence_length=1 << 20, packing="crop"), "too few for one row"),
        (dict(name="few.txt", split="hash", validation_fraction=0.001), "no document was held out"),
        (dict(path="/nowhere/at/all.txt"), "does not exist"),
        (dict(load_with=dict(process_count=3)), "does not divide over 3 processes"),
        (dict(tokenizer=TokenizerConfig("bpe", 100)), "too small: it needs at least 257"),
    ],
)
def test_bad_input(folder, kwargs, said):
    with pytest.raises(UserError, match=said):
        make(folder, **kwargs)


def test_a_tokenizer_that_lacks_a_character_is_named(folder, tmp_path):
    from lmjax.tokenizers import CharTokenizer

    with pytest.raises(UserError, match="is not in the alphabet"):
        make(folder, load_with=dict(tokenizer=CharTokenizer("abc")))
    ours = ByteTokenizer(eos="<stop>")
    assert make(folder, load_with=dict(tokenizer=ours)).tokenizer is ours


def test_no_held_out_text(folder):
    data = make(folder, validation_fraction=0.0)
    assert data.validation_tokens == 0
    with pytest.raises(UserError, match="no held-out text"):
        data.validation()


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(packing="x"),
        dict(split="x"),
        dict(kind="x"),
        dict(kind="stdlib", path="a"),
        dict(kind="text"),
        dict(separator=""),
        dict(validation_fraction=1.0),
        dict(validation_fraction=-0.1),
        dict(sequence_length=0),
        dict(weight=0.0),
        dict(weight=float("nan")),
        dict(max_bytes=-1),
        dict(prefetch=-1),
    ],
)
def test_a_config_that_cannot_be_is_refused_when_made(kwargs):
    with pytest.raises(UserError):
        DataConfig(**kwargs)


def test_configs_import_neither_jax_nor_numpy():
    code = (
        "import sys, lmjax.data.config, lmjax.tokenizers.config as t; lmjax.data.config.DataConfig(); "
        "print([m for m in ('jax', 'numpy', 'grain', 'tokenizers') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_config_directory_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))
    assert DataConfig().cache_root() == str(tmp_path)
    assert DataConfig(cache_dir="~/x").cache_root().endswith("/x")
    monkeypatch.delenv("LMJAX_CACHE")
    assert DataConfig().cache_root().endswith(".cache/lmjax")
