"""Adapters: collections beside "params" that change what a model does while the model stays as it is."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "bottlenecks",
        "deltas",
        "files",
        "folding",
        "low_rank",
        "prefixes",
        "quantization",
        "rescaling",
        "targets",
        "weights",
    ),
    names={
        "bottlenecks": ["Bottleneck", "houlsby", "parallel", "pfeiffer"],
        "deltas": ["Delta", "bitfit", "delta", "full", "norm_tuning"],
        "files": ["load", "save"],
        "folding": ["COLLECTIONS", "adapters_of", "count", "merge", "unmerge", "without"],
        "low_rank": ["LowRank", "dora", "lora"],
        "prefixes": ["Prefix", "Prompt", "flatten", "prefix", "prefix_of_tokens", "prompt"],
        "quantization": ["bits_per_parameter", "dequantize", "kind_of", "quantize"],
        "rescaling": ["IA3", "ia3"],
    },
)
