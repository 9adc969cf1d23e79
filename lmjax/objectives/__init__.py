"""Terms and their algebra: an objective is a sum of weighted terms over one shared policy."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("algebra", "evaluation", "matching", "reducers", "terms", "tracing"),
    names={
        "algebra": ["Objective", "Role", "Term", "term"],
        "evaluation": ["Evaluation", "evaluate", "finalize", "term_weights"],
        "matching": ["attention_maps", "hidden_states"],
        "reducers": [
            "Reducer",
            "constant_horizon",
            "sequence_mean",
            "sequence_sum_mean",
            "token_mean",
            "token_sum",
        ],
        "terms": ["auxiliary", "cross_entropy", "distillation", "divergence", "entropy", "kl", "z_loss"],
    },
)
