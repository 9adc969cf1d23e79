"""What a language model has to beat: a bigram count model and gzip, on the same held-out text."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lmjax.batch import Batch
from lmjax.evaluation.perplexity import Score


def gzip_bits_per_byte(text: bytes, level: int = 9) -> float:
    """Bits a byte of a text compressed as one stream by gzip at its best.

    >>> round(gzip_bits_per_byte(b"ab" * 1000), 3)
    0.144
    """
    return 8 * len(gzip.compress(text, level, mtime=0)) / max(len(text), 1)


def bigram_score(train_ids: Sequence[Any], batches: Iterable[Batch], vocab_size: int) -> Score:
    """What a table of bigram counts does on the same targets: no training, Witten-Bell smoothing.

      p(b | a) = (c(a, b) + n(a) p(b)) / (c(a) + n(a)),   p(b) = (c(b) + 1) / (N + V)

    with c the counts in the training ids and n(a) how many different ids followed a there (Witten and Bell
    1991). Counts are kept sparsely: memory grows with the text, not with V^2.

    Args:
      train_ids: 1-D arrays of ids, one a source.
      batches: held-out batches; `bytes` of them, if there, is that of the score.
      vocab_size: V.

    >>> from lmjax.batch import next_token_batch
    >>> score = bigram_score([np.array([0, 1, 0, 1, 0])], [next_token_batch(np.array([[0, 1, 0]]))], 2)
    >>> round(score.perplexity, 3)  # each transition at (2 + 1 * 3 / 7) / 3 or (2 + 1 * 4 / 7) / 3
    1.2
    """
    keys, firsts = [], []
    unigram_V = np.ones(vocab_size)
    for ids in train_ids:
        ids = np.asarray(ids).astype(np.int64)
        keys.append(ids[:-1] * vocab_size + ids[1:])
        firsts.append(ids[:-1])
        unigram_V += np.bincount(ids, minlength=vocab_size)
    pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
    unigram_V /= unigram_V.sum()
    total_V = np.bincount(np.concatenate(firsts), minlength=vocab_size)
    kinds_V = np.bincount(pairs // vocab_size, minlength=vocab_size)

    nats = tokens = correct = 0.0
    best_V = _most_frequent(pairs, counts, vocab_size, int(np.argmax(unigram_V)))
    for batch in batches:
        kept = np.asarray(batch.mask) > 0
        weight = np.asarray(batch.mask)[kept]
        a, b = (
            np.asarray(batch.tokens)[kept].astype(np.int64),
            np.asarray(batch.targets)[kept].astype(np.int64),
        )
        key = a * vocab_size + b
        at = np.minimum(np.searchsorted(pairs, key), len(pairs) - 1)
        count = np.where(pairs[at] == key, counts[at], 0)
        lower = np.maximum(kinds_V[a], 1)  # a token never followed by anything falls back on p(b)
        p = (count + lower * unigram_V[b]) / (total_V[a] + lower)
        nats -= float(np.sum(weight * np.log(p)))
        tokens += float(weight.sum())
        correct += float(np.sum(weight * (best_V[a] == b)))
    return Score(nats, tokens, correct, getattr(batches, "bytes", None))


def _most_frequent(pairs: np.ndarray, counts: np.ndarray, vocab_size: int, otherwise: int) -> np.ndarray:
    """The id that most often followed each id, int64 [V]."""
    best_V = np.full(vocab_size, otherwise, np.int64)
    order = np.argsort(counts, kind="stable")  # a later, larger count overwrites an earlier one
    best_V[pairs[order] // vocab_size] = pairs[order] % vocab_size
    return best_V
