"""Generation: tokens from a policy and a prompt."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=("sampler",),
    names={"sampler": ["Generation", "generate"]},
)
