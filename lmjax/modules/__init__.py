"""Flax building blocks, used only as pure `init` and `apply`."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "adapted",
        "attention",
        "block",
        "config",
        "dense",
        "mlp",
        "norms",
        "positions",
        "quantized",
        "quantizers",
    ),
    names={
        "attention": ["Attention", "attention_mask"],
        "block": ["Block"],
        "config": ["DecoderConfig", "RopeScaling"],
        "dense": ["Dense"],
        "mlp": ["MLP"],
        "norms": ["Norm", "layer_norm", "rms_norm"],
        "positions": ["apply_rope", "rope_frequencies", "rope_table"],
    },
)
