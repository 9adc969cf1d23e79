"""From a `DataConfig` to batches: sources split, tokenizer made, cache built, rows packed."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lmjax.batch import Batch
from lmjax.data import splits as splits_module
from lmjax.data.cache import TokenCache, build_cache
from lmjax.data.config import DataConfig
from lmjax.data.loader import BatchIterator, BatchPlan
from lmjax.data.packing import BlockRows, CropRows, PackedRows, Rows
from lmjax.data.sources import Source, open_source
from lmjax.data.streaming import StreamingBatches
from lmjax.data.validation import Validation
from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer, digest

_TRAINING_CHARACTERS = 512 << 20  # of the corpus, a tokenizer is trained on no more than this


def load(
    config: DataConfig,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = True,
) -> Dataset:
    """Opens the data of a run, tokenizing it first if no cache of it exists.

    Args:
      config: what to read and how.
      batch_size: rows of a global batch; each process gets batch_size // process_count of them.
      process_index, process_count: this process among all.
      vocab_size: the model's; a tokenizer with more ids than that is a `UserError`.
      tokenizer: use this one, say of a checkpoint, and not the config's.
      progress: show a progress bar while tokenizing.

    Raises:
      UserError: nothing to read, unreadable text, a tokenizer that does not fit, too little text for one row.
    """
    sources = [open_source(s) for s in config.sources()]
    held_out = None
    if config.validation_path:
        held_out = open_source(splits_module.like(config, config.validation_path))
    splits = [splits_module.split(s, config, held_out is not None) for s in sources]
    identities = [[s.identity, config.max_bytes, *splits_module.rule_identity(config)] for s in sources]
    if held_out is not None:
        splits.append(lambda: (("validation", text) for text in held_out.read()))
        identities.append([held_out.identity, "validation"])
        sources.append(held_out)
    if tokenizer is None:
        tokenizer = _tokenizer(config, splits, identities)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocabulary only {vocab_size}: set "
            f"the model's vocab_size to {tokenizer.vocab_size} or more, or use the model's own tokenizer"
        )
    caches = []
    for source, split, identity in zip(sources, splits, identities):
        caches.append(
            build_cache(
                config.cache_root(),
                identity,
                split,
                tokenizer,
                markers=config.document_markers,
                name=source.name,
                meter=functools.partial(_meter, source),
                progress=progress,
            )
        )
        if source.skipped:
            logging.getLogger("lmjax.data").warning(
                "%d files of %s are not UTF-8 text: left out from the first bad byte on", source.skipped, source.name
            )
    return Dataset(config, caches, tokenizer, batch_size, process_index, process_count)


def stream(
    config: DataConfig,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    tokenizer: Tokenizer | None = None,
) -> StreamingBatches:
    """The training documents of a config's own source in their order, tokenized as they are read: no cache.

    For corpora too large to tokenize beforehand. The same documents are held out as by `load`; packing is that of
    "stream", in the order of the source (`seed` and `mixture` have no part in it).

    Args:
      config: what to read and how.
      batch_size: rows of a global batch.
      process_index, process_count: this process among all; each reads its share of the documents.
      tokenizer: use this one and not the config's.
    """
    if batch_size % process_count:
        raise UserError(f"batch size {batch_size} does not divide over {process_count} processes: choose a multiple")
    if config.mixture or config.packing != "stream":
        raise UserError("streaming reads one source in 'stream' packing: leave out data.mixture, or use load")
    source = open_source(config.sources()[0])
    documents = splits_module.split(source, config, bool(config.validation_path))
    if tokenizer is None:
        identity = [source.identity, config.max_bytes, *splits_module.rule_identity(config)]
        tokenizer = _tokenizer(config, [documents], [identity])
    return StreamingBatches(
        lambda: (text for split, text in documents() if split == "train"),
        tokenizer,
        batch_size // process_count,
        config.sequence_length,
        markers=config.document_markers,
        process_index=process_index,
        process_count=process_count,
    )


def _meter(source: Source) -> tuple[int, int | None]:
    return source.position(), source.size


def _tokenizer(
    config: DataConfig, splits: Sequence[Callable[[], Iterator[tuple[str, str]]]], identities: Sequence
) -> Tokenizer:
    """The config's tokenizer; a trained one is kept in the cache root."""
    from lmjax.tokenizers import files
    from lmjax.tokenizers.config import TRAINED

    said = config.tokenizer
    if said.kind not in TRAINED:
        return files.build(said)
    name = digest([files.describe(said), list(identities)])
    directory = os.path.join(config.cache_root(), "tokenizers", name)
    if os.path.isdir(directory):
        return files.load(directory)

    def texts() -> Iterator[str]:
        seen = 0
        for documents in splits:
            for split, text in documents():
                # An alphabet must cover the held-out text; merges must not have seen it.
                if split == "train" or said.kind == "char":
                    yield text
                    seen += len(text)
                    if said.kind != "char" and seen > _TRAINING_CHARACTERS:
                        return

    made = files.build(said, texts())
    temporary = f"{directory}.{os.getpid()}.tmp"
    made.save(temporary)
    try:
        os.rename(temporary, directory)
    except OSError:  # another process was first
        shutil.rmtree(temporary, ignore_errors=True)
    return files.load(directory)


class Dataset:
    """The data of a run.

    Attributes:
      config: what it was made from.
      tokenizer, vocab_size: the tokenizer and its number of ids.
      caches: the token cache of each source (the last one is the validation_path's, where there is one).
      train_tokens, train_bytes, validation_tokens: sizes of the splits.
      rows: rows in one epoch over all sources.
      plan: which rows each batch holds.
    """

    def __init__(
        self,
        config: DataConfig,
        caches: Sequence[TokenCache],
        tokenizer: Tokenizer,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.config, self.caches, self.tokenizer = config, list(caches), tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.batch_size, self._process = batch_size, (process_index, process_count)
        self._train = self.caches[:-1] if config.validation_path else self.caches
        self._held_out = self.caches[-1:] if config.validation_path else self.caches
        self.train_tokens = sum(c.metadata["splits"]["train"]["tokens"] for c in self._train)
        self.train_bytes = sum(c.metadata["splits"]["train"]["bytes"] for c in self._train)
        self.validation_tokens = sum(c.metadata["splits"]["validation"]["tokens"] for c in self._held_out)
        if config.validation_fraction > 0 and not config.validation_path and self.validation_tokens == 0:
            raise UserError(
                "no document was held out for validation: set data.split to 'position', raise "
                "data.validation_fraction, or set it to 0 to go without"
            )
        rows = [_rows(config, c, "train") for c in self._train]
        for cache, made in zip(self._train, rows):
            if len(made) == 0:
                raise UserError(
                    f"{cache.metadata['source']} has {cache.metadata['splits']['train']['tokens']} training "
                    f"tokens, too few for one row of {config.sequence_length}: add text or shorten "
                    "data.sequence_length"
                )
        self.rows = sum(len(r) for r in rows)
        weights = [s.weight for s in config.sources()]
        self.plan = BatchPlan(rows, batch_size, weights, config.seed, process_index, process_count)
        # By content, not by name and date of the files: a run resumes on a copy of its data.
        content = [[c.metadata["files"][f"train.{part}"] for part in ("tokens", "ends")] for c in self._train]
        self.fingerprint = digest(
            [content, tokenizer.fingerprint(), weights, config.seed, config.sequence_length, config.packing]
        )

    @property
    def cache_path(self) -> str:
        """Directory of the first source's cache."""
        return self.caches[0].directory

    def train(self) -> BatchIterator:
        """A new endless iterator of training batches [B/P, T], from the beginning; `set_state` moves it."""
        return BatchIterator(self.plan, self.fingerprint, self.config.prefetch)

    def batch(self, step: int) -> Batch:
        """Training batch number `step`, counted from 0, as the iterator gives it."""
        return self.plan.batch(step)

    def validation(self, batch_size: int | None = None, max_batches: int | None = None) -> Validation:
        """The held-out text in fixed batches, each target once.

        Args:
          batch_size: rows of a global batch; the training batch size by default.
          max_batches: only the first so many.
        """
        if self.validation_tokens < 2:
            raise UserError("there is no held-out text: set data.validation_fraction or data.validation_path")
        return Validation(
            [_rows(self.config, c, "validation") for c in self._held_out],
            self._held_out,
            self.tokenizer,
            batch_size or self.batch_size,
            max_batches,
            *self._process,
            self.config.packing != "crop",
        )

    def validation_text(self) -> bytes:
        """The held-out text, UTF-8."""
        return b"".join(c.validation_text() for c in self._held_out)

    def train_ids(self, source: int = 0) -> np.ndarray:
        """uint16 or uint32 [N], read-only: the training tokens of one source, documents end to end."""
        return self._train[source].tokens("train")

    def validation_ids(self, source: int = 0) -> np.ndarray:
        """uint16 or uint32 [N], read-only: the held-out tokens of one source."""
        return self._held_out[source].tokens("validation")


def _rows(config: DataConfig, cache: TokenCache, split: str) -> Rows:
    tokens, T = cache.tokens(split), config.sequence_length
    if config.packing == "best_fit":
        return PackedRows(tokens, T, cache.ends(split))
    if config.packing == "stream":
        return BlockRows(tokens, T, cache.ends(split))
    return CropRows(tokens, T) if split == "train" else BlockRows(tokens, T)
