"""Checkpoints of adapters: the model under them is not written again and again, it lies where it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmjax.training.checkpoint import Checkpointer, Restored
from lmjax.training.config import CheckpointConfig


class PartCheckpointer(Checkpointer):
    """A `Checkpointer` that writes some collections of the variables only, and everything else of the state.

    What it restores has the other collections of the target: give it a state with the same model in it.

    Args:
      directory, config, options: as for `Checkpointer`.
      collections: names of those that are written.
    """

    def __init__(
        self,
        directory: Path | str,
        config: CheckpointConfig | None = None,
        *,
        collections: Sequence[str],
        **options: Any,
    ) -> None:
        super().__init__(directory, config, **options)
        self._collections = tuple(collections)

    def _part(self, state: Any) -> Any:
        kept = {name: tree for name, tree in state.variables.items() if name in self._collections}
        return dataclasses.replace(state, variables=kept)

    def save(self, step: int, state: Any, data_state: Any = None, **options: Any) -> None:
        super().save(step, self._part(state), data_state, **options)

    def check(self, target: Any) -> None:
        super().check(self._part(target))

    def restore(self, target: Any) -> Restored | None:
        restored = super().restore(self._part(target))
        if restored is None:
            return None
        variables = target.variables | restored.state.variables
        return dataclasses.replace(restored, state=dataclasses.replace(restored.state, variables=variables))
