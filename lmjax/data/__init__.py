"""Text to batches: sources, a token cache, packing, deterministic order, exact resume.

`load(config, batch_size)` gives a `Dataset`: its `train()` iterator, its `validation()` batches.
"""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "cache",
        "chat_encoding",
        "chat_jinja",
        "chat_turns",
        "config",
        "dataset",
        "grain",
        "loader",
        "order",
        "packing",
        "sources",
        "splits",
        "streaming",
        "templates",
        "validation",
    ),
    names={
        "config": ["DataConfig", "SourceConfig"],
        "dataset": ["Dataset", "load", "stream"],
        "cache": ["TokenCache", "build_cache", "open_cache"],
        "loader": ["BatchIterator", "BatchPlan"],
        "order": ["mixture_schedule", "permute"],
        "packing": ["BlockRows", "CropRows", "PackedRows"],
        "sources": ["Source", "open_source"],
        "streaming": ["StreamingBatches"],
        "templates": ["ChatTemplate", "template", "for_tokenizer"],
        "chat_jinja": ["from_tokenizer_config", "from_jinja"],
        "validation": ["Validation"],
    },
)
