"""Chat templates: a conversation to text, and to ids with a mask of the assistant's own words.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. `template` gives the built-in
families by name, `lmjax.data.chat_jinja` runs the Jinja of any other model, and `for_tokenizer` chooses.

Training and generation read the same ids: the text is cut where the assistant's words begin, so `encode` of a
conversation that ends with its reply begins with the `prompt` that the reply was generated from. No message can
forge a turn: a special token spelled out in its content is encoded as ordinary text.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Sequence

import numpy as np

from lmjax.data import chat_turns as turns
from lmjax.data.chat_encoding import disguise, encode_pieces
from lmjax.data.chat_turns import Message, Piece
from lmjax.errors import UserError
from lmjax.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How one family of models writes conversations."""

    name: str
    write: Callable[[Sequence[Message], bool], list[Piece]]
    """(messages, add_generation_prompt) to the pieces of the text."""
    markers: tuple[str, ...] = ()
    """Special tokens that it writes and a tokenizer must have."""
    stop: tuple[str, ...] = ()
    """Texts each of which ends the assistant's turn; see `stops`."""
    document: bool = False
    """The conversation is a base model's document: its ids begin with the tokenizer's bos, where it has one."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        r"""The conversation as text, special tokens spelled out.

        Args:
          messages: the conversation, at least one message.
          add_generation_prompt: also open the assistant's next turn.

        Raises:
          UserError: an empty conversation, an unknown role, a message without content, an order of roles that the
            family does not have, or a Jinja template that raises.

        >>> template("chatml").render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
        """
        return "".join(piece.text for piece in self.write(messages, add_generation_prompt))

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The conversation as ids, and which of them are the assistant's.

        Args:
          tokenizer: must have the template's `markers` among its special tokens.
          messages, add_generation_prompt: as in `render`.

        Returns:
          (ids int32 [n], mask bool [n]). The mask covers what the assistant must learn to produce: the content of
          each of its turns and the mark that ends it, not the header.

        Raises:
          UserError: as `render`; a marker that the tokenizer lacks; a Jinja template that does not tell which words
            are the assistant's.

        >>> from lmjax.tokenizers import ByteTokenizer
        >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        >>> tokenizer = ByteTokenizer(bos="<|im_start|>", eos="<|im_end|>")
        >>> ids, mask = template("chatml").encode(tokenizer, talk)
        >>> tokenizer.decode(ids[mask])
        'yo<|im_end|>'
        """
        ids, learned = self._encode(tokenizer, messages, add_generation_prompt)
        if None in learned:
            raise UserError(
                f"the chat template {self.name} writes a turn otherwise once others follow it, so it does not tell "
                "which words are the assistant's: put {% generation %} blocks around them, or use a built-in template"
            )
        return ids, np.array(learned, bool)

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
        """int32 [n], what the assistant's next turn is generated from: the ids of `encode` with the turn opened.

        Raises:
          UserError: as `render`, or a marker that the tokenizer lacks.
        """
        return self._encode(tokenizer, messages, True)[0]

    def stops(self, tokenizer: Tokenizer) -> tuple[int | str, ...]:
        """What ends the assistant's turn with this tokenizer: special tokens as ids, its eos, and other texts."""
        found = [tokenizer.specials.get(text, text) for text in self.stop]
        found += [] if tokenizer.eos is None else [tokenizer.eos]
        return tuple(dict.fromkeys(found))

    def _encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[np.ndarray, list[bool | None]]:
        specials = tokenizer.specials
        missing = [marker for marker in self.markers if marker not in specials]
        if missing:
            raise UserError(
                f"the chat template {self.name} writes {missing[0]}, which is no special token of this tokenizer: "
                "add it there, or use the template 'plain'"
            )
        written = self.write(messages, add_generation_prompt)
        disguised, undo = disguise(messages, specials)
        if undo:
            text = "".join(piece.text for piece in written)
            written = self.write(disguised, add_generation_prompt)
            if "".join(piece.text for piece in written).translate(undo) != text:
                raise UserError(
                    f"the chat template {self.name} acts on special tokens inside the messages, which are ordinary "
                    "text here: take them out of the content"
                )
        return encode_pieces(tokenizer, written, undo, tokenizer.bos if self.document else None)


_CHATML = turns.Family("<|im_start|>{role}\n", "<|im_end|>", "\n")
_QWEN3 = dataclasses.replace(_CHATML, steps=(turns.qwen3_thoughts, turns.qwen_tools))
_GEMMA = turns.Family(
    "<start_of_turn>{role}\n",
    "<end_of_turn>",
    "\n",
    bos="<bos>",
    names=(("assistant", "model"),),
    steps=(turns.refuse_system, turns.alternate, turns.trim),
)
_IM = ("<|im_start|>", "<|im_end|>")
_TURN = ("<bos>", "<start_of_turn>", "<end_of_turn>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

TEMPLATES: dict[str, ChatTemplate] = {
    known.name: known
    for known in (
        ChatTemplate("chatml", _CHATML, _IM, ("<|im_end|>",)),
        ChatTemplate(
            "llama3",
            turns.Family(
                "<|start_header_id|>{role}<|end_header_id|>\n\n",
                "<|eot_id|>",
                bos="<|begin_of_text|>",
                steps=(turns.trim,),
            ),
            _LLAMA,
            ("<|eot_id|>", "<|end_of_text|>"),
        ),
        ChatTemplate(
            "qwen",
            dataclasses.replace(_CHATML, steps=(turns.qwen_system, turns.qwen_tools)),
            _IM,
            ("<|im_end|>", "<|endoftext|>"),
        ),
        ChatTemplate("qwen3", _QWEN3, _IM, ("<|im_end|>", "<|endoftext|>")),
        ChatTemplate(
            "qwen3-nothink",
            dataclasses.replace(_QWEN3, opening=turns.NO_THOUGHTS),
            _IM,
            ("<|im_end|>", "<|endoftext|>"),
        ),
        ChatTemplate("gemma", _GEMMA, _TURN, ("<end_of_turn>", "<eos>")),
        ChatTemplate(
            "gemma3",
            dataclasses.replace(_GEMMA, steps=(turns.alternate, turns.trim_talk, turns.fold_system)),
            _TURN,
            ("<end_of_turn>", "<eos>"),
        ),
        ChatTemplate("plain", turns.write_plain, (), turns.PLAIN_STOP, document=True),
    )
}
"""The built-in families.

chatml         <|im_start|>role ... <|im_end|>, nothing added (OpenAI's ChatML).
llama3         Llama 3 and 3 Instruct; Llama 3.1 and later add a date: use their own Jinja.
qwen           Qwen2 and 2.5: ChatML with Qwen's system message where there is none, tools in the user's name.
qwen3          Qwen3, thinking: thoughts (<think>...</think> in the content) stay behind the user's last message
               only, and only turns behind it are in the mask: cut a conversation into one example a turn to learn all.
qwen3-nothink  The same; the generation prompt already holds empty thoughts (enable_thinking=False).
gemma          Gemma 1 and 2: roles user and model that alternate; a system message is refused.
gemma3         Gemma 3: the same, a system message stands at the head of the user's first.
plain          `User: ...` and `Assistant: ...` lines for base models and tokenizers without special tokens. Its marks
               are text, so a message can forge a turn here; strip the space that a reply begins with.
"""

# A special token by which a tokenizer tells its family, the more particular first.
_TELLTALES = {
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama3",
    "<start_of_image>": "gemma3",
    "<start_of_turn>": "gemma",
}


def template(name: str) -> ChatTemplate:
    """The built-in template of a family; see `TEMPLATES`.

    Raises:
      UserError: the name is unknown; the nearest one is suggested.

    >>> template("gemma").stop
    ('<end_of_turn>', '<eos>')
    """
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TEMPLATES)}"
        raise UserError(f"no chat template is named {name!r}: {hint}")
    return TEMPLATES[name]


def for_tokenizer(tokenizer: Tokenizer, directory: str | os.PathLike | None = None) -> ChatTemplate:
    """The template that goes with a tokenizer.

    Args:
      tokenizer: its special tokens tell the family: ChatML, Llama 3, Gemma; without one of theirs, plain.
      directory: where the tokenizer's files are, or one of them; a Jinja template there is preferred.

    Raises:
      UserError: the directory's template cannot be read, or jinja2 is missing.

    >>> from lmjax.tokenizers import ByteTokenizer
    >>> for_tokenizer(ByteTokenizer()).name
    'plain'
    """
    from lmjax.data import chat_jinja

    if directory is not None and chat_jinja.has_template(directory):
        return chat_jinja.from_tokenizer_config(directory)
    return template(next((name for token, name in _TELLTALES.items() if token in tokenizer.specials), "plain"))
