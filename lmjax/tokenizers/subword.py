"""BPE, WordPiece and Unigram through the `tokenizers` library: train, load, encode."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lmjax.errors import UserError
from lmjax.tokenizers.base import check_ids, digest, write_file

# Names by which published tokenizers call these roles, tried in order where no tokenizer_config.json says.
_USUAL = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]"),
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
}


class SubwordTokenizer:
    """A `tokenizers.Tokenizer` behind our interface.

    Args:
      inner: the library's tokenizer, or the text of a tokenizer.json. Padding, truncation and post-processor
        (bos, eos, [CLS]) are left out: a document's marks are the data pipeline's affair.
      bos, eos, pad: text of a token of the vocabulary, None for none, "auto" for the usual names.
    """

    kind = "subword"

    def __init__(self, inner: Any, bos: str | None = "auto", eos: str | None = "auto", pad: str | None = "auto"):
        from tokenizers import Tokenizer

        # The text is kept as it came: the library does not read a score back to the last digit it wrote, and
        # a tokenizer must not drift from one save to the next.
        parts = json.loads(inner if isinstance(inner, str) else inner.to_str())
        parts["padding"] = parts["truncation"] = None
        self._json = json.dumps(parts, ensure_ascii=False)
        self._inner = inner = Tokenizer.from_str(self._json)
        self._with_specials: Any = None
        inner.encode_special_tokens = True  # "<|endoftext|>" written in a document is text, not a token
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocabulary.values()) + 1
        self._specials = {t.content: i for i, t in inner.get_added_tokens_decoder().items() if t.special}
        self._marks: dict[str, str | None] = {}
        for role, text in (("bos", bos), ("eos", eos), ("pad", pad)):
            if text == "auto":
                text = next((name for name in _USUAL[role] if name in vocabulary), None)
            elif text is not None and text not in vocabulary:
                raise UserError(f"the {role} token {text!r} is not in this tokenizer's vocabulary: name one that is")
            self._marks[role] = text
            setattr(self, role, None if text is None else vocabulary[text])

    bos: int | None
    eos: int | None
    pad: int | None

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def specials(self) -> dict[str, int]:
        return dict(self._specials)

    @property
    def inner(self) -> Any:
        """The library's tokenizer."""
        return self._inner

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        if special and self._with_specials is None:
            self._with_specials = type(self._inner).from_str(self._json)
        inner = self._with_specials if special else self._inner
        return np.array(inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode(check_ids(ids, self._vocab_size).tolist(), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray | None:
        """int32 [V] of a byte-level vocabulary without normalizer; None for any other."""
        from tokenizers import pre_tokenizers

        parts = json.loads(self._json)
        if '"ByteLevel"' not in json.dumps(parts["decoder"]) or parts["normalizer"] is not None:
            return None
        if '"add_prefix_space": true' in json.dumps(parts["pre_tokenizer"]):
            return None
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        lengths = np.zeros(self._vocab_size, np.int32)
        for token, i in self._inner.get_vocab(with_added_tokens=False).items():
            if token not in self._specials and set(token) <= alphabet:
                lengths[i] = len(token)
        for i, added in self._inner.get_added_tokens_decoder().items():
            if not added.special:
                lengths[i] = len(added.content.encode())
        return lengths

    def fingerprint(self) -> str:
        return digest([json.loads(self._json), self._marks])

    def save(self, directory: str | os.PathLike) -> None:
        """`tokenizer.json` and `tokenizer_config.json`, as Hugging Face's `transformers` reads them."""
        os.makedirs(directory, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {f"{role}_token": text for role, text in self._marks.items()}  # type: ignore[dict-item]
        write_file(os.path.join(directory, "tokenizer.json"), self._json)
        write_file(os.path.join(directory, "tokenizer_config.json"), json.dumps(config))


def train(
    kind: str,
    texts: Iterable[str],
    vocab_size: int,
    bos: str | None = None,
    eos: str | None = "<|endoftext|>",
    pad: str | None = None,
) -> SubwordTokenizer:
    """Trains a subword tokenizer.

    bpe and unigram work on bytes (GPT-2's byte-level alphabet): any text encodes, and decodes to itself.
    wordpiece splits at white space and punctuation, as BERT's does, and does not keep the white space.

    bpe comes out the same each time. The library's wordpiece and unigram trainers do not (ties and sums
    follow the order of a hash table): save what you trained, and load it where the same ids are needed.

    Args:
      kind: "bpe" (Sennrich et al. 2016), "wordpiece" (Schuster & Nakajima 2012) or "unigram" (Kudo 2018).
      texts: the corpus, read once.
      vocab_size: ids in all; a small corpus may give fewer.
      bos, eos, pad: special tokens to add, from id 0 on.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = list(dict.fromkeys(name for name in (bos, eos, pad) if name))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = {"bpe": 256, "unigram": 257, "wordpiece": 1}.get(kind)
    if smallest is None:
        raise UserError(f"tokenizer kind {kind!r} cannot be trained: use bpe, wordpiece or unigram")
    smallest += len(specials)
    if vocab_size < smallest:
        raise UserError(f"a {kind} vocabulary of {vocab_size} is too small: it needs at least {smallest} ids")
    common: dict[str, Any] = {"vocab_size": vocab_size, "show_progress": False}
    trainer: Any
    if kind == "bpe":
        inner = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet, **common)
    elif kind == "unigram":
        inner = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            special_tokens=[*specials, "<unk>"], unk_token="<unk>", initial_alphabet=alphabet, **common
        )
    else:
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(special_tokens=[*specials, "[UNK]"], **common)
    if kind == "wordpiece":
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(cleanup=False)
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()

    def batches() -> Iterator[list[str]]:
        held: list[str] = []
        size = 0
        for text in texts:
            held.append(text)
            size += len(text)
            if size > 1 << 20:
                yield held
                held, size = [], 0
        yield held

    inner.train_from_iterator(batches(), trainer)
    return SubwordTokenizer(inner, bos, eos, pad)


def from_file(
    path: str | os.PathLike, bos: str | None = "auto", eos: str | None = "auto", pad: str | None = "auto"
) -> SubwordTokenizer:
    """Opens a `tokenizer.json`; a `tokenizer_config.json` beside it names bos, eos and pad."""
    try:
        with open(path, encoding="utf-8") as file:
            content = file.read()
        SubwordTokenizer(content)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json that `tokenizers` can read ({error})") from None
    beside = os.path.join(os.path.dirname(os.fspath(path)), "tokenizer_config.json")
    marks: dict[str, str | None] = {"bos": bos, "eos": eos, "pad": pad}
    if os.path.exists(beside):
        with open(beside, encoding="utf-8") as file:
            said = json.load(file)
        for role, text in marks.items():
            if text == "auto" and f"{role}_token" in said:
                token = said[f"{role}_token"]
                marks[role] = token["content"] if isinstance(token, dict) else token
    return SubwordTokenizer(content, **marks)


def from_gpt2_files(
    vocabulary: str | os.PathLike,
    merges: str | os.PathLike,
    bos: str | None = "auto",
    eos: str | None = "auto",
    pad: str | None = "auto",
) -> SubwordTokenizer:
    """GPT-2's own files: `encoder.json` (or `vocab.json`) and `vocab.bpe` (or `merges.txt`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(os.fspath(vocabulary), os.fspath(merges))
    except Exception as error:
        raise UserError(f"{vocabulary} and {merges} are not a BPE vocabulary and its merges ({error})") from None
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if inner.token_to_id("<|endoftext|>") is not None:
        inner.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return SubwordTokenizer(inner, bos, eos, pad)
