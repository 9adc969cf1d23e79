"""lmjax: one policy, a pure function of its parameters; losses over its outputs; losses add."""

from lmjax._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "adapters",
        "batch",
        "data",
        "errors",
        "evaluation",
        "generation",
        "interop",
        "losses",
        "models",
        "modules",
        "objectives",
        "policy",
        "rl",
        "sharding",
        "tokenizers",
        "training",
    ),
    names={"policy": ["Policy", "Outputs"], "batch": ["Batch"], "errors": ["UserError"]},
)
