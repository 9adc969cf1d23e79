"""Grammars: masks against brute force, random schemas with random logits, and what is refused."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lmjax.errors import UserError
from lmjax.generation.constraints import fill_masks, packed_width, unpack
from lmjax.generation.grammars import Grammar, json_object, json_schema, lark, regex
from lmjax.tokenizers import ByteTokenizer, CharTokenizer, SubwordTokenizer, subword

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

BYTE = ByteTokenizer(eos="<eos>")
EOS = 256


@functools.cache
def bpe(eos: str | None = "<|endoftext|>") -> SubwordTokenizer:
    """A byte-level vocabulary with many tokens that span several pieces of JSON."""
    texts = ['{"a":true,"b":[null,false,12],"name":"cat cart dog"} {"a": 1.5, "bc": [[], {}, "é"]}'] * 9
    return subword.train("bpe", texts, 340, eos=eos)


def spell(tokenizer: Any, i: int) -> bytes | None:
    """The bytes of a token by the tokenizer's own `decode`; None of bytes that are no text on their own."""
    if i in tokenizer.specials.values():
        return None
    text = tokenizer.decode([i])
    return None if "\ufffd" in text else text.encode()


def draw(rng: np.random.Generator, z_V: np.ndarray, mask_V: np.ndarray) -> int:
    return int(np.argmax(np.where(mask_V, z_V + rng.gumbel(size=z_V.shape), -np.inf)))


@functools.cache
def closing_ids(tokenizer: Any) -> list[int]:
    closing = [i for i in range(tokenizer.vocab_size) if spell(tokenizer, i) in (b'"', b"]", b"}", b")")]
    return closing if tokenizer.eos is None else [*closing, tokenizer.eos]


def follow(grammar: Grammar, tokenizer: Any, rng: np.random.Generator, limit: int = 4000) -> str:
    """Random logits under the grammar until it ends; signs that close something grow likelier with time."""
    row, closing = grammar.fresh(), closing_ids(tokenizer)
    scale = rng.choice([0.3, 1.0, 3.0])
    while not row.done:
        assert len(row.said) < limit, tokenizer.decode(row.said)
        z_V = scale * rng.normal(size=grammar.vocab_size)
        z_V[closing] += len(row.said) / 30
        row.advance(draw(rng, z_V, row.mask()))
    assert row.complete
    return tokenizer.decode(row.said[:-1] if tokenizer.eos is not None else row.said)


# ---- masks against brute force ------------------------------------------------------------------------------

OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "bc": {"enum": ["cat", "cart", None]}},
    "required": ["a"],
    "additionalProperties": False,
}
OBJECTS = [{"a": a} | b for a in (True, False) for b in ({}, {"bc": "cat"}, {"bc": "cart"}, {"bc": None})]
FINITE: dict[str, tuple[Callable[..., Grammar], list[str]]] = {
    "schema": (
        functools.partial(json_schema, OBJECT, whitespace=False),
        [json.dumps(o, separators=(",", ":")) for o in OBJECTS],
    ),
    "regex": (
        functools.partial(regex, "(cat|cart|dog){1,2}"),
        ["".join(w) for n in (1, 2) for w in itertools.product(("cat", "cart", "dog"), repeat=n)],
    ),
    "lark": (functools.partial(lark, 'start: "a" (b | "true")\nb: "[" "a"? "]"'), ["a[]", "a[a]", "atrue"]),
    "empty": (functools.partial(regex, "(no)?"), ["", "no"]),
    "nothing": (functools.partial(regex, ""), [""]),
}


def check_masks(grammar: Grammar, language: list[bytes], spelled: list[bytes | None], eos: int | None) -> None:
    """Every mask of every text's every spelling: a token is allowed iff some text of the language goes on with it."""
    seen: set[bytes] = set()
    waiting = [(b"", grammar.fresh())]
    while waiting:
        text, row = waiting.pop()
        expected = np.zeros(grammar.vocab_size, bool)
        for i, token in enumerate(spelled):
            expected[i] = bool(token) and any(whole.startswith(text + token) for whole in language)
        assert row.complete == (text in language)
        if eos is not None:
            expected[eos] = text in language
        elif not expected.any():
            assert row.done and row.mask().all()
            continue
        assert not row.done
        np.testing.assert_array_equal(row.mask(), expected, err_msg=repr(text))
        for i in np.flatnonzero(expected):
            branch = row.copy()
            branch.advance(i)
            if i == eos:
                assert branch.done and branch.complete
            elif text + spelled[i] not in seen:
                seen.add(text + spelled[i])
                waiting.append((text + spelled[i], branch))
    assert seen >= set(language) - {b""}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "bpe, no eos", "byte, no eos"])
def test_masks_are_those_of_brute_force(name: str, kind: str) -> None:
    make, language = FINITE[name]
    tokenizer = {
        "byte": BYTE,
        "byte, no eos": ByteTokenizer(),
        "char": CharTokenizer("".join(language) + "xyz", eos="<eos>"),
        "bpe": bpe(),
        "bpe, no eos": bpe(None),
    }[kind]
    spelled = [spell(tokenizer, i) for i in range(tokenizer.vocab_size)]
    check_masks(make(tokenizer), [text.encode() for text in language], spelled, tokenizer.eos)


def test_masks_cut_characters_into_bytes() -> None:
    spelled = [bytes([i]) for i in range(256)] + [None]
    language = [text.encode() for text in ("é", "ê", "éa", "€", "𝄞")]
    check_masks(regex("é|ê|éa|€|𝄞", BYTE), language, spelled, EOS)


def sentencepiece_like(decoder: Any) -> SubwordTokenizer:
    """Llama 2's kind of vocabulary: ▁ for a space, and bytes as <0x..> tokens."""
    from tokenizers import Tokenizer, models

    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁cat", "ca", "▁ca"]
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.BPE(vocabulary, [("c", "a"), ("▁", "ca")], byte_fallback=True, unk_token="<unk>"))
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.decoder = decoder
    return SubwordTokenizer(inner)


@pytest.mark.parametrize("kind", ["replace", "metaspace"])
def test_masks_of_a_vocabulary_with_spaces_and_bytes(kind: str) -> None:
    from tokenizers import decoders

    space = decoders.Metaspace() if kind == "metaspace" else decoders.Replace("▁", " ")
    tokenizer = sentencepiece_like(decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse()]))
    spelled = [None] * 3 + [bytes([i]) for i in range(256)] + [b" ", b"c", b"a", b"t", b"ca", b" ca"]
    check_masks(regex(" ?cat( cat)?", tokenizer), [b"cat", b" cat", b"cat cat", b" cat cat"], spelled, tokenizer.eos)


def test_masks_of_tiktoken() -> None:
    pytest.importorskip("tiktoken")
    from lmjax.tokenizers import TiktokenTokenizer

    ranks = {bytes([i]): i for i in range(256)} | {b"ca": 256, b"cat": 257, b"\xc3\xa9": 258}
    tokenizer = TiktokenTokenizer(ranks, r"\w+|\W+", {"<|endoftext|>": 260})
    spelled = [*ranks, None, None]
    language = [text.encode() for text in ("cat", "é", "catcat", "caté", "écat", "éé")]
    check_masks(regex("(cat|é){1,2}", tokenizer), language, spelled, 260)


def test_masks_of_sentencepiece(tmp_path: Any) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from lmjax.tokenizers import SentencePieceTokenizer

    (tmp_path / "text").write_text("the cat and the cart\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=280, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, model_type="bpe",
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer((tmp_path / "m.model").read_bytes())
    inner = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    spelled: list[bytes | None] = []
    for i in range(tokenizer.vocab_size):
        piece = inner.id_to_piece(i)
        spelled.append(bytes([int(piece[3:5], 16)]) if inner.is_byte(i) else piece.replace("▁", " ").encode())
        if inner.is_control(i) or inner.is_unknown(i):
            spelled[-1] = None
    language = [(a + b).encode() for a in (" the", "the") for b in ("", " cat", " cart")]
    check_masks(regex(" ?the( car?t)?", tokenizer), language, spelled, tokenizer.eos)


@pytest.mark.parametrize("V", [257, 287, 288, 300, 320])
@pytest.mark.parametrize("eos", [True, False])
def test_a_model_may_have_more_ids_than_its_tokenizer(V: int, eos: bool) -> None:
    tokenizer = BYTE if eos else ByteTokenizer()
    spelled = [bytes([i]) for i in range(256)] + [None] * (V - 256)
    check_masks(regex("a|ab", tokenizer, V), [b"a", b"ab"], spelled, EOS if eos else None)


# ---- whole texts --------------------------------------------------------------------------------------------


def random_schema(rng: np.random.Generator) -> dict:
    """A JSON schema with objects, arrays, numbers, strings, enums, alternatives and references."""

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def pick(options: list) -> Any:
        return options[rng.integers(len(options))]

    def between(low: int, high: int) -> tuple[int, int]:
        a, b = sorted(int(x) for x in rng.integers(low, high + 1, 2))
        return a, b

    def value(depth: int) -> Any:
        made: list[Any] = [None, True, False, int(rng.integers(-99, 99)), 0.25, "", 'é\n"\\', "x/y", [], {}]
        if depth:
            made += [[value(depth - 1), value(0)], {"k": value(depth - 1), "": value(0)}]
        return pick(made)

    def integer() -> dict:
        low, high = between(-1200, 1200)
        step = int(rng.integers(1, 8))
        return pick(
            [
                {"type": "integer", "minimum": low, "maximum": high},
                {"type": "integer", "exclusiveMinimum": low, "maximum": high + 1},
                {"type": "integer", "multipleOf": step, "minimum": low, "maximum": high + step},
                {"allOf": [{"type": "integer", "minimum": low}, {"maximum": high}]},
                {"type": "integer"},
            ]
        )

    def string() -> dict:
        least, most = between(0, 6)
        return pick(
            [
                {"type": "string", "minLength": least, "maxLength": most},
                {"type": "string", "pattern": "^[a-c]{1,3}(-[0-9]{2})?$"},
                {"type": "string", "pattern": "[xyz]{2}", "maxLength": 7},
                {"type": "string", "pattern": "^(é|[^a-z]){2,4}$"},
                {"type": "string", "format": pick(["ipv4", "uuid"])},
                {"type": "string"},
            ]
        )

    def number() -> dict:
        low, high = between(-50, 50)
        return pick([{"type": "number"}, {"type": "number", "minimum": low / 4, "maximum": high / 2 + 13}])

    def array(depth: int) -> dict:
        least, most = between(0, 3)
        schema: dict = {"type": "array", "minItems": least, "maxItems": most, "items": any_of(depth - 1)}
        if chance(0.3):
            first = [any_of(depth - 1) for _ in range(rng.integers(1, 3))]
            schema |= {"prefixItems": first, "maxItems": most + 2}
            if least <= len(first) and chance(0.5):
                schema["items"] = False
        return schema

    def object_(depth: int) -> dict:
        if chance(0.2):  # names that are free
            return {"type": "object", "additionalProperties": any_of(depth - 1), "maxProperties": 2}
        names = ["a", "b c", 'q"', "é", "a_long_name"][: rng.integers(0, 6)]
        rng.shuffle(names)
        required = [name for name in names if chance(0.5)]
        schema: dict = {"type": "object", "properties": {name: any_of(depth - 1) for name in names}}
        schema |= {"required": required, "additionalProperties": False}
        if chance(0.2):
            schema |= {"patternProperties": {"^x[0-9]{1,2}$": any_of(depth - 1)}}
        elif names and not required and chance(0.5):
            schema["minProperties"] = 1
        return schema

    def any_of(depth: int) -> dict:
        plain = [integer, string, number, lambda: {"type": "boolean"}, lambda: {"type": "null"}]
        plain += [lambda: {"const": value(2)}, lambda: {"enum": [value(2) for _ in range(rng.integers(1, 5))]}]
        plain += [lambda: {"type": ["string", "null"], "maxLength": 4}, lambda: {"$ref": "#/$defs/node"}]
        if depth <= 0:
            return pick(plain)()
        nested = [lambda: array(depth), lambda: object_(depth)]
        nested += [lambda: {"anyOf": [any_of(depth - 1) for _ in range(rng.integers(1, 4))]}]
        return pick(plain if chance(0.15) else nested)()

    node = {"type": "object", "properties": {"value": integer(), "next": {"$ref": "#/$defs/maybe"}}}
    node |= {"required": ["next"], "additionalProperties": False}
    maybe = {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"$ref": "#/$defs/node"}]}
    return {
        "$schema": jsonschema.Draft202012Validator.META_SCHEMA["$id"],
        **any_of(3),
        "$defs": {"node": node, "maybe": maybe},
    }


def check_random_schemas(seeds: range) -> None:
    checker = jsonschema.FormatChecker(["ipv4", "uuid"])
    kinds: set[str] = set()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        schema = random_schema(rng)
        tokenizer = BYTE if seed % 2 else bpe()
        grammar = json_schema(schema, tokenizer, tokenizer.vocab_size + seed % 40, whitespace=seed % 3 > 0)
        text = follow(grammar, tokenizer, rng)
        instance = json.loads(text)
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(instance)
        kinds.add(type(instance).__name__)
    assert kinds >= {"dict", "list", "str", "int"}


def test_random_schemas_with_random_logits() -> None:
    check_random_schemas(range(100))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_random_schemas_with_random_logits(part: int) -> None:
    check_random_schemas(range(100 * part, 100 * (part + 1)))


def test_a_batch_of_grammars_through_a_jitted_step() -> None:
    tokenizer, B = bpe(), 6
    V = tokenizer.vocab_size + 20
    grammars = [json_schema(OBJECT, tokenizer, V), regex("[a-c]{2,30}", tokenizer, V), json_object(tokenizer, V)]
    rows = [grammar.fresh() for grammar in grammars for _ in range(B // 3)]
    bits_BW = np.zeros((B, packed_width(V)), np.uint32)
    closing = np.array([tokenizer.eos, *tokenizer.encode('"}').tolist()])

    @jax.jit
    def step(bits_BW: jax.Array, key: jax.Array, bonus: jax.Array) -> jax.Array:
        z_BV = jax.random.normal(key, (B, V)).at[:, closing].add(bonus)
        return jax.random.categorical(key, jnp.where(unpack(bits_BW, V), z_BV, -jnp.inf))

    for n in range(400):
        if all(row.done for row in rows):
            break
        fill_masks(rows, bits_BW)
        for row, token in zip(rows, step(bits_BW, jax.random.key(n), n / 20).tolist(), strict=True):
            if not row.done:
                row.advance(token)
    texts = [tokenizer.decode(row.said[:-1]) for row in rows]
    assert all(row.done and row.complete for row in rows), texts
    for text in texts[:2]:
        jsonschema.validate(json.loads(text), OBJECT)
    assert all(re.fullmatch("[a-c]{2,30}", text) for text in texts[2:4])
    assert all(isinstance(json.loads(text), dict) for text in texts[4:])


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{3}-[0-9]{4}",
        r"(yes|no|maybe)( (yes|no))*",
        r"\$?[1-9][0-9]*(\.[0-9]{2})?",
        r"(?i:true|false)",
        r"[^ a-z]{1,9}",
        r"/usr/[a-z]+\.py|\"q\"",
        r"^(é|ü)+x$",
    ],
)
def test_regexes_match_as_a_whole(pattern: str) -> None:
    rng = np.random.default_rng(0)
    for tokenizer in (BYTE, bpe()):
        grammar = regex(pattern, tokenizer)
        for _ in range(5):
            assert re.fullmatch(pattern, follow(grammar, tokenizer, rng))


ARITHMETIC = r"""
start: sum
sum: product | sum ("+" | "-") product
product: atom | product "*" atom
atom: NUMBER | "-" atom | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/ | "0"
%ignore / /
"""


def test_lark_gives_texts_of_its_grammar() -> None:
    rng = np.random.default_rng(0)
    kinds: set[type] = set()
    for tokenizer in (BYTE, bpe()):
        grammar = lark(ARITHMETIC, tokenizer)
        for _ in range(15):
            tree = ast.parse(follow(grammar, tokenizer, rng).strip(), mode="eval")
            kinds |= {type(node) for node in ast.walk(tree)}
    assert kinds == {ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.USub}


def test_lark_names_special_tokens() -> None:
    tokenizer = ByteTokenizer(bos="<|call|>", eos="<|end|>")
    row = lark('start: "a" <|call|> %json {"type": "null"}', tokenizer).fresh()
    row.advance(ord("a"))
    assert np.flatnonzero(row.mask()).tolist() == [tokenizer.bos]
    for token in (tokenizer.bos, *b"null", tokenizer.eos):
        row.advance(token)
    assert row.done


# ---- what a masked step draws -------------------------------------------------------------------------------


def test_one_masked_step_is_one_step_of_rejection_sampling() -> None:
    tokenizer = bpe()
    row = json_schema(True, tokenizer).fresh()
    mask_V = row.mask()
    assert 5 < mask_V.sum() < len(mask_V) / 2
    z_V = jax.random.normal(jax.random.key(0), mask_V.shape) + jnp.where(mask_V, 2.0, 0.0)
    p_V = np.asarray(jax.nn.softmax(z_V.astype(jnp.float32)), np.float64)
    # In float32 the odds of two allowed tokens are those of the model to rounding.
    masked_V = np.asarray(jax.nn.softmax(jnp.where(mask_V, z_V, -jnp.inf)), np.float64)
    np.testing.assert_allclose(masked_V, np.where(mask_V, p_V, 0) / p_V[mask_V].sum(), rtol=2e-6)
    assert not masked_V[~mask_V].any()

    proposed = np.asarray(jax.random.categorical(jax.random.key(1), z_V, shape=(60_000,)))
    rejection = np.bincount(proposed[mask_V[proposed]], minlength=len(mask_V))
    drawn = jax.random.categorical(jax.random.key(2), jnp.where(mask_V, z_V, -jnp.inf), shape=(30_000,))
    masked = np.bincount(np.asarray(drawn), minlength=len(mask_V))
    assert rejection.sum() > 20_000 and not masked[~mask_V].any()
    for counts in (rejection, masked):
        assert scipy.stats.chisquare(counts[mask_V], counts.sum() * masked_V[mask_V] / masked_V.sum()).pvalue > 1e-3


def test_masking_is_not_conditioning() -> None:
    """What the module's docstring warns of, on a model of two tokens: first a or b evenly, then mostly the same."""
    row = regex("(a|b)b", BYTE).fresh()
    after = {"": {"a": 0.5, "b": 0.5}, "a": {"a": 0.9, "b": 0.1}, "b": {"a": 0.1, "b": 0.9}}
    masked = {}
    for text in ("ab", "bb"):
        branch, p = row.copy(), 1.0
        for said, letter in enumerate(text):
            allowed = {c: q for c, q in after[text[:said]].items() if branch.mask()[ord(c)]}
            p *= allowed[letter] / sum(allowed.values())
            branch.advance(ord(letter))
        masked[text] = p
    whole = {text: after[""][text[0]] * after[text[0]][text[1]] for text in masked}
    conditioned = {text: p / sum(whole.values()) for text, p in whole.items()}
    assert masked == {"ab": 0.5, "bb": 0.5}
    assert conditioned == pytest.approx({"ab": 0.1, "bb": 0.9})


# ---- ends ---------------------------------------------------------------------------------------------------


def test_eos_ends_a_row_where_the_grammar_may_end() -> None:
    grammar = regex("a+", BYTE)
    row, other = grammar.fresh(), grammar.fresh()
    with pytest.raises(UserError, match="token 256 is not allowed here"):
        row.advance(EOS)
    row.advance(ord("a"))  # a token refused leaves the row as it was
    assert row.complete and not row.done and row.mask()[EOS]
    row.advance(EOS)
    assert row.complete and row.done
    with pytest.raises(UserError, match="after its row had ended"):
        row.advance(ord("a"))
    assert other.said == [] and not other.complete
    for token in (-1, 257, 10_000):
        with pytest.raises(UserError, match=f"token {token} is not allowed here"):
            other.advance(token)


def test_without_eos_a_row_is_done_when_nothing_can_follow() -> None:
    tokenizer = ByteTokenizer()
    row = regex("ab?", tokenizer).fresh()
    row.advance(ord("a"))
    assert row.complete and not row.done and np.flatnonzero(row.mask()).tolist() == [ord("b")]
    row.advance(ord("b"))
    assert row.complete and row.done
    bits_BW = np.zeros((1, 8), np.uint32)
    fill_masks([row], bits_BW)
    assert np.all(bits_BW == 0xFFFFFFFF)


def test_several_ids_may_end_a_row() -> None:
    row = regex("a", BYTE, 300, eos=[EOS, 290]).fresh()
    row.advance(ord("a"))
    assert np.flatnonzero(row.mask()).tolist() == [EOS, 290]
    row.advance(290)
    assert row.done


def test_an_eos_that_is_also_text_is_only_the_end() -> None:
    newline = ord("\n")
    row = regex("a\n?b|a", ByteTokenizer(), eos=newline).fresh()
    assert np.flatnonzero(row.mask()).tolist() == [ord("a")]
    row.advance(ord("a"))
    assert np.flatnonzero(row.mask()).tolist() == [newline, ord("b")]
    row.advance(newline)
    assert row.done
    row = regex("a\n?b", ByteTokenizer(), eos=newline).fresh()
    row.advance(ord("a"))
    assert np.flatnonzero(row.mask()).tolist() == [ord("b")]


# ---- what is refused ----------------------------------------------------------------------------------------

LIST = {"type": "object", "properties": {"next": {"$ref": "#/$defs/list"}}, "required": ["next"]}
MAYBE = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]}
BAD_SCHEMAS: list[tuple[Any, str]] = [
    (False, "is false, which nothing satisfies"),
    ({"enum": []}, "Unsatisfiable schema"),
    ({"type": "integer", "minimum": 3, "maximum": 1}, r"minimum \(3\) is greater than maximum \(1\); mend"),
    ({"type": "string", "minLength": 3, "maxLength": 1}, "Unsatisfiable schema"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required property 'a' is unsatisfiable"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable schema"),
    ({"type": "string", "pattern": "^abc$", "maxLength": 2}, "Unsatisfiable schema"),
    ({"$ref": "#/$defs/list", "$defs": {"list": LIST}}, "no finite JSON satisfies '#/\\$defs/list'"),
    ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "no finite JSON satisfies '#'"),
    ({"type": "array", "minItems": 1, "prefixItems": [{"$ref": "#"}]}, "no finite JSON satisfies '#'"),
    ({"minProperties": 2}, "minProperties 2 cannot be kept where names are free"),
    ({"not": {"type": "null"}}, "Unimplemented keys"),
    ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported; mend"),
    ({"type": "strang"}, "Invalid type: strang"),
    ({"required": 3}, "Expected array for 'required'"),
    ({"properties": []}, "properties must be an object"),
    ({"type": "string", "pattern": "a("}, "unclosed group"),
    ({"$ref": "#/$defs/none"}, "does not exist"),
    ({"minimum": float("nan")}, "is not JSON"),
    ({"enum": {1, 2}}, "is not JSON"),
    ("{", "is not JSON"),
    (7, "is of type int; give a dict"),
]


@pytest.mark.parametrize("schema, message", BAD_SCHEMAS, ids=str)
def test_schemas_that_are_refused(schema: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        json_schema(schema, BYTE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema, instance",
    [
        ({"$ref": "#/$defs/list", "$defs": {"list": LIST | {"properties": {"next": MAYBE}}}}, {"next": {"next": None}}),
        ({"type": "array", "items": {"$ref": "#"}}, [[], [[]]]),
        ({"type": "array", "prefixItems": [{"$ref": "#"}]}, [[[]]]),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, {"a": {"a": 3}}),
        ({"enum": [{"$ref": "#"}]}, {"$ref": "#"}),
        ({"minProperties": 2, "required": ["a"]}, {"a": 1, "b": 2}),
        ({"minProperties": 1}, {"a": 1}),
        (True, [1]),
        ('{"type": "null"}', None),
    ],
    ids=str,
)
def test_recursion_that_ends_is_followed(schema: Any, instance: Any) -> None:
    row = json_schema(schema, BYTE).fresh()
    for token in (*json.dumps(instance).encode(), EOS):
        row.advance(token)
    assert row.done


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("(", "the regex '\\(' cannot be followed: unclosed group; mend"),
        ("a(?=b)", "look-ahead"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\bfoo", "lookarounds not supported"),
        (r"a[^\s\S]", "no text satisfies the regex"),
        (3, "is of type int"),
    ],
)
def test_regexes_that_are_refused(pattern: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        regex(pattern, BYTE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "grammar, message",
    [
        ('start: "a" start', "rule 'start' of the grammar can never end"),
        ('start: "a" b | "c"\nb[capture]: ("b" b)+ // "x"\n', "rule 'b' of the grammar can never end"),
        ("start: a\na: a /x/ | b\nb: a{1,2}", "rule 'a' of the grammar can never end"),
        ("start: A\nA: /[0-9]+/ & /[a-z]+/", "no text satisfies the Lark grammar"),
        ('start: "a"\n  | b', r'line \d, column \d: unknown name: "b"'),
        ("start: /a(/", "unclosed group"),
        ('x: "a"', "no start rule found"),
        ("", "no start rule found|Empty grammar"),
        ("garbage ;;", "line 1, column 9: lexer error"),
        (None, "is of type NoneType"),
    ],
)
def test_lark_grammars_that_are_refused(grammar: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        lark(grammar, BYTE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "grammar, text",
    [
        ('start: ("a" start)*', "aa"),
        ('start: "a" start?', "aa"),
        ('start: "a" [start]', "aa"),
        ('start: (start NUM | "b")\nNUM: /[0-9]/', "b12"),
        ('start: (start %json {"type": "null"} | "b")', "bnull"),
        ('start: "a" (start | "b")', "aab"),
        ('start: "a" start{0,3}', "aaa"),
        ('?start: "a"\n  | start start', "aaa"),
        ('// start: x\nstart: "start: x" // "a" start\n', "start: x"),
        ('start: a -> one\na: "x" -> two | a a', "xx"),
        ('start: x "b"~2\n%ignore / /\nx: X\nX: /[(\\/|]+/', "(/ b b"),
    ],
)
def test_recursion_that_ends_is_followed_in_lark(grammar: str, text: str) -> None:
    row = lark(grammar, BYTE).fresh()
    for token in (*text.encode(), EOS):
        row.advance(token)
    assert row.done


def test_dead_ends_are_named() -> None:
    row = regex("abc|abd", CharTokenizer("ab", eos="<eos>")).fresh()
    row.advance(0)
    row.advance(1)
    with pytest.raises(UserError, match="allows no token after 'ab' and may not end there"):
        row.mask()
    alone = regex("abc|abd", CharTokenizer("ab")).fresh()
    alone.advance(0)
    alone.advance(1)
    with pytest.raises(UserError, match="allows no token after 'ab' and may not end there"):
        fill_masks([alone], np.zeros((1, 1), np.uint32))
    with pytest.raises(UserError, match="no text satisfies the regex 'xyz'; mend it, or use a tokenizer"):
        regex("xyz", CharTokenizer("ab"))


def test_grammars_that_pass_a_limit_are_named() -> None:
    rules = [f'r{i}: x r{i} "{i}" | x "{i}"' for i in range(1500)]
    start = "start: " + " | ".join(f"r{i}" for i in range(1500))
    row = lark("\n".join([start, *rules, 'x: "a"']), BYTE).fresh()
    with pytest.raises(UserError, match=r"the Lark grammar became too costly to follow .*; give one with fewer"):
        row.advance(ord("a"))


def test_tokenizers_and_vocabularies_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="vocabulary of 256 is smaller than the tokenizer's of 257"):
        regex("a", BYTE, 256, eos=0)
    with pytest.raises(UserError, match="eos 256 is outside the model's vocabulary of 256"):
        regex("a", BYTE, 256)
    with pytest.raises(UserError, match="with the decoder WordPiece have no bytes of their own"):
        regex("a", subword.train("wordpiece", ["a b"], 20))
    with pytest.raises(UserError, match="object does not tell the bytes"):
        regex("a", type("object", (), {"vocab_size": 3, "eos": None, "specials": {}})())


def test_llguidance_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (json_object, functools.partial(regex, "a"), functools.partial(lark, 'start: "a"')):
        with pytest.raises(UserError, match="pip install llguidance"):
            make(BYTE)
