"""Everything exported is registered: a new piece without its line in the registry fails here."""

from __future__ import annotations

import inspect

import jax
import pytest

from lmjax.models import presets
from lmjax.objectives import matching, reducers, terms
from lmjax.objectives.reducers import Reducer
from tests.laws.registry import MODELS, NOT_FAMILIES, REDUCERS, TERMS, tiny_policy


def _public_functions(module) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if callable(value)
        and not inspect.isclass(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    }


def test_every_preset_family_is_registered():
    assert _public_functions(presets) - NOT_FAMILIES == set(MODELS) - {"scanned"}


def test_every_term_is_registered():
    assert _public_functions(terms) | _public_functions(matching) == {case.term for case in TERMS.values()}


def test_every_reducer_is_registered():
    instances = {name for name, value in vars(reducers).items() if isinstance(value, Reducer)}
    assert instances | _public_functions(reducers) == set(REDUCERS)


@pytest.mark.parametrize("module", ["models", "objectives"])
def test_what_is_registered_is_exported(module):
    import lmjax

    exported = set(getattr(lmjax, module).__all__)
    registered = {"models": set(MODELS) - {"scanned"}}.get(
        module, {case.term for case in TERMS.values()} | set(REDUCERS)
    )
    assert registered <= exported


def test_the_options_that_name_a_kind_are_all_registered():
    from typing import get_args, get_type_hints

    from lmjax.losses.divergences import KLEstimator

    built = {name.removeprefix("kl_") for name, case in TERMS.items() if case.term == "kl"}
    assert built == set(get_args(KLEstimator))
    kinds = get_args(get_type_hints(terms.divergence)["kind"])
    assert set(kinds) == {name for name, case in TERMS.items() if case.term == "divergence"}


def test_tiny_policy_has_the_traits_the_laws_need():
    head = tiny_policy().model.head(tiny_policy().init(jax.random.key(0)))
    assert head.softcap == 20.0 and head.scale == 0.5
