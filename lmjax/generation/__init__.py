"""Generation: tokens from a policy and a prompt."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "batching",
        "beam",
        "constraints",
        "contrastive",
        "decoding",
        "dola",
        "drafters",
        "engine",
        "grammars",
        "judged",
        "on_policy",
        "processors",
        "sampler",
        "sampling",
        "slots",
        "speculative",
    ),
    names={
        "engine": ["FINISH", "Generation"],
        "sampler": ["generate", "stream"],
        "batching": ["Request", "generate_many", "serve"],
        "beam": ["Beams", "beam_search"],
        "contrastive": ["contrastive_search"],
        "dola": ["dola_search"],
        "speculative": ["Speculation", "speculate"],
        "drafters": ["draft_model", "early_exit", "prompt_lookup"],
        "decoding": ["prepare"],
        "grammars": ["json_schema", "json_object", "regex", "lark"],
        "on_policy": ["continued_batch"],
        "judged": [
            "JudgedSamples", "answers_batch", "best_and_worst", "best_of_n_batch", "judged_samples", "online_pairs",
        ],
        "constraints": ["from_callable"],
        "processors": [
            "custom", "guide", "sequence_bias", "logit_bias", "repetition_penalty", "frequency_penalty",
            "presence_penalty", "no_repeat_ngram", "bad_words", "min_length", "min_new_tokens", "forced", "clean",
            "exponential_length_penalty", "suppress", "suppress_at_start", "top_k", "top_p", "min_p", "typical",
            "epsilon", "eta",
        ],
    },
)
