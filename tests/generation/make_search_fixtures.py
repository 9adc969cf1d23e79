"""Computes what the tests of search compare with, by the last transformers that has all four searches:

    pip install "transformers==4.55.4" torch numpy && python -m tests.generation.make_search_fixtures

Every case is computed for a batch in float32 and for each prompt alone in float64, and must find the same tokens: no
result here hangs on rounding.
"""

from __future__ import annotations

import json
from typing import Any

from tests.generation.search_cases import (
    CASES,
    ENDS,
    FIXTURES,
    MODELS,
    PROMPTS,
    contrasted_logits,
    reference_model,
    reference_search,
)

# In a group of beams that is done, transformers chooses padding, and takes that off the scores of the groups behind it;
# here such a group chooses nothing. So the padding is a token that these models do not think of.
PAD = 22


def _case(models: tuple[Any, Any], eos: list[int], options: dict[str, Any]) -> dict[str, Any]:
    alone = [[prompt] for prompt in PROMPTS]
    # There, DoLa takes one layer for the whole batch, and the repetition penalty sees padding.
    dependent = "dola_layers" in options or "repetition_penalty" in options
    batches = (alone if dependent else [PROMPTS], alone)
    found = []
    for model, rows in zip(models, batches):
        parts = [reference_search(model, batch, eos, PAD, **options) for batch in rows]
        found.append({key: [row for part in parts for row in part[key]] for key in parts[0]})
    assert found[0]["tokens"] == found[1]["tokens"], f"{options} hangs on rounding"
    return found[0]


def _contrasts() -> dict[str, Any]:
    """The layer that DoLa takes for each row of random logits, and some of the contrasts it makes."""
    import torch
    from transformers.generation.utils import _dola_select_contrast

    final_BV, early_CBV = map(torch.from_numpy, contrasted_logits())
    layers = list(range(len(early_CBV)))
    chosen, kept = [], []
    for b in range(len(final_BV)):
        early, final = {c: early_CBV[c, b : b + 1] for c in layers}, final_BV[b : b + 1]
        found = _dola_select_contrast(layers, early, final)[0]
        chosen.append(next(c for c in layers if torch.equal(_dola_select_contrast([c], early, final)[0], found)))
        kept.append([round(x, 6) if x > -torch.inf else None for x in found.tolist()])
    return {"layers": chosen, "contrast": kept[:20]}


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    assert transformers.__version__ == "4.55.4", "later releases have lost these searches"
    stored: dict[str, Any] = {"transformers": transformers.__version__, "models": {}, "contrasts": _contrasts()}
    lines = []
    for name in MODELS:
        single, double = reference_model(name), reference_model(name).double()
        shapes = {key: list(parameter.shape) for key, parameter in single.named_parameters()}
        stored["models"][name] = {"config": json.loads(single.config.to_json_string()), "shapes": shapes}
        for kind, listed in CASES[name].items():
            for case in listed:
                options = dict(case)
                eos = ENDS[name][: options.pop("ends")]
                found = _case((single, double), eos, options)
                lines.append(json.dumps({"model": name, "kind": kind, "eos": eos, "options": options} | found))
    text = json.dumps(stored)[:-1] + ',\n"cases": [\n' + ",\n".join(lines) + "\n]}\n"
    FIXTURES.write_text(text)
    print(f"{FIXTURES}: {len(lines)} cases, {FIXTURES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
