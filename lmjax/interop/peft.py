"""PEFT's adapter directories, in and out: LoRA, rsLoRA, DoRA, IA3, prompt tuning and prefix tuning.

A directory holds `adapter_config.json` and `adapter_model.safetensors`; here an adapter is a collection beside
"params". Where transformers has one matrix for three of ours (GPT-2's c_attn), adapters are split and joined exactly.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.interop.peft_config import CONFIG, TENSORS, read_peft_config
from lmjax.interop.peft_reading import collections_from_peft
from lmjax.interop.peft_writing import peft_of_collections
from lmjax.interop.tensor_files import FLOATS, Tensor, TensorFiles, write_file, write_json
from lmjax.models.decoder import Variables
from lmjax.modules.config import DecoderConfig


def load_peft(directory: str | Path, config: DecoderConfig, variables: Variables) -> Variables:
    """The variables with an adapter of PEFT beside them, float32 whatever the file holds.

    In layers with a sliding window the tokens see a prefix or a prompt always, in transformers as far as the window
    reaches.

    Args:
      directory: what PEFT's `save_pretrained` wrote.
      config: the model's.
      variables: the model, in either layout.

    Raises:
      UserError: the directory is no such, asks for what lmjax has not, or belongs to another model; or the variables
        have an adapter of this kind already.
    """
    directory = Path(directory)
    raw = read_peft_config(directory)
    file = directory / TENSORS
    if not file.is_file():
        raise UserError(f"there is no {TENSORS} in {directory}; save the adapter with safe_serialization=True.")
    files = TensorFiles(file)
    tensors = {}
    for name in sorted(files.names):
        if files.dtype(name) not in FLOATS.values():
            known = ", ".join(FLOATS)
            raise UserError(f"{file}: the tensor {name} is stored as {files.dtype(name)}; save it in {known}.")
        whole = tuple(slice(0, size) for size in files.shape(name))
        tensors[name] = jnp.asarray(files.read(name, whole), jnp.float32)
    try:
        return variables | collections_from_peft(raw, tensors, config, variables)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error


def save_peft(
    directory: str | Path, config: DecoderConfig, variables: Variables, *, base_model: str | None = None
) -> None:
    """Writes a directory that PEFT's `PeftModel.from_pretrained` loads onto the model that `save_huggingface` writes.

    LoRA's scale is that of each direction here, of each module there: where directions differ, B takes it up. A network
    that makes a prefix is written as the prefix it makes.

    Args:
      directory: made if need be.
      config: the model's; a family of transformers must be able to express it.
      variables: the model with one kind of adapter, in either layout.
      base_model: where the model itself is to be found, which PEFT notes down.

    Raises:
      UserError: there is no adapter or more than one kind, PEFT has none of this kind, or no family of transformers
        expresses the model. All before anything is written.
    """
    fields, arrays = peft_of_collections(config, variables)
    contents = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": None,
    } | fields
    tensors = [
        Tensor(name, array.dtype.name, array.shape, lambda array=array: array)  # type: ignore[misc]
        for name, array in sorted(arrays.items())
    ]
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / TENSORS, tensors)
    write_json(directory / CONFIG, contents)
