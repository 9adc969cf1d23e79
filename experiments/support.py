"""What several experiments share: the compilation cache, prompts, and models opened from where they were saved."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmjax as lm
from lmjax.errors import UserError
from lmjax.models.config import DecoderConfig

if TYPE_CHECKING:
    import numpy as np

    from lmjax.tokenizers.base import Tokenizer

TOKENIZER = "tokenizer"  # its folder in a run directory


def use_compilation_cache(root: str) -> None:
    """Keeps compiled programs under `root`, unless the environment names a place for them already."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def prompt_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """A prompt as ids, int32 [n], with the marker that begins a document where the tokenizer has one.

    Raises:
      UserError: an empty prompt for a tokenizer without such a marker.
    """
    import numpy as np

    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    ids = tokenizer.encode(text)
    if start is not None:
        ids = np.concatenate([[start], ids])
    if not len(ids):
        raise UserError("the prompt is empty and the tokenizer has no marker to begin with; give some text")
    return ids.astype(np.int32)


def completion_text(tokenizer: Tokenizer, tokens: Any, length: int) -> str:
    """The text of the first `length` tokens, without the marker that ends it."""
    ids = [int(token) for token in tokens[: int(length)]]
    if ids and ids[-1] == tokenizer.eos:
        ids.pop()
    return tokenizer.decode([min(token, tokenizer.vocab_size - 1) for token in ids])


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model from disk.

    Attributes:
      policy, variables: the model.
      tokenizer: its own.
      markers: whether its training documents had a marker before them.
      description: where it comes from, in words.
    """

    policy: Any
    variables: Any
    tokenizer: Tokenizer
    markers: bool
    description: str


def open_model(path: str, *, step: str = "last", average: bool | None = None, tokenizer: str = "") -> OpenedModel:
    """Opens a run directory of ours, or a model directory of Hugging Face.

    Args:
      path: either directory.
      step: for a run: "last", "best" or the number of a step.
      average: for a run: the moving average of the parameters, or not; None: where the run kept one.
      tokenizer: a tokenizer to use instead of the one beside the model.

    Raises:
      UserError: the directory is neither, has no such checkpoint, or no tokenizer.
    """
    if not path:
        raise UserError("no model is named; give --model a run directory or a Hugging Face model directory")
    folder = Path(path).expanduser()
    if (folder / "checkpoints").is_dir():
        return _open_run(folder, step, average, tokenizer)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{path} holds no model: give a run directory (with checkpoints/) or a Hugging Face model directory "
            "(with config.json and safetensors)"
        )
    if step != "last" or average:
        raise UserError(
            f"{path} is a Hugging Face directory, which holds one set of weights; leave out step and average"
        )
    config, variables = lm.interop.load_huggingface(folder)
    return OpenedModel(
        lm.Policy(config), variables, lm.tokenizers.load(tokenizer or str(folder)), True, f"{path} (Hugging Face)"
    )


def _open_run(folder: Path, step: str, average: bool | None, tokenizer: str) -> OpenedModel:
    import jax

    from lmjax import command_line

    checkpoints = folder / "checkpoints"
    if step not in ("last", "best") and not step.isdigit():
        raise UserError(f"step is {step!r}; give last, best or a number")
    chosen: Any = None if step == "last" else int(step) if step.isdigit() else step
    config: Any = command_line.load_config(folder / "config.py")
    policy = lm.Policy(config.model)
    metadata = lm.training.read_metadata(checkpoints, chosen)
    has_average = any(name.startswith("ema/") for name in metadata["leaves"])
    if average and not has_average:
        raise UserError(f"the run {folder} kept no moving average; leave out average")
    variables = lm.training.load_part(checkpoints, "variables", chosen)
    if has_average and average is not False:
        variables = variables | lm.training.load_part(checkpoints, "ema", chosen)
    if isinstance(config.model, DecoderConfig) and config.model.scanned:
        variables = lm.models.stack_layers(variables)
    own = lm.tokenizers.load(tokenizer or str(folder / TOKENIZER))
    what = f"{folder}, step {metadata['step']}" + (", moving average" if has_average and average is not False else "")
    return OpenedModel(policy, jax.device_put(variables), own, config.data.document_markers, what)


def output_folder(run_dir: str | None, model: str, name: str) -> Path:
    """Where an experiment that reads a model writes: the run directory given, or else the model's own, or else a
    new one.

    Raises:
      UserError: it cannot be made.
    """
    own = Path(model).expanduser()
    new = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(run_dir) if run_dir else own if (own / "checkpoints").is_dir() else new
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --run-dir") from error
    return folder
