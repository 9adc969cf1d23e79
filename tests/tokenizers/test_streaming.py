"""Streamed text is the decoded text, whatever the tokenizer, the ids, the chunks and the stop strings."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax import tokenizers
from lmjax.errors import UserError
from lmjax.tokenizers import ByteTokenizer, CharTokenizer, SubwordTokenizer, train
from lmjax.tokenizers.base import Tokenizer
from lmjax.tokenizers.streaming import TextStream, find_stop

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 1\n" * 5,
    "é漢字🙂 naïve café, isn't it? " * 4,
]
EOS = "<|endoftext|>"
REPLACEMENT = "\ufffd"


def make_tiktoken():
    pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" q": 258, b"\xa9 x": 259}
    return tokenizers.TiktokenTokenizer(ranks, r"\p{L}+| ?[^\p{L}]+", {EOS: 260})


def make_sentencepiece(**options):
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    options = {"byte_fallback": True, "vocab_size": 400, "hard_vocab_limit": False, "pad_id": 3} | options
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=model, minloglevel=2, character_coverage=0.99, **options
    )
    return tokenizers.SentencePieceTokenizer(model.getvalue())


def make_library(model: str, decoder, specials=(EOS,)):
    """A tokenizer.json of a kind that `train` does not make: byte pieces in Llama 2's style, or a bare decoder."""
    from tokenizers import Tokenizer, models

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if model == "fallback" else []
    pieces += [*specials, "▁", "▁▁", "▁the", "the", "q", "##q", "a", "▁a", ".", "é", "w</w>", "ab", REPLACEMENT]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab, [], byte_fallback=model == "fallback"))
    inner.add_special_tokens(list(specials))
    if decoder is not None:
        inner.decoder = decoder
    return SubwordTokenizer(inner)


def make_llama():
    from tokenizers import decoders as d

    chain = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    return make_library("fallback", d.Sequence(chain))


def make_nested():
    """Byte-level letters under a decoder that is not byte-level at the top, which nothing is known of."""
    from tokenizers import Tokenizer, decoders

    inner = Tokenizer.from_str(made("bpe").inner.to_str())
    inner.decoder = decoders.Sequence([decoders.ByteLevel()])
    return SubwordTokenizer(inner)


class Stranger:
    """Somebody else's tokenizer: the protocol and nothing more."""

    bos = eos = pad = None
    vocab_size = 256
    specials: dict[str, int] = {}  # noqa: RUF012

    def encode(self, text, special=False):
        return ByteTokenizer().encode(text)

    def decode(self, ids):
        return ByteTokenizer().decode(ids)


def decoder(name, *arguments):
    from tokenizers import decoders

    return getattr(decoders, name)(*arguments)


MAKERS = {
    "byte": lambda: ByteTokenizer(bos="<b>", eos=EOS, pad="〈p〉"),
    "char": lambda: CharTokenizer("".join(CORPUS) + REPLACEMENT, eos=EOS),
    "bpe": lambda: train("bpe", CORPUS, 320, bos="<b>", eos=EOS, pad="〈p〉"),
    "unigram": lambda: train("unigram", CORPUS, 320),
    "wordpiece": lambda: train("wordpiece", CORPUS, 120),
    "tiktoken": make_tiktoken,
    "sentencepiece": lambda: make_sentencepiece(
        remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=["<|im_end|>"]
    ),
    "sentencepiece_trimming": make_sentencepiece,
    "sentencepiece_no_prefix": lambda: make_sentencepiece(add_dummy_prefix=False, remove_extra_whitespaces=False),
    "llama": make_llama,
    "metaspace": lambda: make_library("plain", decoder("Metaspace", "▁", "first")),
    "word_ends": lambda: make_library("plain", decoder("BPEDecoder", "</w>")),
    "cleanup": lambda: make_library("plain", decoder("WordPiece", "##", True)),
    "no_decoder": lambda: make_library("plain", None),
    "nested": make_nested,
    "stranger": Stranger,
}


@functools.cache
def made(name) -> Tokenizer:
    return MAKERS[name]()


@st.composite
def id_lists(draw, tokenizer: Tokenizer, longest: int = 40) -> list[int]:
    """Ids of text, ids at random, and byte pieces at random, mixed."""
    parts = []
    some_id = st.integers(0, tokenizer.vocab_size - 1)
    # Few distinct ids, drawn again and again, make the long runs that are hard.
    few = draw(st.lists(some_id, min_size=1, max_size=4))
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["text", "random", "few"]))
        if kind == "text":
            text = draw(st.sampled_from([*CORPUS, "  two  spaces ", "🙂🙂 漢字", "the.the"]))
            start = draw(st.integers(0, len(text) - 1))
            try:
                parts += tokenizer.encode(text[start : start + 12]).tolist()
            except UserError:  # an alphabet without these characters
                continue
        else:
            parts += draw(st.lists(some_id if kind == "random" else st.sampled_from(few), max_size=8))
    return parts[:longest]


def chunks(draw, ids):
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)])]


def first_stop(text: str, stop) -> tuple[int, str] | None:
    """By its definition: read on until a stop string is complete; the longest of those complete at once."""
    for end in range(len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            return end - len(max(complete, key=len)), max(complete, key=len)
    return None


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_parts_joined_are_the_text_before_the_stop(name, data):
    tokenizer = made(name)
    ids = data.draw(id_lists(tokenizer))
    whole = tokenizer.decode(ids)
    inside = [whole[a : a + n] for a in range(len(whole)) for n in (1, 2, 5)]
    likely = st.sampled_from(inside) if inside else st.just("x")
    stop = data.draw(st.lists(st.one_of(likely, st.text("theq a.", min_size=1, max_size=4)), max_size=3))
    stream = TextStream(tokenizer, stop)
    parts = [stream.push(chunk) for chunk in chunks(data.draw, ids)]
    parts.append(stream.finish())
    expected = first_stop(whole, stop)
    assert "".join(parts) == stream.text == (whole if expected is None else whole[: expected[0]])
    assert stream.stopped == (None if expected is None else expected[1])
    assert find_stop(whole, stop) == expected
    if expected is None:
        assert stream.kept == len(ids)
    else:
        assert stream.text.startswith(tokenizer.decode(ids[: stream.kept]))


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_was_given_out_holds_whatever_comes(name, data):
    tokenizer = made(name)
    ids, more = data.draw(id_lists(tokenizer)), data.draw(id_lists(tokenizer))
    stream = TextStream(tokenizer)
    given_out = stream.push(ids)
    assert tokenizer.decode([*ids, *more]).startswith(given_out)
    assert tokenizer.decode(ids).startswith(given_out)


@pytest.mark.parametrize("name", ["byte", "bpe", "unigram", "tiktoken", "sentencepiece", "sentencepiece_trimming"])
def test_whole_characters_are_given_out_at_once(name):
    tokenizer = made(name)
    text = "the 🙂 漢字 café"
    ids = tokenizer.encode(text).tolist()
    stream = TextStream(tokenizer)
    for k in range(1, len(ids) + 1):
        stream.push([ids[k - 1]])
        assert stream.text == tokenizer.decode(ids[:k]).rstrip(REPLACEMENT)
    assert stream.text == text


def test_a_run_of_byte_pieces_waits_for_its_end_where_the_decoder_judges_it_whole():
    tokenizer = made("llama")
    star, the = [f"<0x{byte:02X}>".encode() for byte in "★".encode()], tokenizer.inner.token_to_id("▁the")
    star = [tokenizer.inner.token_to_id(piece.decode()) for piece in star]
    stream = TextStream(tokenizer)
    assert stream.push(star) == "" and stream.push([the]) == "★ the"
    broken = TextStream(tokenizer)
    assert broken.push([*star, star[0]]) == "" and broken.push([the]) == 4 * REPLACEMENT + " the"

    before = TextStream(tokenizer, " the")
    before.push([*star, the])
    assert (before.text, before.kept) == ("★", 3)
    doubtful = TextStream(tokenizer)
    assert doubtful.push([tokenizer.inner.token_to_id(REPLACEMENT)]) == ""  # it might be half of a character
    assert doubtful.push([star[0]]) == REPLACEMENT


def test_a_byte_piece_behind_other_text_begins_a_character_of_its_own():
    tokenizer = made("sentencepiece")
    lead, trail = (tokenizer._inner.piece_to_id(piece) for piece in ("<0xE2>", "<0x82>"))
    stream = TextStream(tokenizer)
    assert stream.push([lead]) == ""
    assert stream.push(tokenizer.encode("the")) == tokenizer.decode([lead, *tokenizer.encode("the")])
    assert stream.push([trail]) == REPLACEMENT


@pytest.mark.parametrize("name", ["byte", "bpe", "tiktoken", "char", "wordpiece", "sentencepiece", "llama"])
def test_special_tokens_are_spelled_out_as_decode_spells_them(name):
    tokenizer = made(name)
    ids = [*tokenizer.specials.values(), *tokenizer.encode("the"), *tokenizer.specials.values()]
    stream = TextStream(tokenizer)
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_a_stop_string_is_held_back_only_while_it_may_come():
    stream = TextStream(ByteTokenizer(), ("\nUser:", "<end>"))
    assert stream.push(b"one\n") == "one"
    assert stream.push(b"Us") == ""
    assert stream.push(b"a <") == "\nUsa "
    assert stream.push(b"e") == ""
    assert stream.finish() == "<e" and stream.stopped is None


def test_invalid_bytes_are_given_out_as_soon_as_they_are_known_to_be():
    stream = TextStream(ByteTokenizer())
    assert stream.push([0xFF]) == REPLACEMENT
    assert stream.push([0xE2]) == "" and stream.push([0xE2]) == REPLACEMENT
    assert stream.push([0x82]) == "" and stream.finish() == REPLACEMENT


@pytest.mark.parametrize("name", ["byte", "bpe", "sentencepiece", "wordpiece"])
def test_an_id_stops_too(name):
    tokenizer = made(name)
    ids = tokenizer.encode("the lazy").tolist()
    last = tokenizer.encode("dog").tolist()[0]
    assert last not in ids
    stream = TextStream(tokenizer, (last, "quick"))
    stream.push([*ids, last, *ids])
    assert (stream.text, stream.stopped, stream.kept) == (tokenizer.decode(ids), last, len(ids))
    assert stream.push(ids) == "" and stream.finish() == ""


def test_an_id_that_stops_leaves_the_strings_before_it_to_be_found():
    stream = TextStream(ByteTokenizer(eos=EOS), ("b", 256))
    assert stream.push([*b"abc", 256]) == "a" and stream.stopped == "b"
    unfinished = TextStream(ByteTokenizer(eos=EOS), (256, "bx"))
    assert unfinished.push([*b"ab\xe2", 256]) == "ab" + REPLACEMENT and unfinished.stopped == 256


@pytest.mark.parametrize("name", ["byte", "char", "bpe", "tiktoken"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_kept_ids_are_the_most_whose_text_lies_before_the_stop(name, data):
    tokenizer = made(name)
    text = data.draw(st.text("the quick", max_size=20))
    ids = tokenizer.encode(text).tolist()
    stop = data.draw(st.text("the quick", min_size=1, max_size=4))
    stream = TextStream(tokenizer, stop)
    stream.push(ids)
    stream.finish()
    fits = [k for k in range(len(ids) + 1) if len(tokenizer.decode(ids[:k])) <= len(stream.text)]
    assert stream.kept == max(fits)


def test_an_id_that_reaches_into_the_stop_is_not_kept():
    tokenizer = make_tiktoken()
    ids = [*b"x", 257, *b"n"]  # x, the, n
    stream = TextStream(tokenizer, "en")
    stream.push(ids)
    assert (stream.text, stream.kept) == ("xth", 1)
    halves = TextStream(tokenizer, " x")
    halves.push([*b"y\xc3", 259])  # the second half of é comes with the stop
    assert (halves.text, halves.kept) == ("yé", 1)


@pytest.mark.parametrize("name", MAKERS)
def test_an_id_costs_the_same_however_long_the_text(name, monkeypatch):
    tokenizer = made(name)
    ids = [i for i in tokenizer.encode("the the é 🙂 q ").tolist() if name != "stranger" or i < 128]
    ids = [*ids, *tokenizer.encode("the").tolist()]
    lengths: list[int] = []
    decode = tokenizer.decode

    def counting(ids):
        lengths.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counting)
    stream = TextStream(tokenizer)
    for _ in range(50):
        stream.push(ids)
    stream.finish()
    assert max(lengths, default=0) <= len(ids)
    # Nothing shows of these; neither do they pile up.
    silent = [i for i in tokenizer.specials.values() if decode([i]) == ""]
    lengths.clear()
    stream = TextStream(tokenizer)
    assert stream.push(silent * 100) == ""
    assert max(lengths, default=0) <= 2 * len(silent)
    assert stream.push(ids) + stream.finish() == decode(ids)


def test_sentencepiece_without_text_yet_is_still_at_the_beginning():
    tokenizer = made("sentencepiece")
    space = tokenizer._inner.piece_to_id("▁")
    for ids in ([space, space, space], [tokenizer.eos, space, tokenizer.bos, space], [space, tokenizer.eos]):
        stream = TextStream(tokenizer)
        assert "".join(stream.push([i]) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_arrays_of_ids_are_taken_and_the_text_is_the_same():
    stream = TextStream(ByteTokenizer(), stop=[np.int32(65)])
    assert stream.push(np.array([104, 105], np.int32)) == "hi"
    assert stream.push(np.zeros(0, np.int32)) == ""
    assert stream.push(np.array([65, 66])) == "" and stream.stopped == 65


def test_mistakes_are_named():
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(ByteTokenizer(), ("x", ""))
    stream = TextStream(ByteTokenizer())
    with pytest.raises(UserError, match="id 256 is not in the vocabulary of 256"):
        stream.push([256])
    stream.finish()
    with pytest.raises(UserError, match="this stream of text is finished"):
        stream.push([65])
    assert stream.finish() == ""


def test_a_gap_in_a_vocabulary_is_named():
    pytest.importorskip("tiktoken")
    tokenizer = tokenizers.TiktokenTokenizer({bytes([i]): i for i in range(256)}, r"\S+|\s+", {EOS: 300})
    with pytest.raises(UserError, match="id 280 is a gap"):
        TextStream(tokenizer).push([280])


def test_a_decoder_that_rewrites_earlier_text_is_refused():
    class Backwards(Stranger):
        def decode(self, ids):
            return super().decode(ids)[::-1]

    with pytest.raises(UserError, match="changes text that it already gave"):
        TextStream(Backwards()).push(b"ab")
