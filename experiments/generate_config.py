"""What `experiments.generate` and `experiments.chat` are told. Plain data, and jax is not imported."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """A model, and how its tokens are chosen.

    Attributes:
      model: a run directory, or a Hugging Face model directory.
      step: of a run directory: last, best, or the number of a step.
      average: of a run directory: the moving average of the parameters or the parameters; None for the average
        where there is one.
      tokenizer: a tokenizer file or directory to use instead of the one beside the model.
      adapter: a directory with an adapter of the model: one of ours, or PEFT's.
      template: how conversations are written: chatml, llama3, qwen, qwen3, qwen3-nothink, gemma, gemma3 or plain; auto
        for the model's own Jinja template, or else the one that its tokenizer's special tokens tell.
      max_new_tokens: tokens of a continuation or a reply, unless it ends itself.
      min_new_tokens: tokens before which it does not end itself.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among so many of the likeliest tokens; 0 for all.
      top_p: sample among the likeliest tokens that hold this share of the probability; 1 for all.
      min_p: leave out tokens less probable than this share of the likeliest one's probability.
      typical: sample among the tokens of the most typical surprisal that hold this share; 1 for all.
      repetition_penalty: above 1, makes tokens of the prompt and the output less likely; 1 changes nothing.
      presence_penalty: taken off the logit of a token that is in the output.
      frequency_penalty: taken off that logit for each time it is.
      no_repeat_ngram: no so many tokens in a row occur twice; 0 for no such rule.
      stop: texts that end the output and are cut from it; a line break is $'\\n' in the shell.
      seed: of the sampling.
      cache: how keys and values are kept: dense, or in 8, 4 or 2 bits.
    """

    model: str = ""
    step: str = "last"
    average: bool | None = None
    tokenizer: str = ""
    adapter: str = ""
    template: str = "auto"
    max_new_tokens: int = 200
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    cache: Literal["dense", "int8", "kivi4", "kivi2"] = "dense"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; ask for at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_new_tokens is {self.min_new_tokens}; give a number from 0 to max_new_tokens, which is "
                f"{self.max_new_tokens}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; give 0 for the likeliest token, or a positive number")
        if "" in self.stop:
            raise UserError("a stop text is empty, which would stop before any text; leave it out")


@dataclasses.dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """A model, prompts, and how to go on from them.

    Attributes:
      prompts: texts to continue, which are printed; an empty one begins a document.
      input: a file of prompts instead: text with a prompt a line, JSON lines, or Parquet.
      prompt_field: of JSON lines and Parquet: the field that holds the prompt. A record with `messages` instead is a
        conversation, to be answered; with --template none that is a field like any other.
      truncate_left: cut prompts that are too long at their beginning; they are refused otherwise.
      samples: continuations of each prompt.
      slots: rows that are decoded together. More are faster and take more memory.
      logprobs: also write the ids and log-probabilities of all tokens.
      json_schema: a file with a JSON schema that each output has to satisfy.
      regex: a regular expression that each output has to match as a whole.
      lark: a file with a grammar in llguidance's Lark that each output has to follow.
    """

    prompts: tuple[str, ...] = ()
    input: str = ""
    prompt_field: str = "prompt"
    truncate_left: bool = False
    samples: int = 1
    slots: int = 16
    logprobs: bool = False
    json_schema: str = ""
    regex: str = ""
    lark: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "slots"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; ask for at least 1")
        if self.input and self.prompts:
            raise UserError("there are prompts and an input file; give one of them")
        rules = [name for name in ("json_schema", "regex", "lark") if getattr(self, name)]
        if len(rules) > 1:
            raise UserError(f"{rules[0]} and {rules[1]} are both given; leave out one, an output follows one rule")
        if rules and self.stop:
            raise UserError(f"stop would cut what {rules[0]} makes whole; leave out one of them")
