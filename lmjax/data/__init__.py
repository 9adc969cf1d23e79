"""Text to batches: sources, a token cache, packing, deterministic order, exact resume.

`load(config, batch_size)` gives a `Dataset`: its `train()` iterator, its `validation()` batches.
"""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "buckets",
        "cache",
        "chat_encoding",
        "chat_jinja",
        "chat_turns",
        "config",
        "dataset",
        "grain",
        "instructions",
        "loader",
        "order",
        "packing",
        "preference_config",
        "preferences",
        "records",
        "sources",
        "splits",
        "streaming",
        "streams",
        "supervised",
        "supervised_config",
        "templates",
        "validation",
    ),
    names={
        "config": ["DataConfig", "SourceConfig"],
        "dataset": ["Dataset", "load", "stream"],
        "cache": ["TokenCache", "build_cache", "open_cache"],
        "loader": ["BatchIterator", "BatchPlan"],
        "order": ["mixing_rates", "mixture_schedule", "permute"],
        "buckets": ["BucketRows"],
        "instructions": ["Conversation", "conversation"],
        "packing": ["BlockRows", "CropRows", "PackedRows"],
        "preference_config": ["PreferenceConfig"],
        "preferences": ["Answer", "Pair", "PairRows", "PreferenceData", "load_preferences", "pair_batch"],
        "sources": ["Source", "open_source"],
        "records": ["Record", "read_records"],
        "streaming": ["StreamingBatches"],
        "streams": ["Together"],
        "supervised": ["Examples", "SupervisedData", "load_supervised", "open_template"],
        "supervised_config": ["ConversationSource", "SupervisedConfig"],
        "templates": ["ChatTemplate", "template", "for_tokenizer"],
        "chat_jinja": ["from_tokenizer_config", "from_jinja"],
        "validation": ["Validation"],
    },
)
