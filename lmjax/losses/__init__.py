"""Pure array functions: arrays in, per-token or per-sequence arrays out, nothing reduced."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("divergences", "fused", "logits", "matching", "policy_gradient", "preferences", "slices", "tokens",
                "vocabulary"),
    names={
        "divergences": [
            "forward_kl",
            "jensen_shannon",
            "kl_estimate",
            "reverse_kl",
            "top_k_kl",
        ],
        "fused": ["token_loss"],
        "logits": ["STATISTICS", "Head", "logits_of"],
        "matching": ["attention_difference", "cosine_distance", "mean_squared_difference"],
        "tokens": ["smoothed_cross_entropy"],
        "vocabulary": ["map_vocabulary", "token_statistics"],
    },
)
