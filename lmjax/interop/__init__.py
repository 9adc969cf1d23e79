"""Other people's file formats, in and out."""

from lmjax._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    submodules=(
        "huggingface",
        "huggingface_config",
        "huggingface_families",
        "huggingface_fields",
        "huggingface_names",
        "huggingface_rope",
        "peft",
        "peft_config",
        "peft_modules",
        "peft_reading",
        "peft_writing",
        "tensor_files",
    ),
    names={
        "huggingface": ["load_huggingface", "save_huggingface"],
        "huggingface_config": ["config_from_huggingface", "config_to_huggingface"],
        "peft": ["load_peft", "save_peft"],
    },
)
