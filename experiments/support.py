"""What several experiments share: the compilation cache, prompts, and models opened from where they were saved."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmjax as lm
from lmjax.errors import UserError
from lmjax.models.config import DecoderConfig

if TYPE_CHECKING:
    import numpy as np

    from experiments.generate_config import SamplingConfig
    from lmjax.data.templates import ChatTemplate
    from lmjax.tokenizers.base import Tokenizer

TOKENIZER = "tokenizer"  # its folder in a run directory
MODEL = "model.py"  # the config of a fine-tuned model there


def use_compilation_cache(root: str) -> None:
    """Keeps compiled programs under `root`, unless the environment names a place for them already."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def prompt_ids(tokenizer: Tokenizer, text: str, markers: bool = True) -> np.ndarray:
    """A prompt as ids, int32 [n].

    Args:
      tokenizer: of the model.
      text: the prompt.
      markers: begin with the marker that begins a document, where the tokenizer has one.

    Raises:
      UserError: an empty prompt without such a marker.
    """
    import numpy as np

    start = (tokenizer.bos if tokenizer.bos is not None else tokenizer.eos) if markers else None
    ids = tokenizer.encode(text)
    if start is not None:
        ids = np.concatenate([[start], ids])
    if not len(ids):
        raise UserError("the prompt is empty and there is no marker to begin a document with; give some text")
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
      tokenizer_path: where that was, and perhaps a chat template beside it.
      markers: whether its training documents had a marker before them.
      description: where it comes from, in words.
      template: name of the chat template it was fine-tuned with, or "auto".
    """

    policy: Any
    variables: Any
    tokenizer: Tokenizer
    tokenizer_path: str
    markers: bool
    description: str
    template: str = "auto"

    @property
    def context(self) -> int | None:
        """Tokens that it has positions for; None where there is no such number."""
        config = self.policy.config
        return config.max_length if isinstance(config, DecoderConfig) else None

    def chat_template(self, name: str = "auto") -> ChatTemplate:
        """The chat template of a name, or the model's own."""
        name = self.template if name == "auto" else name
        if name != "auto":
            return lm.data.template(name)
        return lm.data.for_tokenizer(self.tokenizer, self.tokenizer_path)


def open_model(
    path: str,
    *,
    step: str = "last",
    average: bool | None = None,
    tokenizer: str = "",
    adapter: str = "",
    quantize: str = "",
    targets: Sequence[str] = ("*",),
) -> OpenedModel:
    """Opens a run directory of ours, or a model directory of Hugging Face.

    Args:
      path: either directory.
      step: for a run: "last", "best" or the number of a step.
      average: for a run: the moving average of the parameters, or not; None: where the run kept one.
      tokenizer: a tokenizer to use instead of the one beside the model.
      adapter: a directory with an adapter of the model, ours or PEFT's. What can be folded into the weights is.
      quantize: "nf4" or "int8": the model's linear layers in 4 or 8 bits.
      targets: patterns of those that are.

    Raises:
      UserError: the directory is neither, has no such checkpoint, or no tokenizer; or the adapter is of another model.
    """
    model = _open_base(path, step, average, tokenizer, quantize, targets)
    if quantize and not {"nf4", "int8"} & set(model.variables):
        model = dataclasses.replace(model, variables=lm.adapters.quantize(model.variables, quantize, targets))
    if not adapter:
        return model
    folder = Path(adapter).expanduser()
    variables = _fastest(model.policy, lm.adapters.load(folder, model.variables, model.policy))
    return dataclasses.replace(model, variables=variables, description=f"{model.description}, with {folder}")


def _fastest(policy: lm.Policy, variables: Any) -> Any:
    """Variables with their adapters in the form that is the fastest to run."""
    beside = {kind: variables[kind] for kind in lm.adapters.folding.BESIDE if kind in variables}
    variables = lm.adapters.without(variables, tuple(beside))
    quantized = {"nf4", "int8"} & set(variables)  # would become full weights
    if lm.adapters.adapters_of(variables) and not quantized:
        variables = lm.adapters.merge(variables)
    variables = variables | beside
    return lm.adapters.flatten(policy, variables) if lm.adapters.adapters_of(variables) else variables


def _open_base(
    path: str, step: str, average: bool | None, tokenizer: str, quantize: str, targets: Sequence[str]
) -> OpenedModel:
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
    config, variables = lm.interop.load_huggingface(folder, quantize=quantize or None, targets=targets)
    where = tokenizer or str(folder)
    return OpenedModel(
        lm.Policy(config), variables, lm.tokenizers.load(where), where, True, f"{path} (Hugging Face)"
    )


def _open_run(folder: Path, step: str, average: bool | None, tokenizer: str) -> OpenedModel:
    import jax

    from lmjax import command_line

    checkpoints = folder / "checkpoints"
    if step not in ("last", "best") and not step.isdigit():
        raise UserError(f"step is {step!r}; give last, best or a number")
    chosen: Any = None if step == "last" else int(step) if step.isdigit() else step
    config: Any = command_line.load_config(folder / "config.py")
    if isinstance(config.model, str):
        return _open_finetuned(folder, config, chosen, average, tokenizer)
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
    where = tokenizer or str(folder / TOKENIZER)
    what = f"{folder}, step {metadata['step']}" + (", moving average" if has_average and average is not False else "")
    return OpenedModel(
        policy, jax.device_put(variables), lm.tokenizers.load(where), where, config.data.document_markers, what
    )


def _open_finetuned(folder: Path, config: Any, step: Any, average: bool | None, tokenizer: str) -> OpenedModel:
    """A run of `experiments.sft`: a model of its own, or an adapter of the one it began with."""
    import jax

    from lmjax import command_line

    if average:
        raise UserError(f"the run {folder} kept no moving average; leave out average")
    checkpoints = folder / "checkpoints"
    metadata = lm.training.read_metadata(checkpoints, step)
    variables = lm.training.load_part(checkpoints, "variables", step)
    what = f"{folder}, step {metadata['step']}"
    shape: Any = command_line.load_config(folder / MODEL)
    if isinstance(shape, DecoderConfig) and shape.scanned:
        variables = lm.models.stack_layers(variables)
    if "params" not in variables:
        try:
            base = open_model(
                config.model,
                step=config.step,
                average=config.average,
                quantize=config.quantize,
                targets=config.quantize_targets,
            )
        except UserError as error:
            raise UserError(f"{folder} is an adapter of another model, which cannot be opened: {error}") from None
        if base.policy.config != shape:
            raise UserError(f"{folder} is an adapter of another model than {config.model} is now; put that one back")
        variables, what = base.variables | variables, f"{what}, over {base.description}"
    policy = lm.Policy(shape)
    variables = _fastest(policy, jax.device_put(variables))
    where = tokenizer or str(folder / TOKENIZER)
    template = config.data.template if config.data.template != "none" else "auto"
    markers = config.data.document_markers
    return OpenedModel(policy, variables, lm.tokenizers.load(where), where, markers, what, template)


def cache_spec(name: str, model: OpenedModel) -> Any:
    """The kind of key/value cache that a name stands for: dense, int8, kivi4 or kivi2.

    Raises:
      UserError: the model's heads do not fit it.
    """
    import jax

    from lmjax.modules import cache

    kinds = {"dense": cache.Dense(), "int8": cache.Int8(), "kivi4": cache.Kivi(4), "kivi2": cache.Kivi(2)}
    jax.eval_shape(lambda: model.policy.init_cache(1, 1, kinds[name]))
    return kinds[name]


def sampling_processors(config: SamplingConfig) -> list[Any]:
    """The logits processors that a config asks for and that need no model; those that change nothing are left out.

    Raises:
      UserError: a number out of range.
    """
    given = lm.generation
    neutral = {
        given.repetition_penalty: (config.repetition_penalty, 1),
        given.frequency_penalty: (config.frequency_penalty, 0),
        given.presence_penalty: (config.presence_penalty, 0),
        given.no_repeat_ngram: (config.no_repeat_ngram, 0),
        given.top_k: (config.top_k, 0),
        given.top_p: (config.top_p, 1),
        given.min_p: (config.min_p, 0),
        given.typical: (config.typical, 1),
    }
    return [make(value) for make, (value, nothing) in neutral.items() if value != nothing]


def all_processors(
    config: SamplingConfig, model: OpenedModel, given: Sequence[Any], eos: Sequence[int], max_new_tokens: int
) -> Sequence[Any]:
    """The chain of these and those that need the model: the least length, and no ids beyond the tokenizer's.

    Args:
      config, model: as they are.
      given: from `sampling_processors`.
      eos: the ids that end an output.
      max_new_tokens: the longest output.

    Raises:
      UserError: they contradict each other.
    """
    vocab_size = model.policy.config.vocab_size
    chain = list(given)
    if beyond := list(range(model.tokenizer.vocab_size, vocab_size)):  # they have no text
        chain.append(lm.generation.suppress(beyond))
    if config.min_new_tokens and eos:
        chain.append(lm.generation.min_new_tokens(config.min_new_tokens, eos))
    return lm.generation.processors.check(chain, vocab_size, max_new_tokens)


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
