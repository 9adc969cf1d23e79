"""What all adapters have in common: folded into the weights, taken out again, left out, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmjax.adapters import deltas, low_rank, rescaling
from lmjax.adapters.targets import Variables, leaves, unstacked
from lmjax.errors import UserError
from lmjax.models.adapted import chosen_rows
from lmjax.modules.adapted import CONSTANT

# In the order in which the layers apply them: a vector scales what LoRA has added to, too.
_FOLDS: dict[str, Callable[..., Variables]] = {
    "delta": deltas.fold,
    "lora": low_rank.fold,
    "dora": low_rank.fold,
    "ia3": rescaling.fold,
}
# What is no change of weights.
BESIDE = ("bottleneck", "prefix", "prefix_network", "prompt")
COLLECTIONS = (*_FOLDS, *BESIDE)


def adapters_of(variables: Variables) -> Variables:
    """The adapters alone, without the model: what there is to save.

    >>> adapters_of({"params": {}, "lora": {}})
    {'lora': {}}
    """
    return {name: tree for name, tree in variables.items() if name in COLLECTIONS}


def without(variables: Variables, kinds: Sequence[str] = COLLECTIONS) -> Variables:
    """The same arrays with the adapters left out: the model as it was, and no second copy of it."""
    return {name: tree for name, tree in variables.items() if name not in kinds}


def count(variables: Variables) -> int:
    """How many trained numbers the adapters hold."""
    return sum(leaf.size for path, leaf in leaves(adapters_of(variables)) if CONSTANT not in path)


def merge(variables: Variables) -> Variables:
    """The model with its adapters folded into the weights; a quantized weight becomes a full one where it changes.

    Raises:
      UserError: an adapter is no change of weights (prefixes, prompts, bottlenecks), or the variables have none.
    """
    kinds = _foldable(variables)
    return _fold((kinds, 1), variables)


def unmerge(merged: Variables, adapters: Variables) -> Variables:
    """The model as it was before `merge`, to rounding, with the adapters beside it.

    Args:
      merged: what `merge` returned.
      adapters: the adapters it was given, alone or with their model.

    Raises:
      UserError: as `merge`.
    """
    own = adapters_of(adapters)
    kinds = _foldable(own)
    return _fold((tuple(reversed(kinds)), -1), merged | own) | own


def _foldable(variables: Variables) -> tuple[str, ...]:
    if beside := [kind for kind in BESIDE if kind in variables]:
        raise UserError(
            f"a {beside[0]!r} adapter is no change of weights and cannot be folded into them; "
            "keep it beside them, or leave it out with lmjax.adapters.without."
        )
    if chosen_rows(variables) is not None:
        raise UserError("these adapters were chosen row by row, and no one weight serves all rows; merge each alone.")
    kinds = tuple(kind for kind in _FOLDS if kind in variables)
    if not kinds:
        raise UserError("these variables have no adapter to fold in.")
    return kinds


@unstacked
def _fold(how: tuple[tuple[str, ...], int], variables: Variables) -> Variables:
    kinds, sign = how
    for kind in kinds:
        variables = without(_FOLDS[kind](variables, kind, sign), (kind,))
    return variables
