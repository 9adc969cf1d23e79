"""Grammars for `constraints`: JSON schemas, regular expressions and Lark, through llguidance (an extra).

Every token whose bytes the grammar allows is allowed, not only the tokenizer's own spelling of a text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from lmjax.errors import UserError
from lmjax.generation.constraints import Row, eos_ids, packed_width
from lmjax.generation.grammar_checks import check_lark, check_schema
from lmjax.tokenizers.base import Tokenizer
from lmjax.tokenizers.foreign import SentencePieceTokenizer, TiktokenTokenizer
from lmjax.tokenizers.simple import ByteTokenizer, CharTokenizer
from lmjax.tokenizers.subword import SubwordTokenizer

# llguidance would otherwise allow only the tokenizer's own spelling of text that the grammar forces, which would take
# probability from other spellings and call the tokenizer for each mask. One grammar that says so speaks for all.
_UNFORCED = {"name": "unforced", "lark_grammar": '%llguidance {"no_forcing": true}\nstart: ""'}


class Grammar:
    """A compiled grammar, shared by any number of rows. Made by `json_schema`, `regex` and `lark`.

    Attributes:
      what: what it was made from, as errors call it.
      vocab_size: V, the model's.
      eos: ids that are allowed exactly where the grammar may end, and end the row.
    """

    def __init__(
        self,
        what: str,
        source: dict[str, Any],
        tokenizer: Tokenizer,
        vocab_size: int | None,
        eos: int | Sequence[int] | None,
    ):
        library = _library()
        self.what = what
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.eos = eos_ids(tokenizer.eos if eos is None else eos, self.vocab_size)
        self.vocabulary = _vocabulary(cast(Any, tokenizer), self.vocab_size, self.eos)
        try:
            text = json.dumps({"grammars": [source, _UNFORCED]}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{what} is not JSON ({error}); give plain strings, numbers, lists and dicts") from None
        matcher = library.LLMatcher(
            self.vocabulary,
            text,
            log_level=0,
            limits=library.LLParserLimits(verbose_errors=False),
        )
        if matcher.is_error():
            # Only a Lark grammar has lines and columns that its writer knows.
            reason = _reason(matcher.get_error(), places=what == "the Lark grammar")
            raise UserError(f"{what} cannot be followed: {reason}; mend or leave out that part")
        if "json_schema" in source:
            check_schema(source["json_schema"])
        else:
            check_lark(source["lark_grammar"])
        self._first = GrammarRow(self, matcher)
        self._first.compute([self._first])

    def fresh(self) -> GrammarRow:
        """A constraint at the grammar's beginning, for one row."""
        return self._first.copy()


class GrammarRow(Row):
    """One row's place in a `Grammar`."""

    def __init__(self, grammar: Grammar, matcher: Any):
        super().__init__(grammar.vocab_size, grammar.eos)
        self._grammar, self._matcher = grammar, matcher

    @property
    def complete(self) -> bool:
        """Whether what the row said is a whole text of the grammar; False of a row that was cut off."""
        return self._over or self._matcher.is_accepting()

    @property
    def done(self) -> bool:
        if not self._over and not self.eos and self._matcher.is_accepting():
            self._over = not self.bits.any()
        return self._over

    def copy(self) -> GrammarRow:
        twin = super().copy()
        twin._matcher = self._matcher.deep_copy()
        return twin

    def _accept(self, token: int) -> bool:
        if token in self.eos:
            return self._matcher.is_accepting()
        taken = self._matcher.try_consume_tokens([token])
        self._failure()
        return taken == 1

    def _failure(self) -> bool:
        """Whether the matcher has come to a dead end; that a limit was passed is an error at once."""
        reason = self._matcher.get_error()
        if reason and not reason.startswith("NoExtension"):
            raise UserError(
                f"{self._grammar.what} became too costly to follow ({_reason(reason)}); "
                "give one with fewer alternatives at a time"
            )
        return bool(reason)

    @staticmethod
    def compute(rows: list[GrammarRow]) -> None:
        from llguidance.numpy import fill_next_token_bitmask_par

        widths = {packed_width(row.vocab_size + 1) for row in rows}
        for width in widths:
            some = [row for row in rows if packed_width(row.vocab_size + 1) == width]
            bits = np.zeros((len(some), width), np.int32)
            fill_next_token_bitmask_par(_threads(), [(row._matcher, i) for i, row in enumerate(some)], bits)
            for row, own in zip(some, bits):
                row._receive(own)

    def _receive(self, found: np.ndarray) -> None:
        """Takes the mask over V + 1 ids; the last is the end of a grammar without eos, and no token."""
        bits = found.view(np.uint32)[: packed_width(self.vocab_size)].copy()
        if self.vocab_size % 32:
            bits[-1] &= np.uint32((1 << self.vocab_size % 32) - 1)
        what = self._grammar.what
        if self._failure() or not (bits.any() or self._matcher.is_accepting()):
            if not self.said:
                raise UserError(f"no text satisfies {what}; mend it, or use a tokenizer that has its characters")
            text = self._grammar.vocabulary.decode_bytes(self.said[-20:]).decode(errors="replace")
            raise UserError(
                f"{what} allows no token after {text!r} and may not end there; "
                "mend it, or use a tokenizer that has the characters it needs next"
            )
        self._bits = bits


def json_schema(
    schema: dict | bool | str,
    tokenizer: Tokenizer,
    vocab_size: int | None = None,
    *,
    eos: int | Sequence[int] | None = None,
    whitespace: bool = True,
) -> Grammar:
    """JSON that satisfies a JSON schema.

    Keywords that llguidance does not implement (not, if, contains, uniqueItems, ...) are refused, never ignored.
    Properties come in the order in which the schema lists them. Strings and numbers are as long as the schema lets
    them be: bound them (maxLength, maximum) where the output must end within a budget of tokens.

    Args:
      schema: the schema, or its JSON text.
      tokenizer: the one that the model's ids belong to.
      vocab_size: V of the model, at least the tokenizer's, which is the default; ids beyond are never allowed.
      eos: id or ids that end a row; None: the tokenizer's. Without any, a row is done when nothing can follow.
      whitespace: allow white space between the tokens of JSON, or none at all.

    Raises:
      UserError: the schema is malformed, unsatisfiable or uses what is not supported, the tokenizer's tokens have no
        bytes of their own, or llguidance is missing.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise UserError(f"the JSON schema is not JSON ({error}); give a dict or JSON text") from None
    if schema is False:
        raise UserError("the JSON schema is false, which nothing satisfies; give true for any JSON, or a dict")
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise UserError(f"the JSON schema is of type {type(schema).__name__}; give a dict, a bool or JSON text")
    source = {"json_schema": schema | {"x-guidance": {"whitespace_flexible": whitespace}}}
    return Grammar("the JSON schema", source, tokenizer, vocab_size, eos)


def json_object(
    tokenizer: Tokenizer,
    vocab_size: int | None = None,
    *,
    eos: int | Sequence[int] | None = None,
    whitespace: bool = True,
) -> Grammar:
    """Any JSON object: `json_schema` of {"type": "object"}."""
    return json_schema({"type": "object"}, tokenizer, vocab_size, eos=eos, whitespace=whitespace)


def regex(
    pattern: str, tokenizer: Tokenizer, vocab_size: int | None = None, *, eos: int | Sequence[int] | None = None
) -> Grammar:
    """Text that a regular expression matches as a whole.

    Syntax and classes such as \\w are those of Rust's regex crate: no look-around, no back-references. Arguments as of
    `json_schema`.

    >>> from lmjax.tokenizers import ByteTokenizer
    >>> row = regex("(ab)+", ByteTokenizer(eos="<eos>")).fresh()
    >>> for token in b"ab":
    ...     row.advance(token)
    >>> np.flatnonzero(row.mask()).tolist()  # another a, or the end
    [97, 256]
    """
    if not isinstance(pattern, str):
        raise UserError(f"the regex is of type {type(pattern).__name__}; give a string")
    source = json.loads(_library().LLMatcher.grammar_from_regex(pattern))["grammars"][0]
    shown = pattern if len(pattern) <= 60 else pattern[:57] + "..."
    return Grammar(f"the regex {shown!r}", source, tokenizer, vocab_size, eos)


def lark(
    grammar: str, tokenizer: Tokenizer, vocab_size: int | None = None, *, eos: int | Sequence[int] | None = None
) -> Grammar:
    """Text of a context-free grammar in llguidance's variant of Lark. Arguments as of `json_schema`.

    Its first rule is `start`. In it, `%json {...}` is a schema and `<|name|>` a special token of the tokenizer.
    """
    if not isinstance(grammar, str):
        raise UserError(f"the Lark grammar is of type {type(grammar).__name__}; give a string")
    return Grammar("the Lark grammar", {"lark_grammar": grammar}, tokenizer, vocab_size, eos)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("grammars need the package llguidance: pip install llguidance") from None
    return llguidance


@functools.cache
def _threads() -> Any:
    return _library().LLExecutor()


def _reason(message: str, places: bool = False) -> str:
    """One line of llguidance's several, with the place in the grammar where that is wanted."""
    first = message.strip().splitlines()[0]
    where = re.match(r"(?:at )?(\d+)\((\d+)\): ", first)
    found = re.search(r"^error: (.*)", message, re.MULTILINE)
    said = found[1] if found else first[where.end() :] if where else first
    said = said.removeprefix("Parser Error: ").split(". Enable ")[0]  # such options are not offered here
    return (f"line {where[1]}, column {where[2]}: " if where and places else "") + said[:200]


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Any, vocab_size: int, eos: tuple[int, ...]) -> Any:
    """llguidance's tokenizer of V + 1 ids; the last stands for the end where there is no eos."""
    texts = _texts(tokenizer)
    if vocab_size < len(texts):
        raise UserError(
            f"the model's vocabulary of {vocab_size} is smaller than the tokenizer's of {len(texts)}; "
            "give the tokenizer that the model was trained with"
        )
    texts += [b""] * (vocab_size + 1 - len(texts))
    specials = tokenizer.specials
    for name, i in specials.items():
        texts[i] = name.encode(errors="replace")
    marks = {vocab_size, *eos, *specials.values()}
    for i in marks:
        texts[i] = texts[i] or b"<[%d]>" % i

    class Wrapped:
        eos_token_id, bos_token_id = vocab_size, None
        tokens, special_token_ids = texts, sorted(marks)

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text).tolist()

    library = _library()
    return library.LLTokenizer(library.TokenizerWrapper(Wrapped()), eos_token=list(eos) or [vocab_size])


def _texts(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id stands for; none for special tokens and gaps."""
    texts = [b""] * tokenizer.vocab_size
    specials = set(tokenizer.specials.values())
    if isinstance(tokenizer, ByteTokenizer):
        texts[:256] = [bytes([i]) for i in range(256)]
    elif isinstance(tokenizer, CharTokenizer):
        for i in set(range(len(texts))) - specials:
            texts[i] = tokenizer.decode([i]).encode(errors="surrogatepass")
    elif isinstance(tokenizer, TiktokenTokenizer):
        for token, i in tokenizer._ranks.items():
            texts[i] = token
    elif isinstance(tokenizer, SentencePieceTokenizer):
        inner = tokenizer._inner
        for i in range(len(texts)):
            if not (inner.is_control(i) or inner.is_unknown(i) or inner.is_unused(i)):
                texts[i] = _spaced(inner.id_to_piece(i), "▁", inner.is_byte(i))
    elif isinstance(tokenizer, SubwordTokenizer):
        read = _reader(json.loads(tokenizer.inner.to_str())["decoder"])
        for token, i in tokenizer.inner.get_vocab(with_added_tokens=False).items():
            texts[i] = read(token)
        for i, added in tokenizer.inner.get_added_tokens_decoder().items():
            texts[i] = b"" if added.special else added.content.encode()
    else:
        raise UserError(f"a {type(tokenizer).__name__} does not tell the bytes of its tokens; use one of lmjax's")
    return texts


def _reader(decoder: dict | None) -> Any:
    """How a `tokenizers` decoder turns one token of the vocabulary into bytes."""
    steps = {step["type"]: step for step in (decoder or {}).get("decoders", [decoder or {"type": None}])}
    if "ByteLevel" in steps:
        # GPT-2 writes bytes that do not print as the characters from U+0100 on, in order.
        printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
        hidden = [byte for byte in range(256) if byte not in printing]
        byte_of = {chr(byte): byte for byte in printing} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
        return lambda token: bytes(byte_of[c] for c in token) if set(token) <= byte_of.keys() else b""
    space = steps.get("Metaspace", {}).get("replacement")
    if space is None and steps.get("Replace", {}).get("content") == " ":
        space = steps["Replace"]["pattern"].get("String")
    if space is None:
        raise UserError(
            f"tokens of a vocabulary with the decoder {', '.join(map(str, steps))} have no bytes of their own; use a "
            "byte, character, byte-level or SentencePiece-like tokenizer for grammars"
        )
    return lambda token: _spaced(token, space, "ByteFallback" in steps)


def _spaced(token: str, space: str, may_be_byte: bool) -> bytes:
    """The bytes of a token that writes a space as `space`, and a byte as <0x0A>."""
    if may_be_byte and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace(space, " ").encode(errors="surrogatepass")
