"""Adapters: collections beside "params" that change what a model does while the model stays as it is."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "algebra",
        "bottlenecks",
        "deltas",
        "editing",
        "files",
        "folding",
        "low_rank",
        "merging",
        "prefixes",
        "quantization",
        "rescaling",
        "rows",
        "targets",
        "weights",
    ),
    names={
        "algebra": ["add", "compress", "scale", "subtract", "weighted_sum"],
        "bottlenecks": ["Bottleneck", "houlsby", "parallel", "pfeiffer"],
        "deltas": ["Delta", "bitfit", "delta", "full", "norm_tuning"],
        "editing": ["fact_key", "fact_value", "insert", "key_covariance", "rome"],
        "files": ["load", "save"],
        "folding": ["COLLECTIONS", "adapters_of", "count", "merge", "unmerge", "without"],
        "low_rank": ["LowRank", "dora", "lora"],
        "merging": [
            "apply_vectors", "dare", "dare_ties", "drop", "elect", "slerp", "task_vector", "ties", "trim",
        ],
        "prefixes": ["Prefix", "Prompt", "flatten", "prefix", "prefix_of_tokens", "prompt"],
        "quantization": ["bits_per_parameter", "dequantize", "kind_of", "quantize"],
        "rescaling": ["IA3", "ia3"],
        "rows": ["choose", "stack"],
    },
)
