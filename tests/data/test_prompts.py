"""Files of prompts: what is asked, what is held out, and what rewards read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lmjax.data import PromptConfig, load_prompts, load_supervised, open_template, template
from lmjax.data.supervised_config import SupervisedConfig
from lmjax.errors import UserError
from lmjax.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer(bos="<|im_start|>", eos="<|im_end|>")


def written(folder: Path, records: list[dict]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_prompts_with_what_is_known_of_their_answers(tmp_path):
    records = [{"prompt": f"{n} + 1 = ", "answer": n + 1, "completion": "never read"} for n in range(40)]
    path = written(tmp_path, records)
    found = load_prompts(PromptConfig(path=path, template="none", validation_fraction=0.3), TOKENIZER)
    assert len(found.train) + len(found.held_out) == 40 and len(found.held_out) > 3
    assert all(prompt.record["answer"] == int(prompt.text.split()[0]) + 1 for prompt in found.train)
    # The split and the ids are those that supervised fine-tuning on the same file has.
    config = SupervisedConfig(path=path, template="none", validation_fraction=0.3, sequence_length=64)
    data = load_supervised(config, 4, TOKENIZER, template=open_template("none", TOKENIZER, ""))
    (examples,) = data.held_out_examples.values()
    assert len(examples) == len(found.held_out)
    for prompt in found.held_out:
        assert TOKENIZER.decode(prompt.ids) == f"<|im_start|>{prompt.text}"


def test_templates_and_other_forms(tmp_path):
    records = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "domain": 1},
        {"instruction": "Add.", "input": "1 1", "answer": 2},
    ]
    chatml = template("chatml")
    config = PromptConfig(path=written(tmp_path, records), validation_fraction=0.0)
    first, second = load_prompts(config, TOKENIZER, template=chatml).train
    assert TOKENIZER.decode(first.ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert second.text == "Add.\n\n1 1" and second.record["answer"] == 2
    longest = load_prompts(
        PromptConfig(path=config.path, validation_fraction=0.0, max_length=len(first.ids)), TOKENIZER, template=chatml
    )
    assert longest.left_out == 1 and np.array_equal(longest.train[0].ids, first.ids)


def test_what_cannot_be_asked(tmp_path):
    config = PromptConfig(path=written(tmp_path, [{"prompt": "too long"}]), template="none", max_length=3)
    with pytest.raises(UserError, match="1 were longer than 3 tokens"):
        load_prompts(config, TOKENIZER)
    config = PromptConfig(path=written(tmp_path, [{"prompt": ""}]), template="none", document_markers=False)
    with pytest.raises(UserError, match="empty prompt"):
        load_prompts(config, ByteTokenizer())
    with pytest.raises(UserError, match="neither 'messages'"):
        load_prompts(PromptConfig(path=written(tmp_path, [{"question": "?"}])), TOKENIZER, template=template("plain"))
