"""Where documents come from, and what is said of those that cannot be read."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from lmjax.data.config import SourceConfig
from lmjax.data.sources import open_source
from lmjax.errors import UserError

TEXTS = ["first\ntext", "second: é漢🙂", "third"]


def read(**kwargs):
    return list(open_source(SourceConfig(**kwargs)).read())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def json_lines(field="text"):
    return "\n".join(json.dumps({"id": i, field: t}) for i, t in enumerate(TEXTS)) + "\n\n"


def test_text_files_directories_and_globs(tmp_path):
    for i, text in enumerate(TEXTS):
        write(tmp_path / f"d{i}" / "a.txt", text)
    write(tmp_path / "d0" / "picture.png", b"\xff\xfe")
    assert read(path=str(tmp_path / "d1" / "a.txt")) == [TEXTS[1]]
    assert read(path=str(tmp_path)) == TEXTS
    assert read(path=str(tmp_path / "*" / "*.txt")) == TEXTS
    assert read(path=str(tmp_path / "d[01]" / "*.txt")) == TEXTS[:2]


def test_a_separator_parts_documents_wherever_chunks_end(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "<|end|>\n".join(TEXTS))
    assert read(path=path, separator="<|end|>") == TEXTS
    long = ["x" * (1 << 20), "é" * 700_000, "end"]  # chunk boundaries inside characters and separators
    path = write(tmp_path / "b.txt", "<|end|>".join(long))
    assert read(path=path, separator="<|end|>") == long


@pytest.mark.parametrize("zipped", [False, True])
def test_json_lines(tmp_path, zipped):
    content = json_lines("body").encode()
    path = write(tmp_path / ("a.jsonl" + ".gz" * zipped), gzip.compress(content) if zipped else content)
    assert read(path=path, text_field="body") == TEXTS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), path, row_group_size=2)
    assert read(path=path) == TEXTS
    with pytest.raises(UserError, match=r"no column 'body' .it has: text, n.: set data.text_field"):
        read(path=path, text_field="body")
    with pytest.raises(UserError, match="column 'n' holds int"):
        read(path=path, text_field="n")
    with pytest.raises(UserError, match="is not a Parquet file"):
        read(path=write(tmp_path / "b.parquet", "text"))


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "d"))
    assert read(kind="huggingface", path=str(tmp_path / "d")) == TEXTS
    with pytest.raises(UserError, match="no column 'body'"):
        read(kind="huggingface", path=str(tmp_path / "d"), text_field="body")
    with pytest.raises(UserError, match="cannot be loaded"):
        read(kind="huggingface", path=str(tmp_path / "missing"))


def test_urls_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://corpus/a.txt", "wb") as file:
        file.write(TEXTS[1].encode())
    with fsspec.open("memory://corpus/b.txt", "wb") as file:
        file.write(TEXTS[2].encode())
    assert read(path="memory://corpus/a.txt") == [TEXTS[1]]
    assert read(path="memory://corpus/*.txt") == TEXTS[1:]
    before = open_source(SourceConfig(path="memory://corpus/a.txt")).identity
    with fsspec.open("memory://corpus/a.txt", "wb") as file:
        file.write(b"something else")
    assert open_source(SourceConfig(path="memory://corpus/a.txt")).identity != before
    with pytest.raises(UserError, match="cannot be read"):
        read(path="memory://corpus/missing.txt")


def test_the_standard_library_is_there_sorted_and_without_its_tests():
    source = open_source(SourceConfig())
    texts = list(source.read())
    assert 2 << 20 < sum(map(len, texts)) < 64 << 20 and len(texts) > 200
    names = [name for name, *_ in source.identity[3]]
    assert names == sorted(names) and "json/decoder.py" in names
    assert not [n for n in names if "test" in n.split("/")[:-1] or "site-packages" in n]
    assert source.position() == source.size


def test_undecodable_files(tmp_path):
    bad = write(tmp_path / "bad.txt", b"abc\xff\xfe")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8 text \(byte 3\)"):
        read(path=bad)
    write(tmp_path / "good.txt", "good")
    source = open_source(SourceConfig(path=str(tmp_path)))
    assert list(source.read()) == ["good"] and source.skipped == 1


def test_identity_follows_the_files(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    first = open_source(SourceConfig(path=path)).identity
    assert open_source(SourceConfig(path=path)).identity == first
    write(tmp_path / "a.txt", "three")
    longer = open_source(SourceConfig(path=path)).identity
    os.utime(path, ns=(0, 0))
    before = open_source(SourceConfig(path=path)).identity
    write(tmp_path / "a.txt", "seven")
    os.utime(path, ns=(0, 0))
    assert open_source(SourceConfig(path=path)).identity != before  # same name, size and time
    touched = open_source(SourceConfig(path=path)).identity
    separated = open_source(SourceConfig(path=path, separator="x")).identity
    assert len({json.dumps(i) for i in (first, longer, touched, separated)}) == 4


@pytest.mark.parametrize(
    ("content", "field", "said"),
    [
        ('{"text": "a"}\n{"text": ', "text", "line 2 is not JSON"),
        ('{"text": "a"}', "body", "line 1 has no field 'body' .it has: text.: set data.text_field"),
        ('{"text": 3}', "text", "line 1: field 'text' is not text but int"),
        ('["text"]', "text", "line 1 has no field 'text'"),
    ],
)
def test_bad_json_lines(tmp_path, content, field, said):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(UserError, match=said):
        read(path=path, text_field=field)


def test_missing_paths(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_source(SourceConfig(path=str(tmp_path / "nothing.txt")))
    with pytest.raises(UserError, match=r"holds no \.txt"):
        open_source(SourceConfig(path=str(tmp_path)))
    path = write(tmp_path / "a.jsonl.gz", b"not gzip")
    with pytest.raises(UserError, match="not a whole gzip file"):
        read(path=path)
    with pytest.raises(UserError, match="not a whole gzip file"):
        read(path=write(tmp_path / "b.txt.gz", gzip.compress(b"x" * 1000)[:-12]))
