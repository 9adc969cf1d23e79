"""Terms and their algebra: an objective is a sum of weighted terms over one shared policy."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("algebra", "evaluation", "expressions", "matching", "pairs", "pluralistic", "preferences",
                "reducers", "reward_models", "terms", "tracing"),
    names={
        "algebra": ["Objective", "Role", "Term", "term"],
        "expressions": ["parse_objective"],
        "evaluation": ["Evaluation", "evaluate", "finalize", "term_weights"],
        "matching": ["attention_maps", "hidden_states"],
        "pairs": ["LogRatio", "pair_term", "with_cached_reference"],
        "pluralistic": ["belief_kl", "belief_nll", "gdpo"],
        "preferences": [
            "alphapo",
            "aot",
            "apo_down",
            "apo_zero",
            "bco",
            "chosen_nll",
            "cpo",
            "discopop",
            "dpo",
            "exo",
            "hinge",
            "ipo",
            "kto",
            "nca",
            "orpo",
            "robust_dpo",
            "simpo",
            "sppo",
            "tpo",
            "unlikelihood",
        ],
        "reward_models": ["bradley_terry", "plackett_luce", "process_reward"],
        "reducers": [
            "Reducer",
            "constant_horizon",
            "sequence_mean",
            "sequence_sum_mean",
            "token_mean",
            "token_sum",
        ],
        "terms": ["agreement", "auxiliary", "cross_entropy", "distillation", "divergence", "entropy", "kl", "z_loss"],
    },
)
