"""Every tokenizer: text survives, special tokens stay special, saving changes nothing, references agree."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax import tokenizers
from lmjax.errors import UserError
from lmjax.tokenizers import ByteTokenizer, CharTokenizer, TokenizerConfig, build, load
from lmjax.tokenizers.base import Tokenizer
from lmjax.tokenizers.subword import SubwordTokenizer, from_gpt2_files, train

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 1\n" * 5,
    "é漢字🙂 naïve café " * 4,
]
EOS = "<|endoftext|>"


def make_tiktoken():
    pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" q": 258}
    return tokenizers.TiktokenTokenizer(ranks, r"\p{L}+| ?[^\p{L}]+", {EOS: 259})


def make_sentencepiece():
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=model,
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=3,
    )
    return tokenizers.SentencePieceTokenizer(model.getvalue())


MAKERS = {
    "byte": lambda: ByteTokenizer(bos="<b>", eos=EOS, pad="<p>"),
    "char": lambda: CharTokenizer.train(CORPUS, eos=EOS),
    "bpe": lambda: train("bpe", CORPUS, 320, bos="<b>", eos=EOS, pad="<p>"),
    "wordpiece": lambda: train("wordpiece", CORPUS, 120),
    "unigram": lambda: train("unigram", CORPUS, 320),
    "tiktoken": make_tiktoken,
    "sentencepiece": make_sentencepiece,
}
LOSSLESS = [name for name in MAKERS if name not in ("wordpiece",)]
ANY_TEXT = [name for name in LOSSLESS if name not in ("char", "sentencepiece")]
_made: dict[str, Tokenizer] = {}


def made(name) -> Tokenizer:
    if name not in _made:
        _made[name] = MAKERS[name]()
    return _made[name]


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_training_text_survives(name):
    for text in (*CORPUS, ""):
        ids = made(name).encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1 and (ids < made(name).vocab_size).all()
        assert made(name).decode(ids) == text


@pytest.mark.parametrize("name", ANY_TEXT)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
def test_any_text_survives(name, text):
    ids = made(name).encode(text)
    assert made(name).decode(ids) == text
    table = made(name).token_bytes()
    assert table.shape == (made(name).vocab_size,) and table[ids].sum() == len(text.encode())


def test_wordpiece_keeps_words_and_marks_the_unknown():
    tokenizer = made("wordpiece")
    assert tokenizer.decode(tokenizer.encode("the lazy fox")) == "the lazy fox"
    assert "[UNK]" in tokenizer.decode(tokenizer.encode("the Ω"))


@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_is_its_texts(name):
    for one, text in zip(made(name).encode_batch(CORPUS), CORPUS):
        assert one.dtype == np.int32
        np.testing.assert_array_equal(one, made(name).encode(text))


@pytest.mark.parametrize("name", MAKERS)
def test_saved_and_loaded_is_the_same(name, tmp_path):
    tokenizer = made(name)
    tokenizer.save(tmp_path / "t")
    again = load(tmp_path / "t")
    assert isinstance(again, Tokenizer) and type(again) is type(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint() and len(tokenizer.fingerprint()) == 16
    assert (again.bos, again.eos, again.pad, again.vocab_size, again.specials) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
        tokenizer.vocab_size,
        tokenizer.specials,
    )
    for text in CORPUS:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    without = load(tmp_path / "t", bos=None, eos=None, pad=None)
    assert (without.bos, without.eos, without.pad) == (None, None, None)
    if tokenizer.eos is not None:
        assert without.fingerprint() != tokenizer.fingerprint()


@pytest.mark.parametrize("name", [n for n in MAKERS if n not in ("char", "wordpiece", "sentencepiece")])
def test_a_document_cannot_forge_its_end(name):
    tokenizer = made(name)
    text = f"one{EOS}two"
    ids = tokenizer.encode(text)
    assert tokenizer.eos not in ids and tokenizer.decode(ids) == text
    (batched,) = tokenizer.encode_batch([text])
    np.testing.assert_array_equal(batched, ids)
    parsed = tokenizer.encode(text, special=True)
    assert (parsed == tokenizer.eos).sum() == 1 and tokenizer.decode(parsed) == text
    expected = [*tokenizer.encode("one"), tokenizer.eos, *tokenizer.encode("two")]
    assert parsed.tolist() == expected
    assert tokenizer.token_bytes()[tokenizer.eos] == 0


def test_sentencepiece_control_symbols_are_read_only_when_asked():
    tokenizer = make_sentencepiece()
    assert tokenizer.eos not in tokenizer.encode("one</s>two")
    assert (tokenizer.encode("one</s>two", special=True) == tokenizer.eos).sum() == 1
    assert tokenizer.token_bytes() is None


def test_fingerprints_tell_tokenizers_apart():
    prints = {made(name).fingerprint() for name in MAKERS} | {
        ByteTokenizer().fingerprint(),
        ByteTokenizer(eos="<x>").fingerprint(),
        CharTokenizer("ab").fingerprint(),
        CharTokenizer("abc").fingerprint(),
        train("bpe", CORPUS, 321).fingerprint(),
    }
    assert len(prints) == len(MAKERS) + 5
    # The same in another process: hashing does not depend on its seed.
    code = (
        "from lmjax.tokenizers import *; "
        "print(ByteTokenizer(eos='<e>').fingerprint(), CharTokenizer('hello').fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        ByteTokenizer(eos="<e>").fingerprint(),
        CharTokenizer("hello").fingerprint(),
    ]


def test_bpe_training_is_deterministic():
    assert len({train("bpe", CORPUS, 320).fingerprint() for _ in range(3)}) == 1


def test_scores_do_not_drift_from_save_to_save(tmp_path):
    tokenizer = made("unigram")
    for generation in range(3):
        tokenizer.save(tmp_path / str(generation))
        tokenizer = load(tmp_path / str(generation))
        assert tokenizer.fingerprint() == made("unigram").fingerprint()


def test_bpe_equals_the_library_on_its_own_file(tmp_path):
    import tokenizers as library

    made("bpe").save(tmp_path)
    reference = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*CORPUS, "unseen text, with numbers 123"):
        assert made("bpe").encode(text).tolist() == reference.encode(text).ids
    assert made("bpe").vocab_size == 320 == reference.get_vocab_size()


def test_byte_ids_are_the_bytes():
    assert ByteTokenizer().encode("é").tolist() == list("é".encode())
    assert ByteTokenizer().vocab_size == 256
    assert ByteTokenizer().decode([0xC3]) == "�"
    with_marks = ByteTokenizer(bos="<s>", eos="<s>", pad="<p>")
    assert (with_marks.bos, with_marks.eos, with_marks.pad, with_marks.vocab_size) == (256, 256, 257, 258)


def test_char_ids_are_ranks_in_the_sorted_alphabet():
    tokenizer = CharTokenizer.train(["hello", "world"])
    assert tokenizer.vocab_size == 7 and tokenizer.encode("dehlorw").tolist() == list(range(7))
    for bad, where in (("hex", "'x' .U\\+0078, at position 2"), ("h🙂", "U\\+1F642, at position 1")):
        with pytest.raises(UserError, match=where):
            tokenizer.encode(bad)


def test_ids_of_another_vocabulary_and_broken_text_are_refused():
    for name in MAKERS:
        for bad in ([made(name).vocab_size], [-1]):
            with pytest.raises(UserError, match="is not in the vocabulary"):
                made(name).decode(bad)
    for name in ("byte", "tiktoken"):
        with pytest.raises(UserError, match="lone surrogate"):
            made(name).encode("a\ud800")


def test_build_follows_the_config(tmp_path):
    assert build(TokenizerConfig()).vocab_size == 256
    assert build(TokenizerConfig(eos="<e>")).eos == 256
    assert build(TokenizerConfig("char"), CORPUS).eos is None
    trained = build(TokenizerConfig("bpe", 300), CORPUS)
    assert (trained.vocab_size, trained.eos) == (300, 0)
    assert build(TokenizerConfig("bpe", 300, eos=None), CORPUS).eos is None
    assert build(TokenizerConfig("unigram", 300, pad="<p>"), CORPUS).pad is not None
    trained.save(tmp_path)
    from_file = build(TokenizerConfig("file", path=str(tmp_path)))
    assert from_file.fingerprint() == trained.fingerprint()
    assert build(TokenizerConfig("file", path=str(tmp_path / "tokenizer.json"), eos=None)).eos is None
    with pytest.raises(UserError, match="is trained: give it texts"):
        build(TokenizerConfig("bpe", 300))
    for bad in (
        dict(kind="x"),
        dict(kind="file"),
        dict(kind="byte", path="a"),
        dict(kind="bpe", vocab_size=1),
    ):
        with pytest.raises(UserError):
            TokenizerConfig(**bad)


def test_a_padding_and_marking_tokenizer_json_does_neither(tmp_path):
    import tokenizers as library

    made("bpe").save(tmp_path)
    inner = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_padding(length=50)
    inner.enable_truncation(3)
    inner.post_processor = library.processors.TemplateProcessing("<b> $A", special_tokens=[("<b>", 0)])
    np.testing.assert_array_equal(SubwordTokenizer(inner).encode(CORPUS[0]), made("bpe").encode(CORPUS[0]))


def test_the_tokenizer_config_says_which_tokens_are_which(tmp_path):
    made("bpe").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<p>"}, "bos_token": None}))
    again = load(tmp_path)
    assert again.eos == made("bpe").pad and again.bos is None
    with pytest.raises(UserError, match="the eos token '<none>' is not in this tokenizer's vocabulary"):
        load(tmp_path, eos="<none>")


def test_tiktoken_files_by_name_by_neighbour_and_without_pattern(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"in": 256, b"ing": 257}
    lines = b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in ranks.items())
    (tmp_path / "cl100k_base.tiktoken").write_bytes(lines)
    known = load(tmp_path / "cl100k_base.tiktoken")
    assert known.eos == 100257 and known.decode(known.encode("Singing 12345\n\n  it's")) == "Singing 12345\n\n  it's"
    with pytest.raises(UserError, match="gap"):
        known.decode([5000])
    (tmp_path / "own.tiktoken").write_bytes(lines)
    with pytest.raises(UserError, match="put its split pattern and special tokens into"):
        load(tmp_path / "own.tiktoken")
    (tmp_path / "own.json").write_text(json.dumps({"pattern": r"\w+|\W+", "specials": {"<e>": 258}}))
    own = load(tmp_path / "own.tiktoken", eos="<e>")
    reference = tiktoken.Encoding("own", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<e>": 258})
    for text in CORPUS:
        assert own.encode(text).tolist() == reference.encode(text, disallowed_special=())
    assert own.encode("a<e>", special=True)[-1] == own.eos == 258


def test_the_published_patterns_are_tiktokens_own():
    public = pytest.importorskip("tiktoken_ext.openai_public")
    from lmjax.tokenizers import foreign

    assert public.r50k_pat_str == foreign._GPT2
    source = Path(public.__file__).read_text(encoding="utf-8")
    import re

    lines = re.findall(r'r"""(.*?)"""', source)
    for text in ("Hello World's 12345 ABCdef don't\r\n\n  x ÀÉ漢字🙂 '\t/", *CORPUS):
        import regex  # tiktoken depends on it

        cl100k = next(line for line in lines if "{1,3}+" in line)
        assert regex.findall(foreign._CL100K, text) == regex.findall(cl100k, text)


def test_sentencepiece_equals_the_library(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    made("sentencepiece").save(tmp_path)
    reference = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (*CORPUS, "unseen Ω text"):
        ids = made("sentencepiece").encode(text)
        assert ids.tolist() == reference.encode(text)
        assert made("sentencepiece").decode(ids) == reference.decode(ids.tolist())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.model").write_bytes(b"\x00not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load(tmp_path / "bad" / "x.model")


@pytest.mark.parametrize("name", ["tiktoken", "sentencepiece"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    made(name).save(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("lmjax_tokenizer.json", "{", "is damaged"),
        ("lmjax_tokenizer.json", '{"kind": "byte"}', "is damaged"),
        ("lmjax_tokenizer.json", '{"kind": "new", "bos": null, "eos": null, "pad": null}', "newer version"),
        ("encoder.json", "{}", "needs its merges"),
        ("a.tiktoken", "no ranks here\n", "line 1 is not 'base64 rank'|holds ranks only"),
        ("cl100k_base.tiktoken", "", "is empty"),
        ("notes.txt", "", "holds no tokenizer"),
    ],
)
def test_bad_files(tmp_path, file, content, said):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=said):
        load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "missing")


def byte_level(token):
    """GPT-2's printable spelling of bytes, as its files write tokens."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {b: chr(b) for b in kept} | {
        b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in kept)
    }
    return "".join(spelled[b] for b in token)


def test_gpt2_files_of_our_own_making(tmp_path):
    pairs = [("t", "h"), ("th", "e"), (byte_level(b" "), "the")]
    vocabulary = [byte_level(bytes([b])) for b in range(256)] + ["".join(p) for p in pairs] + [EOS]
    (tmp_path / "encoder.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(" ".join(p) for p in pairs) + "\n")
    tokenizer = load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.specials) == (260, 259, {EOS: 259})
    assert tokenizer.encode("the the").tolist() == [257, 258]
    assert tokenizer.decode(tokenizer.encode(CORPUS[2])) == CORPUS[2]
    np.testing.assert_array_equal(load(tmp_path / "encoder.json").encode("the"), [257])


def test_gpt2s_published_vocabulary(lmjax_data):
    folder = lmjax_data / "gpt2-bpe"
    if not folder.is_dir():
        pytest.skip("LMJAX_DATA holds no gpt2-bpe")
    tokenizer = from_gpt2_files(folder / "encoder.json", folder / "vocab.bpe")
    assert (tokenizer.vocab_size, tokenizer.eos) == (50257, 50256)
    assert tokenizer.encode("Hello, world! It's 2024.").tolist() == [15496, 11, 995, 0, 632, 338, 48609, 13]
    assert tokenizer.encode(f"a{EOS}", special=True).tolist() == [64, 50256]
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    from lmjax.tokenizers.foreign import _GPT2

    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    reference = tiktoken.Encoding("gpt2", pat_str=_GPT2, mergeable_ranks=ranks, special_tokens={EOS: 50256})
    for text in (*CORPUS, "  two  spaces\n\n\nand\ttabs 1234567 I'll we've"):
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())
