"""Whole architectures and their presets."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("config", "decoder", "depth", "layout", "noise", "patterns", "presets", "quantization", "table"),
    names={
        "config": ["BigramConfig", "DecoderConfig", "ModelConfig", "RopeScaling"],
        "table": ["Bigram"],
        "decoder": ["Decoder"],
        "depth": ["spread_layers", "take_layers", "uniform_layers"],
        "layout": ["stack_layers", "unstack_layers"],
        "presets": [
            "PRESETS",
            "bigram",
            "gemma2",
            "gemma3",
            "gpt2",
            "llama",
            "mistral",
            "preset",
            "qwen2",
            "qwen3",
            "small",
        ],
    },
)
