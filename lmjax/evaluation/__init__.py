"""Evaluation: how good a model is, whatever trained it."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("baselines", "logprobs", "objectives", "perplexity", "rewards", "voting", "windows"),
    names={
        "baselines": ["bigram_score", "gzip_bits_per_byte"],
        "logprobs": ["kept_on_disk", "token_logprobs"],
        "objectives": ["evaluate_objective"],
        "perplexity": ["Score", "evaluate_batches"],
        "rewards": [
            "calibration", "ensemble_scores", "reward_judge", "sequence_log_ratios", "sequence_scores",
        ],
        "voting": ["best_of_n", "interval", "maj_at_k", "majority_vote", "pass_at_k", "wilson"],
        "windows": ["TextBatches", "document_batches", "sliding_batches"],
    },
)
