"""The token cache: right, resumable, atomic, and suspicious of what it finds on disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.data import cache as cache_module
from lmjax.data.cache import build_cache, open_cache
from lmjax.errors import UserError
from lmjax.tokenizers import ByteTokenizer, CharTokenizer

DOCUMENTS = [("validation" if i % 5 == 0 else "train", f"document {i} " * (i % 7)) for i in range(60)]
TOKENIZER = ByteTokenizer(eos="<e>")


def build(root, documents=DOCUMENTS, tokenizer=TOKENIZER, **kwargs):
    return build_cache(root, "test", lambda: iter(documents), tokenizer, **kwargs)


def contents(directory):
    """Every file but the metadata's date."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                content = file.read()
            if name == "metadata.json":
                said = json.loads(content)
                content = {k: v for k, v in said.items() if k not in ("created", "checksum")}
            found[os.path.relpath(os.path.join(folder, name), directory)] = content
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.tuples(st.sampled_from(["train", "validation"]), st.text(max_size=20)), min_size=1),
    markers=st.booleans(),
    shard=st.integers(1, 60),
)
def test_every_document_comes_back(tmp_path_factory, documents, markers, shard):
    if not any(text for _, text in documents):
        return
    made = build(tmp_path_factory.mktemp("cache"), documents, markers=markers, shard_bytes=shard)
    made.verify()
    for split in ("train", "validation"):
        texts = [text for s, text in documents if s == split and text]
        tokens, ends = made.tokens(split), made.ends(split)
        parts = np.split(tokens, ends)[: len(ends)]
        marked = [[256, *t.encode(), 256] if markers else [*t.encode()] for t in texts]
        assert [p.tolist() for p in parts] == marked
        assert made.document_bytes(split).tolist() == [len(t.encode()) for t in texts]
        said = made.metadata["splits"][split]
        assert (said["tokens"], said["documents"]) == (len(tokens), len(texts))
        assert said["bytes"] == sum(len(t.encode()) for t in texts)
    assert made.validation_text() == "".join(t for s, t in documents if s == "validation").encode()
    assert made.tokenizer().fingerprint() == TOKENIZER.fingerprint()


def test_built_once_and_named_by_what_it_depends_on(tmp_path):
    first = build(tmp_path)
    before = contents(first.directory)

    def never():
        raise AssertionError("the documents were read again")

    again = build_cache(tmp_path, "test", never, TOKENIZER)
    assert again.directory == first.directory and contents(again.directory) == before
    others = {
        build(tmp_path, tokenizer=ByteTokenizer()).directory,
        build(tmp_path, markers=False).directory,
        build_cache(tmp_path, "other", lambda: iter(DOCUMENTS), TOKENIZER).directory,
        first.directory,
    }
    assert len(others) == 4


def test_ids_above_65535_are_kept_in_four_bytes(tmp_path):
    wide = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 70_000))))
    text = chr(0x10000 + 69_999) + chr(0x10000)
    made = build(tmp_path, [("train", text)], wide)
    assert made.tokens("train").dtype == np.uint32 and made.tokens("train").tolist() == [69_999, 0]


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_an_interrupted_build_continues_and_gives_the_same_cache(tmp_path, stop):
    whole = build(tmp_path / "whole", shard_bytes=300)
    encoded = []

    class Counting(ByteTokenizer):
        def encode_batch(self, texts):
            encoded.extend(texts)
            return super().encode_batch(texts)

    def interrupted():
        shards = 0
        for document in DOCUMENTS:
            partial = tmp_path / "killed" / (os.path.basename(whole.directory) + ".partial") / "journal.json"
            shards = json.loads(partial.read_text())["documents"] if partial.exists() else 0
            if shards >= 8 * stop:
                raise KeyboardInterrupt
            yield document

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "killed", "test", interrupted, TOKENIZER, shard_bytes=300)
    counting = Counting(eos="<e>")
    continued = build(tmp_path / "killed", tokenizer=counting, shard_bytes=300)
    assert contents(continued.directory) == contents(whole.directory)
    assert len(encoded) < len([t for _, t in DOCUMENTS if t]) - 4 * stop  # finished shards were not tokenized again


def test_kill_9_in_the_middle_of_a_build_loses_at_most_a_shard(tmp_path):
    whole = build(tmp_path / "whole", shard_bytes=100)
    script = f"""
import time
from lmjax.data.cache import build_cache
from lmjax.tokenizers import ByteTokenizer
def documents():
    for i in range(60):
        time.sleep(0.02)
        yield ("validation" if i % 5 == 0 else "train"), f"document {{i}} " * (i % 7)
build_cache({str(tmp_path / "killed")!r}, "test", documents, ByteTokenizer(eos="<e>"), shard_bytes=100)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    journal = tmp_path / "killed" / (os.path.basename(whole.directory) + ".partial") / "journal.json"
    limit = time.monotonic() + 60
    while not (journal.exists() and json.loads(journal.read_text())["documents"] > 10):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = json.loads(journal.read_text())["documents"]
    assert 10 < kept < 60
    for name, said in json.loads(journal.read_text())["files"].items():
        assert (journal.parent / name).stat().st_size >= said["size"]
    with open(journal.parent / "train.tokens", "ab") as file:
        file.write(b"half a shard that was being written")
    assert contents(build(tmp_path / "killed", shard_bytes=100).directory) == contents(whole.directory)


def test_a_partial_cache_that_lost_bytes_is_begun_anew(tmp_path):
    whole = build(tmp_path / "whole", shard_bytes=100)

    def broken():
        yield from DOCUMENTS[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "b", "test", broken, TOKENIZER, shard_bytes=100)
    (partial,) = (tmp_path / "b").glob("*.partial")
    os.truncate(partial / "train.tokens", 5)
    assert contents(build(tmp_path / "b", shard_bytes=100).directory) == contents(whole.directory)


@pytest.mark.parametrize("damage", ["truncate", "grow", "remove", "metadata", "checksum", "no metadata", "format"])
def test_a_damaged_cache_is_refused_with_the_mend(tmp_path, damage):
    made = build(tmp_path)
    tokens, metadata = (os.path.join(made.directory, n) for n in ("train.tokens", "metadata.json"))
    with open(metadata) as file:
        said = json.load(file)
    if damage == "truncate":
        os.truncate(tokens, os.path.getsize(tokens) - 1)
    elif damage == "grow":
        with open(tokens, "ab") as file:
            file.write(b"x")
    elif damage == "remove":
        os.remove(tokens)
    elif damage == "metadata":
        os.truncate(metadata, 40)
    elif damage == "no metadata":
        os.remove(metadata)
    else:
        said["files"]["train.tokens"]["size"] -= 2
        if damage == "format":
            said.pop("checksum")
            said["format"] = 99
            said["checksum"] = cache_module.digest(said)
        with open(metadata, "w") as file:
            json.dump(said, file)
    with pytest.raises(UserError, match=r"delete (that directory|it) and run again") as caught:
        build(tmp_path)
    assert made.directory in str(caught.value)


def test_changed_content_is_found_by_verify(tmp_path):
    made = build(tmp_path)
    with open(os.path.join(made.directory, "train.tokens"), "r+b") as file:
        file.write(b"\xff")
    open_cache(made.directory)  # sizes alone do not show it
    with pytest.raises(UserError, match=r"content of train\.tokens has changed"):
        made.verify()


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    whole = build(tmp_path / "whole", shard_bytes=100)
    real, left = cache_module._append, [12]

    def full(path, block):
        left[0] -= 1
        if left[0] < 0:
            with open(path, "ab") as file:
                file.write(block[: len(block) // 2])  # as a disk does that fills up during a write
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, block)

    monkeypatch.setattr(cache_module, "_append", full)
    with pytest.raises(UserError, match="disk is full"):
        build(tmp_path / "full", shard_bytes=100)
    (partial,) = (tmp_path / "full").glob("*.partial")
    assert json.loads((partial / "journal.json").read_text())["documents"] > 0
    monkeypatch.undo()
    assert contents(build(tmp_path / "full", shard_bytes=100).directory) == contents(whole.directory)


def test_an_empty_corpus_and_a_wild_id_are_refused(tmp_path):
    for documents in ([], [("train", ""), ("validation", "")]):
        with pytest.raises(UserError, match="is empty"):
            build(tmp_path, documents, name="corpus.txt")

    class Wild(ByteTokenizer):
        def encode_batch(self, texts):
            return [np.array([999]) for _ in texts]

    with pytest.raises(UserError, match=r"id 999 for corpus\.txt"):
        build(tmp_path, tokenizer=Wild(), name="corpus.txt")


def test_two_builders_at_once_make_one_cache(tmp_path):
    import threading

    made, passes = [], []

    def slow():
        passes.append(1)
        for document in DOCUMENTS:
            time.sleep(0.001)
            yield document

    def work():
        made.append(build_cache(tmp_path, "test", slow, TOKENIZER))

    threads = [threading.Thread(target=work) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len({m.directory for m in made}) == 1 and len(made) == 3 and len(passes) == 1
