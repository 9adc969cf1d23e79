"""Tokenizers: text to ids and back. Nothing here imports JAX.

Our own byte and character tokenizers; BPE, WordPiece and Unigram through the `tokenizers` library; tiktoken
and SentencePiece files. `load` opens any of them from a path, `build` makes the one a `TokenizerConfig`
names.
"""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("base", "config", "files", "foreign", "incremental", "simple", "streaming", "subword"),
    names={
        "base": ["Tokenizer"],
        "config": ["TokenizerConfig"],
        "files": ["build", "load"],
        "simple": ["ByteTokenizer", "CharTokenizer"],
        "subword": ["SubwordTokenizer", "train", "from_gpt2_files"],
        "streaming": ["TextStream", "find_stop"],
        "foreign": ["TiktokenTokenizer", "SentencePieceTokenizer"],
    },
)
